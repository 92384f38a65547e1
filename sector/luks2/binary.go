package luks2

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"hash"
	"slices"
	"strings"
)

// Offsets in the 4096-byte binary header, spec 2.1. Integers are big-endian,
// strings are NUL-padded.
const (
	offMagic     = 0
	offVersion   = 6
	offSize      = 8
	offSeqID     = 16
	offLabel     = 24
	offAlg       = 72
	offSalt      = 104
	offUUID      = 168
	offSubsystem = 208
	offHdrOffset = 256
	offChecksum  = 448
	lenChecksum  = 64
	lenAlg       = 32
)

// checksums are the algorithms that cryptsetup can be told to use. Only sha256
// is written here.
var checksums = map[string]func() hash.Hash{
	"sha256": sha256.New,
	"sha512": sha512.New,
}

// sizeOf looks at the first bytes of a copy that should stand at offset, and
// returns how many bytes the whole copy takes.
func sizeOf(b []byte, offset uint64) (uint64, error) {
	magic := primaryMagic
	if offset != 0 {
		magic = backupMagic
	}
	if string(b[offMagic:offMagic+6]) != magic {
		return 0, ErrMagic
	}
	if v := binary.BigEndian.Uint16(b[offVersion:]); v != 2 {
		return 0, fmt.Errorf("%w but %d", ErrVersion, v)
	}
	size := binary.BigEndian.Uint64(b[offSize:])
	if !slices.Contains(validSizes, size) {
		return 0, fmt.Errorf("%w: size of a copy is %d", ErrInvalid, size)
	}
	return size, nil
}

// Decode parses one whole copy, which was read from offset on the backing
// device (0 for the first copy, the size of a copy for the second). It tells
// apart what is no header ([ErrMagic]), a foreign version ([ErrVersion]), a
// damaged copy ([ErrChecksum]) and one that breaks the rules ([ErrInvalid]).
func Decode(b []byte, offset uint64) (*Header, error) {
	if len(b) < binarySize {
		return nil, fmt.Errorf("luks2: copy at %d: %w", offset, ErrMagic)
	}
	h, err := decode(b, offset)
	if err != nil {
		return nil, fmt.Errorf("luks2: copy at %d: %w", offset, err)
	}
	return h, nil
}

func decode(b []byte, offset uint64) (*Header, error) {
	size, err := sizeOf(b, offset)
	if err != nil {
		return nil, err
	}
	if uint64(len(b)) != size {
		return nil, fmt.Errorf("%w: %d bytes of %d", ErrChecksum, len(b), size)
	}
	alg := cstring(b[offAlg : offAlg+lenAlg])
	newHash := checksums[alg]
	if newHash == nil {
		return nil, fmt.Errorf("%w: checksum algorithm %q", ErrInvalid, alg)
	}
	sum := checksum(newHash(), b)
	stored := b[offChecksum : offChecksum+lenChecksum]
	if !bytes.Equal(stored[:len(sum)], sum) {
		return nil, ErrChecksum
	}
	if at := binary.BigEndian.Uint64(b[offHdrOffset:]); at != offset {
		// A right checksum at a wrong place: a copy that somebody moved.
		return nil, fmt.Errorf("%w: copy says that it stands at %d", ErrInvalid, at)
	}
	if offset != 0 && offset != size {
		return nil, fmt.Errorf("%w: second copy of %d bytes stands at %d", ErrInvalid, size, offset)
	}
	h := &Header{
		Size:      size,
		SeqID:     binary.BigEndian.Uint64(b[offSeqID:]),
		Label:     cstring(b[offLabel : offLabel+labelBytes]),
		UUID:      cstring(b[offUUID : offUUID+uuidBytes]),
		Subsystem: cstring(b[offSubsystem : offSubsystem+labelBytes]),
	}
	copy(h.salts[index(offset)][:], b[offSalt:])
	if err := h.decodeJSON(b[binarySize:]); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := h.Validate(); err != nil {
		return nil, err
	}
	return h, nil
}

// Encode returns the bytes of the copy that stands at offset (0 or h.Size).
// It is the reverse of [Decode], and refuses what Decode would refuse.
func (h *Header) Encode(offset uint64) ([]byte, error) {
	if offset != 0 && offset != h.Size {
		panic("luks2: a copy stands at 0 or at the size of a copy")
	}
	if err := h.Validate(); err != nil {
		return nil, fmt.Errorf("luks2: encoding: %w", err)
	}
	b := make([]byte, h.Size)
	js, err := h.encodeJSON()
	if err != nil {
		return nil, fmt.Errorf("luks2: encoding: %w", err)
	}
	// The area is a C string: at least one NUL must follow the text.
	if room := len(b) - binarySize - 1; len(js) > room {
		return nil, fmt.Errorf("luks2: encoding: %d bytes of JSON, the header has room for %d", len(js), room)
	}
	copy(b[binarySize:], js)

	magic := primaryMagic
	if offset != 0 {
		magic = backupMagic
	}
	copy(b[offMagic:], magic)
	binary.BigEndian.PutUint16(b[offVersion:], 2)
	binary.BigEndian.PutUint64(b[offSize:], h.Size)
	binary.BigEndian.PutUint64(b[offSeqID:], h.SeqID)
	for _, f := range []struct {
		name, value string
		off, size   int
	}{
		{"label", h.Label, offLabel, labelBytes},
		{"UUID", h.UUID, offUUID, uuidBytes},
		{"subsystem", h.Subsystem, offSubsystem, labelBytes},
		{"checksum algorithm", checksumAlg, offAlg, lenAlg},
	} {
		if len(f.value) >= f.size || strings.ContainsRune(f.value, 0) {
			return nil, fmt.Errorf("luks2: encoding: %s %q takes more than %d bytes", f.name, f.value, f.size-1)
		}
		copy(b[f.off:], f.value)
	}
	copy(b[offSalt:], h.salts[index(offset)][:])
	binary.BigEndian.PutUint64(b[offHdrOffset:], offset)
	copy(b[offChecksum:], checksum(sha256.New(), b))
	return b, nil
}

// newSalt draws the salt of the copy at offset, for a new header and a repair.
func (h *Header) newSalt(offset uint64) { rand.Read(h.salts[index(offset)][:]) }

// index numbers the copy at an offset: 0 the first, 1 the second.
func index(offset uint64) int {
	if offset == 0 {
		return 0
	}
	return 1
}

// checksum is over the whole copy with the checksum field taken as zero.
func checksum(hash hash.Hash, b []byte) []byte {
	var zero [lenChecksum]byte
	hash.Write(b[:offChecksum])
	hash.Write(zero[:])
	hash.Write(b[offChecksum+lenChecksum:])
	return hash.Sum(nil)
}

func cstring(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
