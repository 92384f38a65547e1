package keyunseal

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHostKeyRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	opts := Options{HostKey: filepath.Join(dir, "host.key")}
	key := randomKey(t)
	token := mustSeal(t, opts, SpecHostKey, key)
	wantOpens(t, opts, token, key)

	fi, err := os.Stat(opts.HostKey)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode() != 0o600 || fi.Size() != KeySize {
		t.Errorf("file has mode %v and %d bytes, want 0600 and %d", fi.Mode(), fi.Size(), KeySize)
	}
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if fi, err := os.Stat(d); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("directory %s: %v, %v; want mode 0700", d, fi.Mode(), err)
		}
	}
	// Nothing is left of the way there: that would be a second copy of the key.
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("directory holds %v, %v; want host.key alone", entries, err)
	}

	host, err := os.ReadFile(opts.HostKey)
	if err != nil {
		t.Fatal(err)
	}
	wantNoSecret(t, "the token", token, key[:], host)

	// A second seal uses the same host key and makes another token.
	second := mustSeal(t, opts, SpecHostKey, key)
	if again, _ := os.ReadFile(opts.HostKey); !bytes.Equal(again, host) {
		t.Error("the second Seal changed the host key")
	}
	if bytes.Equal(token, second) {
		t.Error("two seals of one key are equal")
	}
	a, _ := Describe(token)
	b, _ := Describe(second)
	if a != b || len(a.KeyID) != 16 || a.Type != TypeHostKey {
		t.Errorf("descriptions %+v and %+v, want the same host key", a, b)
	}
}

// Seals that race for a missing file must end up with one host key.
func TestHostKeyCreateRace(t *testing.T) {
	opts := Options{HostKey: filepath.Join(t.TempDir(), "new", "host.key")}
	key := randomKey(t)
	tokens := make([]json.RawMessage, 8)
	var wg sync.WaitGroup
	for i := range tokens {
		wg.Go(func() {
			var err error
			if tokens[i], err = Seal(t.Context(), opts, SpecHostKey, testVolume, key); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, token := range tokens {
		wantOpens(t, opts, token, key)
	}
	if entries, _ := os.ReadDir(filepath.Dir(opts.HostKey)); len(entries) != 1 {
		t.Errorf("directory holds %v, want host.key alone", entries)
	}
}

func TestHostKeyWrong(t *testing.T) {
	dir := t.TempDir()
	opts := Options{HostKey: filepath.Join(dir, "host.key")}
	key := randomKey(t)
	token := mustSeal(t, opts, SpecHostKey, key)
	id, _ := Describe(token)

	other := Options{HostKey: filepath.Join(dir, "other.key")}
	otherID, _ := Describe(mustSeal(t, other, SpecHostKey, key))
	dst, before := [KeySize]byte{5}, [KeySize]byte{5}
	err := Unseal(t.Context(), other, token, testVolume, &dst)
	wantClass(t, err, ClassWrongKey)
	if want := "sealed with host key " + id.KeyID + ", the file holds " + otherID.KeyID; !strings.Contains(err.Error(), want) {
		t.Errorf("message %q, want %q in it", err, want)
	}

	// Another volume, with the right key.
	err = Unseal(t.Context(), opts, token, "11111111-2222-3333-4444-555555555555", &dst)
	wantClass(t, err, ClassIntegrity)

	// No file: Unseal must not make one.
	missing := Options{HostKey: filepath.Join(dir, "missing", "host.key")}
	err = Unseal(t.Context(), missing, token, testVolume, &dst)
	e := wantClass(t, err, ClassKeyUnusable)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), id.KeyID) || e.Transient() {
		t.Errorf("message %q, transient %v", err, e.Transient())
	}
	if _, err := os.Stat(filepath.Dir(missing.HostKey)); !errors.Is(err, fs.ErrNotExist) {
		t.Error("Unseal made the directory of the host key")
	}
	if dst != before {
		t.Error("a failed Unseal changed dst")
	}
}

func TestHostKeyRefused(t *testing.T) {
	good := bytes.Repeat([]byte{1}, KeySize)
	for _, tt := range []struct {
		name string
		make func(path string) error
		text string
	}{
		{"group may read", func(p string) error { return write(p, good, 0o640) }, "mode 0640"},
		{"world may write", func(p string) error { return write(p, good, 0o602) }, "mode 0602"},
		{"short", func(p string) error { return write(p, good[1:], 0o600) }, "31 bytes"},
		{"long", func(p string) error { return write(p, append(good, '\n'), 0o600) }, "33 bytes"},
		{"empty", func(p string) error { return write(p, nil, 0o600) }, "0 bytes"},
		{"directory", func(p string) error { return os.Mkdir(p, 0o700) }, "regular file"},
		{"FIFO", func(p string) error { return unix.Mkfifo(p, 0o600) }, "regular file"},
		{"device", func(p string) error { return os.Symlink("/dev/zero", p) }, "symbolic link"},
		{"symbolic link", func(p string) error {
			if err := write(p+".true", good, 0o600); err != nil {
				return err
			}
			return os.Symlink(p+".true", p)
		}, "symbolic link"},
		{"dangling link", func(p string) error { return os.Symlink(p+".true", p) }, "symbolic link"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			opts := Options{HostKey: filepath.Join(t.TempDir(), "host.key")}
			if err := tt.make(opts.HostKey); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Lstat(opts.HostKey)
			_, err := Seal(t.Context(), opts, SpecHostKey, testVolume, randomKey(t))
			wantClass(t, err, ClassWrongKey)
			if !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), opts.HostKey) {
				t.Errorf("message %q, want the path and %q", err, tt.text)
			}
			if after, err := os.Lstat(opts.HostKey); err != nil || !os.SameFile(before, after) || before.Size() != after.Size() {
				t.Error("Seal touched the file")
			}
		})
	}
}

func write(path string, b []byte, mode os.FileMode) error {
	if err := os.WriteFile(path, b, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

func TestCheckHostKeyOwner(t *testing.T) {
	st := unix.Stat_t{Mode: unix.S_IFREG | 0o600, Size: KeySize, Uid: 1000}
	if err := checkHostKey(&st, 1000); err != nil {
		t.Errorf("own file: %v", err)
	}
	if err := checkHostKey(&st, 1001); err == nil {
		t.Error("another user's file is accepted")
	}
	if err := checkHostKey(&st, 0); err == nil {
		t.Error("root accepts another user's file")
	}
	st.Uid = 0
	if err := checkHostKey(&st, 1000); err != nil {
		t.Errorf("root's file: %v", err)
	}
}

func TestHostKeyDirectoryNotWritable(t *testing.T) {
	// /proc takes no new files, not even from root.
	opts := Options{HostKey: "/proc/hostcryptd/host.key"}
	_, err := Seal(t.Context(), opts, SpecHostKey, testVolume, randomKey(t))
	wantClass(t, err, ClassConfig)
}

// TestHostKeyHint: who may not read the file is told that, and not to look for another
// token, of which there is none yet when a volume is made.
func TestHostKeyHint(t *testing.T) {
	denied := fail("read host key", "host.key", ClassWrongKey, &fs.PathError{Op: "open", Path: "host.key", Err: fs.ErrPermission}).Error()
	if !strings.Contains(denied, "may this user read it?") || strings.Contains(denied, "token") {
		t.Errorf("a file that may not be read: %s", denied)
	}
	if other := fail("unseal", "host.key", ClassWrongKey, errors.New("another key")).Error(); !strings.Contains(other, "another token may open the volume") {
		t.Errorf("another key: %s", other)
	}
}

// TestOtherHostKey seals with another file than the one of the options, which makes that
// and leaves this alone. A token of either opens with both.
func TestOtherHostKey(t *testing.T) {
	dir := t.TempDir()
	opts := Options{HostKey: filepath.Join(dir, "old.key")}
	other := filepath.Join(dir, "new.key")
	key := randomKey(t)
	first := mustSeal(t, opts, SpecHostKey, key)
	before, err := os.ReadFile(opts.HostKey)
	if err != nil {
		t.Fatal(err)
	}
	second := mustSeal(t, opts, "host-key:"+other, key)
	if after, err := os.ReadFile(opts.HostKey); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the host key was touched: %v", err)
	}
	a, _ := Describe(first)
	b, _ := Describe(second)
	if a.KeyID == b.KeyID || b.Type != TypeHostKey {
		t.Errorf("descriptions %+v and %+v, want two host keys", a, b)
	}
	wantOpens(t, Options{HostKey: other}, second, key)
	both := Options{HostKey: opts.HostKey, OtherHostKey: other}
	wantOpens(t, both, first, key)
	wantOpens(t, both, second, key)
	var got [KeySize]byte
	if e, ok := errors.AsType[*Error](Unseal(t.Context(), opts, second, testVolume, &got)); !ok || e.Class != ClassWrongKey {
		t.Errorf("the new token without the new file: %v", e)
	}
	// What is said is about the file that everybody uses.
	third := mustSeal(t, Options{HostKey: filepath.Join(dir, "third.key")}, SpecHostKey, key)
	if err := Unseal(t.Context(), both, third, testVolume, &got); err == nil || !strings.Contains(err.Error(), opts.HostKey) {
		t.Errorf("a token of neither: %v", err)
	}
	if _, err := Seal(t.Context(), opts, "host-key:", testVolume, key); err == nil {
		t.Error("host-key: without a file was taken")
	}
}
