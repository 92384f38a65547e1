package sector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"hostcryptd/sector/luks2"
	"hostcryptd/sector/sectortest"
)

// served is a volume with a recovery key that is open, and what its header was.
type served struct {
	d        *sectortest.Disk
	v        *Volume
	handover *Handover
	keys     keyring
	key      []byte // the recovery key
	pins     Pins
	first    []byte // all of the disk when it was opened
}

// made are volumes of keks with a recovery key, as argon2 is slow.
var made = map[string]*served{}

// serve opens a new volume of the first of keys.
func serve(t *testing.T, keys ...*kek) *served {
	t.Helper()
	was := made[keys[0].name]
	if was == nil {
		was = &served{key: NewRecoveryKey()}
		was.first = formatWith(t, FormatOptions{Seal: []Sealer{keys[0].seal}, RecoveryKey: was.key}).Bytes()
		made[keys[0].name] = was
	}
	s := &served{keys: ring(keys...), key: was.key, first: was.first, pins: PinDir(filepath.Join(t.TempDir(), "pins")), d: bytesDisk(was.first)}
	var err error
	if s.handover, err = NewHandover(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.handover.Close() })
	if s.v, err = Open(t.Context(), s.d, s.keys.unseal, OpenOptions{Pins: s.pins, Handover: s.handover}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.v.Close() })
	return s
}

func (s *served) options() OpenOptions { return OpenOptions{Pins: s.pins} }

// repair looks at the header and repairs it, with force after what stands there was saved.
func (s *served) repair(t *testing.T, force bool) (HeaderRepair, error) {
	t.Helper()
	s.d.Align = 4096 // as of a block device
	defer func() { s.d.Align = 0 }()
	s.v.Tokens(t.Context(), s.keys.unseal, s.options())
	r := RepairOptions{Force: force}
	if force {
		p, err := s.v.RepairHeader(t.Context(), s.options(), RepairOptions{DryRun: true})
		if err != nil {
			return p, err
		}
		if r.Saved, err = s.v.sumOf(p.Area); err != nil {
			t.Fatal(err)
		}
	}
	return s.v.RepairHeader(t.Context(), s.options(), r)
}

// whole tells whether the disk opens by token, and by the recovery key that it was made
// with: argon2 is slow, so that is told by its area.
func (s *served) whole(t *testing.T, d *sectortest.Disk) {
	t.Helper()
	if err := opens(t, d, s.keys, s.options()); err != nil {
		t.Errorf("by token: %v", err)
	}
	h, _, err := luks2.Read(bytes.NewReader(s.first))
	if err != nil {
		t.Fatal(err)
	}
	k, was := headerOf(t, d).Keyslots[0], h.Keyslots[0]
	if k == nil || !bytes.Equal(k.KDF.Salt, was.KDF.Salt) || !bytes.Equal(d.Bytes()[k.Area.Offset:][:k.Area.Size], s.first[was.Area.Offset:][:was.Area.Size]) {
		t.Error("the keyslot isn't the one that there was")
	}
	if _, copies, err := luks2.Read(d); err != nil || copies.Damaged() {
		t.Errorf("%s, %v", copies.Describe(), err)
	}
}

// bytesDisk is a disk with content.
func bytesDisk(b []byte) *sectortest.Disk {
	d := sectortest.New(int64(len(b)))
	d.WriteAt(b, 0)
	d.Sync()
	return d
}

func poke(t *testing.T, d *sectortest.Disk, off int64, b []byte) {
	t.Helper()
	if _, err := d.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// takeToken takes the token out of the header, as cryptsetup does after many changes.
func takeToken(t *testing.T, s *served) {
	t.Helper()
	h := headerOf(t, s.d)
	h.SeqID = 1000
	for id, k := range h.Tokens {
		if k.Type == "hostcryptd-kek" {
			delete(h.Tokens, id)
		}
	}
	for _, off := range []uint64{0, h.Size} {
		c, err := h.Encode(off)
		if err != nil {
			t.Fatal(err)
		}
		poke(t, s.d, int64(off), c)
	}
}

// TestRepairHeader overwrites the header of a volume that is served in every way. What is
// nobody's is overwritten again, and what may be somebody's only when it was saved.
func TestRepairHeader(t *testing.T) {
	if inHalves {
		return // it makes no requests, so that is what was run before
	}
	a, b := &kek{name: "a"}, &kek{name: "b"}
	gpt := make([]byte, 34*512)
	copy(gpt[510:], "\x55\xaa")
	copy(gpt[512:], "EFI PART")
	noise := bytes.Repeat([]byte("somebody's data "), 4096/16)
	for _, tt := range []struct {
		name    string
		damage  func(t *testing.T, s *served)
		whole   bool
		foreign bool
		problem string // none if there is nothing to do
	}{
		{name: "nothing", damage: func(*testing.T, *served) {}},
		{name: "zeros", whole: true, problem: "no LUKS header",
			damage: func(t *testing.T, s *served) { poke(t, s.d, 0, make([]byte, 1<<20)) }},
		{name: "all zeros", whole: true, problem: "no LUKS header",
			damage: func(t *testing.T, s *served) { poke(t, s.d, 0, make([]byte, dataOffset)) }},
		{name: "only the copies", whole: true, problem: "no LUKS header",
			damage: func(t *testing.T, s *served) { poke(t, s.d, 0, make([]byte, 2*copySize)) }},
		{name: "binary headers", whole: true, problem: "unusable",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 100, []byte("x"))
				poke(t, s.d, copySize+100, []byte("x"))
			}},
		{name: "the texts", whole: true, foreign: true, problem: "unusable",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 5000, noise[:8])
				poke(t, s.d, copySize+5000, noise[:8])
			}},
		{name: "one copy", problem: "first header copy is damaged",
			damage: func(t *testing.T, s *served) { poke(t, s.d, 0, make([]byte, 4096)) }},
		{name: "one copy, by something else", foreign: true, problem: "first header copy is damaged",
			damage: func(t *testing.T, s *served) { poke(t, s.d, 0, noise) }},
		{name: "one copy and the keyslot", foreign: true, problem: "first header copy is damaged",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 0, make([]byte, 4096))
				poke(t, s.d, 2*copySize, noise)
			}},
		{name: "the keyslot", foreign: true, problem: "area of keyslot 0 is not",
			damage: func(t *testing.T, s *served) { poke(t, s.d, 2*copySize+8192, noise) }},
		{name: "the keyslot, by zeros", problem: "area of keyslot 0 is not",
			damage: func(t *testing.T, s *served) { poke(t, s.d, 2*copySize, make([]byte, 8192)) }},
		{name: "the keyslot, before a change of the header", foreign: true, problem: "area of keyslot 0 is not",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 2*copySize, noise)
				if _, err := AddToken(t.Context(), s.d, s.keys.unseal, b.seal, s.options()); err != nil {
					t.Fatal(err)
				}
				if _, err := s.v.Tokens(t.Context(), s.keys.unseal, s.options()); err != nil {
					t.Fatal(err)
				}
			}},
		{name: "partitioned", whole: true, foreign: true, problem: "no LUKS header",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 0, make([]byte, 1<<20))
				poke(t, s.d, 0, gpt)
			}},
		{name: "a file system that leaves the binary headers", whole: true, foreign: true, problem: "unusable",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 64<<10, noise)
				poke(t, s.d, copySize+64<<10, noise)
			}},
		{name: "a file system in their pages", whole: true, foreign: true, problem: "unusable",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 1024, noise[:1024])
				poke(t, s.d, copySize+1024, noise[:1024])
			}},
		{name: "a keyslot changed too", whole: true, foreign: true, problem: "no LUKS header",
			damage: func(t *testing.T, s *served) {
				poke(t, s.d, 0, make([]byte, 2*copySize))
				poke(t, s.d, 2*copySize+8192, noise)
			}},
		{name: "another volume", whole: true, foreign: true, problem: "now holds the header of volume",
			damage: func(t *testing.T, s *served) {
				other := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, RecoveryKey: NewRecoveryKey()})
				poke(t, s.d, 0, other.Bytes()[:1<<20])
			}},
		{name: "the same UUID, forged", whole: true, foreign: true, problem: "another volume key",
			damage: func(t *testing.T, s *served) {
				other := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, UUID: s.v.UUID()})
				poke(t, s.d, 0, other.Bytes()[:2*copySize])
			}},
		{name: "an older header", whole: true, foreign: true, problem: "older header was put back",
			damage: func(t *testing.T, s *served) {
				if _, err := AddToken(t.Context(), s.d, s.keys.unseal, b.seal, s.options()); err != nil {
					t.Fatal(err)
				}
				if _, err := s.v.Tokens(t.Context(), s.keys.unseal, s.options()); err != nil {
					t.Fatal(err)
				}
				poke(t, s.d, 0, s.first[:2*copySize])
			}},
		{name: "forged, of a generation that none reaches", whole: true, foreign: true, problem: "says that it is a newer one of the volume, of generation 9000000000000000000",
			damage: func(t *testing.T, s *served) {
				h := headerOf(t, s.d)
				id, v, err := findVolumeToken(h)
				if err != nil {
					t.Fatal(err)
				}
				v.Generation = "9000000000000000000"
				text, err := json.Marshal(v)
				if err != nil {
					t.Fatal(err)
				}
				if h.Tokens[id], err = luks2.NewToken(text); err != nil {
					t.Fatal(err)
				}
				h.SeqID++
				c, err := h.Encode(0)
				if err != nil {
					t.Fatal(err)
				}
				poke(t, s.d, 0, c)
			}},
		{name: "a token taken out, with a high sequence id", whole: true, foreign: true, problem: "no token is left", damage: takeToken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, a, b)
			tt.damage(t, s)
			before := s.d.Bytes()
			p, err := s.repair(t, false)
			if tt.foreign {
				if !errors.Is(err, ErrDamaged) {
					t.Fatalf("what may be somebody's is overwritten: %v", err)
				}
				for _, r := range []RepairOptions{{Force: true}, {Saved: "00"}} {
					if _, err := s.v.RepairHeader(t.Context(), s.options(), r); !errors.Is(err, ErrDamaged) {
						t.Errorf("%+v: %v", r, err)
					}
				}
				if _, err := s.v.RepairHeader(t.Context(), s.options(), RepairOptions{Force: true, Saved: "00"}); !errors.Is(err, luks2.ErrChanged) {
					t.Errorf("something else was saved: %v", err)
				}
				if !bytes.Equal(s.d.Bytes(), before) {
					t.Fatal("a repair that was refused has written")
				}
				p, err = s.repair(t, true)
			}
			if err != nil {
				t.Fatal(err)
			}
			if p.Whole != tt.whole || p.Foreign != tt.foreign || (p.Problem == "") != (tt.problem == "") || !bytes.Contains([]byte(p.Problem), []byte(tt.problem)) {
				t.Errorf("repaired %+v", p)
			}
			if p.Whole && (!slices.Equal(p.Keyslots, []int{0}) || p.Missing != nil) {
				t.Errorf("keyslots %v, without %v", p.Keyslots, p.Missing)
			}
			s.whole(t, s.d)
			if _, err := s.v.Tokens(t.Context(), nil, s.options()); err != nil {
				t.Errorf("it isn't the header that is known: %v", err)
			}
			if !bytes.Equal(s.d.Bytes()[dataOffset:], before[dataOffset:]) {
				t.Error("the data was touched")
			}
			// Again, after it was overwritten again: what was written is what is kept.
			poke(t, s.d, 0, make([]byte, 1<<20))
			if _, err := s.repair(t, false); err != nil {
				t.Fatal(err)
			}
			s.whole(t, s.d)
		})
	}
}

// TestRepairCryptsetup lets cryptsetup read what a repair has left of a file.
func TestRepairCryptsetup(t *testing.T) {
	name, keyFile, d := image(t, 4096, dataOffset+1<<20)
	// A keyslot of another program's, of a key that is no DEK, is kept as it is.
	second := filepath.Join(t.TempDir(), "second")
	if err := os.WriteFile(second, []byte("another passphrase"), 0o600); err != nil {
		t.Fatal(err)
	}
	fast := []string{"-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
	cryptsetup(t, append([]string{"luksAddKey", "--key-file", keyFile, name, second}, fast...)...)
	v, err := Open(t.Context(), d, testUnseal, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	dump := cryptsetup(t, "luksDump", name)
	for range 2 {
		if _, err := d.WriteAt(alignedBytes(dataOffset), 0); err != nil {
			t.Fatal(err)
		}
		v.Tokens(t.Context(), testUnseal, OpenOptions{})
		p, err := v.RepairHeader(t.Context(), OpenOptions{}, RepairOptions{})
		if err != nil || !slices.Equal(p.Keyslots, []int{0, 1}) {
			t.Fatalf("RepairHeader() = %+v, %v", p, err)
		}
		cryptsetup(t, "isLuks", "--type", "luks2", name)
		cryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile, "--key-slot", "0", name)
		cryptsetup(t, "open", "--test-passphrase", "--key-file", second, "--key-slot", "1", name)
	}
	epoch := func(s string) []byte {
		lines := bytes.Split([]byte(s), []byte("\n"))
		return bytes.Join(slices.DeleteFunc(lines, func(l []byte) bool { return bytes.HasPrefix(l, []byte("Epoch:")) }), []byte("\n"))
	}
	if after := cryptsetup(t, "luksDump", name); !bytes.Equal(epoch(after), epoch(dump)) {
		t.Errorf("luksDump before:\n%s\nand after:\n%s", dump, after)
	}
	if r, err := Verify(t.Context(), d, testUnseal, OpenOptions{}); err != nil || len(r.Findings) > 0 || !slices.Equal(r.Intact, []int{0}) {
		t.Errorf("Verify() = %+v, %v", r, err)
	}
}

// TestRepairRefused: a repair brings nothing back that was removed, and overwrites
// nothing that may be newer than what is kept.
func TestRepairRefused(t *testing.T) {
	if inHalves {
		return // it makes no requests, so that is what was run before
	}
	a, b := &kek{name: "a"}, &kek{name: "b"}
	gone := func(t *testing.T, s *served) { poke(t, s.d, 0, make([]byte, 1<<20)) }
	t.Run("removed and known", func(t *testing.T) {
		s := serve(t, a, b)
		old := s.key
		s.key = NewRecoveryKey()
		if _, _, err := RotateRecoveryKey(t.Context(), s.d, s.keys.unseal, OnlySlot, s.key, s.options()); err != nil {
			t.Fatal(err)
		}
		before := s.v.KeptHeader()
		if _, err := s.v.Tokens(t.Context(), s.keys.unseal, s.options()); err != nil {
			t.Fatal(err)
		}
		if fi, err := before.Stat(); err != nil || fi.Size() != 0 {
			t.Errorf("the header with the old key is still there: %v, %v", fi, err)
		}
		gone(t, s)
		if _, err := s.repair(t, false); err != nil {
			t.Fatal(err)
		}
		if _, adds, err := FindRecoveryKey(t.Context(), s.d, s.key); err != nil || !adds {
			t.Errorf("the new key: %v, %v", adds, err)
		}
		if _, _, err := FindRecoveryKey(t.Context(), s.d, old); !errors.Is(err, ErrWrongKey) {
			t.Errorf("the key that was removed: %v", err)
		}
	})
	t.Run("killed by cryptsetup", func(t *testing.T) {
		// As it does: the header loses the keyslot, with no change of ours, and its area
		// is overwritten.
		s := serve(t, a, b)
		h := headerOf(t, s.d)
		area := h.Keyslots[0].Area
		delete(h.Keyslots, 0)
		h.Digests[0].Keyslots = nil
		if err := luks2.Write(s.d, h); err != nil {
			t.Fatal(err)
		}
		s.d.WriteAt(bytes.Repeat([]byte{7}, int(area.Size)), int64(area.Offset))
		poke(t, s.d, 0, make([]byte, 2*copySize))
		// Nobody has looked since: it comes back only if a person says so.
		if _, err := s.repair(t, false); !errors.Is(err, ErrDamaged) {
			t.Errorf("RepairHeader() = %v", err)
		}
		// Somebody has.
		s = serve(t, a, b)
		h = headerOf(t, s.d)
		delete(h.Keyslots, 0)
		h.Digests[0].Keyslots = nil
		if err := luks2.Write(s.d, h); err != nil {
			t.Fatal(err)
		}
		if _, err := s.v.Tokens(t.Context(), nil, s.options()); err != nil {
			t.Fatal(err)
		}
		poke(t, s.d, 0, make([]byte, 2*copySize))
		if p, err := s.repair(t, false); err != nil || p.Keyslots != nil {
			t.Errorf("RepairHeader() = %+v, %v", p, err)
		}
		if h := headerOf(t, s.d); len(h.Keyslots) != 0 {
			t.Error("the keyslot is back")
		}
	})
	t.Run("killed by cryptsetup, and can't be read for a moment", func(t *testing.T) {
		for name, last := range map[string]int64{"all": 2*copySize - backupPage, "the keyslot": 2*copySize + backupPage} {
			s := serve(t, a, b)
			h := headerOf(t, s.d)
			area := h.Keyslots[0].Area
			if name == "all" {
				delete(h.Keyslots, 0)
				h.Digests[0].Keyslots = nil
				if err := luks2.Write(s.d, h); err != nil {
					t.Fatal(err)
				}
			} else {
				poke(t, s.d, 0, make([]byte, 2*copySize))
			}
			poke(t, s.d, int64(area.Offset)+backupPage, bytes.Repeat([]byte{7}, backupPage))
			before := s.d.Bytes()
			over, reads := false, 0
			s.d.Fail(func(op sectortest.Op, _ int, off int64, n int) error {
				if op != sectortest.Read || over || name != "all" && off != last {
					return nil
				}
				over = off == last && n == backupPage // it has just been looked whose that is
				reads++
				return syscall.EIO
			})
			_, err := s.repair(t, false)
			s.d.Fail(nil)
			if !errors.Is(err, luks2.ErrChanged) || !over || !bytes.Equal(s.d.Bytes(), before) {
				t.Errorf("%s: RepairHeader() = %v, after %d reads that failed", name, err, reads)
			}
			p, err := s.repair(t, false)
			if name == "all" && (err != nil || p.Problem != "") || name != "all" && !errors.Is(err, ErrDamaged) {
				t.Errorf("%s: RepairHeader() once it can be read = %+v, %v", name, p, err)
			}
		}
	})
	t.Run("removed and not known", func(t *testing.T) {
		s := serve(t, a, b)
		if _, err := RemoveRecoveryKey(t.Context(), s.d, s.keys.unseal, OnlySlot, s.options()); err != nil {
			t.Fatal(err)
		}
		gone(t, s)
		for _, force := range []bool{false, true} {
			if _, err := s.repair(t, force); !errors.Is(err, ErrAuth) {
				t.Errorf("force %v: %v", force, err)
			}
		}
		if _, _, err := luks2.Read(s.d); err == nil {
			t.Error("a header was written")
		}
	})
	t.Run("known and not kept", func(t *testing.T) {
		s := serve(t, a, b)
		s.pins = nil
		newer := *s.v.Known()
		newer.Generation, newer.Digest = 2, "of which nobody could read the rest"
		s.v.known.Store(&newer)
		gone(t, s)
		if _, err := s.repair(t, true); !errors.Is(err, ErrNotVolume) {
			t.Errorf("RepairHeader() = %v", err)
		}
	})
	t.Run("another than was judged", func(t *testing.T) {
		s := serve(t, a)
		takeToken(t, s)
		s.v.Tokens(t.Context(), s.keys.unseal, s.options())
		poke(t, s.d, 0, formatWith(t, FormatOptions{Seal: []Sealer{a.seal}}).Bytes()[:2*copySize])
		if _, err := s.v.RepairHeader(t.Context(), s.options(), RepairOptions{DryRun: true}); !errors.Is(err, luks2.ErrChanged) {
			t.Errorf("RepairHeader() = %v", err)
		}
	})
	t.Run("newer, and not signed", func(t *testing.T) {
		// What a host refuses that asks for a signature another one may have made.
		s := serve(t, a, b)
		s.pins = nil
		if _, err := AddToken(t.Context(), s.d, s.keys.unseal, b.seal, s.options()); err != nil {
			t.Fatal(err)
		}
		before := s.d.Bytes()
		o := OpenOptions{Trusted: []TrustedKey{}}
		if _, err := s.v.Tokens(t.Context(), s.keys.unseal, o); !errors.Is(err, ErrAuth) {
			t.Fatalf("Tokens() = %v", err)
		}
		if p, err := s.v.RepairHeader(t.Context(), o, RepairOptions{}); !errors.Is(err, ErrDamaged) || !strings.Contains(p.Problem, "says that it is a newer one") || !bytes.Equal(s.d.Bytes(), before) {
			t.Errorf("RepairHeader() = %+v, %v", p, err)
		}
	})
	t.Run("no pins now", func(t *testing.T) {
		s := serve(t, a)
		gone(t, s)
		s.pins = &otherPins{err: fmt.Errorf("%w: busy", ErrNoPins)}
		if _, err := s.repair(t, false); !errors.Is(err, ErrNoPins) {
			t.Errorf("RepairHeader() = %v", err)
		}
	})
	t.Run("newer, and can't be judged", func(t *testing.T) {
		s := serve(t, a, b)
		if _, err := AddToken(t.Context(), s.d, s.keys.unseal, b.seal, s.options()); err != nil {
			t.Fatal(err)
		}
		want := s.d.Bytes()
		s.keys = ring() // no key answers
		s.v.Tokens(t.Context(), s.keys.unseal, s.options())
		if _, err := s.v.RepairHeader(t.Context(), s.options(), RepairOptions{Force: true, Saved: "00"}); err == nil || errors.Is(err, ErrAuth) || errors.Is(err, luks2.ErrChanged) {
			t.Errorf("RepairHeader() = %v", err)
		}
		// One that comes between the look and the repair.
		s.keys = ring(a, b)
		s.v.Tokens(t.Context(), s.keys.unseal, s.options())
		if _, err := AddToken(t.Context(), s.d, s.keys.unseal, b.seal, s.options()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.v.RepairHeader(t.Context(), s.options(), RepairOptions{Force: true, Saved: "00"}); !errors.Is(err, luks2.ErrChanged) {
			t.Errorf("RepairHeader() of another = %v", err)
		}
		if bytes.Equal(s.d.Bytes(), want) {
			t.Error("internal: nothing was added")
		}
		if p, err := s.repair(t, false); err != nil || p.Problem != "" {
			t.Errorf("RepairHeader() of the newest = %+v, %v", p, err)
		}
	})
	t.Run("of another program", func(t *testing.T) {
		s := serve(t, a)
		h := headerOf(t, s.d)
		h.Config.Requirements = []string{"online-reencrypt-v2"}
		if err := luks2.Write(s.d, h); err != nil {
			t.Fatal(err)
		}
		if _, err := s.repair(t, true); !errors.Is(err, ErrUnsupported) {
			t.Errorf("RepairHeader() = %v", err)
		}
	})
	t.Run("suspended", func(t *testing.T) {
		s := serve(t, a, b)
		if err := s.v.Suspend(SuspendRefuse); err != nil {
			t.Fatal(err)
		}
		if _, err := AddToken(t.Context(), s.d, s.keys.unseal, b.seal, s.options()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.repair(t, true); !errors.Is(err, ErrSuspended) {
			t.Errorf("another header: %v", err)
		}
		poke(t, s.d, 0, s.first[:1<<20])
		gone(t, s)
		s.pins = nil
		if _, err := s.repair(t, false); err != nil {
			t.Fatal(err)
		}
		if err := s.v.Resume(t.Context(), s.keys.unseal, OpenOptions{}); err != nil {
			t.Error(err)
		}
		gone(t, s)
		if _, err := s.repair(t, false); err != nil {
			t.Errorf("after the volume was resumed: %v", err)
		}
	})
	t.Run("erased", func(t *testing.T) {
		s := serve(t, a)
		f := s.v.KeptHeader()
		s.v.ForgetHeader()
		if fi, err := f.Stat(); err != nil || fi.Size() != 0 {
			t.Errorf("the header is still in memory: %v, %v", fi, err)
		}
		// A look that comes now, before the header is erased.
		if _, err := s.v.Tokens(t.Context(), s.keys.unseal, s.options()); err != nil || s.v.KeptHeader() != nil {
			t.Errorf("it is kept again: %v", err)
		}
		if _, err := Erase(t.Context(), s.d, s.v.UUID(), false); err != nil {
			t.Fatal(err)
		}
		for _, force := range []bool{false, true} {
			if _, err := s.repair(t, force); !errors.Is(err, ErrNotVolume) {
				t.Errorf("force %v: %v", force, err)
			}
		}
	})
	t.Run("closed", func(t *testing.T) {
		s := serve(t, a)
		gone(t, s)
		s.v.StopRepairs()
		if _, err := s.repair(t, false); !errors.Is(err, ErrClosed) {
			t.Errorf("RepairHeader() = %v", err)
		}
	})
}

// TestRepairDisk: what a bad disk does to a repair.
func TestRepairDisk(t *testing.T) {
	a := &kek{name: "a"}
	t.Run("sectors that can't be read", func(t *testing.T) {
		s := serve(t, a)
		written := map[int64]bool{}
		s.d.Fail(func(op sectortest.Op, _ int, off int64, n int) error {
			for at := off &^ 4095; at < off+int64(n) && at < 1<<20; at += 4096 {
				if op == sectortest.Write {
					written[at] = true
				} else if op == sectortest.Read && !written[at] {
					return syscall.EIO
				}
			}
			return nil
		})
		if p, err := s.repair(t, false); err != nil || !p.Whole || p.Foreign {
			t.Fatalf("RepairHeader() = %+v, %v", p, err)
		}
		s.d.Fail(nil)
		s.whole(t, s.d)
	})
	t.Run("a flush that fails", func(t *testing.T) {
		s := serve(t, a)
		poke(t, s.d, 0, make([]byte, 1<<20))
		s.d.Fail(func(op sectortest.Op, _ int, _ int64, _ int) error {
			if op == sectortest.Sync {
				return syscall.EIO
			}
			return nil
		})
		if _, err := s.repair(t, false); !errors.Is(err, syscall.EIO) {
			t.Errorf("RepairHeader() = %v", err)
		}
		if !s.v.Failed() {
			t.Error("the error may be of what was written to the volume, which goes on")
		}
		s.d.Fail(nil)
		if _, err := s.repair(t, false); err != nil { // so that there is a header for the next start
			t.Errorf("of a volume that has failed: %v", err)
		}
		s.whole(t, s.d)
	})
	t.Run("writes that are lost", func(t *testing.T) {
		s := serve(t, a)
		poke(t, s.d, 0, make([]byte, 1<<20))
		s.v.b = deaf{s.d}
		if _, err := s.repair(t, false); err == nil {
			t.Error("nothing was written, and it says that all is well")
		}
	})
	t.Run("writes to a keyslot that are lost", func(t *testing.T) {
		s := serve(t, a)
		poke(t, s.d, 0, make([]byte, 1<<20))
		s.v.b = deafAt{s.d, 2 * copySize}
		if _, err := s.repair(t, false); !errors.Is(err, ErrDamaged) {
			t.Errorf("RepairHeader() = %v", err)
		}
		if _, _, err := luks2.Read(s.d); err == nil {
			t.Error("there is a header, and not its keyslot")
		}
	})
	t.Run("a keyslot that could not be read", func(t *testing.T) {
		s := serve(t, a)
		s.d.Fail(func(op sectortest.Op, _ int, off int64, _ int) error {
			if op == sectortest.Read && off == 2*copySize {
				return syscall.EIO
			}
			return nil
		})
		v, err := Open(t.Context(), s.d, s.keys.unseal, s.options())
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		s.d.Fail(nil)
		s.v = v
		poke(t, s.d, 0, make([]byte, 2*copySize))
		if p, err := s.repair(t, false); err != nil || !slices.Equal(p.Missing, []int{0}) {
			t.Fatalf("RepairHeader() = %+v, %v", p, err)
		}
		s.whole(t, s.d) // nobody has touched the area
	})
}

// deafAt loses what is written at an offset.
type deafAt struct {
	*sectortest.Disk
	off int64
}

func (d deafAt) WriteAt(p []byte, off int64) (int, error) {
	if off == d.off {
		return len(p), nil
	}
	return d.Disk.WriteAt(p, off)
}

// TestRepairCut cuts the power, or kills the server, everywhere in a repair. A header
// that can be read is the one from before, or the volume's with its keyslots; and the
// next server can do it again.
func TestRepairCut(t *testing.T) {
	if inHalves {
		return // it makes no requests, so that is what was run before
	}
	a, b := &kek{name: "a"}, &kek{name: "b"}
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, s *served)
	}{
		{"gone", func(t *testing.T, s *served) { poke(t, s.d, 0, make([]byte, 1<<20)) }},
		{"an older header", func(t *testing.T, s *served) {
			if _, err := AddToken(t.Context(), s.d, s.keys.unseal, b.seal, s.options()); err != nil {
				t.Fatal(err)
			}
			if _, err := s.v.Tokens(t.Context(), s.keys.unseal, s.options()); err != nil {
				t.Fatal(err)
			}
			poke(t, s.d, 0, s.first[:2*copySize])
		}},
		{"a high sequence id", takeToken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, a, b)
			tt.damage(t, s)
			want := s.v.Known().Digest
			kept := s.v.KeptHeader()
			// next is the server after the one that was killed.
			next := func(b Backing) *served {
				v, err := Continue(b, s.v.State(), s.handover, SuspendRefuse)
				if err != nil {
					t.Fatal(err)
				}
				// What is held stays as it is whatever this one does with its own.
				image, err := io.ReadAll(io.NewSectionReader(kept, 0, dataOffset))
				if err != nil {
					t.Fatal(err)
				}
				f, err := os.CreateTemp(t.TempDir(), "")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.Write(image); err != nil {
					t.Fatal(err)
				}
				if err := v.TakeKept(f); err != nil {
					t.Fatal(err)
				}
				n := *s
				n.v = v
				return &n
			}
			states, valid := 0, 0
			seen := false
			cuts(t, s.d, func(b Backing) error {
				_, err := next(b).repair(t, true)
				return err
			}, func(at string, left *sectortest.Disk) {
				states++
				h, _, err := luks2.Read(left)
				ours := err == nil && s.v.Knows(h)
				first := make([]byte, copySize)
				if _, err := left.ReadAt(first, 0); err != nil {
					t.Fatal(err)
				}
				if c, err := luks2.Decode(first, 0); err == nil && s.v.Knows(c) && !ours {
					t.Fatalf("after %s: the header is there, and another counts", at)
				}
				if seen && !ours {
					t.Fatalf("after %s: the header was there, and isn't any more: %v", at, err)
				}
				if seen = ours; ours {
					valid++
					k := h.Keyslots[0].Area
					if area := left.Bytes()[k.Offset:][:k.Size]; !bytes.Equal(area, s.first[k.Offset:][:k.Size]) {
						t.Fatalf("after %s: the header is there and its keyslot isn't", at)
					}
				}
				if states%97 != 0 && !(ours && valid%5 == 1) {
					return
				}
				again := bytesDisk(left.Bytes())
				n := next(again)
				n.d = again
				if _, err := n.repair(t, true); err != nil {
					t.Fatalf("after %s: again: %v", at, err)
				}
				if h := headerOf(t, again); !s.v.Knows(h) {
					t.Fatalf("after %s: another header than %s", at, want)
				}
				s.whole(t, again)
			})
			if states < 8 || valid < 2 {
				t.Errorf("%d states, %d with the header: the test shows little", states, valid)
			}
		})
	}
}

// TestTakeKept: what another process has kept counts only if it's what is known.
func TestTakeKept(t *testing.T) {
	s, other := serve(t, &kek{name: "a"}), serve(t, &kek{name: "b"})
	empty, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		f  *os.File
		ok bool
	}{"its own": {s.v.KeptHeader(), true}, "another's": {other.v.KeptHeader(), false}, "nothing": {empty, false}} {
		v, err := Continue(s.d, s.v.State(), s.handover, SuspendRefuse)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.TakeKept(tt.f); (err == nil) != tt.ok || (v.KeptHeader() != nil) != tt.ok {
			t.Errorf("%s: TakeKept() = %v, it keeps %v", name, err, v.KeptHeader())
		}
		// And from then on what is on the disk.
		if _, err := v.Tokens(t.Context(), nil, s.options()); err != nil || v.KeptHeader() == nil {
			t.Errorf("%s: after a look: %v, it keeps %v", name, err, v.KeptHeader())
		}
		v.Leave()
	}
}

// TestKeptSize: what is kept takes little memory, and of a header that asks for more a
// bounded part is kept.
func TestKeptSize(t *testing.T) {
	used := func(f *os.File) int64 {
		var st syscall.Stat_t
		if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	s := serve(t, &kek{name: "a"})
	if n := used(s.v.KeptHeader()); n < keyslotAreaSize || n > keyslotAreaSize+6*4096 {
		t.Errorf("%d bytes for a header with one keyslot", n)
	}
	h := headerOf(t, s.d)
	k := *h.Keyslots[0]
	k.Area.Offset += k.Area.Size
	k.Area.Size = maxKeptAreas
	h.Keyslots[1] = &k
	h.Digests[0].Keyslots = []int{0, 1}
	if err := luks2.Write(s.d, h); err != nil {
		t.Fatal(err)
	}
	if _, err := s.v.Tokens(t.Context(), nil, s.options()); err != nil {
		t.Fatal(err)
	}
	if n := used(s.v.KeptHeader()); n > keyslotAreaSize+6*4096 {
		t.Errorf("%d bytes", n)
	}
	poke(t, s.d, 0, make([]byte, 1<<20))
	if p, err := s.repair(t, false); err != nil || !slices.Equal(p.Keyslots, []int{0}) || !slices.Equal(p.Missing, []int{1}) {
		t.Errorf("RepairHeader() = %+v, %v", p, err)
	}
	s.whole(t, s.d)
}

// TestTwoRepairs repairs a header several times at once, while others look at it and
// the volume is suspended and resumed.
func TestTwoRepairs(t *testing.T) {
	s := serve(t, &kek{name: "a"})
	poke(t, s.d, 0, make([]byte, 1<<20))
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			s.v.Tokens(context.Background(), s.keys.unseal, s.options())
			if _, err := s.v.RepairHeader(context.Background(), s.options(), RepairOptions{}); err != nil {
				t.Error(err)
			}
			s.v.KeptHeader()
			if i == 0 {
				s.v.Suspend(SuspendRefuse)
				if err := s.v.Resume(context.Background(), s.keys.unseal, s.options()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	s.whole(t, s.d)
	if h := headerOf(t, s.d); h.SeqID != 2 {
		t.Errorf("sequence id %d: it was written more than once", h.SeqID)
	}
}
