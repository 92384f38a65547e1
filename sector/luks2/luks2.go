// Package luks2 reads and writes the LUKS2 header: the metadata at the start
// of a backing device that says what the rest of it is.
//
// A header is kept in two copies, one directly after the other. Each copy is a
// 4096-byte binary header and a JSON area, together under one checksum. [Read]
// finds the valid copy with the higher sequence id, [Write] replaces both in an
// order that leaves a valid one wherever power fails, and [Repair] rewrites the
// copy that is damaged or behind. The codec below them is pure: [Decode] and
// [Header.Encode] turn bytes into a [Header] and back.
//
// The package knows the format, not its use: it holds no keys, checks no
// authenticity (the checksum finds damage, not an attacker), and leaves to
// package sector which headers to trust. Fields that it does not know are
// carried through a read and a write unchanged.
//
// Values are not safe for concurrent use. Processes keep out of each other's
// way with [Lock], which takes the locks that cryptsetup takes.
//
// Rules cited as "spec" are from the LUKS2 On-Disk Format Specification 1.1.4;
// where cryptsetup's code differs from the text, the code is followed and the
// comment says so.
package luks2

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// Errors when reading a header. Match them with [errors.Is].
var (
	// ErrMagic means that the bytes are not a LUKS header at all.
	ErrMagic = errors.New("no LUKS header")
	// ErrVersion means a LUKS header of another version than 2.
	ErrVersion = errors.New("not LUKS version 2")
	// ErrChecksum means that the copy is damaged or was being written when
	// power failed.
	ErrChecksum = errors.New("checksum does not match")
	// ErrInvalid means that the checksum is right and the content is not: the
	// header breaks a rule of the format.
	ErrInvalid = errors.New("invalid header")
	// ErrRequirement means that the header demands a feature that this
	// program does not have, so it must not be used (spec 3.5).
	ErrRequirement = errors.New("unknown mandatory requirement")
)

// ErrChanged means that the header on the device is not the one that was read:
// somebody else updated it in between. Read it again and retry.
var ErrChanged = errors.New("header was changed by someone else")

// Limits of the format.
const (
	binarySize   = 4096           // bytes of the binary header
	binaryUsed   = 512            // of which the rest is zeros
	MaxTokens    = 32             // LUKS2_TOKENS_MAX
	MaxKeyslots  = 32             // LUKS2_KEYSLOTS_MAX
	maxMetadata  = 4 << 20        // largest hdr_size
	maxKeyslots  = 128 << 20      // largest keyslots area (spec 2.3)
	areaMultiple = 4096           // alignment of the keyslots area and of areas in it
	sectorBytes  = 512            // unit of iv_tweak and alignment of segments
	labelBytes   = 48             // label and subsystem, with the final NUL
	uuidBytes    = 40             // UUID, with the final NUL
	checksumAlg  = "sha256"       // the only checksum that is written
	primaryMagic = "LUKS\xba\xbe" // first copy
	backupMagic  = "SKUL\xba\xbe" // second copy
)

// A Header is one LUKS2 header, without regard to which copy it came from.
type Header struct {
	Size      uint64 // bytes of one copy: binary header and JSON area; the copies stand at 0 and Size
	SeqID     uint64 // grows by one with each update
	UUID      string // of the volume, at most 39 bytes
	Label     string // at most 47 bytes
	Subsystem string // at most 47 bytes

	Keyslots map[int]*Keyslot
	Tokens   map[int]*Token
	Segments map[int]*Segment
	Digests  map[int]*Digest
	Config   Config

	salts [2][64]byte // of the two copies, so that their checksums differ; updates keep them
	raw   object      // the JSON area as it was read, for fields that are not known here
}

// A Segment says how a range of the backing device maps to the volume
// (spec 3.3).
type Segment struct {
	Type       string // "crypt" or "linear"
	Offset     uint64 // bytes from the start of the backing device
	Size       uint64 // bytes; 0 when Dynamic
	Dynamic    bool   // reaches to the end of the backing device
	IVTweak    uint64 // tweak of the first sector, in 512-byte units
	Encryption string // cipher in dm-crypt's words, "aes-xts-plain64"
	SectorSize uint32 // bytes of an encryption sector
	Flags      []string
	Integrity  bool // carries an "integrity" object, which is not supported here

	raw object
}

// A Digest tells whether a key is the right one for the segments it names: it
// is PBKDF2-HMAC of the key (spec 3.4).
type Digest struct {
	Type       string // "pbkdf2"
	Keyslots   []int
	Segments   []int
	Hash       string // "sha256"
	Iterations uint32
	Salt       []byte // 32 bytes
	Digest     []byte

	raw object
}

// A Token is free-form JSON that tells a program how to get a key; LUKS only
// fixes Type and Keyslots (spec 3.6).
type Token struct {
	Type     string
	Keyslots []int

	raw object
}

// A Keyslot describes a key that is stored encrypted under a passphrase in the
// keyslots area (spec 3.2). Types other than "luks2" are carried along with
// only Type, KeySize and Area understood.
type Keyslot struct {
	Type     string // "luks2", "reencrypt"
	KeySize  int    // bytes
	Priority *int   // 0 ignore, 1 normal, 2 high; nil is normal
	AF       AF
	Area     Area
	KDF      KDF

	raw object
}

// AF describes the anti-forensic splitter of a keyslot.
type AF struct {
	Type    string // "luks1"
	Stripes int    // 4000
	Hash    string
}

// Area is the place of a keyslot's binary data.
type Area struct {
	Type       string // "raw" for luks2 keyslots
	Offset     uint64 // bytes from the start of the backing device
	Size       uint64 // bytes
	Encryption string
	KeySize    int // bytes
}

// KDF describes how a keyslot's passphrase becomes a key.
type KDF struct {
	Type       string // "argon2id", "argon2i" or "pbkdf2"
	Salt       []byte
	Time       uint32 // argon2: passes
	Memory     uint32 // argon2: KiB
	CPUs       uint32 // argon2: lanes
	Hash       string // pbkdf2
	Iterations uint32 // pbkdf2
}

// Config holds what concerns the header as a whole (spec 3.5).
type Config struct {
	JSONSize     uint64   // bytes of the JSON area, Header.Size - 4096
	KeyslotsSize uint64   // bytes of the keyslots area, which follows the second copy
	Flags        []string // hints for dm-crypt such as "allow-discards"
	Requirements []string // mandatory: who does not know one must not use the header

	raw object
}

// validSizes lists the sizes of a copy that cryptsetup accepts
// (LUKS2_check_metadata_area_size in lib/luks2).
var validSizes = []uint64{16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20}

// New returns an empty header whose copies take size bytes each, with a
// keyslots area up to dataOffset. It has no segment yet, so it is not valid.
func New(size, dataOffset uint64) *Header {
	return &Header{
		Size:     size,
		Keyslots: map[int]*Keyslot{},
		Tokens:   map[int]*Token{},
		Segments: map[int]*Segment{},
		Digests:  map[int]*Digest{},
		Config:   Config{JSONSize: size - binarySize, KeyslotsSize: dataOffset - 2*size},
	}
}

// CheckRequirements returns an [ErrRequirement] that names every mandatory
// requirement which is not in known.
func (h *Header) CheckRequirements(known ...string) error {
	var unknown []string
	for _, r := range h.Config.Requirements {
		if !slices.Contains(known, r) {
			unknown = append(unknown, strconv.Quote(r))
		}
	}
	if unknown != nil {
		return fmt.Errorf("%w: %v", ErrRequirement, unknown)
	}
	return nil
}

// FreeArea returns the offset of the first gap of at least size bytes in the
// keyslots area, the way cryptsetup allocates: 4096-byte aligned, lowest first.
func (h *Header) FreeArea(size uint64) (uint64, error) {
	areas := slices.SortedFunc(maps.Values(h.Keyslots), func(a, b *Keyslot) int {
		return int(int64(a.Area.Offset) - int64(b.Area.Offset))
	})
	next := 2 * h.Size
	for _, k := range areas {
		if k.Area.Offset >= next+size {
			break
		}
		next = max(next, roundUp(k.Area.Offset+k.Area.Size, areaMultiple))
	}
	if end := 2*h.Size + h.Config.KeyslotsSize; size > end || next > end-size {
		return 0, fmt.Errorf("luks2: no room for %d bytes in the keyslots area", size)
	}
	return next, nil
}

// Free returns the smallest number below limit that is not a key of m.
func Free[V any](m map[int]V, limit int) (int, error) {
	for i := range limit {
		if _, taken := m[i]; !taken {
			return i, nil
		}
	}
	return 0, fmt.Errorf("luks2: all %d places are taken", limit)
}

// Validate checks the rules of the format that do not depend on who uses the
// header. Its errors wrap [ErrInvalid].
func (h *Header) Validate() error {
	if err := h.validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

func (h *Header) validate() error {
	if !slices.Contains(validSizes, h.Size) {
		return fmt.Errorf("size of a copy is %d bytes, which is not one of %v", h.Size, validSizes)
	}
	if h.Config.JSONSize != h.Size-binarySize {
		return fmt.Errorf("config.json_size is %d, not %d", h.Config.JSONSize, h.Size-binarySize)
	}
	ks := h.Config.KeyslotsSize
	if ks%areaMultiple != 0 || ks > maxKeyslots {
		return fmt.Errorf("config.keyslots_size %d is not a multiple of %d up to %d", ks, areaMultiple, maxKeyslots)
	}
	if h.UUID == "" {
		return errors.New("no UUID")
	}
	if len(h.Tokens) > MaxTokens {
		return fmt.Errorf("%d tokens, of which there may be %d", len(h.Tokens), MaxTokens)
	}
	if len(h.Keyslots) > MaxKeyslots {
		return fmt.Errorf("%d keyslots, of which there may be %d", len(h.Keyslots), MaxKeyslots)
	}
	if err := h.validateSegments(); err != nil {
		return err
	}
	if err := h.validateKeyslots(); err != nil {
		return err
	}
	for id, d := range h.Digests {
		if d.Type != "pbkdf2" {
			return fmt.Errorf("digest %d has unknown type %q", id, d.Type)
		}
		if len(d.Salt) != 32 || d.Iterations == 0 || len(d.Digest) < 20 || len(d.Digest) > 64 {
			return fmt.Errorf("digest %d has salt, iterations or digest of a wrong size", id)
		}
		if s, ok := firstMissing(d.Segments, h.Segments); !ok {
			return fmt.Errorf("digest %d names segment %d, which is not there", id, s)
		}
		if s, ok := firstMissing(d.Keyslots, h.Keyslots); !ok {
			return fmt.Errorf("digest %d names keyslot %d, which is not there", id, s)
		}
	}
	for id, t := range h.Tokens {
		if t.Type == "" {
			return fmt.Errorf("token %d has no type", id)
		}
		if s, ok := firstMissing(t.Keyslots, h.Keyslots); !ok {
			return fmt.Errorf("token %d names keyslot %d, which is not there", id, s)
		}
	}
	return nil
}

// firstMissing returns the first of ids that is not in m, and whether all are.
func firstMissing[V any](ids []int, m map[int]V) (int, bool) {
	for _, id := range ids {
		if _, ok := m[id]; !ok {
			return id, false
		}
	}
	return 0, true
}

func (h *Header) validateSegments() error {
	if len(h.Segments) == 0 {
		return errors.New("no segment")
	}
	var end uint64 // of the segments so far
	for id := range len(h.Segments) {
		s, ok := h.Segments[id]
		if !ok {
			return fmt.Errorf("segments are not numbered 0 to %d", len(h.Segments)-1)
		}
		switch {
		case s.Offset%sectorBytes != 0:
			return fmt.Errorf("segment %d: offset %d is not a multiple of %d", id, s.Offset, sectorBytes)
		case s.Offset < 2*h.Size+h.Config.KeyslotsSize:
			return fmt.Errorf("segment %d: offset %d lies in the header", id, s.Offset)
		case s.Dynamic && id != len(h.Segments)-1:
			return fmt.Errorf("segment %d: dynamic size, but not the last segment", id)
		case !s.Dynamic && (s.Size == 0 || s.Size%sectorBytes != 0 || s.Offset+s.Size < s.Offset):
			return fmt.Errorf("segment %d: impossible size %d", id, s.Size)
		case s.Offset < end:
			return fmt.Errorf("segment %d overlaps the one before it", id)
		}
		end = s.Offset + s.Size
		if s.Type != "crypt" {
			continue
		}
		if n := s.SectorSize; n < 512 || n > 4096 || n&(n-1) != 0 {
			return fmt.Errorf("segment %d: sector size %d", id, n)
		}
		if s.IVTweak%uint64(s.SectorSize/sectorBytes) != 0 {
			// dm-crypt refuses it: "Invalid iv_offset sector".
			return fmt.Errorf("segment %d: iv_tweak %d is not a multiple of the sector size", id, s.IVTweak)
		}
		if h.SegmentDigest(id) == nil {
			return fmt.Errorf("segment %d has no digest", id)
		}
	}
	return nil
}

// SegmentDigest returns the digest of segment id, or nil.
func (h *Header) SegmentDigest(id int) *Digest {
	for _, k := range slices.Sorted(maps.Keys(h.Digests)) {
		if slices.Contains(h.Digests[k].Segments, id) {
			return h.Digests[k]
		}
	}
	return nil
}

func (h *Header) validateKeyslots() error {
	type area struct {
		id       int
		from, to uint64
	}
	var areas []area
	first, last := 2*h.Size, 2*h.Size+h.Config.KeyslotsSize
	for id, k := range h.Keyslots {
		from, to := k.Area.Offset, k.Area.Offset+k.Area.Size
		if k.Area.Size == 0 || to < from || from < first || to > last {
			return fmt.Errorf("keyslot %d: area %d+%d lies outside of the keyslots area", id, k.Area.Offset, k.Area.Size)
		}
		areas = append(areas, area{id, from, to})
		if k.Type != "luks2" {
			continue
		}
		if k.KeySize <= 0 || k.AF.Type != "luks1" || k.AF.Stripes <= 0 || k.Area.Type != "raw" || k.Area.KeySize <= 0 {
			return fmt.Errorf("keyslot %d has an impossible key, area or splitter", id)
		}
		if need := uint64(k.KeySize) * uint64(k.AF.Stripes); k.Area.Size < need {
			return fmt.Errorf("keyslot %d: area of %d bytes is too small for %d", id, k.Area.Size, need)
		}
	}
	slices.SortFunc(areas, func(a, b area) int { return int(int64(a.from) - int64(b.from)) })
	for i := 1; i < len(areas); i++ {
		if areas[i].from < areas[i-1].to {
			return fmt.Errorf("keyslots %d and %d overlap", areas[i-1].id, areas[i].id)
		}
	}
	return nil
}

func roundUp(n, m uint64) uint64 { return (n + m - 1) / m * m }
