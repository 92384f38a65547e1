package main

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// TestKeysInMemory serves a volume, moves data through it, and searches all
// memory of the process, as root reads it, for every form of every key. Then it
// makes the process crash and looks for a core.
//
// Secret memory (memfd_secret) can't be read that way, so what is found is a
// copy. The volume's keys are made known to the test by the host key file and
// the recovery key.
func TestKeysInMemory(t *testing.T) {
	t.Setenv("HOSTCRYPTD_PINS", t.TempDir())
	t.Setenv("HOSTCRYPTD_TPM", "none") // not this machine's
	dir := t.TempDir()
	t.Setenv("HOSTCRYPTD_AUDIT_LOG", filepath.Join(dir, "audit.log"))
	bin := filepath.Join(dir, "hostcryptd")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, bin); err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	var written []byte // by the commands and the daemon
	run := func(name string, args ...string) {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		written = append(written, out...)
	}
	disk, err := os.Create(in("disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	if err := disk.Truncate(24 << 20); err != nil {
		t.Fatal(err)
	}
	disk.Close()
	run(bin, "format", in("disk.img"), "--host-key", in("host.key"), "--recovery-key", in("recovery.key"), "--yes")

	serve := exec.Command(bin, "serve", in("disk.img"), "--host-key", in("host.key"), "--listen", in("s.sock"), "--control", in("c.sock"))
	serve.Dir = dir
	var stderr bytes.Buffer
	serve.Stderr = &stderr
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	defer func() {
		if !ended {
			serve.Process.Kill()
			serve.Wait()
		}
	}()
	for range 200 {
		if _, err := os.Stat(in("s.sock")); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := os.WriteFile(in("data"), bytes.Repeat([]byte("plaintext that a client writes; "), 32<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	run(tool("nbdcopy"), "--flush", in("data"), "nbd+unix:///?socket="+in("s.sock"))

	// More that is written, and the whole life of a key.
	run(bin, "status", in("c.sock"), "--json")
	run(bin, "lock", in("c.sock"))
	run(bin, "unlock", in("c.sock"))
	for range 100 {
		if out, _ := exec.Command(bin, "status", in("c.sock")).Output(); bytes.Contains(out, []byte("unlocked")) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	run(tool("nbdcopy"), "nbd+unix:///?socket="+in("s.sock"), in("back"))
	run(bin, "dump", in("disk.img"), "--json")
	run(bin, "check", in("disk.img"), "--host-key", in("host.key"))
	run(bin, "key", "list", in("disk.img"), "--json")

	// What must not be found, by name, in every form in which it could be there.
	volumeKey, dek, uuid := keysOf(t, in("disk.img"), in("host.key"), in("recovery.key"))
	secrets := make(map[string][]byte)
	add := func(name string, key []byte) {
		secrets[name] = key
		secrets[name+", reversed words"] = swapWords(key)
		for form, text := range textForms(key) {
			secrets[name+" in "+form] = []byte(text)
		}
	}
	add("volume key", volumeKey)
	for i, name := range []string{"first half of the DEK", "second half of the DEK"} {
		half := dek[32*i:][:32]
		add(name, half)
		w := expandAES256(half)
		for _, round := range []int{2, 7, 13} {
			add(fmt.Sprintf("round key %d of the %s", round, name), w[16*round:][:16])
		}
	}
	for _, purpose := range []string{"hostcryptd v1 DEK wrapping", "hostcryptd v1 header MAC"} {
		key, err := hkdf.Key(sha256.New, volumeKey, []byte(uuid), purpose, 32)
		if err != nil {
			t.Fatal(err)
		}
		add("key for "+purpose, key)
	}
	hostKey, err := os.ReadFile(in("host.key"))
	if err != nil {
		t.Fatal(err)
	}
	add("host key", hostKey)
	// What must be found, or the search is none.
	secrets["control"] = []byte(uuid)

	found, searched := searchMemory(t, serve.Process.Pid, secrets)
	t.Logf("searched %d MiB of the process", searched>>20)
	for name, places := range found {
		if name != "control" {
			t.Errorf("%s is in memory: %s", name, strings.Join(places, ", "))
		}
	}
	// Nor may any of them be in what was written for people and programs: output,
	// log of key use, pin, header backup, and the disk itself with its header.
	run(bin, "header", "backup", in("disk.img"), in("backup"))
	auditLog, err := os.ReadFile(in("audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	pin, err := os.ReadFile(filepath.Join(os.Getenv("HOSTCRYPTD_PINS"), uuid+".json"))
	if err != nil {
		t.Fatal(err)
	}
	backup, err := os.ReadFile(in("backup"))
	if err != nil {
		t.Fatal(err)
	}
	disk2, err := os.ReadFile(in("disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	for where, text := range map[string][]byte{"output": written, "audit log": auditLog, "pin": pin, "header backup": backup, "disk": disk2} {
		if !bytes.Contains(text, []byte(uuid)) {
			t.Errorf("the %s doesn't hold the volume's UUID: there is nothing to search", where)
		}
		for name, secret := range secrets {
			if name != "control" && bytes.Contains(text, secret) {
				t.Errorf("%s is in the %s", name, where)
			}
		}
	}
	if found["control"] == nil {
		t.Error("the volume's UUID wasn't found in memory: the search does not work")
	}

	// A crash leaves no core.
	if err := serve.Process.Signal(syscall.SIGABRT); err != nil {
		t.Fatal(err)
	}
	serve.Wait()
	ended = true
	for name, secret := range secrets {
		// The stack that Go prints at SIGABRT is in it too.
		if name != "control" && bytes.Contains(stderr.Bytes(), secret) {
			t.Errorf("%s is in the log", name)
		}
	}
	if st := serve.ProcessState.Sys().(syscall.WaitStatus); st.CoreDump() {
		t.Error("the process dumped core")
	}
	if cores, _ := filepath.Glob(in("core*")); cores != nil {
		t.Errorf("the process left %v", cores)
	}
}

// textForms returns how text may hold a key: hexadecimal, and base64 of either
// alphabet, also of something longer that has it inside, at each of the three
// offsets from the group of bytes before.
func textForms(key []byte) map[string]string {
	forms := map[string]string{
		"hex":            hex.EncodeToString(key),
		"upper case hex": strings.ToUpper(hex.EncodeToString(key)),
		"decimal":        strings.Trim(strings.ReplaceAll(fmt.Sprint(key), " ", ","), "[]"),
		"decimal of %v":  strings.Trim(fmt.Sprint(key), "[]"),
		"escapes of Go":  fmt.Sprintf("%q", key),
		"separated hex":  strings.ReplaceAll(fmt.Sprintf("% x", key), " ", ":"),
	}
	for before := range 3 {
		longer := append(make([]byte, before), key...)
		// The characters that depend on nothing but the key.
		from, to := (before*8+5)/6, len(longer)*8/6
		forms[fmt.Sprintf("base64 after %d bytes", before)] = base64.StdEncoding.EncodeToString(longer)[from:to]
		forms[fmt.Sprintf("base64url after %d bytes", before)] = base64.URLEncoding.EncodeToString(longer)[from:to]
	}
	return forms
}

// TestTextForms: the forms are what others write of a key inside of something.
func TestTextForms(t *testing.T) {
	key := bytes.Repeat([]byte{0xfb, 0xef, 0xbe, 0xff, 1, 2, 3}, 5)[:32]
	forms := textForms(key)
	for before := range 7 {
		blob := append(append(bytes.Repeat([]byte{0xa5}, before), key...), 0x5a, 0x5a, 0x5a)
		for name, text := range map[string]string{"base64": base64.StdEncoding.EncodeToString(blob), "base64url": base64.RawURLEncoding.EncodeToString(blob)} {
			if form := forms[fmt.Sprintf("%s after %d bytes", name, before%3)]; len(form) < 41 || !strings.Contains(text, form) {
				t.Errorf("%s, %d bytes before: %q is not in %q", name, before, form, text)
			}
		}
	}
}

// keysOf gets the keys of a volume: the volume key out of its token, the DEK
// from cryptsetup.
func keysOf(t *testing.T, disk, hostKey, recoveryKey string) (volumeKey, dek []byte, uuid string) {
	t.Helper()
	d, err := sector.OpenDevice(disk, sector.DeviceOptions{ReadOnly: true, Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	h, _, err := sector.ReadHeader(context.Background(), d)
	if err != nil {
		t.Fatal(err)
	}
	var key [keyunseal.KeySize]byte
	err = fmt.Errorf("no token")
	for _, token := range h.Tokens {
		if token.Type == keyunseal.TypeHostKey {
			text, _ := token.MarshalJSON()
			err = keyunseal.Unseal(context.Background(), keyunseal.Options{HostKey: hostKey}, text, h.UUID, &key)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "dek")
	out, err := exec.Command(tool("cryptsetup"), "luksDump", "-q", "--dump-volume-key", "--volume-key-file", file, "--key-file", recoveryKey, disk).CombinedOutput()
	if err != nil {
		t.Fatalf("cryptsetup: %v\n%s", err, out)
	}
	dek, err = os.ReadFile(file)
	if err != nil || len(dek) != 64 {
		t.Fatalf("DEK of %d bytes, %v", len(dek), err)
	}
	return key[:], dek, h.UUID
}

// searchMemory looks for each needle in what can be read of a process's
// memory. It returns where they are, and how many bytes it has read.
func searchMemory(t *testing.T, pid int, needles map[string][]byte) (found map[string][]string, searched int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found = make(map[string][]string)
	const step, overlap = 1 << 20, 256
	buf := make([]byte, step+overlap)
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perm); err != nil {
			t.Fatal(err)
		}
		if perm[0] != 'r' || strings.Contains(line, "[vvar") || strings.Contains(line, "[vsyscall]") {
			continue
		}
		for off := from; off < to; off += step {
			n, err := mem.ReadAt(buf[:min(uint64(len(buf)), to-off)], int64(off))
			if n == 0 && err != nil {
				break // secret memory, or a hole
			}
			searched += min(n, step)
			for name, needle := range needles {
				if i := bytes.Index(buf[:n], needle); i >= 0 && len(found[name]) < 5 {
					found[name] = append(found[name], fmt.Sprintf("%#x in %s", off+uint64(i), strings.Join(strings.Fields(line), " ")))
				}
			}
		}
	}
	return found, searched
}

// swapWords returns key with the bytes of each 32-bit word reversed, as some
// implementations keep them.
func swapWords(key []byte) []byte {
	out := make([]byte, 0, len(key))
	for i := 0; i < len(key); i += 4 {
		out = binary.LittleEndian.AppendUint32(out, binary.BigEndian.Uint32(key[i:]))
	}
	return out
}

// expandAES256 is the key expansion of FIPS 197, section 5.2.
func expandAES256(key []byte) []byte {
	// The S-box, from its definition: inverse in GF(2⁸), then an affine map.
	var sbox [256]byte
	p, q := byte(1), byte(1)
	for ok := true; ok; ok = p != 1 {
		p ^= p<<1 ^ byte(int8(p)>>7)&0x1b // times 3
		q ^= q << 1
		q ^= q << 2
		q ^= q << 4
		q ^= byte(int8(q)>>7) & 0x09 // divided by 3
		rot := func(n int) byte { return q<<n | q>>(8-n) }
		sbox[p] = q ^ rot(1) ^ rot(2) ^ rot(3) ^ rot(4) ^ 0x63
	}
	sbox[0] = 0x63
	w := append([]byte(nil), key...)
	rcon := byte(1)
	for i := 8; i < 60; i++ {
		t := [4]byte(w[4*(i-1):])
		if i%8 == 0 {
			t = [4]byte{sbox[t[1]] ^ rcon, sbox[t[2]], sbox[t[3]], sbox[t[0]]}
			rcon <<= 1
		} else if i%8 == 4 {
			t = [4]byte{sbox[t[0]], sbox[t[1]], sbox[t[2]], sbox[t[3]]}
		}
		for j := range t {
			w = append(w, w[4*(i-8)+j]^t[j])
		}
	}
	return w
}

// TestExpandAES256 uses the example of FIPS 197, appendix A.3.
func TestExpandAES256(t *testing.T) {
	key, _ := hex.DecodeString("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
	w := expandAES256(key)
	if got := hex.EncodeToString(w[len(w)-16:]); len(w) != 240 || got != "fe4890d1e6188d0b046df344706c631e" {
		t.Errorf("last round key %s of %d bytes", got, len(w))
	}
}
