package keyunseal

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestBackoff(t *testing.T) {
	throttled := &Error{Class: ClassThrottled, Status: 429}
	asked := &Error{Class: ClassThrottled, Status: 429, RetryAfter: 30 * time.Second}
	network := &Error{Class: ClassUnreachable}
	identity := &Error{Class: ClassIdentity, Status: 410}
	for _, tt := range []struct {
		err  error
		n    int
		r    float64
		want time.Duration
	}{
		{throttled, 0, 0, 0},
		{throttled, 0, 0.5, 500 * time.Millisecond},
		{throttled, 3, 0.5, 4 * time.Second},
		{throttled, 6, 0.5, 30 * time.Second}, // 64 s capped to 60
		{throttled, 1 << 40, 0.5, 30 * time.Second},
		{network, 3, 0.5, 4 * time.Second},
		{network, 4, 0.5, 7500 * time.Millisecond}, // 16 s capped to 15
		{asked, 0, 0, 30 * time.Second},
		{asked, 2, 0.25, 31 * time.Second},
		{identity, 0, 0, time.Second},
		{errors.New("other"), 2, 0.5, 2 * time.Second},
	} {
		if got := Backoff(tt.err, tt.n, tt.r); got != tt.want {
			t.Errorf("Backoff(%v, %d, %v) = %v, want %v", tt.err, tt.n, tt.r, got, tt.want)
		}
	}
}

func TestRetry(t *testing.T) {
	transient := &Error{Op: "unwrap", Class: ClassThrottled, Status: 429}
	denied := &Error{Op: "unwrap", Class: ClassDenied, Status: 403}
	for _, tt := range []struct {
		name    string
		results []error // the last one repeats
		tries   int     // 0: as many as fit
		want    error
	}{
		{"success", []error{nil}, 1, nil},
		{"success later", []error{transient, transient, nil}, 3, nil},
		{"denied", []error{denied}, 1, denied},
		{"denied later", []error{transient, denied}, 2, denied},
		{"foreign error", []error{context.Canceled}, 1, context.Canceled},
		{"never", []error{transient}, 0, transient},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				tries, reports := 0, 0
				var waited time.Duration
				start := time.Now()
				err := Retry(ctx, func(err error, wait time.Duration) {
					reports++
					waited += wait
				}, func(context.Context) error {
					tries++
					return tt.results[min(tries, len(tt.results))-1]
				})
				if !errors.Is(err, tt.want) {
					t.Errorf("Retry = %v, want %v", err, tt.want)
				}
				if tt.tries == 0 {
					// Mean wait 30 s after the first few.
					if tries < 60 || tries > 300 || time.Since(start) != time.Hour {
						t.Errorf("%d tries in %v", tries, time.Since(start))
					}
					return
				}
				if tries != tt.tries || reports != tries-1 || time.Since(start) != waited {
					t.Errorf("%d tries, %d reports, %v spent of %v announced; want %d tries", tries, reports, time.Since(start), waited, tt.tries)
				}
			})
		})
	}
}

// The end of ctx in the middle of a try must not hide what went wrong before.
func TestRetryKeepsTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		tries := 0
		err := Retry(ctx, nil, func(ctx context.Context) error {
			if tries++; tries == 1 {
				return &Error{Class: ClassThrottled, Status: 429}
			}
			<-ctx.Done()
			return &Error{Class: ClassUnreachable, Err: ctx.Err()}
		})
		wantClass(t, err, ClassThrottled)
	})
}

func TestClassString(t *testing.T) {
	if got := ClassUnreachable.String(); got != "vault unreachable" {
		t.Errorf("String() = %q", got)
	}
	if got := Class(99).String(); got != "class 99" {
		t.Errorf("String() = %q", got)
	}
}
