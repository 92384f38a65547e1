package sector

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkVolume measures a volume on an image file in memory, against the
// same requests on the file itself: the difference is what the volume costs.
func BenchmarkVolume(b *testing.B) {
	const size = 256 << 20
	dir := "/dev/shm"
	if _, err := os.Stat(dir); err != nil {
		dir = b.TempDir()
	}
	dir, err := os.MkdirTemp(dir, "hostcryptd-bench")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "disk.img")
	d := formatted(b, imageFile(b, name, dataOffset+size, DeviceOptions{}))
	v := open1(b, d, OpenOptions{})
	if err := v.WriteZeroes(0, size, false); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int64{4096, 128 << 10} {
		p := alignedBytes(int(n))
		for _, op := range []struct {
			name string
			f    func(off int64) (int, error)
		}{
			{"of=file/op=read", func(off int64) (int, error) { return d.ReadAt(p, dataOffset+off) }},
			{"of=volume/op=read", func(off int64) (int, error) { return v.ReadAt(p, off) }},
			{"of=volume/op=write", func(off int64) (int, error) { return v.WriteAt(p, off) }},
		} {
			b.Run(fmt.Sprintf("size=%d/%s", n, op.name), func(b *testing.B) {
				r := rand.New(rand.NewPCG(1, 1))
				b.SetBytes(n)
				b.ReportAllocs()
				for b.Loop() {
					if _, err := op.f(r.Int64N(size/n) * n); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
