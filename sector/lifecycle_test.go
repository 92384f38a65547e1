package sector

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"hostcryptd/sector/luks2"
	"hostcryptd/sector/sectortest"
)

// A kek is a key encryption key with a name, which may not be usable now.
type kek struct {
	name string
	down bool
	hang bool // until the context ends
}

// seal makes a token of the kek's name, and of the volume key under a mask of the
// name, so that another kek gets something else.
func (k *kek) seal(_ context.Context, volume string, key *[32]byte) (json.RawMessage, error) {
	mask := sha256.Sum256([]byte(k.name + volume))
	for i := range mask {
		mask[i] ^= key[i]
	}
	return json.Marshal(map[string]any{"type": "hostcryptd-kek", "keyslots": []string{}, "kek": k.name, "wrapped": mask[:], "kid": "https://v.example/keys/" + k.name + "?a=<&>"})
}

// keyring unseals tokens by the keks it has.
type keyring map[string]*kek

func ring(keks ...*kek) keyring {
	r := keyring{}
	for _, k := range keks {
		r[k.name] = k
	}
	return r
}

func (r keyring) unseal(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
	var t struct {
		KEK     string
		Wrapped []byte
	}
	if err := json.Unmarshal(token, &t); err != nil {
		return err
	}
	k := r[t.KEK]
	if k == nil || len(t.Wrapped) != 32 {
		return fmt.Errorf("no KEK %q here", t.KEK)
	}
	if k.hang {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	if k.down {
		return fmt.Errorf("KEK %q is down", t.KEK)
	}
	mask := sha256.Sum256([]byte(k.name + volume))
	for i := range mask {
		key[i] = mask[i] ^ t.Wrapped[i]
	}
	return nil
}

// formatWith makes a volume in memory.
func formatWith(t testing.TB, o FormatOptions) *sectortest.Disk {
	t.Helper()
	d := sectortest.New(dataOffset + testVolumeSize)
	o.SectorSize = 4096
	if _, err := Format(t.Context(), d, o); err != nil {
		t.Fatal(err)
	}
	return d
}

// headerOf reads the header of d.
func headerOf(t testing.TB, d Backing) *luks2.Header {
	t.Helper()
	h, _, err := luks2.Read(d)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// opens tells how opening d went.
func opens(t testing.TB, d Backing, r keyring, o OpenOptions) error {
	t.Helper()
	o.ReadOnly = true
	v, err := Open(t.Context(), d, r.unseal, o)
	if err != nil {
		return err
	}
	return v.Close()
}

func tokenIDs(t testing.TB, d Backing) (active, retired []int) {
	t.Helper()
	h, _, err := ReadHeader(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range KeyTokens(h) {
		if k.Retired.IsZero() {
			active = append(active, k.ID)
		} else {
			retired = append(retired, k.ID)
		}
	}
	return active, retired
}

// TestTokens adds, replaces and removes tokens, and opens the volume by each.
func TestTokens(t *testing.T) {
	a, b, c := &kek{name: "a"}, &kek{name: "b"}, &kek{name: "c"}
	pins := PinDir(filepath.Join(t.TempDir(), "pins"))
	o := OpenOptions{Pins: pins, HeadStart: time.Millisecond}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, Pins: pins})
	id, err := AddToken(t.Context(), d, ring(a, b).unseal, b.seal, o)
	if err != nil || id != 2 {
		t.Fatalf("AddToken() = %d, %v", id, err)
	}
	for _, r := range []keyring{ring(a), ring(b), ring(a, b), ring(&kek{name: "a", down: true}, b), ring(&kek{name: "a", hang: true}, b)} {
		if err := opens(t, d, r, o); err != nil {
			t.Errorf("with %v: %v", r, err)
		}
	}
	if err := opens(t, d, ring(c), o); err == nil || !strings.Contains(err.Error(), "token 0") || !strings.Contains(err.Error(), "token 2") {
		t.Errorf("with neither: %v", err)
	}

	// A token that doesn't unseal is not written.
	before := d.Bytes()
	if _, err := AddToken(t.Context(), d, ring(a).unseal, c.seal, o); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("AddToken of a token that does not unseal: %v", err)
	}
	liar := func(ctx context.Context, volume string, _ *[32]byte) (json.RawMessage, error) {
		return c.seal(ctx, volume, &[32]byte{})
	}
	if _, err := AddToken(t.Context(), d, ring(a, c).unseal, liar, o); !errors.Is(err, ErrAuth) {
		t.Errorf("AddToken of a token with another key: %v", err)
	}
	if !bytes.Equal(before, d.Bytes()) {
		t.Error("a refused AddToken wrote")
	}

	// Replacing keeps the old one for a time.
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return c.seal(ctx, volume, key)
	}
	id, err = ReplaceToken(t.Context(), d, ring(a, b, c).unseal, 2, rewrap, time.Hour, o)
	if err != nil || id != 3 {
		t.Fatalf("ReplaceToken() = %d, %v", id, err)
	}
	if active, retired := tokenIDs(t, d); !slices.Equal(active, []int{0, 3}) || !slices.Equal(retired, []int{2}) {
		t.Errorf("tokens %v, retired %v", active, retired)
	}
	for _, k := range []*kek{a, b, c} {
		if err := opens(t, d, ring(k), o); err != nil {
			t.Errorf("with %s: %v", k.name, err)
		}
	}
	all := ring(a, b, c).unseal
	if gone, err := DropRetired(t.Context(), d, all, time.Now(), o); err != nil || gone != nil {
		t.Errorf("DropRetired() before its time = %v, %v", gone, err)
	}
	// Not while it's the only one that works.
	if gone, err := DropRetired(t.Context(), d, ring(b).unseal, time.Now().Add(2*time.Hour), o); err != nil || gone != nil {
		t.Errorf("DropRetired() of what opens the volume = %v, %v", gone, err)
	}
	if gone, err := DropRetired(t.Context(), d, all, time.Now().Add(2*time.Hour), o); err != nil || !slices.Equal(gone, []int{2}) {
		t.Errorf("DropRetired() = %v, %v", gone, err)
	}
	if err := opens(t, d, ring(b), o); err == nil {
		t.Error("a token that was dropped opens the volume")
	}
	if _, err := ReplaceToken(t.Context(), d, all, 2, rewrap, 0, o); err == nil || !strings.Contains(err.Error(), "there is no token 2") {
		t.Errorf("ReplaceToken of a token that's gone: %v", err)
	}
	if _, err := ReplaceToken(t.Context(), d, all, 0, rewrap, 0, o); err != nil {
		t.Error(err)
	}
	if active, retired := tokenIDs(t, d); len(active) != 2 || retired != nil || slices.Contains(active, 0) {
		t.Errorf("tokens %v, retired %v", active, retired)
	}
	h, _, _ := ReadHeader(t.Context(), d)
	if g, err := Generation(h); err != nil || g != 5 {
		t.Errorf("Generation() = %d, %v", g, err)
	}
	if p, err := pins.Load(h.UUID); err != nil || p.Generation != 5 {
		t.Errorf("pin %+v, %v", p, err)
	}
}

// TestRemoveToken is the table of what may be removed when.
func TestRemoveToken(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	bDown := &kek{name: "b", down: true}
	for _, tt := range []struct {
		name                    string
		second, recovery, force bool
		ring                    keyring
		last, fails             bool // ErrLastWay, another error
	}{
		{name: "the only way", ring: ring(a), last: true},
		{name: "the only way, forced", ring: ring(a), force: true, last: true},
		{name: "another unseals", second: true, ring: ring(a, b)},
		{name: "another unseals, and this doesn't", second: true, ring: ring(b)},
		{name: "the other is down", second: true, ring: ring(a, bDown), last: true},
		{name: "the other is down, forced", second: true, force: true, ring: ring(a, bDown)},
		{name: "the other is down, recovery key", second: true, recovery: true, ring: ring(a, bDown), last: true},
		{name: "the other is down, recovery key, forced", second: true, recovery: true, force: true, ring: ring(a, bDown)},
		{name: "only a recovery key would be left", recovery: true, ring: ring(a), last: true},
		{name: "only a recovery key would be left, forced", recovery: true, force: true, ring: ring(a)},
		{name: "nothing unseals, forced", second: true, force: true, ring: ring(bDown), fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := FormatOptions{Seal: []Sealer{a.seal}}
			if tt.second {
				f.Seal = append(f.Seal, b.seal)
			}
			if tt.recovery {
				f.RecoveryKey = NewRecoveryKey()
			}
			d := formatWith(t, f)
			before := d.Bytes()
			err := RemoveToken(t.Context(), d, tt.ring.unseal, 0, tt.force, OpenOptions{})
			if tt.last != errors.Is(err, ErrLastWay) || (tt.last || tt.fails) != (err != nil) {
				t.Fatalf("RemoveToken() = %v", err)
			}
			if err != nil {
				if !bytes.Equal(before, d.Bytes()) {
					t.Error("a refused RemoveToken wrote")
				}
				return
			}
			if opens(t, d, ring(a), OpenOptions{}) == nil {
				t.Error("the token that was removed opens the volume")
			}
			if tt.second {
				if err := opens(t, d, ring(b), OpenOptions{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestTwoChanges has another command change the header while one is asking for a
// key, which holds no lock: neither may take away what the other has shown to be a
// way in, nor what has only the number of what was to be removed.
func TestTwoChanges(t *testing.T) {
	a, b, c, e := &kek{name: "a"}, &kek{name: "b"}, &kek{name: "c", down: true}, &kek{name: "e"}
	all := ring(a, b, c, e)
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return b.seal(ctx, volume, key)
	}
	remove := func(id int, force bool) func(Backing, Unsealer) error {
		return func(d Backing, unseal Unsealer) error {
			return RemoveToken(context.Background(), d, unseal, id, force, OpenOptions{})
		}
	}
	removeSlot := func(d Backing, unseal Unsealer) error {
		_, err := RemoveRecoveryKey(context.Background(), d, unseal, OnlySlot, OpenOptions{})
		return err
	}
	steps := func(steps ...func(Backing, Unsealer) error) func(Backing, Unsealer) error {
		return func(d Backing, unseal Unsealer) error {
			for _, step := range steps {
				if err := step(d, unseal); err != nil {
					return err
				}
			}
			return nil
		}
	}
	retire := func(id int, keep time.Duration) func(Backing, Unsealer) error {
		return func(d Backing, unseal Unsealer) error {
			_, err := ReplaceToken(context.Background(), d, unseal, id, rewrap, keep, OpenOptions{})
			return err
		}
	}
	add := func(d Backing, unseal Unsealer) error {
		_, err := AddToken(context.Background(), d, unseal, e.seal, OpenOptions{})
		return err
	}
	addSlot := func(d Backing, unseal Unsealer) error {
		_, err := AddRecoveryKey(context.Background(), d, unseal, NewRecoveryKey(), OpenOptions{})
		return err
	}
	for _, tt := range []struct {
		name            string
		keks            []*kek
		recovery        bool
		before          func(Backing, Unsealer) error // changes the volume at first
		command, beside func(Backing, Unsealer) error
		want            error // of command
		tokens, slots   int   // that are left
	}{
		{name: "each by the other", keks: []*kek{a, b, c}, command: remove(0, false), beside: remove(1, false), want: luks2.ErrChanged, tokens: 2},
		{name: "each by the other, forced", keks: []*kek{a, b}, command: remove(0, true), beside: remove(1, false), want: luks2.ErrChanged, tokens: 1},
		{name: "what has shown it is retired", keks: []*kek{a, b}, command: remove(1, false), beside: retire(0, time.Hour), want: luks2.ErrChanged, tokens: 3},
		{name: "the keyslot, by a token that goes", keks: []*kek{a}, recovery: true, command: removeSlot, beside: remove(0, true), want: luks2.ErrChanged, slots: 1},
		{name: "another token of this number", keks: []*kek{a, b}, command: remove(1, false), beside: steps(remove(1, false), add), want: luks2.ErrChanged, tokens: 2},
		{name: "another keyslot of this number", keks: []*kek{a}, recovery: true, command: removeSlot, beside: steps(removeSlot, addSlot), want: luks2.ErrChanged, tokens: 1, slots: 1},
		{name: "the expired one, by a token that goes", keks: []*kek{a}, before: retire(0, time.Nanosecond), command: func(d Backing, unseal Unsealer) error {
			_, err := DropRetired(context.Background(), d, unseal, time.Now().Add(time.Hour), OpenOptions{})
			return err
		}, beside: remove(2, true), tokens: 1},
		{name: "something else", keks: []*kek{a, b, c}, command: remove(2, false), beside: remove(1, false), tokens: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := FormatOptions{}
			for _, k := range tt.keks {
				f.Seal = append(f.Seal, k.seal)
			}
			if tt.recovery {
				f.RecoveryKey = NewRecoveryKey()
			}
			d := formatWith(t, f)
			if tt.before != nil {
				if err := tt.before(d, all.unseal); err != nil {
					t.Fatal(err)
				}
			}
			var once sync.Once
			err := tt.command(d, func(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
				err := all.unseal(ctx, volume, token, key)
				if err == nil {
					once.Do(func() {
						if err := tt.beside(d, all.unseal); err != nil {
							t.Errorf("beside: %v", err)
						}
					})
				}
				return err
			})
			if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			active, retired := tokenIDs(t, d)
			if tokens, slots := len(active)+len(retired), len(recoverySlots(headerOf(t, d))); tokens != tt.tokens || slots != tt.slots {
				t.Errorf("%d tokens and %d keyslots are left, want %d and %d", tokens, slots, tt.tokens, tt.slots)
			}
		})
	}
}

// TestRetiredToken: a retired token opens the volume, unless those that stand for
// it were denied, and is not what may be left of the ways in.
func TestRetiredToken(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	both := ring(a, b)
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return b.seal(ctx, volume, key)
	}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	id, err := ReplaceToken(t.Context(), d, both.unseal, 0, rewrap, time.Hour, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	skip := OpenOptions{SkipRetired: true}
	if err := opens(t, d, ring(a), OpenOptions{}); err != nil {
		t.Errorf("by the retired token: %v", err)
	}
	if err := opens(t, d, both, skip); err != nil {
		t.Errorf("by the token in its place: %v", err)
	}
	if opens(t, d, ring(a), skip) == nil {
		t.Error("a retired token that was to be skipped opens the volume")
	}
	// Asked, it's tried only after all others have failed, however slow they are.
	for _, may := range []bool{false, true} {
		slow := ring(a, &kek{name: "b", hang: true})
		asked := 0
		ask := OpenOptions{HeadStart: time.Millisecond, TryTimeout: 50 * time.Millisecond, Retired: func(of KeyToken, others []TokenReport) bool {
			if asked++; of.ID != 0 || len(others) != 1 || others[0].ID != id || others[0].Type != of.Type || !strings.Contains(others[0].Err.Error(), fmt.Sprintf("token %d ", id)) {
				t.Errorf("asked of %d with %v", of.ID, others)
			}
			return may
		}}
		if err := opens(t, d, slow, ask); (err == nil) != may || asked != 1 {
			t.Errorf("may be tried: %v; asked %d times: %v", may, asked, err)
		}
		r, err := Verify(t.Context(), d, slow.unseal, ask)
		if err != nil || r.Opens != may {
			t.Errorf("may be tried: %v; Verify says that it opens: %v, %v", may, r.Opens, err)
		}
	}
	v, err := Open(t.Context(), d, both.unseal, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := v.Suspend(SuspendRefuse); err != nil {
		t.Fatal(err)
	}
	if v.Resume(t.Context(), ring(a).unseal, skip) == nil {
		t.Error("a retired token that was to be skipped resumes the volume")
	}

	before := d.Bytes()
	if err := RemoveToken(t.Context(), d, both.unseal, id, false, OpenOptions{}); !errors.Is(err, ErrLastWay) || !strings.Contains(err.Error(), "retired") {
		t.Errorf("RemoveToken() that leaves a retired token = %v", err)
	}
	if !bytes.Equal(before, d.Bytes()) {
		t.Error("a refused RemoveToken wrote")
	}
	if err := RemoveToken(t.Context(), d, both.unseal, id, true, OpenOptions{}); err != nil {
		t.Errorf("by force: %v", err)
	}
	if active, retired := tokenIDs(t, d); active != nil || !slices.Equal(retired, []int{0}) {
		t.Errorf("tokens %v, retired %v", active, retired)
	}
}

// TestSlowToken has a token that never answers, before one that does.
func TestSlowToken(t *testing.T) {
	a, b := &kek{name: "a", hang: true}, &kek{name: "b"}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal, b.seal}})
	begun := time.Now()
	if err := opens(t, d, ring(a, b), OpenOptions{HeadStart: 20 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took < 20*time.Millisecond || took >= DefaultHeadStart {
		t.Errorf("opened after %v", took)
	}
	// Without another, it's bounded and says so.
	begun = time.Now()
	err := opens(t, d, ring(a), OpenOptions{TryTimeout: 50 * time.Millisecond})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer in 50ms") || time.Since(begun) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(begun))
	}
	// A caller who gives up isn't kept.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	begun = time.Now()
	if _, err := Open(ctx, d, ring(a).unseal, OpenOptions{}); err == nil || time.Since(begun) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(begun))
	}
	// One after the other while they answer: no vault is asked without need.
	var asked atomic.Int32
	count := func(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
		asked.Add(1)
		return ring(&kek{name: "a"}, b).unseal(ctx, volume, token, key)
	}
	if v, err := Open(t.Context(), d, count, OpenOptions{}); err != nil || asked.Load() != 1 {
		t.Errorf("asked %d times, %v", asked.Load(), err)
	} else {
		v.Close()
	}
}

// cuts calls after with every state that a power cut can leave behind during
// change, on a disk that writes in order: after each write, and in each write
// after every 512 bytes.
func cuts(t *testing.T, d *sectortest.Disk, change func(b Backing) error, after func(at string, left *sectortest.Disk)) {
	t.Helper()
	log := &logged{Disk: d}
	start := d.Bytes()
	if err := change(log); err != nil {
		t.Fatal(err)
	}
	left := sectortest.New(int64(len(start)))
	if _, err := left.WriteAt(start, 0); err != nil {
		t.Fatal(err)
	}
	after("the start", left)
	for i, w := range log.writes {
		for n := 0; n < len(w.b); n += 512 {
			part := w.b[n:min(n+512, len(w.b))]
			if _, err := left.WriteAt(part, w.off+int64(n)); err != nil {
				t.Fatal(err)
			}
			// What doesn't change the device doesn't change the answer.
			if same := start[w.off+int64(n):][:len(part)]; bytes.Equal(same, part) {
				continue
			} else {
				copy(same, part)
			}
			after(fmt.Sprintf("write %d of %d, %d bytes", i+1, len(log.writes), n+len(part)), left)
		}
	}
}

type logged struct {
	*sectortest.Disk
	writes []struct {
		off int64
		b   []byte
	}
}

func (l *logged) WriteAt(p []byte, off int64) (int, error) {
	l.writes = append(l.writes, struct {
		off int64
		b   []byte
	}{off, bytes.Clone(p)})
	return l.Disk.WriteAt(p, off)
}

// TestRewrapCrash cuts the power everywhere in a rewrap. The old KEK opens what
// is left always, and the new one from the moment that it's in one whole copy;
// nothing is refused for its generation.
func TestRewrapCrash(t *testing.T) {
	old, fresh := &kek{name: "old"}, &kek{name: "new"}
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return fresh.seal(ctx, volume, key)
	}
	dir := t.TempDir()
	pins := PinDir(filepath.Join(dir, "pins"))
	d := formatWith(t, FormatOptions{Seal: []Sealer{old.seal}, Pins: pins})
	h, _, _ := luks2.Read(d)
	pinned, err := os.ReadFile(pins.Path(h.UUID))
	if err != nil {
		t.Fatal(err)
	}
	states, withNew := 0, 0
	was := false
	cuts(t, d, func(b Backing) error {
		_, err := ReplaceToken(t.Context(), b, ring(old, fresh).unseal, 0, rewrap, time.Hour, OpenOptions{Pins: pins})
		return err
	}, func(at string, left *sectortest.Disk) {
		states++
		// The host was cut off with its pin as it was, or just raised.
		if err := os.WriteFile(pins.Path(h.UUID), pinned, 0o600); err != nil {
			t.Fatal(err)
		}
		o := OpenOptions{Pins: pins}
		if err := opens(t, left, ring(old), o); err != nil {
			t.Fatalf("after %s: the old KEK: %v", at, err)
		}
		now := opens(t, left, ring(fresh), o) == nil
		if was && !now {
			t.Fatalf("after %s: the new KEK opened the volume before, and does not now", at)
		}
		if was = now; now {
			withNew++
		}
	})
	if states < 10 || withNew < 3 || withNew == states {
		t.Errorf("%d states, %d with the new token: the test shows little", states, withNew)
	}
	// The same on a disk that keeps what it likes of what was not flushed.
	for seed := range uint64(20) {
		r := mrand.New(mrand.NewPCG(seed, 1))
		d := formatWith(t, FormatOptions{Seal: []Sealer{old.seal}})
		cut := 1 + r.IntN(9)
		d.Fail(func(op sectortest.Op, n int, _ int64, _ int) error {
			if op == sectortest.Write && n >= cut || op == sectortest.Sync && n*3 > cut {
				return errors.New("power cut")
			}
			return nil
		})
		_, err := ReplaceToken(t.Context(), d, ring(old, fresh).unseal, 0, rewrap, time.Hour, OpenOptions{})
		d.Fail(nil)
		if openErr := opens(t, d.Crash(r, 512), ring(old), OpenOptions{}); openErr != nil {
			t.Errorf("seed %d, cut at write %d (%v): %v", seed, cut, err, openErr)
		}
	}
}

// TestRotateCrash: at every moment of a rotation one of the recovery keys opens
// the volume.
func TestRotateCrash(t *testing.T) {
	a := &kek{name: "a"}
	old, fresh := NewRecoveryKey(), NewRecoveryKey()
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, RecoveryKey: old})
	oldArea := d.Bytes()[2*copySize:][:keyslotAreaSize]
	type state struct {
		at   string
		disk *sectortest.Disk
	}
	var states []state
	seen := map[[32]byte]bool{}
	cuts(t, d, func(b Backing) error {
		id, removed, err := RotateRecoveryKey(t.Context(), b, ring(a).unseal, OnlySlot, fresh, OpenOptions{})
		if id != 1 || removed != 0 {
			t.Errorf("RotateRecoveryKey() = %d, %d, %v", id, removed, err)
		}
		return err
	}, func(at string, left *sectortest.Disk) {
		// argon2 is slow, so only states in which what decides differs: which
		// header counts, and the areas that it names.
		h, _, err := luks2.Read(left)
		if err != nil {
			t.Fatalf("after %s: %v", at, err)
		}
		hash := sha256.New()
		for _, k := range h.Keyslots {
			fmt.Fprint(hash, k.Area.Offset)
			area := make([]byte, k.Area.Size)
			left.ReadAt(area, int64(k.Area.Offset))
			hash.Write(area)
		}
		if sum := [32]byte(hash.Sum(nil)); !seen[sum] {
			seen[sum] = true
			states = append(states, state{at, sectortest.New(left.Size())})
			states[len(states)-1].disk.WriteAt(left.Bytes(), 0)
		}
	})
	if len(states) != 2 {
		t.Errorf("%d states that differ, want the old and the new", len(states))
	}
	for _, s := range states {
		_, adds1, err1 := FindRecoveryKey(t.Context(), s.disk, old)
		_, adds2, err2 := FindRecoveryKey(t.Context(), s.disk, fresh)
		if (err1 == nil) == (err2 == nil) || adds1 == adds2 {
			t.Errorf("after %s: old key %v, %v, new key %v, %v", s.at, adds1, err1, adds2, err2)
		}
	}
	if bytes.Contains(d.Bytes(), oldArea[:4096]) {
		t.Error("the area of the old keyslot is still there")
	}
}

// TestForgedHeader is the attack that no MAC can stop. The KEK's public half is
// public: who can write to the disk formats it himself, with a volume key of his
// own, the UUID of the victim's and a token that the vault will unwrap. The
// victim's host would then write its data under the attacker's key. The pin
// tells, and a signature.
func TestForgedHeader(t *testing.T) {
	vault, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	// Sealing takes the public key only, unsealing is what the vault does.
	seal := func(_ context.Context, volume string, key *[32]byte) (json.RawMessage, error) {
		wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, &vault.PublicKey, key[:], nil)
		if err != nil {
			return nil, err
		}
		return json.Marshal(map[string]any{"type": "hostcryptd-rsa", "keyslots": []string{}, "wrapped": wrapped})
	}
	unseal := func(_ context.Context, volume string, token json.RawMessage, key *[32]byte) error {
		var t struct{ Wrapped []byte }
		if err := json.Unmarshal(token, &t); err != nil {
			return err
		}
		b, err := rsa.DecryptOAEP(sha256.New(), nil, vault, t.Wrapped, nil)
		copy(key[:], b)
		return err
	}
	pins := PinDir(t.TempDir())
	const uuid = "6e0e0c1c-2d2d-4c4c-8b8b-1a1a2b2b3c3c"
	victim := formatWith(t, FormatOptions{UUID: uuid, Seal: []Sealer{seal}, Pins: pins})

	forged := formatWith(t, FormatOptions{UUID: uuid, Seal: []Sealer{seal}})
	if _, err := victim.WriteAt(forged.Bytes()[:dataOffset], 0); err != nil {
		t.Fatal(err)
	}
	// Without the pin the attack works.
	v, err := Open(t.Context(), victim, unseal, OpenOptions{})
	if err != nil {
		t.Fatalf("the forged header should be good in itself: %v", err)
	}
	v.Close()
	before := victim.Bytes()
	_, err = Open(t.Context(), victim, unseal, OpenOptions{Pins: pins})
	if !errors.Is(err, ErrAuth) || !strings.Contains(err.Error(), "header accept") || !strings.Contains(err.Error(), "forged") {
		t.Errorf("Open() = %v, want ErrAuth that says what to do", err)
	}
	for name, err := range map[string]error{
		"AddToken": func() error {
			_, err := AddToken(t.Context(), victim, unseal, seal, OpenOptions{Pins: pins})
			return err
		}(),
		"RepairHeader": func() error {
			_, err := RepairHeader(t.Context(), victim, unseal, false, OpenOptions{Pins: pins})
			return err
		}(),
	} {
		if !errors.Is(err, ErrAuth) {
			t.Errorf("%s of a forged header: %v", name, err)
		}
	}
	if r, err := Verify(t.Context(), victim, unseal, OpenOptions{Pins: pins}); err != nil || r.Opens || len(r.Findings) != 1 || !errors.Is(r.PinError, ErrAuth) {
		t.Errorf("Verify() = %+v, %v", r, err)
	}
	if !bytes.Equal(before, victim.Bytes()) {
		t.Error("a refused header was written to")
	}
	// The process that derives keys elsewhere tells the same.
	derive := func(_ context.Context, header []byte, volumeKey *[32]byte, dek *[64]byte) (string, error) {
		return DeriveDEK(header, volumeKey, dek)
	}
	if _, err := Open(t.Context(), victim, unseal, OpenOptions{Pins: pins, Derive: derive}); !errors.Is(err, ErrAuth) {
		t.Errorf("Open() with a Deriver = %v", err)
	}
	// So does a signature, on a host that never saw the volume.
	signer, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	trusted := []TrustedKey{&vault.PublicKey, &signer.PublicKey}
	sign := func(_ context.Context, volume string, digest [32]byte) (*Signature, error) {
		if volume != uuid {
			t.Errorf("signing for volume %s", volume)
		}
		value, err := rsa.SignPSS(rand.Reader, signer, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		return &Signature{"signer", AlgorithmPS256, base64.StdEncoding.EncodeToString(value)}, err
	}
	asks := OpenOptions{Trusted: trusted}
	signed := formatWith(t, FormatOptions{UUID: uuid, Seal: []Sealer{seal}, Sign: sign, Trusted: trusted})
	if v, err = Open(t.Context(), signed, unseal, asks); err != nil {
		t.Fatal(err)
	}
	v.Close()
	refused := func(name string, d Backing) {
		t.Helper()
		if _, err := Open(t.Context(), d, unseal, asks); !errors.Is(err, ErrAuth) || !strings.Contains(err.Error(), "header sign") {
			t.Errorf("%s: Open() = %v, want ErrAuth that says what to do", name, err)
		}
		if _, err := AddToken(t.Context(), d, unseal, seal, asks); !errors.Is(err, ErrAuth) {
			t.Errorf("%s: AddToken() = %v", name, err)
		}
		if r, err := Verify(t.Context(), d, unseal, asks); err != nil || r.Opens || len(r.Findings) != 1 {
			t.Errorf("%s: Verify() = %+v, %v", name, r, err)
		}
	}
	refused("no signature", forged)
	if _, err := Open(t.Context(), signed, unseal, OpenOptions{Trusted: trusted[:1]}); !errors.Is(err, ErrAuth) {
		t.Errorf("signed by a key that isn't trusted: %v", err)
	}
	if _, err := Open(t.Context(), signed, unseal, OpenOptions{Trusted: []TrustedKey{}}); !errors.Is(err, ErrAuth) {
		t.Errorf("no key is trusted: %v", err)
	}
	// The real signature, in a header that the attacker has made and knows the
	// volume key of.
	real := headerOf(t, signed)
	stolen := func(_ context.Context, _ string, _ [32]byte) (*Signature, error) { return SignatureOf(real), nil }
	refused("a stolen signature", formatWith(t, FormatOptions{UUID: uuid, Seal: []Sealer{seal}, Sign: stolen}))
	other := func(ctx context.Context, volume string, digest [32]byte) (*Signature, error) {
		s, err := sign(ctx, volume, digest)
		s.Algorithm = "RS256"
		return s, err
	}
	refused("another algorithm", formatWith(t, FormatOptions{UUID: uuid, Seal: []Sealer{seal}, Sign: other}))
	// It's under the MAC as everything is.
	_, vt, err := findVolumeToken(real)
	if err != nil {
		t.Fatal(err)
	}
	vt.Signature = nil
	text, err := json.Marshal(vt)
	if err != nil {
		t.Fatal(err)
	}
	for id, tk := range real.Tokens {
		if tk.Type == volumeTokenType {
			if real.Tokens[id], err = luks2.NewToken(text); err != nil {
				t.Fatal(err)
			}
		}
	}
	stripped := sectortest.New(signed.Size())
	stripped.WriteAt(signed.Bytes(), 0)
	if err := luks2.Write(stripped, real); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), stripped, unseal, OpenOptions{}); !errors.Is(err, ErrAuth) {
		t.Errorf("the signature was taken out: %v", err)
	}
	// It outlives changes, and can be made later.
	if _, err := AddToken(t.Context(), signed, unseal, seal, asks); err != nil {
		t.Fatal(err)
	}
	if v, err = Open(t.Context(), signed, unseal, asks); err != nil {
		t.Fatal(err)
	}
	v.Close()
	late := formatWith(t, FormatOptions{UUID: uuid, Seal: []Sealer{seal}})
	if err := Sign(t.Context(), late, unseal, other, asks); !errors.Is(err, ErrAuth) || SignatureOf(headerOf(t, late)) != nil {
		t.Errorf("Sign() with a bad signature = %v", err)
	}
	if err := Sign(t.Context(), late, unseal, sign, asks); err != nil {
		t.Fatal(err)
	}
	if v, err = Open(t.Context(), late, unseal, asks); err != nil {
		t.Fatal(err)
	}
	v.Close()
	if _, err := Format(t.Context(), sectortest.New(dataOffset+1<<20), FormatOptions{SectorSize: 4096, Seal: []Sealer{seal}, Trusted: trusted}); !errors.Is(err, ErrAuth) {
		t.Errorf("Format() without the signature that is asked for: %v", err)
	}

	// A person can say that it's right.
	if old, now, err := Accept(t.Context(), victim, unseal, OpenOptions{Pins: pins}); err != nil || old == nil || old.Fingerprint == now.Fingerprint {
		t.Fatalf("Accept() = %v, %v, %v", old, now, err)
	}
	if v, err = Open(t.Context(), victim, unseal, OpenOptions{Pins: pins}); err != nil {
		t.Fatal(err)
	}
	v.Close()
}

// TestOpenAnother has two volumes of one host exchange their places: no key is asked for.
func TestOpenAnother(t *testing.T) {
	a := &kek{name: "a"}
	pins := PinDir(filepath.Join(t.TempDir(), "pins"))
	one := formatWith(t, FormatOptions{UUID: "6e0e0c1c-2d2d-4c4c-8b8b-1a1a2b2b3c3c", Seal: []Sealer{a.seal}, Pins: pins})
	other := formatWith(t, FormatOptions{UUID: "7e0e0c1c-2d2d-4c4c-8b8b-1a1a2b2b3c3c", Seal: []Sealer{a.seal}, Pins: pins})
	o := OpenOptions{UUID: headerOf(t, one).UUID, Pins: pins, RequirePin: true}
	if err := opens(t, one, ring(a), o); err != nil {
		t.Error(err)
	}
	asked := 0
	unseal := func(context.Context, string, json.RawMessage, *[32]byte) error { asked++; return errors.New("asked") }
	if _, err := Open(t.Context(), other, unseal, o); !errors.Is(err, ErrAuth) || asked != 0 {
		t.Errorf("Open() of another volume = %v, want %v; %d tokens were tried", err, ErrAuth, asked)
	}
	if r, err := Verify(t.Context(), other, ring(a).unseal, o); err != nil || r.Opens || len(r.Findings) != 1 {
		t.Errorf("Verify() of another volume = %+v, %v", r, err)
	}
}

// TestReplay puts an older header back, whole.
func TestReplay(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	pins := PinDir(t.TempDir())
	o := OpenOptions{Pins: pins}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal, b.seal}, Pins: pins})
	year := d.Bytes()
	if err := RemoveToken(t.Context(), d, ring(a, b).unseal, 1, false, o); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, d, ring(b), o); err == nil {
		t.Fatal("the removed token opens the volume")
	}
	// Only the token: the MAC tells.
	h, _, err := luks2.Read(d)
	if err != nil {
		t.Fatal(err)
	}
	was, _, _ := luks2.Read(bytes.NewReader(year))
	h.Tokens[1] = was.Tokens[1]
	tampered := sectortest.New(d.Size())
	tampered.WriteAt(d.Bytes(), 0)
	if err := luks2.Write(tampered, h); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, tampered, ring(a, b), OpenOptions{}); !errors.Is(err, ErrAuth) {
		t.Errorf("with the removed token put back: %v", err)
	}
	// All of it: the generation tells.
	replayed := sectortest.New(d.Size())
	replayed.WriteAt(year, 0)
	err = opens(t, replayed, ring(b), o)
	if !errors.Is(err, ErrAuth) || !strings.Contains(err.Error(), "generation 1") || !strings.Contains(err.Error(), "generation 2") || !strings.Contains(err.Error(), "header accept") {
		t.Errorf("an older header: %v", err)
	}
	// Also if its sequence id was raised, which nothing protects.
	was.SeqID += 100
	if err := luks2.Format(replayed, was); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, replayed, ring(b), o); !errors.Is(err, ErrAuth) {
		t.Errorf("an older header with a higher sequence id: %v", err)
	}
	// A generation that was raised without the volume key is no generation.
	_, v, _ := findVolumeToken(was)
	v.setGeneration(9)
	text, _ := json.Marshal(v)
	for id, token := range was.Tokens {
		if token.Type == volumeTokenType {
			was.Tokens[id], _ = luks2.NewToken(text)
		}
	}
	if err := luks2.Format(replayed, was); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, replayed, ring(b), o); !errors.Is(err, ErrAuth) {
		t.Errorf("an older header with a raised generation: %v", err)
	}
	// A damaged pin is not taken for a missing one.
	if err := os.WriteFile(pins.Path(h.UUID), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, d, ring(a), o); !errors.Is(err, ErrAuth) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("with a damaged pin: %v", err)
	}
	if _, now, err := Accept(t.Context(), d, ring(a).unseal, o); err != nil || now.Generation != 2 {
		t.Errorf("Accept() = %v, %v", now, err)
	}
	if fi, err := os.Stat(pins.Path(h.UUID)); err != nil || fi.Mode() != 0o600 {
		t.Errorf("pin: %v, %v", fi.Mode(), err)
	}
	if err := opens(t, d, ring(a), o); err != nil {
		t.Error(err)
	}
	// A host that has not seen the volume trusts it, and then remembers it.
	other := PinDir(filepath.Join(t.TempDir(), "not", "there", "yet"))
	if err := opens(t, d, ring(a), OpenOptions{Pins: other}); err != nil {
		t.Error(err)
	}
	if p, err := other.Load(h.UUID); err != nil || p == nil || p.Generation != 2 {
		t.Errorf("pin at first sight: %v, %v", p, err)
	}
}

// TestTamperEverywhere changes every value in every object of ours, one at a
// time, with a right checksum. Nothing of it may be served.
func TestTamperEverywhere(t *testing.T) {
	a := &kek{name: "a"}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal, a.seal}})
	good, _, err := luks2.Read(d)
	if err != nil {
		t.Fatal(err)
	}
	clean, err := good.Encode(0)
	if err != nil {
		t.Fatal(err)
	}
	var doc any
	if err := json.Unmarshal(bytes.TrimRight(clean[4096:], "\x00"), &doc); err != nil {
		t.Fatal(err)
	}
	cases := 0
	visit(doc, nil, func(path []string, change func() (undo func())) {
		where := strings.Join(path, ".")
		undo := change()
		defer undo()
		text, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		cases++
		forged := make([]byte, len(clean))
		copy(forged, clean[:4096])
		copy(forged[4096:], text)
		sum := sha256.New()
		clear(forged[448 : 448+64])
		sum.Write(forged)
		copy(forged[448:], sum.Sum(nil))
		left := sectortest.New(d.Size())
		left.WriteAt(forged, 0)
		err = opens(t, left, ring(a), OpenOptions{})
		if !errors.Is(err, ErrAuth) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNotVolume) && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s changed: %v", where, err)
		}
		// What leaves a header of the form of ours is for the MAC to find.
		formless := regexp.MustCompile(`^tokens\.2\.(type|version|deks|deks\.0)(\.\(removed\))?$|^tokens\.\d\.(keyslots|type)`)
		if strings.HasPrefix(where, "tokens.") && !errors.Is(err, ErrAuth) && !formless.MatchString(where) {
			t.Errorf("%s changed: %v, want ErrAuth", where, err)
		}
	})
	if cases < 40 {
		t.Errorf("only %d cases", cases)
	}
	// The binary header: the UUID is bound, label and the like are free.
	for _, tt := range []struct {
		name string
		off  int
		want error
	}{
		{"magic", 0, ErrDamaged}, {"version", 7, ErrNotVolume}, {"size", 14, ErrDamaged}, {"sequence id", 23, nil}, {"label", 24, nil},
		{"algorithm", 72, ErrDamaged}, {"salt", 104, nil}, {"UUID", 168, ErrAuth}, {"subsystem", 208, nil}, {"offset", 263, ErrDamaged},
	} {
		forged := bytes.Clone(clean)
		forged[tt.off] ^= 1
		clear(forged[448 : 448+64])
		sum := sha256.Sum256(forged)
		copy(forged[448:], sum[:])
		left := sectortest.New(d.Size())
		left.WriteAt(forged, 0)
		err := opens(t, left, ring(a), OpenOptions{})
		if tt.want == nil && err != nil || tt.want != nil && !errors.Is(err, tt.want) && !errors.Is(err, ErrNotVolume) {
			t.Errorf("%s changed: %v, want %v", tt.name, err, tt.want)
		}
	}
}

// visit offers a change of every scalar below v, and the removal of every member
// of an object, but for what other programs may change.
func visit(v any, path []string, offer func(path []string, change func() func())) {
	free := []string{"config", "keyslots"} // flags; keyslots are empty here
	if len(path) == 1 && slices.Contains(free, path[0]) {
		return
	}
	alter := func(v any) any {
		switch v := v.(type) {
		case string:
			if v == "" {
				return "x"
			}
			// Stay in the alphabet of base64 and of numbers.
			c := byte('1')
			if v[0] == c {
				c = '2'
			}
			return string(c) + v[1:]
		case float64:
			return v + 1
		case bool:
			return !v
		}
		return nil
	}
	switch o := v.(type) {
	case map[string]any:
		for name, member := range o {
			p := append(slices.Clone(path), name)
			if changed := alter(member); changed != nil {
				offer(p, func() func() { o[name] = changed; return func() { o[name] = member } })
			}
			if len(path) > 1 && name != "flags" {
				offer(append(p, "(removed)"), func() func() { delete(o, name); return func() { o[name] = member } })
			}
			visit(member, p, offer)
		}
	case []any:
		for i, member := range o {
			if changed := alter(member); changed != nil {
				offer(append(slices.Clone(path), fmt.Sprint(i)), func() func() { o[i] = changed; return func() { o[i] = member } })
			}
		}
	}
}

// TestVersion1 opens a header as the first version wrote it, and changes it.
func TestVersion1(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	h, _, err := luks2.Read(d)
	if err != nil {
		t.Fatal(err)
	}
	k, err := newKeys(0)
	if err != nil {
		t.Fatal(err)
	}
	defer k.free()
	if _, err := unlock(t.Context(), h, k, ring(a).unseal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	id, v, _ := findVolumeToken(h)
	v.Version, v.Generation = 1, ""
	mac, err := headerMAC(k.volumeKey, h, v)
	if err != nil {
		t.Fatal(err)
	}
	text, _ := json.Marshal(map[string]any{"type": v.Type, "keyslots": []int{}, "version": 1, "size": v.Size, "deks": v.DEKs, "mac": mac})
	h.Tokens[id], _ = luks2.NewToken(text)
	if err := luks2.Write(d, h); err != nil {
		t.Fatal(err)
	}
	pins := PinDir(t.TempDir())
	if err := opens(t, d, ring(a), OpenOptions{Pins: pins}); err != nil {
		t.Fatal(err)
	}
	old := d.Bytes()
	if _, err := AddToken(t.Context(), d, ring(a, b).unseal, b.seal, OpenOptions{Pins: pins}); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, d, ring(b), OpenOptions{Pins: pins}); err != nil {
		t.Error(err)
	}
	d.WriteAt(old, 0)
	if err := opens(t, d, ring(a), OpenOptions{Pins: pins}); !errors.Is(err, ErrAuth) {
		t.Errorf("version 1 put back: %v", err)
	}
}

// TestParseRecoveryKey is the table of how people write a key down.
func TestParseRecoveryKey(t *testing.T) {
	const key = "000011-123453-720885-000000-654313-111111-222222-333333"
	flat := strings.ReplaceAll(key, "-", "")
	for _, text := range []string{
		key, flat, key + "\n", " " + key + "\r\n", strings.ReplaceAll(key, "-", " "), strings.ReplaceAll(key, "-", "\u2013"),
		strings.ReplaceAll(key, "-", " - "), "\ufeff" + key, strings.ReplaceAll(key, "-", "\n"), "\t" + flat[:5] + " " + flat[5:],
	} {
		if got, err := ParseRecoveryKey([]byte(text)); err != nil || string(got) != key {
			t.Errorf("ParseRecoveryKey(%q) = %q, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"": "0 digits", key[:54]: "47 digits", key + "-000011": "more than 8 groups",
		strings.Replace(key, "123453", "123454", 1):  "group 2 is mistyped",
		strings.Replace(key, "123453", "213453", 1):  "group 2 is mistyped", // swapped
		strings.Replace(key, "720885", "720896", 1):  "group 3 is mistyped", // 65536 * 11
		strings.Replace(key, "654313", "65431x", 1):  "group 5 has something else than a digit",
		strings.Replace(key, "654313", "65431", 1):   "group 5 has 5 digits",
		strings.Replace(key, "654313", "6543133", 1): "group 6 has 1 digits",
		"correct horse": "group 1 has something else",
	} {
		_, err := ParseRecoveryKey([]byte(text))
		if !errors.Is(err, ErrMistyped) || !errors.Is(err, ErrWrongKey) || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseRecoveryKey(%q): %v, want %q", text, err, want)
		}
		if err != nil && regexp.MustCompile(`\d{3}`).MatchString(err.Error()) {
			t.Errorf("the error shows digits of the key: %v", err)
		}
	}
	for range 200 {
		key := NewRecoveryKey()
		if got, err := ParseRecoveryKey(key); err != nil || !bytes.Equal(got, key) {
			t.Fatalf("%q: %v", key, err)
		}
	}
}

// TestRemoveRecoveryKey removes a keyslot where its pin can't be noted, and where
// it can't be removed, which is the last way in only if no token unseals.
func TestRemoveRecoveryKey(t *testing.T) {
	a := &kek{name: "a"}
	f := FormatOptions{Seal: []Sealer{a.seal}, RecoveryKey: NewRecoveryKey()}
	d := formatWith(t, f)
	area := headerOf(t, d).Keyslots[0].Area
	full := errors.New("disk full")
	material := func() []byte { return d.Bytes()[area.Offset : area.Offset+area.Size] }
	before := bytes.Clone(material())
	if removed, err := RemoveRecoveryKey(t.Context(), d, ring(a).unseal, OnlySlot, OpenOptions{Pins: &otherPins{raising: full}}); removed != 0 || !errors.Is(err, full) {
		t.Errorf("RemoveRecoveryKey() = %d, %v, want 0, %v", removed, err, full)
	}
	if slots := recoverySlots(headerOf(t, d)); len(slots) != 0 {
		t.Errorf("keyslots %v are left", slots)
	}
	if bytes.Equal(before, material()) {
		t.Error("the keyslot is gone, and its area still holds the key")
	}

	// The only one is none, or one of two.
	for n := range 3 {
		if n > 0 {
			if _, err := AddRecoveryKey(t.Context(), d, ring(a).unseal, NewRecoveryKey(), OpenOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		before := d.Bytes()
		if n == 1 {
			continue
		}
		removed, err := RemoveRecoveryKey(t.Context(), d, ring(a).unseal, OnlySlot, OpenOptions{})
		_, removed2, err2 := RotateRecoveryKey(t.Context(), d, ring(a).unseal, OnlySlot, NewRecoveryKey(), OpenOptions{})
		if err == nil || err2 == nil || removed != OnlySlot || removed2 != OnlySlot || !bytes.Equal(before, d.Bytes()) {
			t.Errorf("the only one of %d: removed %d, %v; rotated %d, %v", n, removed, err, removed2, err2)
		}
	}

	// b takes the place of a, and a is kept: it goes soon.
	b := &kek{name: "b", down: true}
	retired := formatWith(t, f)
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return b.seal(ctx, volume, key)
	}
	if _, err := ReplaceToken(t.Context(), retired, ring(a, &kek{name: "b"}).unseal, 0, rewrap, time.Hour, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	before = retired.Bytes()
	if _, err := RemoveRecoveryKey(t.Context(), retired, ring(a, b).unseal, 0, OpenOptions{}); !errors.Is(err, ErrLastWay) {
		t.Errorf("shown by a retired token: %v", err)
	}
	if !bytes.Equal(before, retired.Bytes()) {
		t.Error("shown by a retired token: refused, and written")
	}

	for _, tt := range []struct {
		name string
		ring keyring
		o    OpenOptions
		last bool
	}{
		{"none unseals", ring(), OpenOptions{}, true},
		{"pins out of reach", ring(a), OpenOptions{Pins: &otherPins{err: fmt.Errorf("%w: busy", ErrNoPins)}}, false},
	} {
		d := formatWith(t, f)
		before := d.Bytes()
		if _, err := RemoveRecoveryKey(t.Context(), d, tt.ring.unseal, 0, tt.o); err == nil || errors.Is(err, ErrLastWay) != tt.last {
			t.Errorf("%s: %v", tt.name, err)
		}
		if !bytes.Equal(before, d.Bytes()) {
			t.Errorf("%s: refused, and written", tt.name)
		}
	}
}

// TestBackup restores a backup in every situation, with cryptsetup's backup and
// its test of the recovery key beside.
func TestBackup(t *testing.T) {
	name, keyFile, d := image(t, 4096, dataOffset+1<<20)
	pins := PinDir(t.TempDir())
	o := OpenOptions{Pins: pins}
	a := &kek{name: "a"}
	unseal := func(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
		if err := ring(a).unseal(ctx, volume, token, key); err == nil {
			return nil
		}
		return testUnseal(ctx, volume, token, key)
	}
	var backup bytes.Buffer
	info, err := Backup(t.Context(), d, &backup)
	if err != nil {
		t.Fatal(err)
	}
	// The same bytes as cryptsetup's, after the page.
	theirs := filepath.Join(t.TempDir(), "theirs")
	cryptsetup(t, "luksHeaderBackup", "--header-backup-file", theirs, name)
	want, err := os.ReadFile(theirs)
	if err != nil || !bytes.Equal(backup.Bytes()[backupPage:], want) {
		t.Errorf("cryptsetup's backup differs, %v", err)
	}

	// A newer generation, with another token and without the recovery key.
	if _, err := AddToken(t.Context(), d, unseal, a.seal, o); err != nil {
		t.Fatal(err)
	}
	if _, err := RemoveRecoveryKey(t.Context(), d, unseal, 0, o); err != nil {
		t.Fatal(err)
	}
	var newer bytes.Buffer
	if _, err := Backup(t.Context(), d, &newer); err != nil {
		t.Fatal(err)
	}
	all := func() []byte {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	refused := func(what string, b []byte, ro RestoreOptions, kind error) {
		t.Helper()
		before := all()
		ro.Pins = pins
		if _, err := Restore(t.Context(), d, bytes.NewReader(b), ro); !errors.Is(err, kind) {
			t.Errorf("%s: %v, want %v", what, err, kind)
		}
		if !bytes.Equal(before, all()) {
			t.Errorf("%s: it was refused, and written all the same", what)
		}
	}
	refused("an older generation", backup.Bytes(), RestoreOptions{}, ErrAuth)
	for _, at := range []int{0, 40, 300, backupPage - 1, backupPage, backupPage + 5000, backup.Len() - 1} {
		bad := bytes.Clone(newer.Bytes())
		bad[at] ^= 1
		refused(fmt.Sprintf("damaged at %d", at), bad, RestoreOptions{OlderGeneration: true}, ErrDamaged)
	}
	refused("cut off", newer.Bytes()[:newer.Len()-1], RestoreOptions{}, ErrDamaged)
	refused("one byte more", append(bytes.Clone(newer.Bytes()), 0), RestoreOptions{}, ErrDamaged)
	refused("empty", nil, RestoreOptions{}, ErrDamaged)
	refused("cryptsetup's", want, RestoreOptions{}, ErrDamaged)
	var foreign bytes.Buffer
	if _, err := Backup(t.Context(), format(t, 4096, testVolumeSize), &foreign); err != nil {
		t.Fatal(err)
	}
	refused("another volume's", foreign.Bytes(), RestoreOptions{OlderGeneration: true, UUID: info.UUID}, ErrDevice)
	var large bytes.Buffer
	if _, err := Backup(t.Context(), format(t, 4096, 2<<20), &large); err != nil {
		t.Fatal(err)
	}
	refused("a larger volume's", large.Bytes(), RestoreOptions{}, ErrDevice)

	// The header destroyed: only the right UUID.
	if _, err := d.WriteAt(make([]byte, 2*copySize), 0); err != nil {
		t.Fatal(err)
	}
	refused("no header, no UUID", newer.Bytes(), RestoreOptions{}, ErrNotVolume)
	refused("no header, another UUID", newer.Bytes(), RestoreOptions{UUID: "00000000-0000-4000-8000-000000000000"}, ErrNotVolume)
	refused("no header, an older backup", backup.Bytes(), RestoreOptions{UUID: info.UUID}, ErrAuth)
	if _, err := Restore(t.Context(), d, bytes.NewReader(newer.Bytes()), RestoreOptions{UUID: info.UUID, Pins: pins}); err != nil {
		t.Fatal(err)
	}
	if err := opens(t, d, ring(a), o); err != nil {
		t.Error(err)
	}
	// The older one, deliberately: the pin goes with it, and stays on the key.
	if _, err := Restore(t.Context(), d, bytes.NewReader(backup.Bytes()), RestoreOptions{OlderGeneration: true, Pins: pins}); err != nil {
		t.Fatal(err)
	}
	if got := all(); !bytes.Equal(got[:dataOffset], want) {
		t.Error("the header area isn't what was backed up")
	}
	if v, err := Open(t.Context(), d, unseal, o); err != nil {
		t.Error(err)
	} else {
		v.Close()
	}
	cryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile, name)
	cryptsetup(t, "luksDump", name)
}

// TestRestoreCrash: an interrupted restore leaves the header that was there or
// the one of the backup.
func TestRestoreCrash(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	var backup bytes.Buffer
	if _, err := Backup(t.Context(), d, &backup); err != nil {
		t.Fatal(err)
	}
	if _, err := AddToken(t.Context(), d, ring(a, b).unseal, b.seal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	states := 0
	cuts(t, d, func(disk Backing) error {
		_, err := Restore(t.Context(), disk, &backup, RestoreOptions{OlderGeneration: true})
		return err
	}, func(at string, left *sectortest.Disk) {
		states++
		if err := opens(t, left, ring(a), OpenOptions{}); err != nil {
			t.Fatalf("after %s: %v", at, err)
		}
	})
	if states < 8 {
		t.Errorf("%d states", states)
	}
}

// TestErase looks for anything that was in the header, and lets cryptsetup and
// blkid look too.
func TestErase(t *testing.T) {
	name, keyFile, d := image(t, 4096, dataOffset+1<<20)
	before, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	h, _, _ := luks2.Read(d)
	if _, err := Erase(t.Context(), d, "00000000-0000-4000-8000-000000000000", true); !errors.Is(err, ErrDevice) {
		t.Errorf("Erase of another UUID: %v", err)
	}
	if after, _ := os.ReadFile(name); !bytes.Equal(before, after) {
		t.Fatal("a refused Erase wrote")
	}
	done, err := Erase(t.Context(), d, h.UUID, false)
	if err != nil || done.Bytes != dataOffset || !done.Discarded {
		t.Fatalf("Erase() = %+v, %v", done, err)
	}
	after, err := os.ReadFile(name)
	if err != nil || !bytes.Equal(after[:dataOffset], make([]byte, dataOffset)) || !bytes.Equal(after[dataOffset:], before[dataOffset:]) {
		t.Errorf("after Erase the header area is not zero, or the data was touched (%v)", err)
	}
	if exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file", keyFile, name).Run() == nil {
		t.Error("cryptsetup opens the erased volume")
	}
	if _, err := Erase(t.Context(), d, h.UUID, false); !errors.Is(err, ErrNoHeader) {
		t.Errorf("Erase of nothing: %v", err)
	}
	if done, err := Erase(t.Context(), d, h.UUID, true); err != nil || done.UUID != "" || done.Bytes != dataOffset {
		t.Errorf("Erase with force = %+v, %v", done, err)
	}

	// What the disk does: random, then zeros, each flushed; the copies first.
	a := &kek{name: "a"}
	disk := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	h, _, _ = luks2.Read(disk)
	header := disk.Bytes()[:copySize]
	log := &logged{Disk: disk}
	if _, err := Erase(t.Context(), log, h.UUID, false); err != nil {
		t.Fatal(err)
	}
	if first := log.writes[0]; first.off != 0 || bytes.Contains(first.b, header[:64]) || bytes.Count(first.b, []byte{0}) > len(first.b)/100 {
		t.Error("the first write is not random bytes over the header")
	}
	// A disk that doesn't keep what it's told is noticed.
	disk = formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	h, _, _ = luks2.Read(disk)
	if _, err := Erase(t.Context(), deaf{disk}, h.UUID, false); !errors.Is(err, ErrDamaged) {
		t.Errorf("Erase on a disk that ignores writes: %v", err)
	}
}

// TestEraseTokenless: that the first copy has lost what shows it to be a volume's keeps
// nobody from destroying the second, by force.
func TestEraseTokenless(t *testing.T) {
	a := &kek{name: "a"}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	h := headerOf(t, d)
	id, _, err := findVolumeToken(h)
	if err != nil {
		t.Fatal(err)
	}
	delete(h.Tokens, id)
	h.SeqID++
	enc, err := h.Encode(0)
	if err != nil {
		t.Fatal(err)
	}
	d.WriteAt(enc, 0)
	if _, err := Erase(t.Context(), d, h.UUID, false); !errors.Is(err, ErrNotVolume) || errors.Is(err, ErrNoHeader) {
		t.Errorf("Erase() = %v", err)
	}
	if _, err := Erase(t.Context(), d, "00000000-0000-4000-8000-000000000000", true); !errors.Is(err, ErrDevice) {
		t.Errorf("Erase of another UUID with force = %v", err)
	}
	done, err := Erase(t.Context(), d, h.UUID, true)
	if err != nil || done.UUID != h.UUID || done.Bytes != dataOffset {
		t.Errorf("Erase with force = %+v, %v", done, err)
	}
	if _, _, err := luks2.Read(d); !errors.Is(err, luks2.ErrMagic) {
		t.Errorf("after Erase: %v", err)
	}
}

// TestEraseServed: whatever stands before the second copy, the server of the volume
// destroys that.
func TestEraseServed(t *testing.T) {
	for name, forge := range map[string]func(d *sectortest.Disk) Backing{
		"another UUID": func(d *sectortest.Disk) Backing {
			h := headerOf(t, d)
			h.UUID = "00000000-0000-4000-8000-000000000000"
			enc, err := h.Encode(0)
			if err != nil {
				t.Fatal(err)
			}
			d.WriteAt(enc, 0)
			return d
		},
		"another's volume": func(d *sectortest.Disk) Backing {
			other := formatWith(t, FormatOptions{Seal: []Sealer{(&kek{name: "b"}).seal}})
			d.WriteAt(other.Bytes()[:copySize], 0)
			return d
		},
		"nothing": func(d *sectortest.Disk) Backing {
			d.WriteAt(make([]byte, copySize), 0)
			return d
		},
		"unreadable": func(d *sectortest.Disk) Backing { return &badUntilWritten{Disk: d} },
	} {
		a := &kek{name: "a"}
		d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
		uuid := headerOf(t, d).UUID
		second := bytes.Clone(d.Bytes()[copySize : copySize+512])
		b := forge(d)
		done, err := EraseServed(t.Context(), b, uuid)
		if err != nil || done.Bytes != dataOffset {
			t.Errorf("%s: EraseServed() = %+v, %v", name, done, err)
		}
		if bytes.Contains(d.Bytes()[:dataOffset], second) {
			t.Errorf("%s: the second copy is left", name)
		}
	}
}

// badUntilWritten is a disk with sectors that can't be read before they are written again.
type badUntilWritten struct {
	*sectortest.Disk
	written bool
}

func (d *badUntilWritten) ReadAt(p []byte, off int64) (int, error) {
	if !d.written {
		return 0, syscall.EIO
	}
	return d.Disk.ReadAt(p, off)
}

func (d *badUntilWritten) WriteAt(p []byte, off int64) (int, error) {
	d.written = true
	return d.Disk.WriteAt(p, off)
}

// TestEraseForged: a header that somebody has forged doesn't say what of the true one
// stays.
func TestEraseForged(t *testing.T) {
	for name, tt := range map[string]struct {
		forge func(h *luks2.Header)
		want  int64
	}{
		"smaller copies": {func(h *luks2.Header) {
			h.Size, h.Config.JSONSize, h.Config.KeyslotsSize = 16<<10, 12<<10, 0
			h.Segments[0].Offset = 32 << 10
		}, dataOffset},
		"data at 2^63":        {func(h *luks2.Header) { h.Segments[0].Offset = 1 << 63 }, dataOffset},
		"data far behind":     {func(h *luks2.Header) { h.Segments[0].Offset = 1 << 40 }, dataOffset},
		"keyslots of 128 MiB": {func(h *luks2.Header) { h.Config.KeyslotsSize, h.Segments[0].Offset = 128<<20, 129<<20 }, dataOffset + 1<<20},
	} {
		a := &kek{name: "a"}
		disk := sectortest.New(dataOffset + 1<<20)
		if _, err := Format(t.Context(), disk, FormatOptions{SectorSize: 4096, Seal: []Sealer{a.seal}}); err != nil {
			t.Fatal(err)
		}
		h, _, err := luks2.Read(disk)
		if err != nil {
			t.Fatal(err)
		}
		h.SeqID++
		tt.forge(h)
		for _, off := range []uint64{0, h.Size} {
			enc, err := h.Encode(off)
			if err != nil {
				t.Fatal(err)
			}
			disk.WriteAt(enc, int64(off))
		}
		before := bytes.Clone(disk.Bytes())
		done, err := Erase(t.Context(), disk, h.UUID, false)
		if err != nil || done.Bytes != tt.want || !done.Discarded {
			t.Errorf("%s: Erase() = %+v, %v; want %d bytes", name, done, err, tt.want)
		}
		if _, _, err := luks2.Read(disk); err == nil {
			t.Errorf("%s: a header is left", name)
		}
		after, zeros := disk.Bytes(), make([]byte, 512)
		for off := 0; off < dataOffset; off += 512 {
			if b := before[off : off+512]; !bytes.Equal(b, zeros) && bytes.Equal(b, after[off:off+512]) {
				t.Errorf("%s: what stood at %d is left", name, off)
				break
			}
		}
		if v, err := Open(t.Context(), disk, ring(a).unseal, OpenOptions{}); err == nil {
			v.Close()
			t.Errorf("%s: the erased volume opens", name)
		}
	}
}

// deaf answers writes, and does nothing.
type deaf struct{ *sectortest.Disk }

func (deaf) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// TestVerifyFindings has one thing wrong at a time.
func TestVerifyFindings(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	for _, tt := range []struct {
		name  string
		ring  keyring
		wreck func(d *sectortest.Disk)
		want  string
		opens bool
	}{
		{"good", ring(a, b), nil, "", true},
		{"one token down", ring(a), nil, `token 1 (hostcryptd-kek): no KEK "b" here`, true},
		{"none opens", ring(), nil, `no KEK "a" here`, false},
		{"a copy", ring(a, b), func(d *sectortest.Disk) { d.WriteAt([]byte("damage"), 5000) }, "first header copy is damaged", true},
		{"a conflict", ring(a, b), func(d *sectortest.Disk) {
			h, _, _ := luks2.Read(d)
			h.Label = "another"
			enc, _ := h.Encode(h.Size)
			d.WriteAt(enc, int64(h.Size))
		}, "same sequence id and differ", true},
	} {
		d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal, b.seal}})
		if tt.wreck != nil {
			tt.wreck(d)
		}
		r, err := Verify(t.Context(), d, tt.ring.unseal, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Opens != tt.opens || (tt.want == "") != (len(r.Findings) == 0) || !strings.Contains(strings.Join(r.Findings, "\n"), tt.want) {
			t.Errorf("%s: opens %v, findings %q", tt.name, r.Opens, r.Findings)
		}
	}
	// A device that became smaller doesn't open either.
	whole := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	short := sectortest.New(whole.Size() - 4096)
	if _, err := short.WriteAt(whole.Bytes()[:short.Size()], 0); err != nil {
		t.Fatal(err)
	}
	if r, err := Verify(t.Context(), short, ring(a).unseal, OpenOptions{}); err != nil || r.Opens || len(r.Findings) != 1 || opens(t, short, ring(a), OpenOptions{}) == nil {
		t.Errorf("of a device that was cut off: %+v, %v", r, err)
	}
}

// TestTokensAfterCryptsetup: cryptsetup rewrites the JSON in its own way, and the
// tokens are still under the MAC; if it takes one away, that's noticed.
func TestTokensAfterCryptsetup(t *testing.T) {
	name, keyFile, d := image(t, 4096, dataOffset+1<<20)
	a := &kek{name: "a"}
	if _, err := AddToken(t.Context(), d, func(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
		if ring(a).unseal(ctx, volume, token, key) == nil {
			return nil
		}
		return testUnseal(ctx, volume, token, key)
	}, a.seal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, "config", name, "--label", "renamed")
	cryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile, name)
	if err := opens(t, d, ring(a), OpenOptions{}); err != nil {
		t.Errorf("after cryptsetup rewrote the header: %v", err)
	}
	cryptsetup(t, "token", "remove", "--token-id", "0", name)
	if err := opens(t, d, ring(a), OpenOptions{}); !errors.Is(err, ErrAuth) {
		t.Errorf("after cryptsetup removed a token: %v", err)
	}
}

// otherPins are pins that fail, or are none.
type otherPins struct {
	err     error // of Load
	raising error // of Raise and Set
	raised  []Pin
}

func (p *otherPins) Load(string) (*Pin, error) { return nil, p.err }
func (p *otherPins) Raise(_ string, v Pin) error {
	p.raised = append(p.raised, v)
	return p.raising
}
func (p *otherPins) Set(_ string, v Pin) error { return p.Raise("", v) }

// TestPinsOutOfReach: pins that can't be had now are no attack, others that can't
// be read are, and a host may be told to serve only what it knows.
func TestPinsOutOfReach(t *testing.T) {
	a := &kek{name: "a"}
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	before := d.Bytes()
	for _, tt := range []struct {
		err     error
		require bool
		auth    bool
	}{
		{fmt.Errorf("%w: busy", ErrNoPins), false, false},
		{errors.New("damaged"), false, true},
		{nil, true, true},
	} {
		pins := &otherPins{err: tt.err}
		o := OpenOptions{Pins: pins, RequirePin: tt.require}
		_, adding := AddToken(t.Context(), d, ring(a).unseal, a.seal, o)
		for _, err := range []error{opens(t, d, ring(a), o), adding} {
			if err == nil || errors.Is(err, ErrAuth) != tt.auth || errors.Is(err, ErrNoPins) == tt.auth {
				t.Errorf("pins with %v, required %v: %v", tt.err, tt.require, err)
			}
		}
		if r, err := Verify(t.Context(), d, ring(a).unseal, o); err != nil || r.Opens || len(r.Findings) != 1 {
			t.Errorf("pins with %v, required %v: Verify() = %+v, %v", tt.err, tt.require, r, err)
		}
		if pins.raised != nil {
			t.Errorf("pins with %v were raised", tt.err)
		}
	}
	if !bytes.Equal(before, d.Bytes()) {
		t.Error("the header was changed")
	}
	pins := &otherPins{}
	if err := opens(t, d, ring(a), OpenOptions{Pins: pins}); err != nil || len(pins.raised) != 1 || pins.raised[0].Generation != 1 {
		t.Errorf("at first sight: %v, %v", err, pins.raised)
	}
}

// TestPinUnreadable: a file that can't be read now says nothing of the header, and what is
// in it does.
func TestPinUnreadable(t *testing.T) {
	a := &kek{name: "a"}
	pins := PinDir(t.TempDir())
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, Pins: pins})
	file := pins.Path(headerOf(t, d).UUID)
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		make func() error
		want error
	}{
		{"can't be opened", func() error { return os.Symlink(file, file) }, ErrNoPins},
		{"can't be read", func() error { return os.Mkdir(file, 0o700) }, ErrNoPins},
		{"empty", func() error { return os.WriteFile(file, nil, 0o600) }, ErrAuth},
		{"cut off", func() error { return os.WriteFile(file, content[:len(content)/2], 0o600) }, ErrAuth},
		{"good", func() error { return os.WriteFile(file, content, 0o600) }, nil},
	} {
		if err := errors.Join(os.RemoveAll(file), tt.make()); err != nil {
			t.Fatal(err)
		}
		err := opens(t, d, ring(a), OpenOptions{Pins: pins})
		if !errors.Is(err, tt.want) || tt.want == ErrNoPins && errors.Is(err, ErrAuth) {
			t.Errorf("a pin that is %s: %v, want %v", tt.name, err, tt.want)
		}
	}
}
