package sector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hostcryptd/sector/luks2"
	"hostcryptd/sector/sectortest"
)

// TestAddTokenByRecovery brings a volume back whose KEKs are lost.
func TestAddTokenByRecovery(t *testing.T) {
	a, b, lost := &kek{name: "a"}, &kek{name: "b"}, ring()
	key, pins := NewRecoveryKey(), PinDir(filepath.Join(t.TempDir(), "pins"))
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, RecoveryKey: key, Pins: pins})
	var told *Known
	o := OpenOptions{Pins: pins, Changed: func(_ []KeyToken, k *Known) { told = k }}
	refused := func(d *sectortest.Disk, key []byte, want error) {
		t.Helper()
		before := d.Bytes()
		seal := func(context.Context, string, *[32]byte) (json.RawMessage, error) {
			t.Error("a KEK is asked to wrap the key before the header is known to be good")
			return nil, errors.New("no KEK")
		}
		if _, err := AddTokenByRecovery(t.Context(), d, key, ring(b).unseal, seal, o); !errors.Is(err, want) {
			t.Errorf("AddTokenByRecovery() = %v, want %v", err, want)
		}
		if !bytes.Equal(before, d.Bytes()) {
			t.Error("it was refused, and something was written")
		}
	}
	if _, err := AddToken(t.Context(), d, lost.unseal, b.seal, o); err == nil {
		t.Fatal("AddToken() needs no KEK")
	}
	refused(d, NewRecoveryKey(), ErrWrongKey)

	// a was retired in favor of another, and its time is over. As nothing shows that
	// another token works, it stays.
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return (&kek{name: "lost"}).seal(ctx, volume, key)
	}
	if _, err := ReplaceToken(t.Context(), d, ring(a, &kek{name: "lost"}).unseal, 0, rewrap, time.Nanosecond, o); err != nil {
		t.Fatal(err)
	}
	old := d.Bytes()
	id, err := AddTokenByRecovery(t.Context(), d, key, ring(b).unseal, b.seal, o)
	if err != nil {
		t.Fatal(err)
	}
	if active, retired := tokenIDs(t, d); len(active) != 2 || active[1] != id || len(retired) != 1 {
		t.Errorf("tokens %v, retired %v, of which %d is new", active, retired, id)
	}
	for _, r := range []keyring{ring(a), ring(b), ring(&kek{name: "lost"})} {
		if err := opens(t, d, r, o); err != nil {
			t.Errorf("by %v: %v", r, err)
		}
	}
	p, err := pins.Load(headerOf(t, d).UUID)
	if err != nil || p.Generation != 3 || told == nil || told.Generation != 3 {
		t.Errorf("generation of the pin %v, told %v, want 3", p, told)
	}

	// An old header is refused, and a forged one, whatever the recovery key says.
	replay := sectortest.New(d.Size())
	replay.WriteAt(old, 0)
	refused(replay, key, ErrAuth)
	h := headerOf(t, d)
	h.Segments[0].IVTweak = 8
	forged := sectortest.New(d.Size())
	forged.WriteAt(d.Bytes(), 0)
	if err := luks2.Write(forged, h); err != nil {
		t.Fatal(err)
	}
	refused(forged, key, ErrAuth)

	// The new recovery key does, the old one doesn't any more.
	rotated := NewRecoveryKey()
	if _, _, err := RotateRecoveryKey(t.Context(), d, ring(b).unseal, 0, rotated, o); err != nil {
		t.Fatal(err)
	}
	refused(d, key, ErrWrongKey)
	if _, v, _ := findVolumeToken(headerOf(t, d)); len(v.Recovery) != 1 {
		t.Errorf("the header has volume keys for %v", v.Recovery)
	}
	// With no token at all.
	active, retired := tokenIDs(t, d)
	for _, id := range append(active, retired...) {
		if err := RemoveToken(t.Context(), d, ring(a, b, &kek{name: "lost"}).unseal, id, true, o); err != nil {
			t.Fatal(err)
		}
	}
	if err := opens(t, d, ring(b), o); err == nil || !strings.Contains(err.Error(), "hostcryptd key add") {
		t.Errorf("without a token: %v", err)
	}
	if _, err := AddTokenByRecovery(t.Context(), d, rotated, ring(b).unseal, b.seal, o); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, d, ring(b), o); err != nil {
		t.Error(err)
	}
}

// TestRecoveryAfterCryptsetup: cryptsetup still opens a volume that a recovery key
// was used on, and what it does to keyslots counts.
func TestRecoveryAfterCryptsetup(t *testing.T) {
	name, keyFile, d := image(t, 4096, dataOffset+1<<20)
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	a := &kek{name: "a"}
	add := func(key []byte) error {
		_, err := AddTokenByRecovery(t.Context(), d, key, ring(a).unseal, a.seal, OpenOptions{})
		return err
	}
	if err := add(key); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile, name)

	// A keyslot that cryptsetup has made has no volume key.
	theirs := filepath.Join(t.TempDir(), "theirs")
	if err := os.WriteFile(theirs, []byte("their passphrase"), 0o600); err != nil {
		t.Fatal(err)
	}
	pbkdf := []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
	cryptsetup(t, append([]string{"luksAddKey", "--batch-mode", "--key-file", keyFile, name, theirs}, pbkdf...)...)
	if err := add([]byte("their passphrase")); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "keyslot 1 has the data key") {
		t.Errorf("by a keyslot of cryptsetup: %v", err)
	}
	if slot, adds, err := FindRecoveryKey(t.Context(), d, []byte("their passphrase")); slot != 1 || adds || err != nil {
		t.Errorf("FindRecoveryKey() = %d, %v, %v", slot, adds, err)
	}
	if slot, adds, err := FindRecoveryKey(t.Context(), d, key); slot != 0 || !adds || err != nil {
		t.Errorf("FindRecoveryKey() = %d, %v, %v", slot, adds, err)
	}
	if err := add(key); err != nil {
		t.Error(err)
	}

	// With the keyslot the other half is gone, though the header still has it.
	before := headerOf(t, d)
	cryptsetup(t, "luksKillSlot", "--batch-mode", "--key-file", theirs, name, "0")
	_, v, err := findVolumeToken(headerOf(t, d))
	if err != nil || len(v.Recovery) != 1 {
		t.Fatalf("%v, %v", v.Recovery, err)
	}
	if err := add(key); !errors.Is(err, ErrWrongKey) {
		t.Errorf("by a keyslot that is gone: %v", err)
	}
	// Nor is it for another keyslot of that number.
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, []byte("another passphrase"), 0o600); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, append([]string{"luksAddKey", "--batch-mode", "--key-slot", "0", "--key-file", theirs, name, other}, pbkdf...)...)
	if err := add([]byte("another passphrase")); !errors.Is(err, ErrUnsupported) {
		t.Errorf("by another keyslot of the same number: %v", err)
	}
	// What was wrapped goes with the next change, also where its number is used again.
	if _, err := AddToken(t.Context(), d, ring(a).unseal, a.seal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, v, err := findVolumeToken(headerOf(t, d)); err != nil || len(v.Recovery) != 0 {
		t.Errorf("wrapped still: %v, %v", v.Recovery, err)
	}
	h := headerOf(t, d)
	_, v, _ = findVolumeToken(before)
	k, err := newKeys(0)
	if err != nil {
		t.Fatal(err)
	}
	defer k.free()
	if err := openKeyslot(d, h, 1, []byte("their passphrase"), k.dek); err != nil {
		t.Fatal(err)
	}
	v.Recovery["1"] = v.Recovery["0"]
	if err := v.unwrapVolumeKey(k, key, h.UUID, 0); err != nil {
		t.Error(err)
	}
	for what, err := range map[string]error{
		"another keyslot": v.unwrapVolumeKey(k, key, h.UUID, 1),
		"another volume":  v.unwrapVolumeKey(k, key, "another UUID", 0),
		"another key":     v.unwrapVolumeKey(k, NewRecoveryKey(), h.UUID, 0),
	} {
		if err == nil {
			t.Errorf("the volume key is unwrapped for %s", what)
		}
	}
	k.dek[0] ^= 1
	if err := v.unwrapVolumeKey(k, key, h.UUID, 0); err == nil {
		t.Error("the volume key is unwrapped without the DEK")
	}
}

// TestCostlyKeyslots: keyslots of another program are tried last and one after the
// other in memory, and not in more of it than there is.
func TestCostlyKeyslots(t *testing.T) {
	key := NewRecoveryKey()
	d := formatWith(t, FormatOptions{Seal: []Sealer{(&kek{name: "a"}).seal}, RecoveryKey: key})
	h, _, err := ReadHeader(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	var dek [dekSize]byte
	theirs := func(id int, passes, kib uint32) {
		k := *h.Keyslots[0]
		k.KDF.Time, k.KDF.Memory = passes, kib
		h.Keyslots[id] = &k
		h.SegmentDigest(0).Keyslots = append(h.SegmentDigest(0).Keyslots, id)
	}
	ours := *h.Keyslots[0]
	theirs(9, 0, 0)
	*h.Keyslots[9] = ours
	h.Keyslots[0].KDF.Time = maxKDFTime // takes hours
	if slot, err := findKeyslot(d, h, key, &dek); err != nil || slot != 9 {
		t.Fatalf("keyslot %d, %v", slot, err)
	}

	// None opens it, so all are tried.
	*h.Keyslots[0] = ours
	h.SegmentDigest(0).Keyslots = []int{0}
	delete(h.Keyslots, 9)
	const each = 48 << 10
	try := func(slots ...int) (grown int) {
		t.Helper()
		defer func(was []int) { h.SegmentDigest(0).Keyslots = was }(h.SegmentDigest(0).Keyslots)
		h.SegmentDigest(0).Keyslots = slots
		debug.FreeOSMemory()
		if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil { // resets the peak, proc(5)
			t.Fatal(err)
		}
		before := residentPeak(t)
		if _, err := findKeyslot(d, h, NewRecoveryKey(), &dek); !errors.Is(err, ErrWrongKey) {
			t.Errorf("a wrong key: %v", err)
		}
		return residentPeak(t) - before
	}
	for id := 1; id <= 3; id++ {
		theirs(id, 1, each)
	}
	// The peak is seen only if nothing else of the process gives memory back meanwhile.
	one := 0
	for range 10 {
		if one = try(1); one >= each*7/8 {
			break
		}
	}
	if three := try(1, 2, 3); one < each*7/8 || three > one*3/2 {
		t.Errorf("a keyslot of %d KiB took %d KiB of memory, and three %d KiB", each, one, three)
	}

	// One for which there is no memory: whether it opens the volume isn't known.
	file := filepath.Join(t.TempDir(), "meminfo")
	defer func(was string) { memInfo = was }(memInfo)
	memInfo = file
	for text, tried := range map[string]bool{
		"MemTotal: 9999999 kB\nMemAvailable:  49151 kB\nSwapFree:            0 kB\n": false,
		"MemAvailable:  40000 kB\nSwapFree:        9152 kB\n":                        true,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := findKeyslot(d, h, NewRecoveryKey(), &dek)
		if errors.Is(err, ErrWrongKey) != tried || errors.Is(err, syscall.ENOMEM) == tried || !tried && !strings.Contains(err.Error(), "keyslot 2 could not be tried: argon2id of a keyslot: cannot allocate memory: it takes 48 MiB, and this host has 47 MiB to give") {
			t.Errorf("with %q: %v", text, err)
		}
		if slot, err := findKeyslot(d, h, key, &dek); err != nil || slot != 0 {
			t.Errorf("with %q, the right key: keyslot %d, %v", text, slot, err)
		}
	}
}

// residentPeak is the most memory, in KiB, that this process has had.
func residentPeak(t *testing.T) (kib int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			if _, err := fmt.Sscan(value, &kib); err != nil {
				t.Fatal(err)
			}
		}
	}
	return kib
}

// TestTamperedKeyslot: each member of a keyslot that keeps its recovery key from opening it
// and that a header may have is seen when it has changed; what cryptsetup may change isn't one.
func TestTamperedKeyslot(t *testing.T) {
	a := &kek{name: "a"}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, RecoveryKey: NewRecoveryKey()})
	was := d.Bytes()
	for name, tamper := range map[string]func(k *luks2.Keyslot){
		"key_size":        func(k *luks2.Keyslot) { k.KeySize = 32 },
		"af.stripes":      func(k *luks2.Keyslot) { k.AF.Stripes = 3999 },
		"af.hash":         func(k *luks2.Keyslot) { k.AF.Hash = "sha512" },
		"area.offset":     func(k *luks2.Keyslot) { k.Area.Offset += 4096 },
		"area.size":       func(k *luks2.Keyslot) { k.Area.Size += 4096 },
		"area.encryption": func(k *luks2.Keyslot) { k.Area.Encryption = "aes-cbc-plain64" },
		"area.key_size":   func(k *luks2.Keyslot) { k.Area.KeySize = 32 },
		"kdf.type":        func(k *luks2.Keyslot) { k.KDF.Type = "argon2i" },
		"kdf.time":        func(k *luks2.Keyslot) { k.KDF.Time++ },
		"kdf.memory":      func(k *luks2.Keyslot) { k.KDF.Memory *= 2 },
		"kdf.cpus":        func(k *luks2.Keyslot) { k.KDF.CPUs++ },
		"pbkdf2": func(k *luks2.Keyslot) {
			k.KDF = luks2.KDF{Type: "pbkdf2", Salt: k.KDF.Salt, Hash: "sha256", Iterations: 1000}
		},
		"priority": func(k *luks2.Keyslot) { k.Priority = new(int) },
	} {
		d.WriteAt(was[:2*copySize], 0)
		h := headerOf(t, d)
		tamper(h.Keyslots[0])
		if err := luks2.Write(d, h); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		r, err := Verify(t.Context(), d, ring(a).unseal, OpenOptions{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		intact := slices.Equal(r.Intact, []int{0}) && len(r.Findings) == 0
		seen := r.Intact == nil && len(r.Findings) == 1 && strings.Contains(r.Findings[0], "keyslot 0 is damaged")
		if name == "priority" && !intact || name != "priority" && !seen {
			t.Errorf("%s: intact %v, unknown %v, findings %q", name, r.Intact, r.Unknown, r.Findings)
		}
	}
}

// TestReplacedOldKeyslots: a keyslot that cryptsetup has put in the place of one that an
// earlier version made isn't taken for that.
func TestReplacedOldKeyslots(t *testing.T) {
	for _, salted := range []bool{false, true} {
		a, b := &kek{name: "a"}, &kek{name: "b"}
		key, other := NewRecoveryKey(), filepath.Join(t.TempDir(), "other")
		d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, RecoveryKey: key})
		h := headerOf(t, d)
		id, v, err := findVolumeToken(h)
		if err != nil {
			t.Fatal(err)
		}
		e := v.Recovery["0"]
		e.MAC = ""
		if !salted {
			e.Salt = ""
		}
		v.Recovery["0"] = e
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if h.Tokens[id], err = luks2.NewToken(text); err != nil {
			t.Fatal(err)
		}
		if err := luks2.Write(d, h); err != nil {
			t.Fatal(err)
		}
		name, keyFile := filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "key")
		for file, content := range map[string][]byte{name: d.Bytes(), keyFile: key, other: []byte("another passphrase")} {
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cheap := []string{"--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "1"}
		cryptsetup(t, append([]string{"luksAddKey", "--batch-mode", "--key-slot", "1", "--key-file", keyFile, name, other}, cheap...)...)
		cryptsetup(t, "luksKillSlot", "--batch-mode", "--key-file", other, name, "0")
		cryptsetup(t, append([]string{"luksAddKey", "--batch-mode", "--key-slot", "0", "--key-file", other, name, other}, cheap...)...)
		cryptsetup(t, "luksKillSlot", "--batch-mode", "--key-file", other, name, "1")
		image, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		d.WriteAt(image[:dataOffset], 0)
		if _, err := AddToken(t.Context(), d, ring(a, b).unseal, b.seal, OpenOptions{}); err != nil {
			t.Fatal(err)
		}
		_, v, err = findVolumeToken(headerOf(t, d))
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := v.Recovery["0"]; e.MAC != "" || ok == salted {
			t.Errorf("salted: %v: after a change there is %v, %+v", salted, ok, e)
		}
		if r, err := Verify(t.Context(), d, ring(a, b).unseal, OpenOptions{}); err != nil || len(r.Noted) > 0 || !slices.Equal(r.Unknown, []int{0}) || len(r.Findings) > 0 {
			t.Errorf("salted: %v: Verify() = intact %v, noted %v, unknown %v, findings %q, %v", salted, r.Intact, r.Noted, r.Unknown, r.Findings, err)
		}
	}
}

// TestOldKeyslots: a keyslot of a version that wrote no MAC gets one with the next change
// of the header, and from then on damage to it is seen; that it was good before isn't said.
func TestOldKeyslots(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	key := NewRecoveryKey()
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, RecoveryKey: key})
	h := headerOf(t, d)
	id, v, err := findVolumeToken(h)
	if err != nil {
		t.Fatal(err)
	}
	e := v.Recovery["0"]
	e.Salt, e.MAC = "", ""
	v.Recovery["0"] = e
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if h.Tokens[id], err = luks2.NewToken(text); err != nil {
		t.Fatal(err)
	}
	if err := luks2.Write(d, h); err != nil {
		t.Fatal(err)
	}
	verify := func(intact, noted, unknown []int, findings int) {
		t.Helper()
		r, err := Verify(t.Context(), d, ring(a, b).unseal, OpenOptions{})
		if err != nil || !slices.Equal(r.Intact, intact) || !slices.Equal(r.Noted, noted) || !slices.Equal(r.Unknown, unknown) || len(r.Findings) != findings {
			t.Errorf("intact %v, noted %v, unknown %v, findings %q, %v", r.Intact, r.Noted, r.Unknown, r.Findings, err)
		}
	}
	verify(nil, nil, []int{0}, 0)

	// One that can't be read now stays as it is.
	d.Fail(func(op sectortest.Op, _ int, off int64, _ int) error {
		if op == sectortest.Read && off == 2*copySize {
			return syscall.EIO
		}
		return nil
	})
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return b.seal(ctx, volume, key)
	}
	if _, err := AddToken(t.Context(), d, ring(a, b).unseal, b.seal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	d.Fail(nil)
	verify(nil, nil, []int{0}, 0)
	if _, err := ReplaceToken(t.Context(), d, ring(a, b).unseal, 0, rewrap, 0, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	verify(nil, []int{0}, nil, 0)
	_, v, _ = findVolumeToken(headerOf(t, d))
	noted := v.keyslotNoted(0)
	if time.Since(noted) > time.Hour {
		t.Errorf("noted %v", noted)
	}
	if slot, adds, err := FindRecoveryKey(t.Context(), d, key); err != nil || slot != 0 || !adds {
		t.Errorf("FindRecoveryKey() = %d, %v, %v", slot, adds, err)
	}
	// It isn't noted again: that would hide damage.
	was := d.Bytes()
	d.WriteAt([]byte("damage"), 2*copySize+5000)
	if _, err := AddToken(t.Context(), d, ring(a, b).unseal, a.seal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	verify(nil, nil, nil, 1)
	d.WriteAt(was[2*copySize:][:keyslotAreaSize], 2*copySize)
	verify(nil, []int{0}, nil, 0)

	// A new one is as it was written.
	if _, _, err := RotateRecoveryKey(t.Context(), d, ring(a).unseal, OnlySlot, NewRecoveryKey(), OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	verify([]int{1}, nil, nil, 0)
}
