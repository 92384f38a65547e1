package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// The serving process never computes with the volume key: Go's hash and cipher
// code leaves copies on the heap. A short-lived process of this binary does it,
// as the unsealing child does the unsealing:
//
//	standard input   the header
//	descriptor 3     pipe with the volume key
//	descriptor 4     pipe for the DEK
//	standard output  a deriveVerdict
//
// Both keys go between the pipes and secret memory with nothing in between.

// deriveArg is the argument by which this process knows what it is.
const deriveArg = "derive-child"

// deriveTimeout bounds some PBKDF2 and AES.
const deriveTimeout = time.Minute

// A deriveVerdict is how it went.
type deriveVerdict struct {
	Error string `json:"error,omitempty"`
	Kind  string `json:"kind,omitempty"` // of deriveKinds

	Fingerprint string `json:"fingerprint,omitempty"` // of the volume key
}

// deriveKinds are the errors that mean something to the caller.
var deriveKinds = map[string]error{
	"volume": sector.ErrNotVolume, "damaged": sector.ErrDamaged, "unsupported": sector.ErrUnsupported, "auth": sector.ErrAuth,
}

// A derivedError is an error of the child: its text says it all, its kind is
// for programs.
type derivedError struct {
	text string
	kind error
}

func (e *derivedError) Error() string { return e.text }
func (e *derivedError) Unwrap() error { return e.kind }

// deriveElsewhere is a [sector.Deriver].
func deriveElsewhere(ctx context.Context, header []byte, volumeKey *[sector.VolumeKeySize]byte, dek *[sector.DEKSize]byte) (string, error) {
	keyIn, keyOut, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer keyIn.Close()
	// It always fits, so there is nobody to wait for.
	_, err = keyOut.Write(volumeKey[:])
	keyOut.Close()
	if err != nil {
		return "", err
	}
	dekIn, dekOut, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer dekIn.Close()

	ctx, cancel := context.WithTimeout(ctx, deriveTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", deriveArg)
	cmd.Args[0] = os.Args[0]
	cmd.Env = []string{}
	if race := os.Getenv("GORACE"); race != "" { // of tests, see keyunseal.Child
		cmd.Env = append(cmd.Env, "GORACE="+race)
	}
	cmd.Stdin = bytes.NewReader(header)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.ExtraFiles = []*os.File{keyIn, dekOut}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the parent-death signal is about the thread that forked
	err = cmd.Run()
	runtime.UnlockOSThread()
	dekOut.Close()
	var v deriveVerdict
	if err == nil {
		err = json.Unmarshal(stdout.Bytes(), &v)
	}
	if err != nil {
		return "", fmt.Errorf("deriving the data key in a child process: %w: %.300s", err, stderr.Bytes())
	}
	if v.Error != "" {
		return "", &derivedError{v.Error, deriveKinds[v.Kind]}
	}
	// The child has ended, so all of it is in the pipe.
	if n, err := unix.IoctlGetInt(int(dekIn.Fd()), unix.TIOCINQ); err != nil || n != len(dek) {
		return "", fmt.Errorf("the child process handed over %d bytes, want %d: %w", n, len(dek), errors.Join(err, syscall.EPROTO))
	}
	if _, err := io.ReadFull(dekIn, dek[:]); err != nil {
		clear(dek[:])
		return "", err
	}
	return v.Fingerprint, nil
}

// deriveMain is the whole program of the child. Its memory goes with it, and
// the volume key was in a pipe, so nothing here is wiped.
func deriveMain() int {
	if err := harden(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	keyunseal.LockMemory()
	fingerprint, err := deriveFrom(os.Stdin, os.NewFile(3, "volume key"), os.NewFile(4, "data key"))
	v := deriveVerdict{Fingerprint: fingerprint}
	if err != nil {
		v.Error = err.Error()
		for kind, target := range deriveKinds {
			if errors.Is(err, target) {
				v.Kind = kind
			}
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(v); err != nil {
		return 1
	}
	return 0
}

func deriveFrom(in, keyIn, dekOut *os.File) (fingerprint string, err error) {
	if keyIn == nil || dekOut == nil {
		return "", errors.New("this argument isn't for use by hand")
	}
	var volumeKey [sector.VolumeKeySize]byte
	if _, err := io.ReadFull(keyIn, volumeKey[:]); err != nil {
		return "", fmt.Errorf("reading the volume key: %w", err)
	}
	header, err := io.ReadAll(io.LimitReader(in, 8<<20)) // the largest of LUKS2 has 4 MiB
	if err != nil {
		return "", err
	}
	var dek [sector.DEKSize]byte
	if fingerprint, err = sector.DeriveDEK(header, &volumeKey, &dek); err != nil {
		return "", err
	}
	_, err = dekOut.Write(dek[:])
	return fingerprint, err
}
