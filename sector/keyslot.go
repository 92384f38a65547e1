package sector

import (
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/pbkdf2"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// A LUKS2 keyslot holds the DEK under a passphrase: the DEK is split into
// stripes, of which all are needed to get it back, and the stripes are
// encrypted with a key that the KDF makes of the passphrase (spec 3.2; the
// splitter is that of LUKS1). Keyslots are for recovery: cryptsetup opens
// them, so a volume can be read where hostcryptd isn't.

const afStripes = 4000

// hashes are those that cryptsetup uses in headers it writes by itself.
var hashes = map[string]func() hash.Hash{
	"sha1":   sha1.New,
	"sha256": sha256.New,
	"sha512": sha512.New,
}

// Cost of argon2id for a recovery key. The key has 128 random bits, so the
// cost protects nothing; it is cryptsetup's minimum of passes with little
// memory, so that a crash kernel with 192 MiB can use it too.
const (
	recoveryTime   = 4
	recoveryMemory = 32 << 10 // KiB
	recoveryCPUs   = 1
)

// Bounds on the KDF cost that a header can ask for, cryptsetup's own
// (lib/crypto_backend/pbkdf_check.c): 4 GiB and 4 threads.
const (
	maxKDFMemory = 4 << 20 // KiB
	maxKDFCPUs   = 4
	maxKDFTime   = 10_000
)

// newKeyslot describes a keyslot for a DEK at an offset in the keyslots area.
func newKeyslot(offset uint64) *luks2.Keyslot {
	salt := make([]byte, 32)
	rand.Read(salt)
	return &luks2.Keyslot{
		Type: "luks2", KeySize: dekSize,
		AF: luks2.AF{Type: "luks1", Stripes: afStripes, Hash: "sha256"},
		Area: luks2.Area{
			Type: "raw", Offset: offset, Size: keyslotAreaSize, Encryption: Cipher, KeySize: 64,
		},
		KDF: luks2.KDF{Type: "argon2id", Time: recoveryTime, Memory: recoveryMemory, CPUs: recoveryCPUs, Salt: salt},
	}
}

// keyslotAreaSize is what the stripes of a DEK take, in multiples of 4096.
const keyslotAreaSize = (dekSize*afStripes + 4095) / 4096 * 4096

// keyslotCipher derives the cipher of a keyslot's area.
func keyslotCipher(k *luks2.Keyslot, passphrase []byte) (*xts.Cipher, error) {
	if k.Area.Encryption != Cipher || k.Area.KeySize != 64 {
		return nil, fmt.Errorf("%w: keyslot encrypted with %s and %d-byte keys", ErrUnsupported, k.Area.Encryption, k.Area.KeySize)
	}
	var key []byte
	switch kdf := k.KDF; kdf.Type {
	case "argon2id", "argon2i":
		if kdf.Time == 0 || kdf.Time > maxKDFTime || kdf.Memory > maxKDFMemory || kdf.CPUs == 0 || kdf.CPUs > maxKDFCPUs {
			return nil, fmt.Errorf("%w: keyslot with %s of %d passes over %d KiB on %d threads", ErrUnsupported, kdf.Type, kdf.Time, kdf.Memory, kdf.CPUs)
		}
		derive := argon2.IDKey
		if kdf.Type == "argon2i" {
			derive = argon2.Key
		}
		if kdf.Memory > recoveryMemory {
			if err := haveMemory(kdf.Memory); err != nil {
				return nil, fmt.Errorf("%s of a keyslot: %w", kdf.Type, err)
			}
			// Else the next such keyslot would need as much beside it: Go's collector lets
			// what is garbage grow to the size of what isn't.
			defer debug.FreeOSMemory()
		}
		key = derive(passphrase, kdf.Salt, kdf.Time, kdf.Memory, uint8(kdf.CPUs), 64)
	case "pbkdf2":
		newHash := hashes[kdf.Hash]
		if newHash == nil || kdf.Iterations > maxDigestIterations {
			return nil, fmt.Errorf("%w: keyslot with pbkdf2 of %d times %s", ErrUnsupported, kdf.Iterations, kdf.Hash)
		}
		key = pbkdf2.Key(passphrase, kdf.Salt, int(kdf.Iterations), 64, newHash)
	default:
		return nil, fmt.Errorf("%w: keyslot with KDF %q", ErrUnsupported, kdf.Type)
	}
	defer clear(key)
	return xts.NewCipher((*[64]byte)(key))
}

// haveMemory returns an error if this host hasn't as much memory to give, in KiB.
// cryptsetup asks for up to 1 GiB in a header that it writes. As this process locks its
// memory, where it may, the kernel would kill it or another for that.
func haveMemory(need uint32) error {
	b, err := os.ReadFile(memInfo)
	if err != nil {
		return nil // the kernel will say
	}
	var have, n uint64
	for line := range strings.Lines(string(b)) {
		// What others can be moved to swap for counts too.
		for _, name := range []string{"MemAvailable:", "SwapFree:"} {
			if value, ok := strings.CutPrefix(line, name); ok {
				if _, err := fmt.Sscan(value, &n); err == nil {
					have += n
				}
			}
		}
	}
	if uint64(need) > have {
		return fmt.Errorf("%w: it takes %d MiB, and this host has %d MiB to give; try again with more", syscall.ENOMEM, need>>10, have>>10)
	}
	return nil
}

var memInfo = "/proc/meminfo"

// kdfCost orders keyslots: those that this program writes come first, then by what it
// takes to try them.
func kdfCost(k *luks2.Keyslot) uint64 {
	switch kdf := k.KDF; {
	case kdf.Type == "argon2id" && kdf.Time == recoveryTime && kdf.Memory == recoveryMemory && kdf.CPUs == recoveryCPUs:
		return 0
	case kdf.Type == "pbkdf2":
		return 1
	default:
		return 1 + uint64(kdf.Time)*uint64(kdf.Memory)
	}
}

// sealKeyslot fills area (keyslotAreaSize bytes, zeroed) with the DEK under a
// passphrase.
func sealKeyslot(k *luks2.Keyslot, passphrase []byte, dek *[dekSize]byte, area []byte) error {
	c, err := keyslotCipher(k, passphrase)
	if err != nil {
		return err
	}
	defer c.Wipe()
	afSplit(area[:dekSize*afStripes], dek[:], sha256.New)
	// The area counts its own sectors of 512 bytes from 0.
	c.EncryptSectors(area, area, 0, 512)
	return nil
}

// openKeyslot takes a DEK out of a keyslot and checks it against the keyslot's
// digest. A wrong passphrase gives [ErrWrongKey].
func openKeyslot(b luks2.File, h *luks2.Header, id int, passphrase []byte, dek *[dekSize]byte) error {
	k := h.Keyslots[id]
	if k.Type != "luks2" || k.KeySize != dekSize || k.AF.Stripes != afStripes || k.Area.Size > 1<<20 {
		return fmt.Errorf("%w: keyslot %d is of a kind that hostcryptd does not write", ErrUnsupported, id)
	}
	newHash := hashes[k.AF.Hash]
	if newHash == nil {
		return fmt.Errorf("%w: keyslot %d splits with hash %q", ErrUnsupported, id, k.AF.Hash)
	}
	c, err := keyslotCipher(k, passphrase)
	if err != nil {
		return err
	}
	defer c.Wipe()
	area := alignedBytes(int(k.Area.Size))
	defer clear(area)
	if _, err := b.ReadAt(area, int64(k.Area.Offset)); err != nil {
		return fmt.Errorf("sector: reading keyslot %d: %w", id, err)
	}
	c.DecryptSectors(area, area[:len(area)/512*512], 0, 512)
	afMerge(dek[:], area[:dekSize*afStripes], newHash)
	for _, d := range h.Digests {
		if slices.Contains(d.Keyslots, id) {
			if checkDigest(d, dek) == nil {
				return nil
			}
			clear(dek[:])
			return fmt.Errorf("keyslot %d: %w", id, ErrWrongKey)
		}
	}
	clear(dek[:])
	return fmt.Errorf("%w: keyslot %d has no digest", luks2.ErrInvalid, id)
}

// keyslotIDs lists the keyslots of type luks2 in ascending order.
func keyslotIDs(h *luks2.Header) []int {
	ids := slices.Sorted(maps.Keys(h.Keyslots))
	return slices.DeleteFunc(ids, func(id int) bool { return h.Keyslots[id].Type != "luks2" })
}

// afSplit spreads key over stripes of its size: all but the last are random,
// and the last is such that [afMerge] gives key back.
func afSplit(stripes, key []byte, newHash func() hash.Hash) {
	n := len(key)
	last := len(stripes) - n
	rand.Read(stripes[:last])
	d := afAccumulate(stripes[:last], n, newHash)
	defer clear(d)
	subtle.XORBytes(stripes[last:], d, key)
}

// afMerge is the reverse of [afSplit].
func afMerge(key, stripes []byte, newHash func() hash.Hash) {
	n := len(key)
	last := len(stripes) - n
	d := afAccumulate(stripes[:last], n, newHash)
	defer clear(d)
	subtle.XORBytes(key, d, stripes[last:])
}

// afAccumulate computes d = diffuse(d XOR stripe) over all stripes but the
// last (LUKS1 specification, section 2.4).
func afAccumulate(stripes []byte, n int, newHash func() hash.Hash) []byte {
	h := newHash()
	d := make([]byte, n)
	sum := make([]byte, 0, h.Size())
	for ; len(stripes) > 0; stripes = stripes[n:] {
		subtle.XORBytes(d, d, stripes[:n])
		// diffuse replaces each block of the hash's size by the hash of its
		// number and itself; a shorter last block by as much of its hash.
		for i, block := 0, d; len(block) > 0; i++ {
			part := block[:min(h.Size(), len(block))]
			h.Reset()
			var number [4]byte
			binary.BigEndian.PutUint32(number[:], uint32(i))
			h.Write(number[:])
			h.Write(part)
			sum = h.Sum(sum[:0])
			copy(part, sum)
			block = block[len(part):]
		}
	}
	clear(sum[:cap(sum)])
	return d
}
