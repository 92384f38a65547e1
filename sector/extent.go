package sector

// An extent is a byte range of a volume, cut for the cipher: from and to are
// the bounds of the sectors that hold it.
type extent struct {
	off, end int64 // the range itself
	from, to int64 // rounded out to whole sectors
}

// extentOf returns the extent of length bytes at off. The caller has checked
// that the range lies in the volume, so nothing here overflows.
func extentOf(off, length, sectorSize int64) extent {
	end := off + length
	return extent{
		off: off, end: end,
		from: off / sectorSize * sectorSize,
		to:   (end + sectorSize - 1) / sectorSize * sectorSize,
	}
}

// whole tells whether the range consists of whole sectors.
func (e extent) whole() bool { return e.off == e.from && e.end == e.to }

// head cuts the first part of e off that takes at most max bytes of whole
// sectors; max is a multiple of the sector size. What is left may be empty.
func (e extent) head(max int64) (first, rest extent) {
	if e.to-e.from <= max {
		return e, extent{off: e.end, end: e.end, from: e.to, to: e.to}
	}
	cut := e.from + max
	return extent{off: e.off, end: cut, from: e.from, to: cut},
		extent{off: cut, end: e.end, from: cut, to: e.to}
}

func (e extent) len() int64 { return e.end - e.off }

// within returns the whole sectors inside of the range: what may be discarded.
func (e extent) within(sectorSize int64) (from, to int64) {
	from, to = e.from, e.to
	if e.off != e.from {
		from += sectorSize
	}
	if e.end != e.to {
		to -= sectorSize
	}
	return from, max(from, to)
}
