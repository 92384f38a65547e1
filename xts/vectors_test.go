package xts

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// A vector is one published test case: one sector.
type vector struct {
	name                  string
	key                   *[64]byte
	tweak                 [16]byte
	plaintext, ciphertext []byte
}

// run checks both directions of v, into another buffer and in place. A tweak
// whose high half is zero is a sector number, so it goes through the public
// methods; the others through the methods that these stand on.
func (v *vector) run(t *testing.T, tr *tier) {
	t.Helper()
	c := newTestCipher(t, tr, v.key)
	lo, hi := binary.LittleEndian.Uint64(v.tweak[:8]), binary.LittleEndian.Uint64(v.tweak[8:])
	type direction struct {
		op       string
		in, want []byte
		crypt    func(dst, src []byte)
	}
	n := len(v.plaintext)
	tests := []direction{
		{"encrypt", v.plaintext, v.ciphertext, func(dst, src []byte) { c.tier.encrypt(c, &dst[0], src, n, lo, hi) }},
		{"decrypt", v.ciphertext, v.plaintext, func(dst, src []byte) { c.tier.decrypt(c, &dst[0], src, n, lo, hi) }},
	}
	if hi == 0 {
		tests = append(tests,
			direction{"EncryptSectors", v.plaintext, v.ciphertext, func(dst, src []byte) { c.EncryptSectors(dst, src, lo, n) }},
			direction{"DecryptSectors", v.ciphertext, v.plaintext, func(dst, src []byte) { c.DecryptSectors(dst, src, lo, n) }})
	}
	for _, tt := range tests {
		src, dst := bytes.Clone(tt.in), make([]byte, n)
		tt.crypt(dst, src)
		if !bytes.Equal(dst, tt.want) {
			t.Errorf("%s: %s = %x, want %x", v.name, tt.op, dst, tt.want)
		}
		if !bytes.Equal(src, tt.in) {
			t.Errorf("%s: %s changed its input", v.name, tt.op)
		}
		tt.crypt(src, src)
		if !bytes.Equal(src, tt.want) {
			t.Errorf("%s: %s in place = %x, want %x", v.name, tt.op, src, tt.want)
		}
	}
}

// runVectors runs all vectors with every tier, after checking that there are as
// many as there should be: a parser that loses cases must not pass.
func runVectors(t *testing.T, vectors []*vector, want int) {
	t.Helper()
	if len(vectors) != want {
		t.Fatalf("%d cases, want %d", len(vectors), want)
	}
	forEachTier(t, func(t *testing.T, tr *tier) {
		for _, v := range vectors {
			v.run(t, tr)
		}
		t.Logf("%d cases", len(vectors))
	})
}

// TestCAVP runs the NIST vectors that are a whole number of blocks: of 100 cases
// for each of 256, 384, 140, 250 and again 384 bits, in each direction, the 300 of
// 256 or 384 bits.
func TestCAVP(t *testing.T) {
	for _, file := range []string{"cavp-128hexstr-XTSGenAES256.rsp.gz", "cavp-dataunitseqno-XTSGenAES256.rsp.gz"} {
		t.Run(strings.TrimSuffix(file, ".rsp.gz"), func(t *testing.T) {
			vectors, partial := readCAVP(t, file)
			if want := 400; partial != want {
				t.Errorf("%d cases need ciphertext stealing, want %d", partial, want)
			}
			runVectors(t, vectors, 600)
		})
	}
}

// readCAVP returns the cases of a CAVP response file that are a whole number of
// blocks, and how many others there are.
func readCAVP(t *testing.T, file string) (vectors []*vector, partial int) {
	t.Helper()
	var (
		v       *vector
		section string
		bits    int
	)
	for n, line := range strings.Split(string(readTestdata(t, file)), "\n") {
		line = strings.TrimSpace(line)
		if line == "[ENCRYPT]" || line == "[DECRYPT]" {
			section = line
			continue
		}
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(line, " = ")
		if !ok {
			t.Fatalf("%s:%d: %q is not an assignment", file, n+1, line)
		}
		switch name {
		case "COUNT":
			v = &vector{name: section + " " + value}
		case "DataUnitLen":
			bits = number(t, value)
		case "Key":
			v.key = (*[64]byte)(unhex(t, value))
		case "i":
			v.tweak = [16]byte(unhex(t, value))
		case "DataUnitSeqNumber":
			binary.LittleEndian.PutUint64(v.tweak[:], uint64(number(t, value)))
		case "PT":
			v.plaintext = unhex(t, value)
		case "CT":
			v.ciphertext = unhex(t, value)
		default:
			t.Fatalf("%s:%d: unknown name %q", file, n+1, name)
		}
		// The last value of a case is CT when encrypting and PT when decrypting.
		if v.plaintext == nil || v.ciphertext == nil {
			continue
		}
		if bits%(8*blockSize) != 0 {
			partial++
			continue
		}
		if len(v.plaintext) != bits/8 || len(v.ciphertext) != bits/8 {
			t.Fatalf("%s:%d: case %s has not %d bits", file, n+1, v.name, bits)
		}
		vectors = append(vectors, v)
	}
	return vectors, partial
}

// TestIEEE1619 runs the vectors of annex B for AES-256, 10 to 14, out of a file in
// OpenSSL's test format.
func TestIEEE1619(t *testing.T) {
	var vectors []*vector
	for stanza := range strings.SplitSeq(string(readTestdata(t, "openssl-evpciph_aes_xts_excerpt.txt.gz")), "\n\n") {
		fields := map[string]string{}
		for line := range strings.Lines(stanza) {
			if name, value, ok := strings.Cut(strings.TrimSpace(line), " = "); ok {
				fields[name] = value
			}
		}
		if !strings.EqualFold(fields["Cipher"], "aes-256-xts") {
			continue
		}
		vectors = append(vectors, &vector{
			name:       "IV " + fields["IV"],
			key:        (*[64]byte)(unhex(t, fields["Key"])),
			tweak:      [16]byte(unhex(t, fields["IV"])),
			plaintext:  unhex(t, fields["Plaintext"]),
			ciphertext: unhex(t, fields["Ciphertext"]),
		})
	}
	for _, v := range vectors {
		if len(v.plaintext) != 512 || len(v.ciphertext) != 512 {
			t.Errorf("%s: %d and %d bytes, want 512", v.name, len(v.plaintext), len(v.ciphertext))
		}
	}
	runVectors(t, vectors, 5)
}

func TestWycheproof(t *testing.T) {
	var file struct {
		NumberOfTests int
		TestGroups    []struct {
			KeySize int
			Tests   []struct {
				TcID             int
				Key, IV, Msg, CT string
				Result           string
			}
		}
	}
	if err := json.Unmarshal(readTestdata(t, "wycheproof-aes_xts_test.json.gz"), &file); err != nil {
		t.Fatal(err)
	}
	var (
		vectors                  []*vector
		total, otherKey, partial int
	)
	for _, group := range file.TestGroups {
		for _, tc := range group.Tests {
			total++
			if tc.Result != "valid" {
				t.Errorf("case %d: result %q is not handled", tc.TcID, tc.Result)
			}
			v := &vector{name: strconv.Itoa(tc.TcID), plaintext: unhex(t, tc.Msg), ciphertext: unhex(t, tc.CT)}
			copy(v.tweak[:], unhex(t, tc.IV)) // a short one is padded with zeros
			switch {
			case group.KeySize != 512:
				otherKey++
			case len(v.plaintext)%blockSize != 0:
				partial++
			default:
				v.key = (*[64]byte)(unhex(t, tc.Key))
				vectors = append(vectors, v)
			}
		}
	}
	if total != 123 || total != file.NumberOfTests || otherKey != 82 || partial != 20 {
		t.Errorf("%d cases (file says %d), %d of other key sizes, %d that need ciphertext stealing; want 123, 82, 20",
			total, file.NumberOfTests, otherKey, partial)
	}
	runVectors(t, vectors, 21)
}

// readTestdata returns the content of a compressed file in testdata.
func readTestdata(t *testing.T, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z) // checks the CRC
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func number(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
