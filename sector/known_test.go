package sector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"hostcryptd/sector/luks2"
	"hostcryptd/sector/sectortest"
)

// TestKnownTokens changes the header under a volume that is served: by those who have
// its key, and by those who can only write to the disk.
func TestKnownTokens(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	both := ring(a, b)
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	kept, err := NewHandover()
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	v, err := Open(t.Context(), d, both.unseal, OpenOptions{Handover: kept})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	unseals := 0
	counted := func(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
		unseals++
		return both.unseal(ctx, volume, token, key)
	}
	look := func(want error, ids ...int) {
		t.Helper()
		list, err := v.Tokens(t.Context(), counted, OpenOptions{})
		if !errors.Is(err, want) {
			t.Errorf("Tokens() = %v, want %v", err, want)
		}
		got := []int{}
		for _, k := range list {
			if k.Retired.IsZero() {
				got = append(got, k.ID)
			}
		}
		if !slices.Equal(got, ids) {
			t.Errorf("tokens %v, want %v", got, ids)
		}
	}
	restore := func(header []byte) {
		t.Helper()
		if _, err := d.WriteAt(header[:2*copySize], 0); err != nil {
			t.Fatal(err)
		}
	}
	look(nil, 0)
	if unseals != 0 {
		t.Errorf("%d unseals of a header that is known", unseals)
	}
	first := d.Bytes()
	rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[32]byte) (json.RawMessage, error) {
		return b.seal(ctx, volume, key)
	}
	id, err := ReplaceToken(t.Context(), d, both.unseal, 0, rewrap, time.Hour, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	look(nil, id)
	look(nil, id)
	if unseals != 1 {
		t.Errorf("%d unseals for one change", unseals)
	}
	second := d.Bytes()

	// The whole header of before; the next server knows as much.
	restore(first)
	look(ErrAuth, id)
	next, err := Continue(d, v.State(), kept, SuspendRefuse)
	if err != nil {
		t.Fatal(err)
	}
	if list, err := next.Tokens(t.Context(), both.unseal, OpenOptions{}); !errors.Is(err, ErrAuth) || len(list) != 2 {
		t.Errorf("the next server: %v, %v", list, err)
	}
	next.Close()
	// A volume that was suspended isn't resumed with it either.
	if err := v.Suspend(SuspendRefuse); err != nil {
		t.Fatal(err)
	}
	if err := v.Resume(t.Context(), both.unseal, OpenOptions{}); !errors.Is(err, ErrAuth) {
		t.Errorf("Resume() with an older header = %v, want %v", err, ErrAuth)
	}
	restore(second)
	if err := v.Resume(t.Context(), both.unseal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	look(nil, id)

	// Only the token.
	h, _, err := luks2.Read(d)
	if err != nil {
		t.Fatal(err)
	}
	old, _, err := luks2.Read(bytes.NewReader(first))
	if err != nil {
		t.Fatal(err)
	}
	h.Tokens[0] = old.Tokens[0]
	if err := luks2.Write(d, h); err != nil {
		t.Fatal(err)
	}
	look(ErrAuth, id)

	// Another volume, of the same UUID and a key that is known to all.
	other := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}, UUID: v.UUID()})
	restore(other.Bytes())
	look(ErrAuth, id)
	// Nothing.
	restore(make([]byte, 2*copySize))
	look(ErrNotVolume, id)

	// A change that can't be authenticated now is taken over when it can.
	restore(second)
	if err := RemoveToken(t.Context(), d, both.unseal, 0, false, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	b.down = true
	list, err := v.Tokens(t.Context(), both.unseal, OpenOptions{})
	if err == nil || len(list) != 2 {
		t.Errorf("with the KEK down: %v, %v", list, err)
	}
	b.down = false
	if list, err = v.Tokens(t.Context(), both.unseal, OpenOptions{}); err != nil || len(list) != 1 {
		t.Errorf("with the KEK up: %v, %v", list, err)
	}

	// Who has made a header can say so, if it's true.
	before := *v.Known()
	var told *Known
	if _, err := AddToken(t.Context(), d, both.unseal, a.seal, OpenOptions{Changed: func(_ []KeyToken, k *Known) { told = k }}); err != nil {
		t.Fatal(err)
	}
	unseals = 0
	another := *told
	another.Digest = before.Digest
	if err := v.Learn(t.Context(), &another, false); !errors.Is(err, ErrAuth) {
		t.Errorf("Learn() of a header that isn't there = %v, want %v", err, ErrAuth)
	}
	if err := v.Learn(t.Context(), told, false); err != nil {
		t.Error(err)
	}
	look(nil, 0, id)
	if unseals != 0 {
		t.Errorf("%d unseals of a header that was told", unseals)
	}
	if err := v.Learn(t.Context(), &before, false); !errors.Is(err, ErrAuth) {
		t.Errorf("Learn() of an older header = %v, want %v", err, ErrAuth)
	}

	// A person may accept the older one, which the volume is resumed with then. He
	// can't make it another volume.
	restore(second)
	look(ErrAuth, 0, id)
	pins := PinDir(t.TempDir())
	accept := func() {
		t.Helper()
		told = nil
		if _, _, err := Accept(t.Context(), d, both.unseal, OpenOptions{Pins: pins, Changed: func(_ []KeyToken, k *Known) { told = k }}); err != nil || told == nil {
			t.Fatalf("Accept() = %v, and says %v", err, told)
		}
	}
	accept()
	if err := v.Learn(t.Context(), told, true); err != nil {
		t.Errorf("Learn() of an older header that was accepted = %v", err)
	}
	look(nil, id)
	if err := v.Suspend(SuspendRefuse); err != nil {
		t.Fatal(err)
	}
	if err := v.Resume(t.Context(), both.unseal, OpenOptions{Pins: pins}); err != nil {
		t.Errorf("Resume() with a header that was accepted = %v", err)
	}
	restore(first)
	if err := v.Learn(t.Context(), told, true); !errors.Is(err, ErrAuth) {
		t.Errorf("Learn() of an accepted header that isn't there = %v, want %v", err, ErrAuth)
	}
	restore(other.Bytes())
	accept()
	if err := v.Learn(t.Context(), told, true); !errors.Is(err, ErrAuth) {
		t.Errorf("Learn() of another volume's header that was accepted = %v, want %v", err, ErrAuth)
	}
}

// TestKnownShort: the state that goes to the next server is bounded.
func TestKnownShort(t *testing.T) {
	k := &Known{Digest: "d", Tokens: make([]KeyToken, 30)}
	for i := range k.Tokens {
		k.Tokens[i].Text = make([]byte, 2000)
	}
	if s := k.short(); len(s.Tokens) != 16 || s.Digest != k.Digest || len(k.Tokens) != 30 {
		t.Errorf("%d tokens of %d", len(s.Tokens), len(k.Tokens))
	}
	if (*Known)(nil).short() != nil {
		t.Error("something of nothing")
	}
}

// TestResumeDamagedCopy: a volume that can't have one of its header copies back is
// resumed with the other, as often as it's suspended, and with no older one.
func TestResumeDamagedCopy(t *testing.T) {
	for _, off := range []int64{0, copySize} {
		a := &kek{name: "a"}
		both := ring(a)
		d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
		older := d.Bytes()[copySize-off:][:copySize]
		if _, err := AddToken(t.Context(), d, both.unseal, a.seal, OpenOptions{}); err != nil {
			t.Fatal(err)
		}
		v, err := Open(t.Context(), d, both.unseal, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		if _, err := d.WriteAt(bytes.Repeat([]byte("other"), 8192/5), off); err != nil {
			t.Fatal(err)
		}
		resume := func() error {
			if err := v.Suspend(SuspendRefuse); err != nil {
				t.Fatal(err)
			}
			return v.Resume(t.Context(), both.unseal, OpenOptions{})
		}
		for range 2 {
			if err := resume(); err != nil {
				t.Errorf("Resume() without the copy at %d = %v", off, err)
			}
			if k := v.Known(); k.Generation != 2 {
				t.Errorf("generation %d is known without the copy at %d, not 2", k.Generation, off)
			}
		}
		if _, err := d.WriteAt(older, copySize-off); err != nil {
			t.Fatal(err)
		}
		if err := resume(); !errors.Is(err, ErrAuth) {
			t.Errorf("Resume() with an older copy = %v, want %v", err, ErrAuth)
		}
	}
}

// TestChangedMeanwhile: a header that the host has changed while it was unlocked, and
// of which it then knows a higher generation, is no older one that was put back.
func TestChangedMeanwhile(t *testing.T) {
	a := &kek{name: "a"}
	both := ring(a)
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	o := OpenOptions{Pins: PinDir(t.TempDir()), HeadStart: time.Hour}
	var v *Volume
	left := 0 // changes that are to be made while a header is unlocked
	var learn func([]KeyToken, *Known)
	racing := func(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
		if left > 0 {
			left--
			change := o
			change.Changed = learn
			if _, err := AddToken(ctx, d, both.unseal, a.seal, change); err != nil {
				t.Error(err)
			}
		}
		return both.unseal(ctx, volume, token, key)
	}
	open := func() (err error) {
		v, err = Open(t.Context(), d, racing, o)
		return err
	}
	resume := func() error {
		learn = func(_ []KeyToken, k *Known) {
			if err := v.Learn(t.Context(), k, false); err != nil {
				t.Error(err)
			}
		}
		if err := v.Suspend(SuspendRefuse); err != nil {
			t.Fatal(err)
		}
		return v.Resume(t.Context(), racing, OpenOptions{HeadStart: time.Hour})
	}
	look := func() error {
		if _, err := AddToken(t.Context(), d, both.unseal, a.seal, o); err != nil {
			t.Fatal(err)
		}
		_, err := v.Tokens(t.Context(), racing, o)
		return err
	}
	change := func() error {
		_, err := AddToken(t.Context(), d, racing, a.seal, o)
		return err
	}
	for _, tt := range []struct {
		name string
		f    func() error
	}{{"Open", open}, {"Tokens", look}, {"AddToken", change}, {"Resume", resume}} {
		left = 1
		if err := tt.f(); err != nil || left != 0 {
			t.Errorf("%s with a change meanwhile: %v", tt.name, err)
		}
		// Who changes it without end gets an end.
		left = 10
		if err := tt.f(); !errors.Is(err, ErrAuth) || left != 10-judgeTries {
			t.Errorf("%s with changes without end: %v after %d", tt.name, err, 10-left)
		}
		left = 0
		if tt.name == "Open" {
			if err := open(); err != nil {
				t.Fatal(err)
			}
			defer v.Close()
		}
	}
}

// A slowHeader is a disk that tells when its header is asked for, and waits.
type slowHeader struct {
	*sectortest.Disk
	asked, answer chan bool
}

func (s slowHeader) LockHeader(ctx context.Context, write bool) (func(), error) {
	s.asked <- true
	<-s.answer
	return s.Disk.LockHeader(ctx, write)
}

// TestTokensSuspended: a look at a header that isn't known fetches no key for a
// volume that is suspended, also if that came while the look was under way.
func TestTokensSuspended(t *testing.T) {
	a := &kek{name: "a"}
	d := slowHeader{formatWith(t, FormatOptions{Seal: []Sealer{a.seal}}), make(chan bool, 10), make(chan bool, 10)}
	d.answer <- true
	d.answer <- true // to keep it
	v, err := Open(t.Context(), d, ring(a).unseal, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	<-d.asked
	<-d.asked
	v.known.Store(nil) // as after a server that didn't say
	look := make(chan error)
	go func() {
		_, err := v.Tokens(t.Context(), func(context.Context, string, json.RawMessage, *[32]byte) error {
			t.Error("the key was fetched")
			return ErrSuspended
		}, OpenOptions{})
		look <- err
	}()
	<-d.asked
	if err := v.Suspend(SuspendRefuse); err != nil {
		t.Fatal(err)
	}
	d.answer <- true
	if err := <-look; !errors.Is(err, ErrSuspended) {
		t.Errorf("Tokens() = %v, want %v", err, ErrSuspended)
	}
}

// TestVerifyMeanwhile: what is wrong with a header that was changed while it was
// checked is no finding, unless it's wrong with the next too.
func TestVerifyMeanwhile(t *testing.T) {
	a, b := &kek{name: "a"}, &kek{name: "b"}
	both := ring(a, b)
	d := formatWith(t, FormatOptions{Seal: []Sealer{a.seal}})
	o := OpenOptions{Pins: PinDir(t.TempDir())}
	if _, err := AddToken(t.Context(), d, both.unseal, b.seal, o); err != nil {
		t.Fatal(err)
	}
	verify := func(change func(tries int)) (*Report, int) {
		t.Helper()
		var mu sync.Mutex
		asked, tries := 0, 0
		r, err := Verify(t.Context(), d, func(ctx context.Context, volume string, token json.RawMessage, key *[32]byte) error {
			mu.Lock()
			defer mu.Unlock()
			if asked%2 == 0 {
				tries++
				change(tries)
			}
			asked++
			return both.unseal(ctx, volume, token, key)
		}, o)
		if err != nil {
			t.Fatal(err)
		}
		return r, tries
	}
	rewrap := func() {
		if _, err := AddToken(t.Context(), d, both.unseal, b.seal, o); err != nil {
			t.Error(err)
		}
		if err := RemoveToken(t.Context(), d, both.unseal, 2, false, o); err != nil {
			t.Error(err)
		}
	}
	if r, tries := verify(func(int) {}); len(r.Findings) > 0 || !r.Opens || tries != 1 {
		t.Errorf("a good header: %q, %d tries", r.Findings, tries)
	}
	if r, tries := verify(func(n int) {
		if n == 1 {
			rewrap()
		}
	}); len(r.Findings) > 0 || !r.Opens || tries != 2 {
		t.Errorf("a header that was changed meanwhile: %q, %d tries", r.Findings, tries)
	}
	if r, tries := verify(func(int) { rewrap() }); len(r.Findings) == 0 || tries != judgeTries {
		t.Errorf("one that changes without end: %q, %d tries", r.Findings, tries)
	}
	if r, tries := verify(func(n int) {
		if n == 1 {
			rewrap()
			delete(both, "b")
		}
	}); len(r.Findings) != 1 || !r.Opens || tries != 2 {
		t.Errorf("one that was changed, and whose key is gone: %q, %d tries", r.Findings, tries)
	}
}
