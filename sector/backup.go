package sector

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"hostcryptd/sector/luks2"
)

// A backup of a header is a page of text that says what it is, and the header
// area as it stands on the device: both copies and the keyslots, the same bytes
// that cryptsetup luksHeaderBackup writes. FORMAT.md specifies it.

// BackupInfo is what a backup says of itself.
type BackupInfo struct {
	Version    int       `json:"hostcryptd_header_backup"`
	UUID       string    `json:"uuid"`
	Generation string    `json:"generation"`
	SequenceID string    `json:"sequence_id"`
	Size       string    `json:"size"`        // of the header area that follows, bytes
	DeviceSize string    `json:"device_size"` // bytes
	Created    time.Time `json:"created"`
	SHA256     string    `json:"sha256"` // of all of the backup, with zeros here
}

const (
	backupVersion = 1
	backupPage    = 4096
	maxHeaderArea = 8<<20 + 128<<20 // both copies and the keyslots, at the most of LUKS2
)

// encode returns the page.
func (i BackupInfo) encode() ([]byte, error) {
	b, err := json.Marshal(i)
	if err != nil || len(b) >= backupPage {
		return nil, errors.Join(err, errors.New("sector: internal error: the backup's page"))
	}
	page := bytes.Repeat([]byte(" "), backupPage)
	copy(page, b)
	page[backupPage-1] = '\n'
	return page, nil
}

// sum returns the checksum of a backup whose area is body.
func (i BackupInfo) sum(body []byte) (string, error) {
	i.SHA256 = strings.Repeat("0", 2*sha256.Size)
	page, err := i.encode()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	h.Write(page)
	h.Write(body)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Backup writes a backup of the header to w. Both copies must be good.
func Backup(ctx context.Context, b Backing, w io.Writer) (BackupInfo, error) {
	release, err := b.LockHeader(ctx, false)
	if err != nil {
		return BackupInfo{}, err
	}
	defer release()
	h, copies, err := readHeader(b)
	if err != nil {
		return BackupInfo{}, err
	}
	if copies.Damaged() {
		return BackupInfo{}, fmt.Errorf("%w: %s; 'hostcryptd header repair' first", ErrDamaged, copies.Describe())
	}
	v, err := supported(h)
	if err != nil {
		return BackupInfo{}, err
	}
	body := alignedBytes(int(headerArea(h)))
	if _, err := b.ReadAt(body, 0); err != nil {
		return BackupInfo{}, fmt.Errorf("sector: reading the header area: %w", err)
	}
	info := BackupInfo{
		Version: backupVersion, UUID: h.UUID,
		Generation: strconv.FormatUint(v.generation(), 10), SequenceID: strconv.FormatUint(h.SeqID, 10),
		Size: strconv.Itoa(len(body)), DeviceSize: strconv.FormatInt(b.Size(), 10), Created: time.Now().UTC().Truncate(time.Second),
	}
	if info.SHA256, err = info.sum(body); err != nil {
		return info, err
	}
	page, err := info.encode()
	if err != nil {
		return info, err
	}
	for _, p := range [][]byte{page, body} {
		if _, err := w.Write(p); err != nil {
			return info, fmt.Errorf("sector: writing the backup: %w", err)
		}
	}
	return info, nil
}

// headerArea is the size of everything before the data: cryptsetup's backups
// have the same.
func headerArea(h *luks2.Header) int64 { return int64(2*h.Size + h.Config.KeyslotsSize) }

// AreaSize is the size in bytes of what header commands write in: both copies of the
// header and the keyslots.
func AreaSize(h *luks2.Header) int64 { return headerArea(h) }

// A BackupError is what is wrong with a backup, and not with a device. It is an
// [ErrDamaged].
type BackupError struct{ err error }

func (e *BackupError) Error() string   { return "the backup can't be used: " + e.err.Error() }
func (e *BackupError) Unwrap() []error { return []error{ErrDamaged, e.err} }

// ReadBackup reads a backup and checks it as far as it can be without a key.
// An error about its content is a [BackupError], or [ErrUnsupported].
func ReadBackup(r io.Reader) (BackupInfo, *luks2.Header, []byte, error) {
	var info BackupInfo
	damaged := func(format string, args ...any) (BackupInfo, *luks2.Header, []byte, error) {
		return info, nil, nil, &BackupError{fmt.Errorf(format, args...)}
	}
	page := make([]byte, backupPage)
	if _, err := io.ReadFull(r, page); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("it is too short")
	} else if err != nil {
		return info, nil, nil, err
	}
	if err := json.Unmarshal(page, &info); err != nil || info.Version == 0 {
		return damaged("it's not one that hostcryptd wrote; those of cryptsetup are restored by cryptsetup luksHeaderRestore")
	}
	if info.Version != backupVersion {
		return info, nil, nil, fmt.Errorf("%w: the backup is of version %d; this program knows %d", ErrUnsupported, info.Version, backupVersion)
	}
	size, err := strconv.ParseInt(info.Size, 10, 64)
	if err != nil || size < 2*16<<10 || size > maxHeaderArea || size%backupPage != 0 {
		return damaged("impossible size %q", info.Size)
	}
	body := alignedBytes(int(size))
	if _, err := io.ReadFull(r, body); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("it is too short")
	} else if err != nil {
		return info, nil, nil, err
	}
	if n, err := io.ReadFull(r, make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return damaged("it is too long")
	}
	sum, err := info.sum(body)
	if err != nil || sum != info.SHA256 {
		return damaged("its checksum is wrong")
	}
	h, copies, err := luks2.Read(bytes.NewReader(body))
	if err != nil {
		return damaged("%w", err)
	}
	if copies.Damaged() {
		return damaged("%s", copies.Describe())
	}
	v, err := supported(h)
	if err != nil {
		return info, nil, nil, fmt.Errorf("the backup: %w", err)
	}
	if h.UUID != info.UUID || strconv.FormatUint(v.generation(), 10) != info.Generation || strconv.FormatUint(h.SeqID, 10) != info.SequenceID || headerArea(h) != size {
		return damaged("what it says of itself is not what is in it")
	}
	return info, h, body, nil
}

// RestoreOptions say what a restore may do.
type RestoreOptions struct {
	// UUID confirms the volume where the device's own header can't.
	UUID string
	// OlderGeneration permits a backup that is older than the header on the
	// device, or than the one that this host has seen last: recovery keys and
	// tokens that were removed since come back.
	OlderGeneration bool
	Pins            Pins // as of [OpenOptions]; nil for none
}

// Restore writes a backup to the device it was made of, and reads it back. The
// device must not be in use. It refuses the backup of another volume, one that is
// damaged ([BackupError]) and, with [ErrAuth], one of an older generation; where
// the header on the device is gone, only the right UUID permits it.
//
// The second copy is written first, so that an interrupted Restore leaves the
// header that was there, or the new one; its keyslots may be neither, until it
// is repeated.
func Restore(ctx context.Context, b Backing, r io.Reader, o RestoreOptions) (BackupInfo, error) {
	info, h, body, err := ReadBackup(r)
	if err != nil {
		return info, err
	}
	v, err := supported(h)
	if err != nil {
		return info, err
	}
	if room := b.Size() - int64(h.Segments[0].Offset); room < v.size() {
		return info, fmt.Errorf("%w: the volume of the backup has %d bytes of data, the device has room for %d", ErrDevice, v.size(), max(0, room))
	}
	release, err := b.LockHeader(ctx, true)
	if err != nil {
		return info, err
	}
	defer release()
	if err := o.permits(b, h, v); err != nil {
		return info, err
	}
	pin, err := o.pinAfter(h.UUID, v.generation())
	if err != nil {
		return info, err
	}

	size := int64(h.Size)
	for _, part := range []struct{ from, to int64 }{{size, 2 * size}, {2 * size, int64(len(body))}, {0, size}} {
		// A copy without its magic is none, until all else of it is there.
		isCopy := part.from != 2*size
		if isCopy {
			if _, err := b.WriteAt(alignedBytes(backupPage), part.from); err != nil {
				return info, restoring(part.from, err)
			}
		}
		head := part.from
		if isCopy {
			head += backupPage
		}
		if _, err := b.WriteAt(body[head:part.to], head); err != nil {
			return info, restoring(head, err)
		}
		if isCopy {
			if _, err := b.WriteAt(body[part.from:head], part.from); err != nil {
				return info, restoring(part.from, err)
			}
		}
		if err := b.Sync(); err != nil {
			return info, restoring(part.from, err)
		}
	}
	again := alignedBytes(len(body))
	if _, err := b.ReadAt(again, 0); err != nil {
		return info, restoring(0, err)
	}
	if !bytes.Equal(again, body) {
		return info, fmt.Errorf("%w: the header area reads back as something else than was written", ErrDamaged)
	}
	if pin != nil {
		if err := o.Pins.Set(h.UUID, *pin); err != nil {
			return info, fmt.Errorf("sector: the header was restored, but this host still expects a later one: %w", err)
		}
	}
	return info, nil
}

func restoring(off int64, err error) error {
	return fmt.Errorf("sector: restoring the header at %d; repeat it: %w", off, err)
}

// permits compares a backup with what is on the device.
func (o *RestoreOptions) permits(b Backing, h *luks2.Header, v *volumeToken) error {
	current, _, err := readHeader(b)
	if err != nil {
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNotVolume) {
			return err
		}
		if strings.ToLower(o.UUID) != h.UUID {
			return fmt.Errorf("%w: the device has no header that would tell which volume it is; if it is volume %s of the backup, confirm with --uuid UUID", ErrNotVolume, h.UUID)
		}
		return nil
	}
	if current.UUID != h.UUID {
		return fmt.Errorf("%w: the backup is of volume %s, and the device holds volume %s", ErrDevice, h.UUID, current.UUID)
	}
	if current.Segments[0] == nil || current.Segments[0].Offset != h.Segments[0].Offset || headerArea(current) != headerArea(h) {
		return fmt.Errorf("%w: the header on the device has another layout than the backup", ErrDevice)
	}
	_, now, err := findVolumeToken(current)
	if err == nil && now.generation() > v.generation() && !o.OlderGeneration {
		return fmt.Errorf("%w: the backup is of generation %d, the header on the device of generation %d: keys that were removed since would come back; --older-generation permits it", ErrAuth, v.generation(), now.generation())
	}
	return nil
}

// pinAfter returns the pin to set after a restore, if it has to change.
func (o *RestoreOptions) pinAfter(volume string, generation uint64) (*Pin, error) {
	if o.Pins == nil {
		return nil, nil
	}
	p, err := o.Pins.Load(volume)
	if err != nil || p == nil || p.Generation <= generation {
		return nil, err
	}
	if !o.OlderGeneration {
		return nil, fmt.Errorf("%w: the backup is of generation %d, and this host has seen generation %d of the volume: keys that were removed since would come back; --older-generation permits it", ErrAuth, generation, p.Generation)
	}
	// Whose header it is stays pinned.
	return &Pin{p.Fingerprint, generation}, nil
}

// Erased is what [Erase] did.
type Erased struct {
	UUID      string // of the header that was there, or ""
	Bytes     int64  // overwritten and read back
	Discarded bool   // the device was told too
}

// ErrNoHeader means that there is no header left that says which volume it is.
var ErrNoHeader = fmt.Errorf("%w: there is no readable header", ErrNotVolume)

// Erase destroys every way into the volume: both copies of the header with all
// tokens, and the keyslots. Each is overwritten with random bytes, flushed and
// read back, then with zeros, flushed and read back, and discarded where the
// device can do that. The header's copies come first. No less is overwritten than
// all places where a copy can stand, whatever the header that is found says. The
// device must not be in use, and must hold the volume named by its UUID. If it has
// no readable header the error is [ErrNoHeader], unless force says to erase the area
// of a new volume's header all the same, such as after an interrupted Erase. That
// nothing else stands there is then the caller's to know. Force also erases a LUKS2
// header with the UUID that has nothing of a volume's: it may have been forged.
func Erase(ctx context.Context, b Backing, uuid string, force bool) (Erased, error) {
	return erase(ctx, b, uuid, force, false)
}

// EraseServed is Erase with force, for a server that has authenticated the volume and has
// had the device exclusively since. A header that doesn't say which volume it is, says
// another, or can't be read doesn't keep it from anything: who can write to the device may
// have put that before a copy of the true one.
func EraseServed(ctx context.Context, b Backing, uuid string) (Erased, error) {
	return erase(ctx, b, uuid, true, true)
}

func erase(ctx context.Context, b Backing, uuid string, force, served bool) (Erased, error) {
	release, err := b.LockHeader(ctx, true)
	if err != nil {
		return Erased{}, err
	}
	defer release()
	done := Erased{}
	// Nobody has authenticated the header that is read here, and a forged one may stand
	// before a true copy: so it can only add to what is overwritten. A second copy is at
	// the latest at 4 MiB, and 4 MiB long; keyslots that are farther than that of a new
	// volume are noise without the salts in the header.
	end, copies := int64(dataOffset), int64(2*copySize)
	h, _, err := readHeader(b)
	switch {
	case err == nil:
		if _, _, err := findVolumeToken(h); err != nil && !force {
			return done, fmt.Errorf("%w; if it was one of hostcryptd's volumes, which the other copy may still open, --force erases it", err)
		}
		if h.UUID == strings.ToLower(uuid) {
			done.UUID = h.UUID
		} else if !served {
			return done, fmt.Errorf("%w: the device holds volume %s, not %s", ErrDevice, h.UUID, uuid)
		}
		end, copies = max(end, headerArea(h)), max(copies, int64(2*h.Size))
	case served:
	case !force || !errors.Is(err, ErrNotVolume) && !errors.Is(err, ErrDamaged):
		if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotVolume) {
			err = fmt.Errorf("%w: %w", ErrNoHeader, err)
		}
		return done, err
	case !uuidForm.MatchString(strings.ToLower(uuid)):
		return done, fmt.Errorf("%w: %q is not a UUID", ErrDevice, uuid)
	}
	end = min(end, b.Size())
	end -= end % backupPage
	copies = min(copies, end)
	for _, part := range []struct{ from, to int64 }{{0, copies}, {copies, end}} {
		if err := overwrite(b, part.from, part.to); err != nil {
			return done, fmt.Errorf("sector: erasing; the volume may still open, repeat it: %w", err)
		}
	}
	done.Bytes = end
	switch err := b.Discard(0, end); {
	case err == nil:
		done.Discarded = true
	case !errors.Is(err, errors.ErrUnsupported):
		return done, fmt.Errorf("sector: the header was overwritten, but discarding it failed: %w", err)
	}
	return done, b.Sync()
}

// overwrite fills a range with random bytes and then with zeros.
func overwrite(b Backing, from, to int64) error {
	const step = 1 << 20
	want, got := alignedBytes(step), alignedBytes(step)
	var seed [32]byte
	for _, random := range []bool{true, false} {
		rand.Read(seed[:])
		// The same stream twice: to write it, and to compare.
		for _, compare := range []bool{false, true} {
			noise := newNoise(seed)
			for off := from; off < to; off += step {
				p := want[:min(step, to-off)]
				if random {
					noise.Read(p)
				} else {
					clear(p)
				}
				if !compare {
					if _, err := b.WriteAt(p, off); err != nil {
						return err
					}
					continue
				}
				q := got[:len(p)]
				if _, err := b.ReadAt(q, off); err != nil {
					return err
				}
				if !bytes.Equal(p, q) {
					return fmt.Errorf("%w: at %d the device does not hold what was just written", ErrDamaged, off)
				}
			}
			if !compare {
				if err := b.Sync(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
