package main

import (
	"testing"
	"time"
)

func TestStuckFor(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"block nbd0: Possible stuck request 00000000aec40452: control (read@122183680,65536B). Runtime 5 seconds": 5 * time.Second,
		"Possible stuck request 0: control (flush@0,0B). Runtime 120 seconds":                                     120 * time.Second,
		"Possible stuck request": stuckAfter,
	} {
		if got := stuckFor(text); got != want {
			t.Errorf("stuckFor(%q) = %v, want %v", text, got, want)
		}
	}
}
