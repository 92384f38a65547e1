package sector

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// The MAC of a header shows that its parts belong together. It can't show who
// made the header: where the KEK is a public key, anybody can wrap a volume key
// of his own with it. And a header of last year is as authentic as today's, so
// who kept a copy could bring back a way in that was removed. Both are told from
// the real one by what this host remembers of it.

// A Pin is what a host remembers of a volume.
type Pin struct {
	Fingerprint string // of the volume key; no secret
	Generation  uint64 // the highest that was seen
}

// Pins remembers volumes by their UUID. All of its methods may be called at
// once, also by several processes.
type Pins interface {
	// Load returns the pin of a volume, or nil if there is none. An error with
	// [ErrNoPins] says nothing about the header; any other is taken for an attack.
	Load(volume string) (*Pin, error)
	// Raise stores p if there is no pin, or one with the same fingerprint and a
	// lower generation.
	Raise(volume string, p Pin) error
	// Set stores p in place of whatever there is.
	Set(volume string, p Pin) error
}

// DefaultPins is where a host keeps its pins. It is not in /var, which may be on
// a volume: a pin must be there before that is opened.
const DefaultPins PinDir = "/etc/hostcryptd/pins"

// A PinDir keeps pins in files of a directory, named by UUID, mode 0600.
type PinDir string

// A pinFile is the content of a file.
type pinFile struct {
	Version     int       `json:"version"`
	UUID        string    `json:"uuid"`
	Fingerprint string    `json:"fingerprint"`
	Generation  string    `json:"generation"`
	Updated     time.Time `json:"updated"`
}

const pinVersion = 1

// Path is the file of a volume's pin.
func (d PinDir) Path(volume string) string { return filepath.Join(string(d), volume+".json") }

// Load reads the pin of a volume. A file that can't be read now, or is damaged, is an
// error, not a missing pin: the former with [ErrNoPins].
func (d PinDir) Load(volume string) (*Pin, error) {
	if !uuidForm.MatchString(volume) {
		return nil, fmt.Errorf("pin: %q is not a UUID", volume)
	}
	b, err := os.ReadFile(d.Path(volume))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		// The process may have too many files open, or the disk have had an error: nobody
		// has said anything of the header.
		return nil, fmt.Errorf("%w: pin: %w", ErrNoPins, err)
	}
	var f pinFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("pin %s is damaged: %w", d.Path(volume), err)
	}
	n, err := strconv.ParseUint(f.Generation, 10, 63)
	if err != nil || f.Version != pinVersion || f.UUID != volume || f.Fingerprint == "" {
		return nil, fmt.Errorf("pin %s is damaged, or of another version", d.Path(volume))
	}
	return &Pin{f.Fingerprint, n}, nil
}

// Raise is as [Pins] says.
func (d PinDir) Raise(volume string, p Pin) error {
	return d.RaiseWith(volume, p, func() {})
}

// RaiseWith is Raise, and calls first before that, under the same lock: no other
// process writes a pin of this host at that time. Where there is no directory that
// could be locked, first is called all the same.
func (d PinDir) RaiseWith(volume string, p Pin, first func()) error {
	unlock, err := d.lock()
	if err != nil {
		first()
		return err
	}
	defer unlock()
	first()
	old, err := d.Load(volume)
	if err != nil {
		return err
	}
	if old != nil && (old.Fingerprint != p.Fingerprint || old.Generation >= p.Generation) {
		return nil
	}
	return d.write(volume, p)
}

// Set is as [Pins] says.
func (d PinDir) Set(volume string, p Pin) error {
	return d.SetWith(volume, p, func() error { return nil })
}

// SetWith is Set, and calls first before that, under the same lock. After an error
// of first it does no more.
func (d PinDir) SetWith(volume string, p Pin, first func() error) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := first(); err != nil {
		return err
	}
	return d.write(volume, p)
}

// Remove forgets a volume. It tells whether there was something to forget.
func (d PinDir) Remove(volume string) (bool, error) {
	if !uuidForm.MatchString(volume) {
		return false, fmt.Errorf("pin: %q is not a UUID", volume)
	}
	if _, err := os.Stat(string(d)); errors.Is(err, fs.ErrNotExist) {
		return false, nil // nor is a directory made for it
	}
	unlock, err := d.lock()
	if err != nil {
		return false, err
	}
	defer unlock()
	err = os.Remove(d.Path(volume))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = syncDir(string(d))
	}
	return err == nil, err
}

// lock makes the directory, and keeps other processes from writing to it.
func (d PinDir) lock() (unlock func(), err error) {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return nil, fmt.Errorf("pin: %w", err)
	}
	f, err := os.Open(string(d))
	if err != nil {
		return nil, fmt.Errorf("pin: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("pin: locking %s: %w", d, err)
	}
	return func() { f.Close() }, nil
}

// write replaces a file: after a power cut there is the old or the new one.
func (d PinDir) write(volume string, p Pin) error {
	if !uuidForm.MatchString(volume) {
		return fmt.Errorf("pin: %q is not a UUID", volume)
	}
	b, err := json.MarshalIndent(pinFile{pinVersion, volume, p.Fingerprint, strconv.FormatUint(p.Generation, 10), time.Now().UTC().Truncate(time.Second)}, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(string(d), ".pin-*") // mode 0600
	if err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), d.Path(volume))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("pin: %w", err), os.Remove(f.Name()))
	}
	return syncDir(string(d))
}

func syncDir(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// checkOrigin tells whether an authenticated header is the one that it should be:
// by its signature, and by what this host remembers.
func (o *OpenOptions) checkOrigin(volume string, got opened) error {
	if err := o.checkSignature(volume, got); err != nil {
		return err
	}
	return o.checkPin(volume, got)
}

func (o *OpenOptions) checkPin(volume string, got opened) error {
	if o.Pins == nil {
		return nil
	}
	p, err := o.Pins.Load(volume)
	switch {
	case err == nil && p == nil && o.RequirePin:
		return fmt.Errorf("%w: this host does not know volume %s, and was told to serve only those it knows; if it is to be trusted, 'hostcryptd header accept' says so", ErrAuth, volume)
	case errors.Is(err, ErrNoPins):
		return err
	case err != nil:
		// A pin that can be spoiled is no pin.
		return fmt.Errorf("%w: %w; if the header is to be trusted as it is, 'hostcryptd header accept' replaces the pin", ErrAuth, err)
	case p == nil:
		return nil
	case p.Fingerprint != got.fingerprint:
		return fmt.Errorf("%w: the header was made with another volume key than the one that this host knows volume %s by: somebody formatted it elsewhere, or forged it with the public part of its key; if it was you, 'hostcryptd header accept' says so", ErrAuth, volume)
	case p.Generation > got.generation:
		return fmt.Errorf("%w: the header is of generation %d, and this host has seen generation %d of volume %s: an older header was put back; if that was meant, 'hostcryptd header accept' says so", ErrOlder, got.generation, p.Generation, volume)
	}
	return nil
}

// CheckPin compares the header that is known with what this host remembers, of which
// the process that opened the volume may have had an old copy, and notes it there. An
// error is as of [Open], but that a host which remembers nothing has nothing to object;
// a warning is that it couldn't be noted.
func (v *Volume) CheckPin(o OpenOptions) (warning string, err error) {
	k := v.Known()
	if k == nil {
		return "", nil
	}
	got := opened{fingerprint: k.Fingerprint, generation: k.Generation}
	o.RequirePin = false
	if err := o.checkPin(v.uuid, got); err != nil {
		return "", err
	}
	return o.raise(v.uuid, got), nil
}

// raise notes a header that is good, and returns a warning if it couldn't.
func (o *OpenOptions) raise(volume string, got opened) string {
	if o.Pins == nil {
		return ""
	}
	if err := o.Pins.Raise(volume, Pin{got.fingerprint, got.generation}); err != nil {
		return fmt.Sprintf("this host could not note generation %d of the header, so an older one would not be noticed: %v", got.generation, err)
	}
	return ""
}
