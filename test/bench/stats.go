package main

import (
	"math"
	"math/bits"
	"slices"
	"time"
)

// median returns the middle of values, or the mean of the two middle ones. It
// is NaN of nothing.
func median(values []float64) float64 {
	n := len(values)
	if n == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(values))
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// ratios returns, for each round that both have, a's value divided by the best
// of others in that same round. Machines are noisy; neighbours in time share
// the noise, so a ratio within a round says more than one of medians.
func ratios(a []float64, others ...[]float64) []float64 {
	var out []float64
	for round, v := range a {
		best := 0.0
		for _, o := range others {
			if round < len(o) {
				best = max(best, o[round])
			}
		}
		if best > 0 {
			out = append(out, v/best)
		}
	}
	return out
}

// Buckets of a histogram: 64 to each doubling, so a percentile is off by less
// than 1.6 %.
const (
	bucketBits = 6
	buckets    = (64 - bucketBits) << bucketBits
)

// A histogram counts latencies. Adding allocates nothing.
type histogram struct {
	count  uint64
	bucket [buckets]uint32
}

func (h *histogram) add(d time.Duration) {
	v := uint64(max(d, 0))
	i := v
	if shift := bits.Len64(v) - bucketBits - 1; shift > 0 {
		i = uint64(shift)<<bucketBits + v>>shift
	}
	h.bucket[min(i, buckets-1)]++
	h.count++
}

func (h *histogram) merge(o *histogram) {
	h.count += o.count
	for i, n := range o.bucket {
		h.bucket[i] += n
	}
}

// quantile returns the lower edge of the bucket in which the share q of all
// latencies is reached, or 0 of nothing.
func (h *histogram) quantile(q float64) time.Duration {
	want, sum := uint64(math.Ceil(q*float64(h.count))), uint64(0)
	for i, n := range h.bucket {
		sum += uint64(n)
		if sum >= want && n > 0 {
			if i < 2<<bucketBits {
				return time.Duration(i)
			}
			shift := i>>bucketBits - 1
			return time.Duration(uint64(i-shift<<bucketBits) << shift)
		}
	}
	return 0
}
