//go:build race

package nbd_test

import "time"

// slowDelay is what TestSlowDevice's device takes. The race detector makes the
// server slower, not what has to be reached.
const slowDelay = 50 * time.Millisecond
