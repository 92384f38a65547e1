// Package sector makes an encrypted volume of a backing device.
//
// [Format] writes the header that makes a backing device a volume, [Open]
// unlocks it, and the [Volume] it returns reads and writes plaintext blocks,
// every sector encrypted with AES-256-XTS on its way. The header is a LUKS2
// header and the sectors are laid out as dm-crypt lays them out, so that
// cryptsetup opens the same disk; FORMAT.md beside this file specifies both.
//
// # Words
//
// The backing device is the raw disk or image file; the volume is what it
// holds, seen as plaintext. A sector is one XTS data unit, 512 or 4096 bytes.
// The DEK is the 64-byte XTS key of the data. The volume key is 32 random
// bytes that wrap the DEK and authenticate the header; a token in the header
// holds it, wrapped by a key encryption key (KEK) which this package never
// sees: a [Sealer] makes tokens, an [Unsealer] opens them.
//
// # Concurrency
//
// A Volume serves any number of goroutines. A write, zeros and a trim wait for those
// before them that touch one of their sectors, also when all wait for a suspended
// volume: a part of a sector is read, changed and written, and a write that a client
// sends again must not be overtaken by itself. Reads are not ordered with writes of the
// same time, as on any disk.
//
// # Durability
//
// There is no write cache here: what WriteAt has accepted is with the backing
// device, and one [Volume.Sync] makes all of it durable, whichever goroutine
// wrote it. After a failed Sync nobody can tell what was lost, so the volume
// has failed: writes and syncs return [ErrFailed] until it is opened anew.
package sector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"hostcryptd/sector/luks2"
)

// Errors by what a caller can do about them. I/O errors of the backing device
// are passed on as they are; all errors of a Volume have a [syscall.Errno] in
// their chain.
var (
	// ErrNotVolume means that the backing device holds no header of ours.
	ErrNotVolume = errors.New("not a hostcryptd volume")
	// ErrDamaged means that both copies of the header are damaged.
	ErrDamaged = errors.New("the header is damaged")
	// ErrUnsupported means a valid LUKS2 header with something in it that this
	// version does not do: another cipher, several segments, a requirement.
	ErrUnsupported = errors.New("unsupported header")
	// ErrAuth means that the header, or a wrapped key in it, is not what was
	// written with this volume key: it was changed or put together from others.
	ErrAuth = errors.New("header authenticity")
	// ErrOlder is the ErrAuth of a header of this volume key that is older than the one
	// that was seen last: [Accept] makes it the one to go by.
	ErrOlder = fmt.Errorf("%w", ErrAuth)
	// ErrDevice means that the backing device can't hold or be a volume:
	// too small, misaligned, read-only, not a disk.
	ErrDevice = errors.New("unsuitable device")
	// ErrBusy means that something else has the backing device open.
	ErrBusy = errors.New("device is in use")
	// ErrNoPins means that what this host remembers of its volumes can't be had
	// now, as from a TPM that is busy; it may be later.
	ErrNoPins = errors.New("what this host remembers of the volume can't be had now")
	// ErrWrongKey means that a recovery key opens no keyslot.
	ErrWrongKey = errors.New("wrong recovery key")
	// ErrLastWay means that what was to be removed is the last way into the
	// volume, as far as can be shown.
	ErrLastWay = errors.New("it's the last way in")
	// ErrFailed means that a flush of this volume has failed before.
	ErrFailed = fmt.Errorf("volume has failed: an earlier flush was not completed: %w", syscall.EIO)
	// ErrSuspended means that the volume is suspended: its keys were wiped and
	// have not come back.
	ErrSuspended = fmt.Errorf("volume is suspended: its key was withdrawn: %w", syscall.ESHUTDOWN)
	// ErrClosed means that the volume was closed and its keys are gone.
	ErrClosed = fmt.Errorf("volume is closed: %w", syscall.ESHUTDOWN)
)

// A Backing is a backing device. Offsets count from its start. If Alignment
// is not 1, offsets, lengths and addresses of ReadAt, WriteAt and WriteAtSync
// are multiples of it. Implementations serve concurrent callers.
type Backing interface {
	io.ReaderAt
	io.WriterAt
	// WriteAtSync is WriteAt, and the data is durable when it returns.
	WriteAtSync(p []byte, off int64) (int, error)
	// Sync makes all completed writes durable.
	Sync() error
	// Discard tells the device that a range is not needed any more. A device
	// that can't do that returns an error that is [errors.ErrUnsupported].
	Discard(off, length int64) error
	// Size is in bytes.
	Size() int64
	// Alignment is in bytes; 1 means that there is none to keep.
	Alignment() int
	// Direct tells that there is no cache between WriteAt and the device, so
	// that the error of each operation is its own.
	Direct() bool
	// LockHeader keeps other programs from the header, see [luks2.Lock].
	LockHeader(ctx context.Context, exclusive bool) (unlock func(), err error)
}

// A Sealer wraps a volume key and returns the token that holds it. The volume
// is named by its UUID, which the token may be bound to.
type Sealer func(ctx context.Context, volume string, key *[VolumeKeySize]byte) (json.RawMessage, error)

// An Unsealer gets the volume key out of a token. It is called with tokens of
// any type that starts with [TokenPrefix], from several goroutines at once, and
// returns when ctx ends; an error means that this token can't be opened now, and
// the next one is tried. Nothing may write to key after it has returned.
type Unsealer func(ctx context.Context, volume string, token json.RawMessage, key *[VolumeKeySize]byte) error

const (
	// VolumeKeySize is the size of a volume key in bytes.
	VolumeKeySize = 32
	// TokenPrefix starts the type of each token that belongs to hostcryptd.
	TokenPrefix = "hostcryptd-"
	// Subsystem is the subsystem of our headers; blkid and udev show it.
	Subsystem = "hostcryptd"
	// Cipher is the one cipher that a volume can have, in dm-crypt's words.
	Cipher = "aes-xts-plain64"

	dekSize     = 64
	copySize    = 256 << 10 // of the header
	dataOffset  = 16 << 20  // where the first sector of a new volume stands
	sector512   = 512       // unit of tweaks
	maxIOOffset = 1<<63 - 1
)

// ReadHeader returns the header of a backing device and the state of its two
// copies. It says what to do when there is none that can be used.
//
// Anybody who may read an image can hold its lock, and so keep a volume from being
// served. Two good copies of one header are one that nobody is writing, so after
// lockPatience they do without the lock.
func ReadHeader(ctx context.Context, b Backing) (*luks2.Header, luks2.Copies, error) {
	patient, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	unlock, err := b.LockHeader(patient, false)
	if patient.Err() != nil && err != nil && ctx.Err() == nil {
		if h, copies, err := readHeader(b); err == nil && !copies.Damaged() {
			return h, copies, nil
		}
		unlock, err = b.LockHeader(ctx, false)
	}
	if err != nil {
		return nil, luks2.Copies{}, err
	}
	defer unlock()
	return readHeader(b)
}

// lockPatience is more than any program has to hold the lock for that writes a header.
var lockPatience = 20 * time.Second

// bringBack says what to do where the header is gone.
const bringBack = "'hostcryptd header repair' writes it back if the volume is being served now, else 'hostcryptd header restore' a backup of it"

func readHeader(b Backing) (*luks2.Header, luks2.Copies, error) {
	h, copies, err := luks2.Read(b)
	switch {
	case err == nil:
		return h, copies, nil
	case errors.Is(err, luks2.ErrMagic):
		return nil, copies, fmt.Errorf("%w: there is no LUKS2 header on it; if there was one, "+bringBack, ErrNotVolume)
	case errors.Is(err, luks2.ErrVersion):
		return nil, copies, fmt.Errorf("%w: %w", ErrNotVolume, err)
	case errors.Is(err, luks2.ErrChecksum), errors.Is(err, luks2.ErrInvalid):
		return nil, copies, fmt.Errorf("%w: %s; "+bringBack, ErrDamaged, copies.Describe())
	}
	return nil, copies, fmt.Errorf("%w: neither copy of the header can be read: %w; if the disk is failing, copy it and restore the header there with 'hostcryptd header restore'", ErrDevice, err)
}
