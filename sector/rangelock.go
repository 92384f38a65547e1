package sector

import "sync"

// A rangeLock keeps writes that overlap from being under way at the same time. A
// write of a part of a sector reads the sector before it writes it, and would put
// back what another write has just replaced. And a write of whole sectors may
// be there twice: a client that has lost its connection sends it again on a new one,
// and with several connections the kernel does so with one that has taken 30 s
// (drivers/block/nbd.c, nbd_xmit_timeout). The first must have ended before the second
// is answered, or it would end on top of what was written after that. So a request
// takes its place before it waits for anything else, for the keys of a suspended volume
// too. What a server has not given to the volume yet is not covered: package
// nbd doesn't begin it any more when the client is gone, and a volume that is written to
// has one socket with the kernel.
//
// Ranges are granted in the order in which they were asked for, so nobody
// starves. The list is searched linearly: it is as long as there are writes
// in flight, a few hundred at most.
type rangeLock struct {
	mu     sync.Mutex
	freed  sync.Cond
	ticket uint64
	held   []span // in the order of their tickets, granted or waiting
}

type span struct {
	ticket   uint64
	from, to int64
}

func (a span) conflicts(b span) bool {
	return a.from < b.to && b.from < a.to
}

// lock waits for [from, to) and returns the ticket for unlock.
func (l *rangeLock) lock(from, to int64) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.freed.L == nil {
		l.freed.L = &l.mu
	}
	l.ticket++
	mine := span{l.ticket, from, to}
	l.held = append(l.held, mine)
	for l.blocked(mine) {
		l.freed.Wait()
	}
	return mine.ticket
}

// try is lock, if the range can be had at once.
func (l *rangeLock) try(from, to int64) (ticket uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	mine := span{l.ticket + 1, from, to}
	for _, h := range l.held {
		if h.conflicts(mine) {
			return 0, false
		}
	}
	l.ticket++
	l.held = append(l.held, mine)
	return mine.ticket, true
}

// blocked tells whether an earlier span conflicts with s.
func (l *rangeLock) blocked(s span) bool {
	for _, h := range l.held {
		if h.ticket == s.ticket {
			return false
		}
		if h.conflicts(s) {
			return true
		}
	}
	panic("sector: internal error: a range that is not held")
}

func (l *rangeLock) unlock(ticket uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, h := range l.held {
		if h.ticket == ticket {
			l.held = append(l.held[:i], l.held[i+1:]...)
			l.freed.Broadcast()
			return
		}
	}
	panic("sector: internal error: a range that is not held")
}
