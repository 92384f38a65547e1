package audit

import (
	"fmt"
	"sync"
	"time"
)

// queueLength is how many records wait for a log that can't be written: early
// in boot its file system isn't mounted yet.
const queueLength = 256

// A Queue appends records from a goroutine of its own, so that who has a record
// never waits for a disk. What finds no room in the queue is dropped, and a
// record tells later how many were.
type Queue struct {
	file  string
	ready func() bool
	told  func(Record, Head, error)

	mu      sync.Mutex
	waiting []Record
	dropped int
	closed  bool
	wake    chan struct{} // capacity 1
	done    chan struct{}
}

// retryAfter is how long a Queue waits after a failure. Tests change it.
var retryAfter = 5 * time.Second

// NewQueue returns a queue for a log. Nothing is written as long as ready, if it
// isn't nil, returns false. told, if it isn't nil, hears of each record when it was
// written, and of the first failure of a row.
func NewQueue(file string, ready func() bool, told func(Record, Head, error)) *Queue {
	q := &Queue{file: file, ready: ready, told: told, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go q.run()
	return q
}

// Append puts a record into the queue. It may be called from any goroutine.
func (q *Queue) Append(r Record) {
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	if len(q.waiting) >= queueLength {
		q.dropped++
		return
	}
	q.waiting = append(q.waiting, r)
	q.kick()
}

func (q *Queue) kick() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Close writes what waits, once, and returns when that is done.
func (q *Queue) Close() {
	q.end()
	<-q.done
}

// CloseWithin is Close, which it may be called before, for who can't wait longer than
// that. It tells whether it is done; else the queue goes on with it.
func (q *Queue) CloseWithin(limit time.Duration) bool {
	q.end()
	select {
	case <-q.done:
		return true
	case <-time.After(limit):
		return false
	}
}

func (q *Queue) end() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.kick()
}

// next returns the record to write next, and whether the queue is closed.
func (q *Queue) next() (r Record, ok, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.dropped > 0 && len(q.waiting) == 0 {
		r = Record{Event: Dropped, Outcome: Failed, Time: time.Now(), Detail: fmt.Sprintf("%d records were lost, as this log couldn't be written", q.dropped)}
		return r, true, q.closed
	}
	if len(q.waiting) == 0 {
		return r, false, q.closed
	}
	return q.waiting[0], true, q.closed
}

// written takes a record that was written out of the queue.
func (q *Queue) written(r Record) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if r.Event == Dropped {
		q.dropped = 0
		return
	}
	q.waiting = q.waiting[1:]
}

func (q *Queue) run() {
	defer close(q.done)
	failing := false
	for {
		r, ok, closed := q.next()
		if !ok {
			if closed {
				return
			}
			<-q.wake
			continue
		}
		if q.ready != nil && !closed && !q.ready() {
			time.Sleep(min(retryAfter, time.Second))
			continue
		}
		head, err := Append(q.file, r)
		if q.told != nil && (err == nil || !failing) {
			q.told(r, head, err)
		}
		if failing = err != nil; !failing {
			q.written(r)
			continue
		}
		if closed {
			return
		}
		select {
		case <-time.After(retryAfter):
		case <-q.wake:
			time.Sleep(min(retryAfter, 100*time.Millisecond))
		}
	}
}
