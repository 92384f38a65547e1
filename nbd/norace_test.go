//go:build !race

package nbd_test

import "time"

const slowDelay = 10 * time.Millisecond
