package xts

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
)

// cpuFlags says, for each tier of any build, which words of the flags (amd64) or
// Features (arm64) line of /proc/cpuinfo a machine that can run it has. It repeats
// what the tier's own detection should find out, from an independent source.
var cpuFlags = map[string][]string{
	generic.name:          {},
	"zmm (AVX-512, VAES)": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "vaes", "vpclmulqdq"},
	"ymm (AVX2, VAES)":    {"avx2", "bmi2", "vaes"},
	"xmm (AVX, AES-NI)":   {"avx", "aes", "pclmulqdq"},
	"neon (arm64 AES)":    {"aes"},
}

// forEachTier runs a test once for every tier in this build. A tier that the
// machine doesn't support is skipped, but it is a failure if the kernel says that
// the machine does, or if the variable HOSTCRYPTD_MUST_RUN has the word xts.
func forEachTier(t *testing.T, test func(t *testing.T, tr *tier)) {
	t.Helper()
	for _, tr := range tiers {
		t.Run("impl="+tr.name, func(t *testing.T) {
			if !tr.supported {
				skipTier(t, tr)
			}
			test(t, tr)
		})
	}
}

func skipTier(t *testing.T, tr *tier) {
	want, known := cpuFlags[tr.name]
	if !known {
		t.Fatalf("tier %q has no entry in cpuFlags", tr.name)
	}
	if mustRun := strings.FieldsFunc(os.Getenv("HOSTCRYPTD_MUST_RUN"), func(r rune) bool { return r == ',' || r == ' ' }); slices.Contains(mustRun, "xts") {
		t.Fatalf("HOSTCRYPTD_MUST_RUN has xts, but this machine doesn't support %q", tr.name)
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(info)) {
		name, value, _ := strings.Cut(line, ":")
		if name = strings.TrimSpace(name); name != "flags" && name != "Features" {
			continue
		}
		have := strings.Fields(value)
		for _, f := range want {
			if !slices.Contains(have, f) {
				t.Skipf("the processor has no %s", f)
			}
		}
		t.Fatalf("the processor has all of %v, but %q is not supported", want, tr.name)
	}
	t.Fatal("no flags in /proc/cpuinfo to justify a skip")
}

// newTestCipher returns a cipher of tier tr in memory with a guard on either side,
// and fails the test in the end if a guard was touched.
func newTestCipher(t testing.TB, tr *tier, key *[64]byte) *Cipher {
	t.Helper()
	const guard = alignment
	b := bytes.Repeat([]byte{0xa5}, guard+Size+guard+alignment)
	b = b[-address(b)%alignment:][:guard+Size+guard]
	c, err := newCipher(tr, b[guard:guard+Size], key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		want := bytes.Repeat([]byte{0xa5}, guard)
		if !bytes.Equal(b[:guard], want) || !bytes.Equal(b[guard+Size:], want) {
			t.Error("memory next to the cipher's was written")
		}
	})
	return c
}

// TestChoose checks what HOSTCRYPTD_XTS means.
func TestChoose(t *testing.T) {
	all := []*tier{
		{name: "wide (not here)"},
		{name: "wrong (here)", supported: true, expand: expandGeneric, encrypt: wrongEncrypt, decrypt: decryptGeneric},
		{name: "narrow (here)", supported: true, portable: true},
		{name: "narrower (here)", supported: true, portable: true},
		{name: "generic (here)", supported: true, portable: true},
	}
	for _, tt := range []struct{ word, want string }{
		{"", "narrow"}, // the fastest
		{"narrow", "narrow"},
		{"narrower", "narrower"},
		{"generic", "generic"},
		{"wide", "narrow"}, // unsupported
		{"wrong", "narrow"},
		{"Narrower", "narrow"},
		{"narrower (here)", "narrow"},
		{"nonsense", "narrow"},
	} {
		got, _, _ := strings.Cut(choose(all, tt.word).name, " ")
		if got != tt.want {
			t.Errorf("choose(%q) = %q, want %q", tt.word, got, tt.want)
		}
	}
	if got := choose(nil, ""); got != &generic {
		t.Errorf("choose among none = %q, want the generic one", got.name)
	}
}

// TestEnvironment forces every tier of this machine by the variable.
func TestEnvironment(t *testing.T) {
	names := Implementations()
	for _, name := range names {
		word, _, _ := strings.Cut(name, " ")
		t.Setenv("HOSTCRYPTD_XTS", word)
		if got := fromEnvironment().name; got != name {
			t.Errorf("HOSTCRYPTD_XTS=%s chooses %q, want %q", word, got, name)
		}
	}
	for _, word := range []string{"", "nonsense"} {
		t.Setenv("HOSTCRYPTD_XTS", word)
		if got := fromEnvironment().name; got != names[0] {
			t.Errorf("HOSTCRYPTD_XTS=%s chooses %q, want the fastest, %q", word, got, names[0])
		}
	}
}

// TestNewCipherWith checks that a tier can be had by its name.
func TestNewCipherWith(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		c, err := NewCipherWith(tr.name, testKey(1))
		if err != nil {
			t.Fatal(err)
		}
		if c.tier != tr {
			t.Errorf("NewCipherWith(%q) uses %q", tr.name, c.tier.name)
		}
		if _, err := NewCipherWith(tr.name, new([64]byte)); !errors.Is(err, ErrEqualKeys) {
			t.Errorf("equal halves: error %v, want %v", err, ErrEqualKeys)
		}
	})
	if got := panicOf(func() { NewCipherWith("nonsense", testKey(1)) }); !strings.Contains(got, "no implementation") {
		t.Errorf("unknown name: panic %q", got)
	}
}

func TestImplementation(t *testing.T) {
	var first *tier
	names := map[string]bool{}
	for _, tr := range tiers {
		if tr.supported && first == nil {
			first = tr
		}
		if _, ok := cpuFlags[tr.name]; !ok {
			t.Errorf("tier %q has no entry in cpuFlags", tr.name)
		}
		if names[tr.name] {
			t.Errorf("two tiers are called %q", tr.name)
		}
		names[tr.name] = true
	}
	if last := tiers[len(tiers)-1]; last != &generic || !generic.supported {
		t.Errorf("the last tier is %q, want the generic one, supported everywhere", last.name)
	}
	if got := Implementations(); got[0] != first.name || got[len(got)-1] != generic.name {
		t.Errorf("Implementations() = %q, want from %q to %q", got, first.name, generic.name)
	}
	if got := Implementation(); got != fromEnvironment().name {
		t.Errorf("Implementation() = %q, want the first supported tier, %q", got, first.name)
	}
	c, err := NewCipher(testKey(1))
	if err != nil {
		t.Fatal(err)
	}
	if c.tier.name != Implementation() {
		t.Errorf("NewCipher uses %q, but Implementation() = %q", c.tier.name, Implementation())
	}
}
