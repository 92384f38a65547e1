//go:build !purego

package xts

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEmulated runs TestEmulatedInside on the processor that QEMU makes of everything it
// knows. With QEMU 7.2 that claims 256-bit VAES and computes it wrongly; whatever the
// version, what [NewCipher] gives must be right.
func TestEmulated(t *testing.T) {
	qemu, err := exec.LookPath("qemu-x86_64-static")
	if err != nil {
		t.Fatal("qemu-x86_64-static is missing (package qemu-user-static)")
	}
	bin := filepath.Join(t.TempDir(), "xts.test")
	// Not this test's own binary, which may have the race detector: that doesn't
	// run in QEMU.
	build := exec.Command("go", "test", "-c", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	run := exec.Command(qemu, "-cpu", "max", bin, "-test.run", "^TestEmulatedInside$", "-test.v")
	run.Env = append(os.Environ(), emulatedEnv+"=1")
	out, err := run.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestEmulatedInside") {
		t.Fatalf("in QEMU: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

const emulatedEnv = "HOSTCRYPTD_XTS_EMULATED"

func TestEmulatedInside(t *testing.T) {
	if os.Getenv(emulatedEnv) == "" {
		return // part of TestEmulated
	}
	t.Logf("%s is used; wrong are %q", Implementation(), Faulty())
	key := testKey(7)
	c, err := NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, sectorSize := range []int{512, 4096} {
		src := testData(8, 41*sectorSize)
		dst := make([]byte, len(src))
		c.EncryptSectors(dst, src, 77, sectorSize)
		if !bytes.Equal(dst, peer(t, key, src, 77, sectorSize, false)) {
			t.Errorf("sectors of %d bytes are encrypted wrongly", sectorSize)
		}
		if c.DecryptSectors(dst, dst, 77, sectorSize); !bytes.Equal(dst, src) {
			t.Errorf("sectors of %d bytes are decrypted wrongly", sectorSize)
		}
	}
}
