package keyunseal

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// Retry calls try until it succeeds, fails with an error that isn't transient,
// or ctx ends. It waits as [Backoff] says between the tries, and tells report,
// if that isn't nil, about every failure that it will wait for.
//
// When ctx ends Retry returns the last error that try had found out by itself:
// "throttled" says more than "deadline exceeded".
func Retry(ctx context.Context, report func(err error, wait time.Duration), try func(context.Context) error) error {
	var last error
	for n := 0; ; n++ {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if e, ok := errors.AsType[*Error](err); !ok || !e.Transient() {
			return err
		}
		if ctx.Err() != nil {
			if last != nil {
				return last
			}
			return err
		}
		last = err

		wait := Backoff(err, n, rand.Float64())
		if report != nil {
			report(err, wait)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return last
		}
	}
}

// Backoff returns how long to wait after failure number n (from 0) of a row of
// failures, given a random r in [0, 1). It's exponential with full jitter, so
// that hosts that failed together don't come back together: uniform between 0
// and 1 s * 2ⁿ, at most 60 s after an answer of the service and 15 s after no
// answer. What the vault asked for by Retry-After is added. The identity
// endpoint asks for at least one second.
func Backoff(err error, n int, r float64) time.Duration {
	limit, floor := 60*time.Second, time.Duration(0)
	if e, ok := errors.AsType[*Error](err); ok {
		floor = e.RetryAfter
		if e.Status == 0 {
			limit = 15 * time.Second
		}
		if e.Class == ClassIdentity {
			floor = max(floor, time.Second)
		}
	}
	ceiling := min(limit, time.Second<<min(n, 10))
	return floor + time.Duration(r*float64(ceiling))
}
