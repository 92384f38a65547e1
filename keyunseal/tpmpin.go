package keyunseal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/google/go-tpm/tpm2"
)

// What a host remembers of its volumes in files, who can write to the host's own
// disk can put back together with an old header. So where there is a TPM it
// remembers them too: 64 bytes for each volume in an NV index, which isn't on
// any disk.
//
// It's an ordinary index and not a counter: it holds the fingerprint too, and a
// write of one command is the old value or the new one. It has no password and no
// policy: who can send commands to the TPM, which is who may open /dev/tpmrm0, root
// and the group tss on many systems, or starts a system of his own on it, can write
// it. It's about those who can't.

// A Pin is what the TPM remembers of a volume.
type Pin struct {
	Fingerprint [32]byte // of the volume key
	Generation  uint64
}

const (
	pinSize  = 64
	pinMagic = "hcp1"

	// Indexes are in the upper half of what the TCG's registry gives to the
	// owner, 0x01800000 to 0x01bfffff: others begin at its lower end.
	pinFirst = 0x01a00000
	pinLast  = 0x01bfffff

	// pinPlaces is how many indexes one volume may have its pin in, in the case
	// that others are taken.
	pinPlaces = 4
)

// NoTPM as [Options.TPM] says that this host has no TPM, or isn't to use it.
const NoTPM = "none"

// firmwareTPM is there on a host whose firmware has a TPM 2.0, whether or not the
// kernel has a driver for it (TCG ACPI Specification, table TPM2).
var firmwareTPM = "/sys/firmware/acpi/tables/TPM2"

// HaveTPM tells whether this host has a TPM, working or not. A TPM that the
// firmware has and whose driver isn't there, perhaps not yet, is an error:
// without it the host would take itself for one that never had a TPM.
func (o Options) HaveTPM() (bool, error) {
	path := o.tpm()
	if path == NoTPM {
		return false, nil
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if path == DefaultTPM {
		if _, err := os.Stat(firmwareTPM); err == nil {
			return true, fail("find TPM", path, ClassNoTPM, fmt.Errorf("the firmware has a TPM, and the kernel has no device for it: load its driver, or say --tpm %s", NoTPM))
		}
	}
	return false, nil
}

// LoadPin returns what the TPM remembers of a volume, or nil if that's nothing,
// also because there is no TPM.
func LoadPin(ctx context.Context, opts Options, volume string) (*Pin, error) {
	var pin *Pin
	err := withPin(ctx, opts, "read pin", volume, func(c *tpmConn, uuid [16]byte) error {
		found, err := findPin(c, uuid)
		if err == nil && found.index != 0 {
			pin = &found.pin
		}
		return err
	})
	return pin, err
}

// StorePin lets the TPM remember a volume, in place of what it remembered, and
// tells whether there is a TPM.
func StorePin(ctx context.Context, opts Options, volume string, pin Pin) (stored bool, err error) {
	err = withPin(ctx, opts, "write pin", volume, func(c *tpmConn, uuid [16]byte) error {
		found, err := findPin(c, uuid)
		if err != nil {
			return err
		}
		at := found.index
		if at == 0 {
			if at = found.free; at == 0 {
				return &Error{Class: ClassConfig, Code: "TPM_RC_NV_DEFINED", Err: fmt.Errorf("all %d places for this volume are taken by others: tpm2_getcap handles-nv-index lists them", pinPlaces)}
			}
			if !found.defined {
				if err := definePin(c, at); err != nil {
					return err
				}
			}
		}
		if err := writePin(c, at, encodePin(uuid, pin)); err != nil {
			return err
		}
		again, err := findPin(c, uuid)
		if err == nil && (again.index != at || again.pin != pin) {
			err = &Error{Class: ClassNoTPM, Err: errors.New("the TPM doesn't hold what was just written to it")}
		}
		stored = err == nil
		return err
	})
	return stored, err
}

// RemovePin lets the TPM forget a volume. It tells whether there was something to
// forget.
func RemovePin(ctx context.Context, opts Options, volume string) (removed bool, err error) {
	err = withPin(ctx, opts, "remove pin", volume, func(c *tpmConn, uuid [16]byte) error {
		for {
			found, err := findPin(c, uuid)
			if err != nil || found.index == 0 {
				return err
			}
			if removed {
				return errors.New("the TPM still holds the pin that it was told to remove")
			}
			_, name, err := readNVPublic(c, found.index)
			if err != nil {
				return err
			}
			_, err = tpm2.NVUndefineSpace{
				AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
				NVIndex:    tpm2.NamedHandle{Handle: found.index, Name: name},
			}.Execute(c)
			if err != nil {
				return ownerError(err)
			}
			removed = true
		}
	})
	return removed, err
}

// withPin runs f with this host's TPM, if it has one.
func withPin(ctx context.Context, opts Options, op, volume string, f func(c *tpmConn, uuid [16]byte) error) error {
	volume, err := canonicalUUID(volume)
	if err != nil {
		return fail(op, opts.tpm(), ClassConfig, err)
	}
	b, err := hex.DecodeString(strings.ReplaceAll(volume, "-", ""))
	if err != nil {
		return fail(op, opts.tpm(), ClassInternal, err)
	}
	have, err := opts.HaveTPM()
	if !have {
		return nil
	}
	if err != nil {
		return err
	}
	c, err := openTPM(ctx, opts.tpm())
	if err != nil {
		return classifyTPM(op, opts.tpm(), err)
	}
	defer c.Close()
	return classifyTPM(op, opts.tpm(), f(c, [16]byte(b)))
}

// pinIndexes are the places where the pin of a volume may be.
func pinIndexes(uuid [16]byte) (list [pinPlaces]tpm2.TPMHandle) {
	sum := sha256.Sum256(append([]byte("hostcryptd pin v1\x00"), uuid[:]...))
	first := binary.BigEndian.Uint32(sum[:])
	for i := range list {
		list[i] = tpm2.TPMHandle(pinFirst + (first+uint32(i))%(pinLast-pinFirst+1))
	}
	return list
}

// A pinPlace is what was found in a volume's places.
type pinPlace struct {
	index tpm2.TPMHandle // of its pin, or 0
	pin   Pin

	free    tpm2.TPMHandle // the first that a pin can be put into, or 0
	defined bool           // it exists already, and holds nothing
}

// findPin looks at all of a volume's places: one that became free must not hide
// a later one.
func findPin(c *tpmConn, uuid [16]byte) (found pinPlace, err error) {
	for _, index := range pinIndexes(uuid) {
		public, name, err := readNVPublic(c, index)
		if errors.Is(err, tpm2.TPMRCHandle) {
			if found.free == 0 {
				found.free = index
			}
			continue
		}
		if err != nil {
			return pinPlace{}, err
		}
		if want := pinPublic(index); public.DataSize != want.DataSize || public.Attributes.NT != want.Attributes.NT || !public.Attributes.AuthRead || !public.Attributes.AuthWrite {
			continue // another program's
		}
		if !public.Attributes.Written {
			// Made by one who was interrupted before he wrote.
			if found.free == 0 {
				found.free, found.defined = index, true
			}
			continue
		}
		resp, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: name, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: name}, Size: pinSize,
		}.Execute(c)
		if errors.Is(err, tpm2.TPMRCAuthFail) || errors.Is(err, tpm2.TPMRCBadAuth) {
			continue // another program's, with a password
		}
		if err != nil {
			return pinPlace{}, err
		}
		if pin, ok := decodePin(resp.Data.Buffer, uuid); ok {
			found.index, found.pin = index, pin
			return found, nil
		}
	}
	return found, nil
}

func readNVPublic(c *tpmConn, index tpm2.TPMHandle) (*tpm2.TPMSNVPublic, tpm2.TPM2BName, error) {
	resp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
	if err != nil {
		return nil, tpm2.TPM2BName{}, err
	}
	public, err := resp.NVPublic.Contents()
	return public, resp.NVName, err
}

func pinPublic(index tpm2.TPMHandle) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: pinSize,
		// NoDA: that others have guessed passwords doesn't lock it.
		Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, OwnerRead: true, OwnerWrite: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
	}
}

func definePin(c *tpmConn, index tpm2.TPMHandle) error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		PublicInfo: tpm2.New2B(pinPublic(index)),
	}.Execute(c)
	if errors.Is(err, tpm2.TPMRCNVSpace) {
		return &Error{Class: ClassConfig, Code: codeNoRoom, Err: errors.New("the TPM has no room left to remember a volume")}
	}
	return ownerError(err)
}

func writePin(c *tpmConn, index tpm2.TPMHandle, data []byte) error {
	_, name, err := readNVPublic(c, index) // the first write changes the name
	if err != nil {
		return err
	}
	_, err = tpm2.NVWrite{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
		Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data},
	}.Execute(c)
	return err
}

// encodePin: magic, UUID, generation, fingerprint, and the beginning of the
// SHA-256 of these. FORMAT.md has an example.
func encodePin(uuid [16]byte, p Pin) []byte {
	b := append([]byte(pinMagic), uuid[:]...)
	b = binary.BigEndian.AppendUint64(b, p.Generation)
	b = append(b, p.Fingerprint[:]...)
	sum := sha256.Sum256(b)
	return append(b, sum[:4]...)
}

// decodePin tells whether b is the pin of a volume.
func decodePin(b []byte, uuid [16]byte) (Pin, bool) {
	if len(b) != pinSize {
		return Pin{}, false
	}
	p := Pin{Generation: binary.BigEndian.Uint64(b[20:]), Fingerprint: [32]byte(b[28:])}
	return p, bytes.Equal(b, encodePin(uuid, p))
}
