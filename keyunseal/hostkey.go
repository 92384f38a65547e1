package keyunseal

import (
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The host key file is exactly 32 random bytes, mode 0600, owned by root or by
// the user of this process. It protects a disk that leaves the host, and only
// if the file is on another disk. It's made once and never written again: every
// volume of the host depends on it.

const (
	hostKeyAlgorithm = "HKDF-SHA256+A256GCM"
	hostKeyIDSize    = 8
)

func sealHostKey(path, volume string, key *[KeySize]byte) (token, error) {
	var secret [KeySize]byte
	defer clear(secret[:])
	err := readHostKey(path, &secret)
	if errors.Is(err, fs.ErrNotExist) {
		if err := createHostKey(path); err != nil {
			return nil, fail("create host key", path, ClassConfig, err)
		}
		// Read what the file holds: another Seal may have made it first.
		err = readHostKey(path, &secret)
	}
	if err == nil && secret == [KeySize]byte{} {
		err = errors.New("holds zeros, which are no key") // what was sealed with it once, it opens
	}
	if err != nil {
		return nil, fail("read host key", path, ClassWrongKey, err)
	}

	id, err := hostKeyID(&secret)
	if err != nil {
		return nil, fail("seal", path, ClassInternal, err)
	}
	e, err := sealEnvelope(&secret, TypeHostKey, volume, key)
	if err != nil {
		return nil, fail("seal", path, ClassInternal, err)
	}
	return &hostKeyToken{tokenHead: newHead(TypeHostKey), HostKeyID: id, envelope: e}, nil
}

func (t *hostKeyToken) keyID() string { return t.HostKeyID }

func (t *hostKeyToken) describe() Description {
	return Description{Type: t.Type, Version: t.Version, KeyID: t.HostKeyID, Algorithm: hostKeyAlgorithm}
}

func (t *hostKeyToken) unseal(_ context.Context, opts Options, volume string, dst *[KeySize]byte) (err error) {
	defer opts.observeHere("unwrap", t.HostKeyID, time.Now(), &err)
	var secret [KeySize]byte
	defer clear(secret[:])
	if err := t.findKey(opts, &secret); err != nil {
		return err
	}
	if err := t.open(&secret, TypeHostKey, volume, dst); err != nil {
		// The host key is the right one, so the token is altered or of another volume.
		return fail("unseal", opts.hostKey(), ClassIntegrity, err)
	}
	return nil
}

// probe looks whether the file is there and the right one.
func (t *hostKeyToken) probe(_ context.Context, opts Options, _ string) error {
	var secret [KeySize]byte
	defer clear(secret[:])
	return t.findKey(opts, &secret)
}

// rewrap has nothing to do: a host key is made once.
func (t *hostKeyToken) rewrap(context.Context, Options, string, *[KeySize]byte) (token, error) {
	return nil, fail("rewrap", "", ClassConfig, ErrCurrent)
}

// findKey reads the host key that t was sealed with.
func (t *hostKeyToken) findKey(opts Options, secret *[KeySize]byte) error {
	err := t.readKey(opts.hostKey(), secret)
	if err != nil && opts.OtherHostKey != "" && t.readKey(opts.OtherHostKey, secret) == nil {
		return nil
	}
	return err
}

func (t *hostKeyToken) readKey(path string, secret *[KeySize]byte) error {
	if err := readHostKey(path, secret); errors.Is(err, fs.ErrNotExist) {
		return fail("read host key", path, ClassKeyUnusable, fmt.Errorf("%w; the token was sealed with host key %s", err, t.HostKeyID))
	} else if err != nil {
		return fail("read host key", path, hostKeyClass(err), err)
	}
	id, err := hostKeyID(secret)
	if err != nil {
		return fail("unseal", path, ClassInternal, err)
	}
	if !strings.EqualFold(id, t.HostKeyID) {
		return fail("unseal", path, ClassWrongKey, fmt.Errorf("the token was sealed with host key %s, the file holds %s", t.HostKeyID, id))
	}
	return nil
}

// hostKeyClass is the class of an error of reading a host key that is there. No
// descriptor or no memory left, and an error of the disk, say nothing of the key.
func hostKeyClass(err error) Class {
	if _, errno := errors.AsType[unix.Errno](err); errno && !errors.Is(err, fs.ErrPermission) {
		return ClassInternal
	}
	return ClassWrongKey
}

func (o Options) hostKey() string { return cmp.Or(o.HostKey, DefaultHostKey) }

// hostKeyID names a host key without helping to find it: HKDF under its own
// info string, not a hash of the key.
func hostKeyID(key *[KeySize]byte) (string, error) {
	id, err := hkdf.Key(sha256.New, key[:], nil, "hostcryptd host key id v1", hostKeyIDSize)
	return hex.EncodeToString(id), err
}

// readHostKey reads the file into dst. It looks at the open file, not at the
// name, so what it has checked is what it reads.
func readHostKey(path string, dst *[KeySize]byte) error {
	// O_NONBLOCK: a FIFO of that name must be an error, not a wait.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return errors.New("is a symbolic link; name the file itself")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if err := checkHostKey(&st, os.Geteuid()); err != nil {
		return err
	}
	var buf [KeySize]byte
	defer clear(buf[:])
	if _, err := io.ReadFull(f, buf[:]); err != nil {
		return err
	}
	*dst = buf
	return nil
}

// checkHostKey refuses a file that somebody else may have read or written.
func checkHostKey(st *unix.Stat_t, uid int) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return errors.New("is not a regular file")
	case st.Mode&0o077 != 0:
		return fmt.Errorf("has mode %04o, others may read or write it; if they haven't, chmod 600 it", st.Mode&0o7777)
	case st.Uid != 0 && int(st.Uid) != uid:
		return fmt.Errorf("is owned by user %d, neither root nor this process", st.Uid)
	case st.Size != KeySize:
		return fmt.Errorf("has %d bytes, want %d", st.Size, KeySize)
	}
	return nil
}

// createHostKey makes the file, and its directory if that is missing too. The
// file appears with all its content or not at all, and is on stable storage when
// createHostKey returns. A file that is already there, or that someone else makes
// meanwhile, stays: that's not an error.
func createHostKey(path string) error {
	dir := filepath.Dir(path)
	if err := makeDir(dir); err != nil {
		return err
	}
	var key [KeySize]byte
	defer clear(key[:])
	rand.Read(key[:]) // never fails

	tmp := filepath.Join(dir, "."+filepath.Base(path)+"."+strings.ToLower(rand.Text()))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(tmp) // after the rename there is nothing to remove
	_, err = f.Write(key[:])
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	// Unlike link and unlink, this leaves no second name behind in a crash.
	err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.LinkError{Op: "rename", Old: tmp, New: path, Err: err}
	}
	return syncDir(dir)
}

// makeDir makes dir with mode 0700 and puts its name on stable storage. Parents
// that are missing too get the same mode.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := makeDir(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
