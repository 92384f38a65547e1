package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hostcryptd/xts"
)

// A speedRow is one measurement of speed.
type speedRow struct {
	Implementation string  `json:"implementation"`
	Buffer         int     `json:"buffer"` // bytes in one call
	Sector         int     `json:"sector_size"`
	Encrypt        float64 `json:"encrypt_gb_per_second"`
	Decrypt        float64 `json:"decrypt_gb_per_second"`
}

// measure fills in the rates of a row.
func (r *speedRow) measure() error {
	var key [64]byte
	for i := range key {
		key[i] = byte(i) // halves must differ; it protects nothing
	}
	c, err := xts.NewCipherWith(r.Implementation, &key)
	if err != nil {
		return err
	}
	defer c.Wipe()
	dst, src := make([]byte, r.Buffer), make([]byte, r.Buffer)
	r.Encrypt = throughput(r.Buffer, func() { c.EncryptSectors(dst, src, 1, r.Sector) })
	r.Decrypt = throughput(r.Buffer, func() { c.DecryptSectors(dst, src, 1, r.Sector) })
	return nil
}

func (a *app) speedCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "speed",
		Short: "measure encryption and memory speed on this machine",
		Long: `speed measures the functions that the daemon encrypts with, on one core, and
copying in memory beside them. It says which implementation runs here.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, args []string) error {
			here := xts.Implementation()
			rows := []speedRow{
				{here, 4096, 512, 0, 0}, {here, 4096, 4096, 0, 0},
				{here, 128 << 10, 512, 0, 0}, {here, 128 << 10, 4096, 0, 0}, {here, 1 << 20, 4096, 0, 0},
			}
			for _, name := range xts.Implementations() {
				if name != here {
					rows = append(rows, speedRow{name, 128 << 10, 4096, 0, 0})
				}
			}
			best := 0.0
			for i := range rows {
				if err := rows[i].measure(); err != nil {
					return err
				}
				best = max(best, rows[i].Encrypt, rows[i].Decrypt)
			}
			dst, src := make([]byte, 1<<20), make([]byte, 1<<20)
			memory := throughput(len(src), func() { copy(dst, src) })

			if a.json {
				return a.printJSON(map[string]any{"implementation": here, "rows": rows, "copy_gb_per_second": memory})
			}
			fmt.Fprintf(a.stdout, "AES-256-XTS on one core; the daemon uses %s here\n\n", here)
			fmt.Fprintf(a.stdout, "%-22s %8s %7s  %-8s %6s\n", "implementation", "buffer", "sector", "", "GB/s")
			for _, r := range rows {
				fmt.Fprintf(a.stdout, "%-22s %8d %7d  encrypt %7.2f %s\n", r.Implementation, r.Buffer, r.Sector, r.Encrypt, bar(r.Encrypt, best))
				fmt.Fprintf(a.stdout, "%-22s %8s %7s  decrypt %7.2f %s\n", "", "", "", r.Decrypt, bar(r.Decrypt, best))
			}
			fmt.Fprintf(a.stdout, "\ncopying 1 MiB in memory: %.2f GB/s\n", memory)
			for _, name := range xts.Faulty() {
				fmt.Fprintf(a.stdout, "not used, as this processor computes wrong results with it: %s\n", name)
			}
			return nil
		},
	}
	return a.jsonFlag(c)
}

// throughput runs f, which handles n bytes, for some time and returns the
// median of its rounds in GB/s: other programs disturb a mean.
func throughput(n int, f func()) float64 {
	const rounds, round = 21, 5 * time.Millisecond
	var rates []float64
	for range rounds {
		start, calls := time.Now(), 0
		for time.Since(start) < round {
			f()
			calls++
		}
		rates = append(rates, float64(n)*float64(calls)/time.Since(start).Seconds()/1e9)
	}
	slices.Sort(rates)
	return rates[rounds/2]
}

func bar(v, best float64) string {
	return strings.Repeat("█", max(1, int(40*v/best+0.5)))
}
