// Package ceiling has the loops that the benchmark of package xts compares with:
// the rounds of AES-256 on registers, and nothing else. No mode of operation can be
// faster on the same instructions. No product code imports it.
//
// [Run] may be called concurrently.
package ceiling

import "strings"

// A loop does 14 rounds on each of its registers, n times.
type loop struct {
	run   func(n int)
	bytes int // in its registers
}

// Run does the rounds of AES-256 for at least one and about n bytes with the
// instructions of an implementation of package xts that this machine supports, of
// which it takes the name. It returns the number of bytes; 0 means that there is
// no loop for that implementation.
func Run(implementation string, n int) int {
	name, _, _ := strings.Cut(implementation, " ")
	l, ok := loops[name]
	if !ok {
		return 0
	}
	times := max(1, n/l.bytes)
	l.run(times)
	return times * l.bytes
}
