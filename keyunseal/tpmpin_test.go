package keyunseal

import (
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

const otherVolume = "1f8fad5b-d9cb-469f-a165-70867728950e"

func testPin(generation uint64) Pin {
	p := Pin{Generation: generation}
	for i := range p.Fingerprint {
		p.Fingerprint[i] = byte(i + 1)
	}
	return p
}

func wantPin(t *testing.T, opts Options, volume string, want *Pin) {
	t.Helper()
	got, err := LoadPin(t.Context(), opts, volume)
	if err != nil || (got == nil) != (want == nil) || got != nil && *got != *want {
		t.Errorf("LoadPin(%.4s) = %+v, %v, want %+v", volume, got, err, want)
	}
}

func store(t *testing.T, opts Options, volume string, pin Pin) {
	t.Helper()
	if stored, err := StorePin(t.Context(), opts, volume, pin); err != nil || !stored {
		t.Fatalf("StorePin = %v, %v", stored, err)
	}
}

// TestTPMPin: the TPM remembers volumes over a reboot, each its own, until it's
// told to forget, or cleared.
func TestTPMPin(t *testing.T) {
	s := newTPM(t)
	opts := s.options()
	wantPin(t, opts, testVolume, nil)
	one, two := testPin(7), testPin(1<<63-1)
	store(t, opts, testVolume, one)
	store(t, opts, strings.ToUpper(otherVolume), two)
	s.reboot()
	wantPin(t, opts, testVolume, &one)
	wantPin(t, opts, otherVolume, &two)
	one.Generation++
	store(t, opts, testVolume, one)
	wantPin(t, opts, testVolume, &one)
	wantPin(t, opts, otherVolume, &two)

	if removed, err := RemovePin(t.Context(), opts, testVolume); err != nil || !removed {
		t.Errorf("RemovePin = %v, %v", removed, err)
	}
	if removed, err := RemovePin(t.Context(), opts, testVolume); err != nil || removed {
		t.Errorf("RemovePin again = %v, %v", removed, err)
	}
	wantPin(t, opts, testVolume, nil)
	wantPin(t, opts, otherVolume, &two)
	// Nothing is left in the TPM.
	s.do(func(c *tpmConn) error {
		for _, index := range pinIndexes(uuidBytes(t, testVolume)) {
			if _, _, err := readNVPublic(c, index); !errors.Is(err, tpm2.TPMRCHandle) {
				t.Errorf("index %#x: %v", index, err)
			}
		}
		return nil
	})
	store(t, opts, testVolume, one)
	s.clear()
	wantPin(t, opts, testVolume, nil)
	wantPin(t, opts, otherVolume, nil)
}

func uuidBytes(t *testing.T, volume string) [16]byte {
	b, err := hex.DecodeString(strings.ReplaceAll(volume, "-", ""))
	if err != nil {
		t.Fatal(err)
	}
	return [16]byte(b)
}

// TestTPMPinPlaces: places that others have are left alone, one that somebody
// made and didn't write is used, and a hole doesn't hide a pin behind it.
func TestTPMPinPlaces(t *testing.T) {
	s := newTPM(t)
	opts := s.options()
	places := pinIndexes(uuidBytes(t, testVolume))
	pin := testPin(3)
	define := func(index tpm2.TPMHandle, size uint16, password string) {
		s.do(func(c *tpmConn) error {
			public := pinPublic(index)
			public.DataSize = size
			_, err := tpm2.NVDefineSpace{
				AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
				Auth:       tpm2.TPM2BAuth{Buffer: []byte(password)}, PublicInfo: tpm2.New2B(public),
			}.Execute(c)
			return err
		})
	}
	undefine := func(index tpm2.TPMHandle) {
		s.do(func(c *tpmConn) error {
			_, name, err := readNVPublic(c, index)
			if err != nil {
				return err
			}
			_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, NVIndex: tpm2.NamedHandle{Handle: index, Name: name}}.Execute(c)
			return err
		})
	}
	define(places[0], 32, "")
	define(places[1], pinSize, "somebody's")
	s.do(func(c *tpmConn) error { // written, so that only the password tells
		_, name, err := readNVPublic(c, places[1])
		if err != nil {
			return err
		}
		_, err = tpm2.NVWrite{
			AuthHandle: tpm2.AuthHandle{Handle: places[1], Name: name, Auth: tpm2.PasswordAuth([]byte("somebody's"))},
			NVIndex:    tpm2.NamedHandle{Handle: places[1], Name: name}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, pinSize)},
		}.Execute(c)
		return err
	})
	define(places[2], pinSize, "")
	store(t, opts, testVolume, pin)
	wantPin(t, opts, testVolume, &pin)
	undefine(places[0])
	pin.Generation++
	store(t, opts, testVolume, pin)
	wantPin(t, opts, testVolume, &pin)
	s.do(func(c *tpmConn) error {
		if _, _, err := readNVPublic(c, places[0]); !errors.Is(err, tpm2.TPMRCHandle) {
			t.Errorf("the pin is in two places: %v", err)
		}
		return nil
	})
	// Another volume's pin in one of these places isn't taken for this one's.
	undefine(places[2])
	s.do(func(c *tpmConn) error {
		if err := definePin(c, places[0]); err != nil {
			return err
		}
		return writePin(c, places[0], encodePin(uuidBytes(t, otherVolume), pin))
	})
	wantPin(t, opts, testVolume, nil)

	for _, index := range places[2:] {
		define(index, 8, "")
	}
	_, err := StorePin(t.Context(), opts, testVolume, pin)
	if e := wantClass(t, err, ClassConfig); !strings.Contains(e.Error(), "taken by others") {
		t.Error(e)
	}
}

// TestTPMPinRefused: no TPM, one without room, one whose owner has a password,
// and one that the kernel has no driver for.
func TestTPMPinRefused(t *testing.T) {
	dir := t.TempDir()
	for _, none := range []string{NoTPM, filepath.Join(dir, "none")} {
		opts := Options{TPM: none}
		wantPin(t, opts, testVolume, nil)
		if stored, err := StorePin(t.Context(), opts, testVolume, testPin(1)); err != nil || stored {
			t.Errorf("%s: StorePin = %v, %v", none, stored, err)
		}
		if removed, err := RemovePin(t.Context(), opts, testVolume); err != nil || removed {
			t.Errorf("%s: RemovePin = %v, %v", none, removed, err)
		}
	}
	if _, err := Seal(t.Context(), Options{TPM: NoTPM}, SpecTPM, testVolume, randomKey(t)); err == nil || !strings.Contains(err.Error(), "--tpm none") {
		t.Errorf("--key tpm --tpm none: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "broken"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := LoadPin(t.Context(), Options{TPM: filepath.Join(dir, "broken")}, testVolume)
	if e := wantClass(t, err, ClassNoTPM); !e.Transient() {
		t.Errorf("a TPM that is there and doesn't work: %v", e)
	}

	// What the firmware says counts only for the kernel's own device.
	if _, err := os.Stat(DefaultTPM); err == nil {
		t.Logf("%s is there: not tried without", DefaultTPM)
	} else {
		table := firmwareTPM
		firmwareTPM = filepath.Join(dir, "broken")
		defer func() { firmwareTPM = table }()
		_, err := LoadPin(t.Context(), Options{}, testVolume)
		e := wantClass(t, err, ClassNoTPM)
		if !e.Transient() || !strings.Contains(e.Error(), "load its driver") {
			t.Error(e)
		}
		_, err = Seal(t.Context(), Options{HostKey: filepath.Join(dir, "host.key")}, SpecPlatform, testVolume, randomKey(t))
		wantClass(t, err, ClassNoTPM)
		if _, err := os.Stat(filepath.Join(dir, "host.key")); err == nil {
			t.Error("a TPM without driver was passed over for the host key")
		}
		wantPin(t, Options{TPM: NoTPM}, testVolume, nil)
	}

	s := newTPM(t)
	opts := s.options()
	pin := testPin(1)
	store(t, opts, testVolume, pin)
	s.do(func(c *tpmConn) error { // fill it
		for i := range uint32(10_000) {
			public := pinPublic(tpm2.TPMHandle(0x01800000 + i))
			public.DataSize = 2048 >> min(i/64, 6)
			_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, PublicInfo: tpm2.New2B(public)}.Execute(c)
			if errors.Is(err, tpm2.TPMRCNVSpace) && i/64 >= 6 {
				return nil
			} else if err != nil && !errors.Is(err, tpm2.TPMRCNVSpace) {
				return err
			}
		}
		return errors.New("it has no end")
	})
	_, err = StorePin(t.Context(), opts, otherVolume, pin)
	if e := wantClass(t, err, ClassConfig); e.Code != codeNoRoom || !strings.Contains(e.Error(), "tpm2_getcap") {
		t.Error(e)
	}
	// One that is there is still written.
	pin.Generation++
	store(t, opts, testVolume, pin)

	s.do(func(c *tpmConn) error {
		_, err := tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("owner")},
		}.Execute(c)
		return err
	})
	wantPin(t, opts, testVolume, &pin)
	pin.Generation++
	store(t, opts, testVolume, pin)
	_, err = StorePin(t.Context(), opts, otherVolume, pin)
	if e := wantClass(t, err, ClassConfig); e.Code != codeOwnerAuth {
		t.Error(e)
	}
	_, err = RemovePin(t.Context(), opts, testVolume)
	if e := wantClass(t, err, ClassConfig); e.Code != codeOwnerAuth {
		t.Error(e)
	}
}

// TestPinExample compares with FORMAT.md, also through the TPM tools of the TCG's
// community.
func TestPinExample(t *testing.T) {
	want := formatSection(t, "pin")
	fingerprint, err := hex.DecodeString("84f231c391dda22684f3b056c251819d8311d1ce9179ee2c120948ca3223dfd6")
	if err != nil {
		t.Fatal(err)
	}
	pin := Pin{Fingerprint: [32]byte(fingerprint), Generation: 7}
	s := newTPM(t)
	store(t, s.options(), testVolume, pin)
	out := s.shell(t.TempDir(), "tpm2_nvread 0x01b97b9b")
	if got := hex.EncodeToString(out); got != strings.TrimSpace(want) {
		t.Errorf("the index holds\n%s, FORMAT.md has\n%s", got, want)
	}
	if p, ok := decodePin(out, uuidBytes(t, testVolume)); !ok || p != pin {
		t.Errorf("decodePin = %+v, %v", p, ok)
	}
	for i := range out {
		bad := append([]byte(nil), out...)
		bad[i] ^= 1
		if _, ok := decodePin(bad, uuidBytes(t, testVolume)); ok {
			t.Errorf("byte %d was changed, and the pin is good", i)
		}
	}
}
