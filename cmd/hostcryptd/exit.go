package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"hostcryptd/keyunseal"
	"hostcryptd/nbd/nbdnl"
	"hostcryptd/sector"
	"hostcryptd/sector/luks2"
)

// Exit codes are part of the interface: units and scripts act on them. They
// don't change their meaning; 3, 6 to 9 and 15 are not used.
const (
	codeUsage       = 1
	codeWrongKey    = 2
	codeDevice      = 4
	codeBusy        = 5
	codeUnreachable = 10
	codeDenied      = 11
	codeKeyUnusable = 12
	codeThrottled   = 13
	codeIdentity    = 14
	codeAuth        = 16
	codeKernel      = 17
	codeCheck       = 19
)

// exitCodes is the table as the manual shows it.
var exitCodes = []struct {
	code    int
	meaning string
}{
	{0, "success"},
	{codeUsage, "wrong usage, or an error that has no code of its own"},
	{codeWrongKey, "the key is wrong, or was refused"},
	{codeDevice, "no such device, or not one that can be used"},
	{codeBusy, "something is in use or exists already"},
	{codeUnreachable, "the vault or the TPM can't be reached"},
	{codeDenied, "the vault denies access"},
	{codeKeyUnusable, "the key is disabled, expired, deleted or unknown"},
	{codeThrottled, "the vault throttled the requests for too long"},
	{codeIdentity, "the identity is not available"},
	{codeAuth, "the header is not authentic"},
	{codeKernel, "the kernel lacks support"},
	{codeCheck, "a check found errors"},
}

func exitCodesHelp() string {
	var b strings.Builder
	b.WriteString("Exit codes:\n")
	for _, e := range exitCodes {
		fmt.Fprintf(&b, "  %2d  %s\n", e.code, e.meaning)
	}
	return strings.TrimRight(b.String(), "\n")
}

// withCode gives an error an exit code that its kind does not tell.
func withCode(code int, err error) error { return &codedError{code, err} }

type codedError struct {
	code int
	error
}

func (e *codedError) Unwrap() error { return e.error }

// exitCode maps an error to its exit code. An error that joins several, such
// as those of several tokens, has the code of the first that has one.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	code := 0
	walk(err, func(e error) bool {
		code = codeOf(e)
		return code == 0
	})
	if code == 0 {
		return codeUsage
	}
	return code
}

// codeOf returns the code of one error, not looking into what it wraps, or 0.
func codeOf(err error) int {
	switch e := err.(type) {
	case *codedError:
		return e.code
	case *keyunseal.Error:
		switch e.Class {
		case keyunseal.ClassUnreachable, keyunseal.ClassMalformed, keyunseal.ClassNoTPM, keyunseal.ClassTPMBusy, keyunseal.ClassTPMLockout:
			return codeUnreachable
		case keyunseal.ClassThrottled:
			return codeThrottled
		case keyunseal.ClassIdentity:
			return codeIdentity
		case keyunseal.ClassDenied:
			return codeDenied
		case keyunseal.ClassKeyUnusable:
			return codeKeyUnusable
		case keyunseal.ClassWrongKey, keyunseal.ClassTPMState:
			return codeWrongKey
		case keyunseal.ClassIntegrity:
			return codeAuth
		}
		return codeUsage
	case syscall.Errno:
		switch {
		case e == syscall.EBUSY || e == syscall.EADDRINUSE || e.Is(os.ErrExist):
			return codeBusy
		case e.Is(os.ErrNotExist) || e == syscall.ENXIO || e == syscall.ENODEV:
			return codeDevice
		}
		return 0
	}
	switch err {
	case sector.ErrWrongKey:
		return codeWrongKey
	case sector.ErrNotVolume, sector.ErrDevice, sector.ErrDamaged, sector.ErrUnsupported:
		return codeDevice
	case sector.ErrBusy, nbdnl.ErrBusy, luks2.ErrChanged:
		return codeBusy
	case sector.ErrAuth:
		return codeAuth
	case nbdnl.ErrNotSupported:
		return codeKernel
	}
	return 0
}

// walk visits an error and what it wraps, outermost first, until visit returns
// false.
func walk(err error, visit func(error) bool) bool {
	if err == nil {
		return true
	}
	if !visit(err) {
		return false
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		return walk(e.Unwrap(), visit)
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			if !walk(err, visit) {
				return false
			}
		}
	}
	return true
}

// usagef is an error of the command line.
func usagef(format string, args ...any) error {
	return withCode(codeUsage, fmt.Errorf(format, args...))
}

// missingFile adds what to do to an error about a device that isn't there.
func missingFile(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w; for an image file, make it first: truncate -s 10G FILE", err)
	}
	return err
}
