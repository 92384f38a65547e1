package evidence

import (
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func whole(b []byte) []Extent { return []Extent{{0, int64(len(b))}} }

// random returns n bytes that are the same in every run.
func random(n int) []byte {
	r := rand.NewChaCha8([32]byte{'e', 'v', 'i'})
	b := make([]byte, n)
	r.Read(b)
	return b
}

// text returns at least n bytes of this package's own source, each copy with
// a number so that no two blocks are equal.
func text(t *testing.T, n int) []byte {
	t.Helper()
	src, err := os.ReadFile("evidence.go")
	if err != nil {
		t.Fatal(err)
	}
	var b []byte
	for i := 0; len(b) < n; i++ {
		b = binary.BigEndian.AppendUint32(b, uint32(i))
		b = append(b, src...)
	}
	return b[:n]
}

func ecb(t *testing.T, plain []byte) []byte {
	t.Helper()
	c, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, len(plain))
	for i := 0; i < len(plain); i += 16 {
		c.Encrypt(out[i:], plain[i:])
	}
	return out
}

func TestMeasure(t *testing.T) {
	const n = 64 * BlockSize
	counter := make([]byte, n)
	for i := range counter {
		counter[i] = byte(i)
	}
	repeated := random(n)
	copy(repeated[8*BlockSize:], repeated[:BlockSize])
	nearlyRandom := random(n)
	for i := 0; i < n; i += 4 { // the top bit of every fourth byte is clear
		nearlyRandom[i] &= 0x7f
	}
	oneUnit := random(n)
	copy(oneUnit[16:32], oneUnit[:16])

	partly := random(n) // of each block, an eighth to seven eighths were never written
	partlyText := text(t, n)
	for i := range 64 {
		clear(partly[i*BlockSize:][:sectorSize*(i%7+1)])
		clear(partlyText[i*BlockSize:][:sectorSize*(i%7+1)])
	}
	halfASector := random(BlockSize)
	clear(halfASector[:sectorSize/2])

	tests := []struct {
		name      string
		data      []byte
		encrypted bool
		patterned int // -1: any
	}{
		{name: "random", data: random(n), encrypted: true},
		{name: "random and never written", data: append(make([]byte, n), random(n)...), encrypted: true},
		{name: "random and partly written", data: partly, encrypted: true},
		{name: "text and partly written", data: partlyText, patterned: 64},
		{name: "half a sector of zeros", data: halfASector, patterned: 1},
		{name: "nothing written", data: make([]byte, n)},
		{name: "text", data: text(t, n), patterned: 64},
		{name: "zeros in ECB", data: ecb(t, append(make([]byte, n-16), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)), patterned: 64},
		{name: "bytes too even", data: counter, patterned: 64},
		{name: "one bit missing in four bytes", data: nearlyRandom, patterned: -1},
		{name: "equal blocks", data: repeated},
		{name: "one unit twice", data: oneUnit, patterned: 1},
		{name: "one block of text", data: append(random(n), text(t, BlockSize)...), patterned: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Measure(bytes.NewReader(tt.data), whole(tt.data))
			if err != nil {
				t.Fatal(err)
			}
			if err := got.LooksEncrypted(); (err == nil) != tt.encrypted {
				t.Errorf("%+v: LooksEncrypted() = %v, want encrypted=%v", got, err, tt.encrypted)
			}
			if tt.patterned >= 0 && got.Patterned != tt.patterned {
				t.Errorf("%+v: %d patterned blocks, want %d", got, got.Patterned, tt.patterned)
			}
		})
	}
}

// TestMeasureCounts checks the chi-square itself: the figures can be
// computed by hand.
func TestMeasureCounts(t *testing.T) {
	ones := bytes.Repeat([]byte{1}, BlockSize)
	got, err := Measure(bytes.NewReader(ones), whole(ones))
	if err != nil {
		t.Fatal(err)
	}
	// One value is there 4096 times instead of 16, the other 255 not at all.
	want := (4080.0*4080 + 255*16*16) / 16
	if got.Worst != want || got.Sum != want || got.Patterned != 1 {
		t.Errorf("Measure(ones) = %+v, want chi-square %v", got, want)
	}
}

func TestSearch(t *testing.T) {
	long := bytes.Repeat([]byte("0123456789"), 30)
	data := random(3<<20 + 17)
	put := func(at int, s []byte) { copy(data[at:], s) }
	put(0, []byte("HEAD"))
	put(1<<20-2, []byte("cut by a chunk"))
	put(2<<20-150, long)
	put(len(data)-4, []byte("TAIL"))
	put(5000, []byte("twice"))
	put(1<<20+90, append([]byte("..."), "twice"...))

	needles := []string{"HEAD", "cut by a chunk", string(long), "TAIL", "twice", "not there"}
	var nn [][]byte
	for _, s := range needles {
		nn = append(nn, []byte(s))
	}
	got, err := Search(bytes.NewReader(data), whole(data), nn...)
	if err != nil {
		t.Fatal(err)
	}
	if want := []int{1, 1, 1, 1, 2, 0}; !slices.Equal(got, want) {
		t.Errorf("Search(%q) = %v, want %v", needles[3:], got, want)
	}
	for i, at := range []int64{0, 1<<20 - 2, 2<<20 - 150, int64(len(data)) - 4, 5000, -1} {
		if off, err := Find(bytes.NewReader(data), whole(data), nn[i]); off != at || err != nil {
			t.Errorf("Find(%.20q) = %d, %v, want %d", nn[i], off, err, at)
		}
	}
	if _, err := Search(bytes.NewReader(data), []Extent{{0, int64(len(data)) + 1}}, nn...); err == nil {
		t.Error("Search past the end gave no error")
	}
}

func TestExtents(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 64 << 20
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{1 << 20, 40 << 20} {
		if _, err := f.WriteAt([]byte("NEEDLE"), at); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		from int64
		want int
	}{{0, 2}, {8 << 20, 1}, {48 << 20, 0}} {
		list, err := Extents(f, tt.from)
		if err != nil {
			t.Fatal(err)
		}
		var sum int64
		for _, e := range list {
			sum += e.Len
		}
		if sum > size/2 {
			t.Fatalf("the file system of %s doesn't keep holes: %v", f.Name(), list)
		}
		counts, err := Search(f, list, []byte("NEEDLE"))
		if err != nil {
			t.Fatal(err)
		}
		if counts[0] != tt.want {
			t.Errorf("from %d: found %d times in %v, want %d", tt.from, counts[0], list, tt.want)
		}
	}
}
