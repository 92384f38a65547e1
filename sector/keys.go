package sector

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/pbkdf2"

	"hostcryptd/sector/luks2"
)

// volumeTokenType is the type of the token that holds what the volume key
// protects: the wrapped DEKs and the header's MAC. Every volume has exactly
// one. Tokens of the other hostcryptd- types hold the volume key itself.
const volumeTokenType = TokenPrefix + "volume"

// formatVersion is the version of volumeToken and of everything that its MAC
// covers. Version 1 had no generation and left the key tokens out of the MAC;
// it is still read, and becomes version 2 when the header is next changed.
const formatVersion = 2

// dekVersion is the version of a wrapped DEK, which did not change.
const dekVersion = 1

// A volumeToken is the content of the token of type volumeTokenType.
type volumeToken struct {
	Type       string                 `json:"type"`
	Keyslots   []string               `json:"keyslots"`
	Version    int                    `json:"version"`
	Size       string                 `json:"size"`                 // of the data when it was formatted, in bytes, as LUKS2 writes 64-bit integers
	Generation string                 `json:"generation,omitempty"` // grows with every change that was made with the volume key
	DEKs       map[string]wrappedKey  `json:"deks"`                 // by number of the digest they match
	Recovery   map[string]forRecovery `json:"recovery,omitempty"`   // the volume key, by number of the keyslot whose recovery key wraps it
	Signature  *Signature             `json:"signature,omitempty"`
	MAC        string                 `json:"mac"`
}

// A wrappedKey is a key under AES-256-GCM; Wrapped ends with the tag.
type wrappedKey struct {
	Nonce   string `json:"nonce"`
	Wrapped string `json:"wrapped"`
}

// A forRecovery is the volume key under a recovery key, and what tells whether the
// keyslot of that key is as it was written.
type forRecovery struct {
	wrappedKey
	Salt string `json:"salt,omitempty"` // of the keyslot's KDF: another one is another keyslot
	MAC  string `json:"mac,omitempty"`  // see keyslotMAC

	// Noted is when MAC was made of what was there then, see noteOldKeyslots; zero if it was
	// made when the keyslot was.
	Noted time.Time `json:"noted,omitzero"`
}

// What derived keys are for. A purpose is the info of HKDF-SHA256; the volume's
// UUID is its salt. They are derived from the volume key, but for that of
// purposeRecovery, see recoverySecret.
const (
	purposeWrap     = "hostcryptd v1 DEK wrapping"
	purposeMAC      = "hostcryptd v1 header MAC"
	purposePin      = "hostcryptd v1 pin"
	purposeKeyslot  = "hostcryptd v1 keyslot"
	purposeRecovery = "hostcryptd v1 volume key wrapping"
)

func deriveKey(secret []byte, uuid, purpose string) []byte {
	key, err := hkdf.Key(sha256.New, secret, []byte(uuid), purpose, 32)
	if err != nil {
		panic("sector: internal error: " + err.Error()) // only for a length beyond the hash's reach
	}
	return key
}

// newAEAD is the cipher that wraps keys, with a key that is derived.
func newAEAD(secret []byte, uuid, purpose string) cipher.AEAD {
	key := deriveKey(secret, uuid, purpose)
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic("sector: internal error: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("sector: internal error: " + err.Error())
	}
	return aead
}

// fields encodes strings so that no two lists give the same bytes: each with
// its length before it, as 4 bytes big-endian.
func fields(list ...string) []byte {
	var b []byte
	for _, s := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	return b
}

// dekData is the additional data of a wrapped DEK: where it belongs and how
// it is to be used. A DEK moved to another volume or used with another cipher
// or sector size does not unwrap.
func dekData(uuid, digest string, sectorSize uint32) []byte {
	return fields("hostcryptd v1 DEK", uuid, digest, Cipher, strconv.FormatUint(uint64(sectorSize), 10), strconv.Itoa(dekVersion))
}

func wrapDEK(volumeKey *[VolumeKeySize]byte, dek *[dekSize]byte, uuid, digest string, sectorSize uint32, nonce []byte) wrappedKey {
	return wrap(newAEAD(volumeKey[:], uuid, purposeWrap), dek[:], dekData(uuid, digest, sectorSize), nonce)
}

func unwrapDEK(volumeKey *[VolumeKeySize]byte, w wrappedKey, dek *[dekSize]byte, uuid, digest string, sectorSize uint32) error {
	if err := w.unwrap(newAEAD(volumeKey[:], uuid, purposeWrap), dek[:], dekData(uuid, digest, sectorSize)); err != nil {
		return fmt.Errorf("%w: wrapped DEK %s: %w", ErrAuth, digest, err)
	}
	return nil
}

func newNonce() []byte {
	nonce := make([]byte, 12)
	rand.Read(nonce)
	return nonce
}

func wrap(aead cipher.AEAD, key, data, nonce []byte) wrappedKey {
	return wrappedKey{
		Nonce:   base64.StdEncoding.EncodeToString(nonce),
		Wrapped: base64.StdEncoding.EncodeToString(aead.Seal(nil, nonce, key, data)),
	}
}

// unwrap fills key.
func (w wrappedKey) unwrap(aead cipher.AEAD, key, data []byte) error {
	nonce, err1 := base64.StdEncoding.DecodeString(w.Nonce)
	wrapped, err2 := base64.StdEncoding.DecodeString(w.Wrapped)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if len(nonce) != aead.NonceSize() || len(wrapped) != len(key)+aead.Overhead() {
		return errors.New("it is of a wrong size")
	}
	// Open has room for its result in key, so nothing else gets to see it.
	if _, err := aead.Open(key[:0:len(key)], nonce, wrapped, data); err != nil {
		return errors.New("it does not belong to this volume and this key")
	}
	return nil
}

// A recovery key gives the DEK, by its keyslot. To make a token of a new KEK, and to
// authenticate the header before, takes the volume key, which all KEKs that had it
// may have lost: so each recovery key wraps that too.

// recoverySecret is what the key that wraps a volume key for a recovery key is
// derived from. The DEK is in it so that this way goes with the keyslot, whoever
// removes that. The recovery key is, so that the DEK alone does not give the key
// that wraps it: that would be a circle.
func recoverySecret(dek *[dekSize]byte, recoveryKey []byte) []byte {
	return slices.Concat(dek[:], recoveryKey)
}

func recoveryAEAD(dek *[dekSize]byte, recoveryKey []byte, uuid string) cipher.AEAD {
	secret := recoverySecret(dek, recoveryKey)
	defer clear(secret)
	return newAEAD(secret, uuid, purposeRecovery)
}

// recoveryData is the additional data of a volume key that a recovery key wraps.
func recoveryData(uuid string, keyslot int) []byte {
	return fields("hostcryptd v1 volume key", uuid, strconv.Itoa(keyslot))
}

// wrapVolumeKey wraps the volume key of k for the recovery key of a keyslot.
func (v *volumeToken) wrapVolumeKey(k *keys, recoveryKey []byte, uuid string, keyslot int, nonce []byte) {
	if v.Recovery == nil {
		v.Recovery = map[string]forRecovery{}
	}
	v.Recovery[strconv.Itoa(keyslot)] = forRecovery{wrappedKey: wrap(recoveryAEAD(k.dek, recoveryKey, uuid), k.volumeKey[:], recoveryData(uuid, keyslot), nonce)}
}

// keyslotMAC tells a keyslot from any other: all of its members that decide how it is
// opened, and what is in its area. Its priority is left out, which cryptsetup may change.
// It needs no MAC around it, and no older program minds it.
func keyslotMAC(volumeKey *[VolumeKeySize]byte, uuid string, keyslot int, k *luks2.Keyslot, area []byte) []byte {
	var list []string
	add := func(members ...any) {
		for _, m := range members {
			list = append(list, fmt.Sprint(m))
		}
	}
	add(uuid, keyslot, k.Type, k.KeySize, k.AF.Type, k.AF.Stripes, k.AF.Hash)
	add(k.Area.Type, k.Area.Offset, k.Area.Size, k.Area.Encryption, k.Area.KeySize, k.KDF.Type, string(k.KDF.Salt))
	if k.KDF.Type == "pbkdf2" {
		add(k.KDF.Hash, k.KDF.Iterations)
	} else {
		add(k.KDF.Time, k.KDF.Memory, k.KDF.CPUs)
	}
	key := deriveKey(volumeKey[:], uuid, purposeKeyslot)
	defer clear(key)
	mac := hmac.New(sha256.New, key)
	mac.Write(fields(append(list, string(area))...))
	return mac.Sum(nil)
}

// noteKeyslot lets keyslotIntact know a keyslot of h, whose volume key is wrapped, and
// what is in its area.
func (v *volumeToken) noteKeyslot(volumeKey *[VolumeKeySize]byte, h *luks2.Header, keyslot int, area []byte) {
	name, k := strconv.Itoa(keyslot), h.Keyslots[keyslot]
	e := v.Recovery[name]
	e.Noted = time.Time{}
	e.Salt = base64.StdEncoding.EncodeToString(k.KDF.Salt)
	e.MAC = base64.StdEncoding.EncodeToString(keyslotMAC(volumeKey, h.UUID, keyslot, k, area))
	v.Recovery[name] = e
}

// noteOldKeyslots lets keyslotIntact know the keyslots that have no MAC, since an earlier
// version has made them: from now on. Nobody can tell without its recovery key whether
// one is damaged already, so when it was noted stands beside it. What can't be read is
// left as it is, and so are keyslots of other programs: for them no volume key is wrapped,
// unless one has taken the number of a keyslot that had it.
func (v *volumeToken) noteOldKeyslots(b Backing, volumeKey *[VolumeKeySize]byte, h *luks2.Header, now time.Time) {
	for _, id := range recoverySlots(h) {
		e, ours := v.Recovery[strconv.Itoa(id)]
		k := h.Keyslots[id]
		ours = ours && kdfCost(k) == 0 && (e.Salt == "" || e.Salt == base64.StdEncoding.EncodeToString(k.KDF.Salt))
		if !ours || e.MAC != "" || k.Area.Size > 1<<20 {
			continue
		}
		area := alignedBytes(int(k.Area.Size))
		if readFull(b, area, int64(k.Area.Offset)) != nil {
			continue
		}
		v.noteKeyslot(volumeKey, h, id, area)
		e = v.Recovery[strconv.Itoa(id)]
		e.Noted = now.UTC().Truncate(time.Second)
		v.Recovery[strconv.Itoa(id)] = e
	}
}

// keyslotNoted is when a keyslot was noted by noteOldKeyslots, or zero.
func (v *volumeToken) keyslotNoted(keyslot int) time.Time {
	return v.Recovery[strconv.Itoa(keyslot)].Noted
}

// keyslotIntact tells whether a keyslot and its area are as they were written, or that
// this isn't known: of a keyslot that cryptsetup or an earlier version has made.
func (v *volumeToken) keyslotIntact(volumeKey *[VolumeKeySize]byte, h *luks2.Header, keyslot int, area []byte) (intact, known bool) {
	e, k := v.Recovery[strconv.Itoa(keyslot)], h.Keyslots[keyslot]
	if e.MAC == "" || e.Salt != base64.StdEncoding.EncodeToString(k.KDF.Salt) {
		return false, false
	}
	want, err := base64.StdEncoding.DecodeString(e.MAC)
	return err == nil && hmac.Equal(want, keyslotMAC(volumeKey, h.UUID, keyslot, k, area)), true
}

// unwrapVolumeKey is the reverse: with the DEK in k it fills in the volume key.
func (v *volumeToken) unwrapVolumeKey(k *keys, recoveryKey []byte, uuid string, keyslot int) error {
	w, ok := v.Recovery[strconv.Itoa(keyslot)]
	if !ok {
		return errors.New("there is none")
	}
	return w.unwrap(recoveryAEAD(k.dek, recoveryKey, uuid), k.volumeKey[:], recoveryData(uuid, keyslot))
}

// headerMAC authenticates what decides how the volume is read and who may open
// it: the UUID, all segments, the digest of each, the requirements, the size, the
// generation, the wrapped DEKs, the key tokens and the signature. Keyslots, the tokens of other
// programs, label and flags are left out, so that cryptsetup may change them. What
// recovery keys wrap goes with the keyslots, and is authenticated by itself.
// FORMAT.md has an example.
func headerMAC(volumeKey *[VolumeKeySize]byte, h *luks2.Header, v *volumeToken) ([]byte, error) {
	list, err := authenticated(h, v)
	if err != nil {
		return nil, err
	}
	key := deriveKey(volumeKey[:], h.UUID, purposeMAC)
	defer clear(key)
	mac := hmac.New(sha256.New, key)
	mac.Write(fields(list...))
	return mac.Sum(nil), nil
}

// authenticated is what headerMAC is computed of.
func authenticated(h *luks2.Header, v *volumeToken) ([]string, error) {
	list := []string{fmt.Sprintf("hostcryptd v%d header", v.Version), h.UUID}
	number := func(n uint64) { list = append(list, strconv.FormatUint(n, 10)) }

	number(uint64(len(h.Segments)))
	for _, id := range slices.Sorted(maps.Keys(h.Segments)) {
		s := h.Segments[id]
		number(uint64(id))
		list = append(list, s.Type)
		number(s.Offset)
		if s.Dynamic {
			list = append(list, "dynamic")
		} else {
			number(s.Size)
		}
		number(s.IVTweak)
		list = append(list, s.Encryption)
		number(uint64(s.SectorSize))
		number(uint64(len(s.Flags)))
		list = append(list, slices.Sorted(slices.Values(s.Flags))...)
		// The digest itself, not only its number: what it costs to check is
		// then known to be what was chosen.
		list = append(list, digestOf(h, id))
		if d := h.SegmentDigest(id); d != nil {
			list = append(list, d.Hash)
			number(uint64(d.Iterations))
			list = append(list, string(d.Salt), string(d.Digest))
		}
	}
	number(uint64(len(h.Config.Requirements)))
	list = append(list, slices.Sorted(slices.Values(h.Config.Requirements))...)
	list = append(list, v.Size)
	if v.Version > 1 {
		list = append(list, v.Generation)
	}
	number(uint64(len(v.DEKs)))
	for _, id := range slices.Sorted(maps.Keys(v.DEKs)) {
		list = append(list, id, v.DEKs[id].Nonce, v.DEKs[id].Wrapped)
	}
	if v.Version > 1 {
		// A token that was removed must not come back, nor lead elsewhere.
		tokens := slices.SortedFunc(slices.Values(keyTokens(h)), func(a, b KeyToken) int { return a.ID - b.ID })
		number(uint64(len(tokens)))
		for _, t := range tokens {
			text, err := canonical(h.Tokens[t.ID])
			if err != nil {
				return nil, fmt.Errorf("%w: token %d: %w", ErrAuth, t.ID, err)
			}
			number(uint64(t.ID))
			list = append(list, text)
		}
		if s := v.Signature; s != nil {
			list = append(list, "signature", s.KeyID, s.Algorithm, s.Value)
		}
	}
	return list, nil
}

// canonical writes a token such that it doesn't matter who wrote the JSON last:
// no white space, members sorted by name, RFC 8785 for what tokens hold.
func canonical(t *luks2.Token) (string, error) {
	text, err := t.MarshalJSON()
	if err != nil {
		return "", err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return "", err
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return "", err
	}
	return strings.TrimSuffix(b.String(), "\n"), nil
}

// fingerprint names a volume key without helping to find it.
func fingerprint(volumeKey *[VolumeKeySize]byte, uuid string) string {
	return hex.EncodeToString(deriveKey(volumeKey[:], uuid, purposePin))
}

// digestOf returns the number of the digest of a segment, as text; "" for a
// segment without one.
func digestOf(h *luks2.Header, segment int) string {
	for _, id := range slices.Sorted(maps.Keys(h.Digests)) {
		if slices.Contains(h.Digests[id].Segments, segment) {
			return strconv.Itoa(id)
		}
	}
	return ""
}

// setVolumeToken puts v into h, under a MAC over both. It comes last when a
// header is made or changed.
func setVolumeToken(h *luks2.Header, volumeKey *[VolumeKeySize]byte, v *volumeToken) error {
	v.Type, v.Keyslots, v.Version = volumeTokenType, []string{}, formatVersion
	slots := recoverySlots(h) // cryptsetup may have removed some, or put others in their place
	maps.DeleteFunc(v.Recovery, func(id string, e forRecovery) bool {
		n, err := strconv.Atoi(id)
		return err != nil || !slices.Contains(slots, n) || e.Salt != "" && e.Salt != base64.StdEncoding.EncodeToString(h.Keyslots[n].KDF.Salt)
	})
	mac, err := headerMAC(volumeKey, h, v)
	if err != nil {
		return err
	}
	v.MAC = base64.StdEncoding.EncodeToString(mac)
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	t, err := luks2.NewToken(text)
	if err != nil {
		return err
	}
	id, _, err := findVolumeToken(h)
	if err != nil {
		id, err = luks2.Free(h.Tokens, luks2.MaxTokens)
	}
	if err != nil {
		return err
	}
	h.Tokens[id] = t
	return nil
}

// findVolumeToken returns the one token of type volumeTokenType.
func findVolumeToken(h *luks2.Header) (int, *volumeToken, error) {
	found := -1
	for id, t := range h.Tokens {
		if t.Type != volumeTokenType {
			continue
		}
		if found >= 0 {
			return 0, nil, fmt.Errorf("%w: two tokens of type %s", ErrAuth, volumeTokenType)
		}
		found = id
	}
	if found < 0 {
		return 0, nil, fmt.Errorf("%w: a LUKS2 header, but without a token of type %s", ErrNotVolume, volumeTokenType)
	}
	text, err := h.Tokens[found].MarshalJSON()
	if err != nil {
		return 0, nil, err
	}
	var v volumeToken
	if err := json.Unmarshal(text, &v); err != nil {
		return 0, nil, fmt.Errorf("%w: token %d: %w", ErrAuth, found, err)
	}
	if v.Version < 1 || v.Version > formatVersion {
		return 0, nil, fmt.Errorf("%w: token %d is of version %d; this program knows versions up to %d", ErrUnsupported, found, v.Version, formatVersion)
	}
	if _, err := strconv.ParseUint(v.Generation, 10, 63); v.Version > 1 && err != nil {
		return 0, nil, fmt.Errorf("%w: token %d: generation: %w", ErrAuth, found, err)
	}
	return found, &v, nil
}

// size is Size as a number; a Size that is none counts as 0, which excludes no
// device. It was under the MAC when it was written.
func (v *volumeToken) size() int64 {
	n, err := strconv.ParseInt(v.Size, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// generation is Generation as a number, 0 in version 1.
func (v *volumeToken) generation() uint64 {
	if v.Version == 1 {
		return 0
	}
	n, _ := strconv.ParseUint(v.Generation, 10, 63) // checked by findVolumeToken
	return n
}

// setGeneration replaces the generation.
func (v *volumeToken) setGeneration(n uint64) { v.Generation = strconv.FormatUint(n, 10) }

// verify checks the MAC with a volume key that a token gave.
func (v *volumeToken) verify(h *luks2.Header, volumeKey *[VolumeKeySize]byte) error {
	mac, err := base64.StdEncoding.DecodeString(v.MAC)
	want, werr := headerMAC(volumeKey, h, v)
	if werr != nil {
		return werr
	}
	if err != nil || !hmac.Equal(mac, want) {
		return fmt.Errorf("%w: the header is not the one that was written with this volume key", ErrAuth)
	}
	return nil
}

// digestIterations is cryptsetup's floor. PBKDF2 slows down guessing, and a
// DEK of 512 random bits can't be guessed.
const digestIterations = 1000

// newDigest makes the LUKS2 digest of a DEK, over segment 0.
func newDigest(dek *[dekSize]byte) *luks2.Digest {
	salt := make([]byte, 32)
	rand.Read(salt)
	return &luks2.Digest{
		Type: "pbkdf2", Segments: []int{0}, Hash: "sha256", Iterations: digestIterations, Salt: salt,
		Digest: pbkdf2.Key(dek[:], salt, digestIterations, sha256.Size, sha256.New),
	}
}

// maxDigestIterations bounds the work that a header can ask for; cryptsetup's
// benchmark stays far below it.
const maxDigestIterations = 10_000_000

// checkDigest tells whether a DEK is the one that its digest was made of
// (spec 3.4).
func checkDigest(d *luks2.Digest, dek *[dekSize]byte) error {
	newHash := hashes[d.Hash]
	if newHash == nil {
		return fmt.Errorf("%w: digest with hash %q", ErrUnsupported, d.Hash)
	}
	if d.Iterations > maxDigestIterations {
		return fmt.Errorf("%w: digest with %d iterations", ErrUnsupported, d.Iterations)
	}
	got := pbkdf2.Key(dek[:], d.Salt, int(d.Iterations), len(d.Digest), newHash)
	if subtle.ConstantTimeCompare(got, d.Digest) != 1 {
		return fmt.Errorf("%w: the DEK does not match the digest of its segment", ErrAuth)
	}
	return nil
}

// newDEK draws a DEK whose halves differ, which XTS needs (IEEE 1619; FIPS
// 140-3 IG C.I). That they don't is an event of probability 2^-256.
func newDEK(dek *[dekSize]byte) {
	for {
		rand.Read(dek[:])
		if !bytes.Equal(dek[:32], dek[32:]) {
			return
		}
	}
}
