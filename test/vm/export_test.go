//go:build vm

package vm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hostcryptd/test/vm/vmtest"
)

// testQEMUExport runs hostcryptd on the host with an image file; QEMU is the
// NBD client and gives the export to a guest as a virtio disk. At the end
// cryptsetup decrypts the image without the kernel, and the files that a
// kernel's file system wrote through hostcryptd are compared one by one.
func testQEMUExport(t *testing.T, l *lab) {
	begun := time.Now()
	var (
		image    = filepath.Join(l.Dir, "export.img")
		recovery = filepath.Join(l.Dir, "export-recovery.key")
		hostKey  = filepath.Join(l.Dir, "export-host.key")
		socket   = filepath.Join(l.Dir, "export.sock")
		canary   = newCanary()
	)
	if err := vmtest.Sparse(image, volumeSize); err != nil {
		t.Fatal(err)
	}
	payload, err := vmtest.Payload(t.Context(), filepath.Join(l.Dir, "export-payload.tar"), payloadSize)
	if err != nil {
		t.Fatal(err)
	}
	l.format(t, image, hostKey, "--recovery-key", recovery)

	disks := []vmtest.Disk{{Serial: "volume", Socket: socket}, l.sparse(t, "state", stateSize), payload.Disk()}
	// Another process for the second boot: what it serves comes from the disk.
	stop := l.serve(t, image, hostKey, socket)
	write := l.boot(t, "export-write", map[string]string{"canary": canary}, disks...)
	stop()
	stop = l.serve(t, image, hostKey, socket)
	verify := l.boot(t, "export-verify", nil, disks...)
	stop()

	checkCiphertext(t, image, canary, payload)
	checkByCryptsetup(t, l, image, recovery, canary, payload)
	l.row("QEMUExport", time.Since(begun), write, verify)
}

// command runs a program on the host and fails the test if it fails.
func (l *lab) command(t *testing.T, name string, args ...string) {
	t.Helper()
	t.Logf("# %s %s", filepath.Base(name), strings.Join(args, " "))
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// serve starts hostcryptd serve on the host and waits for its socket. The
// function it returns stops it and fails the test if it doesn't end cleanly.
func (l *lab) serve(t *testing.T, image, hostKey, socket string) (stop func()) {
	t.Helper()
	args := []string{"serve", image, "--host-key", hostKey, "--listen", socket, "--control", socket + ".control", "--audit-log", "none", "--pins", hostKey + ".pins", "--tpm", "none"}
	t.Logf("# hostcryptd %s &", strings.Join(args, " "))
	cmd := exec.CommandContext(t.Context(), l.Hostcryptd, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if info, err := os.Stat(socket); err == nil && info.Mode().Type() == fs.ModeSocket {
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("hostcryptd serve ended before %s appeared: %v: %s", socket, err, &out)
		default:
		}
		if time.Now().After(deadline) {
			cmd.Process.Kill()
			<-ended
			t.Fatalf("no %s after 30 s: %s", socket, &out)
		}
	}
	return func() {
		t.Helper()
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatalf("stopping hostcryptd serve: %v: %s", err, &out)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("hostcryptd serve after SIGTERM: %v: %s", err, &out)
			}
		case <-time.After(30 * time.Second):
			cmd.Process.Kill()
			<-ended
			t.Fatalf("hostcryptd serve still ran 30 s after SIGTERM: %s", &out)
		}
		if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there after hostcryptd serve has ended: %v", socket, err)
		}
	}
}

// checkByCryptsetup takes a copy of the image through cryptsetup's own
// decryption, which needs neither root nor the device mapper, and compares
// the files in the file system that comes out.
func checkByCryptsetup(t *testing.T, l *lab, image, recovery, canary string, payload *vmtest.Tree) {
	t.Helper()
	tool := func(name string, args ...string) {
		t.Helper()
		path, err := vmtest.Tool(name)
		if err != nil {
			t.Fatal(err)
		}
		l.command(t, path, args...)
	}
	tool("cryptsetup", "isLuks", "--type", "luks2", image)
	tool("cryptsetup", "open", "--test-passphrase", "--type", "luks2", "--key-file", recovery, image)

	plain := filepath.Join(l.Dir, "export-plain.img")
	if err := vmtest.CopySparse(plain, image); err != nil {
		t.Fatal(err)
	}
	tool("cryptsetup", "reencrypt", "--batch-mode", "--decrypt", "--force-offline-reencrypt",
		"--header", filepath.Join(l.Dir, "export-header.img"), "--key-file", recovery, plain)
	tool("e2fsck", "-fn", plain)
	files := filepath.Join(l.Dir, "export-files")
	if err := os.Mkdir(files, 0o755); err != nil {
		t.Fatal(err)
	}
	tool("debugfs", "-R", "rdump / "+files, plain)

	want := map[string]string{}
	for name, sum := range payload.Files {
		want[filepath.Join("files", name)] = sum
	}
	sum := sha256.Sum256([]byte(canary + "\n"))
	want["canary.txt"] = hex.EncodeToString(sum[:])
	err := filepath.WalkDir(files, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(files, path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != want[name] {
			t.Errorf("cryptsetup decrypted %s to sha256 %x, want %s", name, sum, want[name])
		}
		delete(want, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(want) > 0 {
		t.Errorf("%d files are missing from what cryptsetup decrypted", len(want))
	}
	t.Logf("cryptsetup decrypted the image: %d files equal", len(payload.Files)+1)
}
