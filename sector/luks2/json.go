package luks2

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// An object is a JSON object whose members are still text. Every typed struct
// keeps the object it was read from, so that members which are not known here
// survive a rewrite, as cryptsetup promises too.
//
// Members are looked up by exact name. The struct decoding of encoding/json
// would also take "Encryption" for "encryption", where cryptsetup would not:
// two readers that see two different headers are how attacks begin.
type object map[string]json.RawMessage

// A reader takes members out of an object and keeps the first error.
type reader struct {
	o   object
	err error
}

func (r *reader) fail(name string, err error) {
	if r.err == nil {
		r.err = fmt.Errorf("%q: %w", name, err)
	}
}

// get decodes a member into v. A member that is missing is an error unless it
// is optional.
func (r *reader) get(name string, v any) { r.lookup(name, v, false) }
func (r *reader) opt(name string, v any) { r.lookup(name, v, true) }

func (r *reader) lookup(name string, v any, optional bool) {
	raw, ok := r.o[name]
	if !ok {
		if !optional {
			r.fail(name, errors.New("missing"))
		}
		return
	}
	if err := json.Unmarshal(raw, v); err != nil {
		r.fail(name, err)
	}
}

// size reads a 64-bit integer, which LUKS2 writes as a decimal string because
// JSON numbers are doubles (spec 3).
func (r *reader) size(name string) uint64 {
	var s string
	r.get(name, &s)
	if r.err != nil {
		return 0
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		r.fail(name, err)
	}
	return n
}

// ids reads an array of object names, which are decimal strings.
func (r *reader) ids(name string) []int {
	var names []string
	r.get(name, &names)
	ids := make([]int, 0, len(names))
	for _, s := range names {
		n, err := parseID(s)
		if err != nil {
			r.fail(name, err)
		}
		ids = append(ids, n)
	}
	return ids
}

func (r *reader) bytes(name string) []byte {
	var s string
	r.get(name, &s)
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		r.fail(name, err)
	}
	return b
}

func (r *reader) object(name string) *reader {
	var o object
	r.get(name, &o)
	return &reader{o: o, err: r.err}
}

func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || strconv.FormatUint(n, 10) != s {
		return 0, fmt.Errorf("%q is not an object number", s)
	}
	return int(n), nil
}

// set replaces a member.
func (o object) set(name string, v any) {
	b, err := marshal(v)
	if err != nil {
		panic("luks2: internal error: " + err.Error()) // only strings, numbers and maps come here
	}
	o[name] = b
}

func (o object) setSize(name string, n uint64) { o.set(name, strconv.FormatUint(n, 10)) }

func (o object) setIDs(name string, ids []int) {
	names := make([]string, 0, len(ids)) // never null
	for _, n := range ids {
		names = append(names, strconv.Itoa(n))
	}
	o.set(name, names)
}

func (o object) setBytes(name string, b []byte) {
	o.set(name, base64.StdEncoding.EncodeToString(b))
}

func (o object) clone() object {
	if o == nil {
		return object{}
	}
	return maps.Clone(o)
}

// marshal is json.Marshal without its escaping of <, > and & for HTML.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimRight(b.Bytes(), "\n"), nil
}

// decodeJSON reads the JSON area: text that starts with "{", then only zeros.
func (h *Header) decodeJSON(area []byte) error {
	text := area
	if i := bytes.IndexByte(area, 0); i >= 0 {
		text = area[:i]
		if len(bytes.TrimLeft(area[i:], "\x00")) != 0 {
			return errors.New("bytes after the end of the JSON text")
		}
	} else {
		return errors.New("JSON text does not end")
	}
	if !bytes.HasPrefix(text, []byte("{")) {
		return errors.New("JSON text does not start with {")
	}
	if err := json.Unmarshal(text, &h.raw); err != nil {
		return err
	}
	r := &reader{o: h.raw}
	h.Keyslots = readObjects(r, "keyslots", readKeyslot)
	h.Tokens = readObjects(r, "tokens", readToken)
	h.Segments = readObjects(r, "segments", readSegment)
	h.Digests = readObjects(r, "digests", readDigest)
	config := r.object("config")
	h.Config = readConfig(config)
	return errors.Join(r.err, config.err)
}

// readObjects reads a top-level object whose members are numbered objects.
func readObjects[T any](r *reader, name string, read func(*reader) T) map[int]T {
	var members map[string]object
	r.get(name, &members)
	m := make(map[int]T, len(members))
	for key, o := range members {
		id, err := parseID(key)
		if err != nil {
			r.fail(name, err)
			break
		}
		if o == nil {
			r.fail(name, fmt.Errorf("%s is not an object", key))
			break
		}
		mr := &reader{o: o}
		m[id] = read(mr)
		if mr.err != nil {
			r.fail(name+"."+key, mr.err)
			break
		}
	}
	return m
}

func readSegment(r *reader) *Segment {
	s := &Segment{raw: r.o}
	r.get("type", &s.Type)
	s.Offset = r.size("offset")
	var size string
	if r.get("size", &size); size == "dynamic" {
		s.Dynamic = true
	} else {
		s.Size = r.size("size")
	}
	r.opt("flags", &s.Flags)
	if s.Type == "crypt" {
		s.IVTweak = r.size("iv_tweak")
		r.get("encryption", &s.Encryption)
		r.get("sector_size", &s.SectorSize)
		_, s.Integrity = r.o["integrity"]
	}
	return s
}

func (s *Segment) MarshalJSON() ([]byte, error) {
	o := s.raw.clone()
	o.set("type", s.Type)
	o.setSize("offset", s.Offset)
	if s.Dynamic {
		o.set("size", "dynamic")
	} else {
		o.setSize("size", s.Size)
	}
	if s.Type == "crypt" {
		o.setSize("iv_tweak", s.IVTweak)
		o.set("encryption", s.Encryption)
		o.set("sector_size", s.SectorSize)
	}
	if len(s.Flags) > 0 {
		o.set("flags", s.Flags)
	}
	return marshal(map[string]json.RawMessage(o))
}

func readDigest(r *reader) *Digest {
	d := &Digest{raw: r.o}
	r.get("type", &d.Type)
	d.Keyslots = r.ids("keyslots")
	d.Segments = r.ids("segments")
	r.get("hash", &d.Hash)
	r.get("iterations", &d.Iterations)
	d.Salt = r.bytes("salt")
	d.Digest = r.bytes("digest")
	return d
}

func (d *Digest) MarshalJSON() ([]byte, error) {
	o := d.raw.clone()
	o.set("type", d.Type)
	o.setIDs("keyslots", d.Keyslots)
	o.setIDs("segments", d.Segments)
	o.set("hash", d.Hash)
	o.set("iterations", d.Iterations)
	o.setBytes("salt", d.Salt)
	o.setBytes("digest", d.Digest)
	return marshal(map[string]json.RawMessage(o))
}

// NewToken makes a token of a JSON object that has at least "type" and
// "keyslots", such as the programs that own tokens write.
func NewToken(text []byte) (*Token, error) {
	var o object
	if err := json.Unmarshal(text, &o); err != nil {
		return nil, fmt.Errorf("luks2: token: %w", err)
	}
	r := &reader{o: o}
	t := readToken(r)
	if r.err != nil {
		return nil, fmt.Errorf("luks2: token: %w", r.err)
	}
	return t, nil
}

func readToken(r *reader) *Token {
	t := &Token{raw: r.o}
	r.get("type", &t.Type)
	t.Keyslots = r.ids("keyslots")
	return t
}

// MarshalJSON returns the token as its owner wrote it, but for Keyslots.
func (t *Token) MarshalJSON() ([]byte, error) {
	o := t.raw.clone()
	o.set("type", t.Type)
	o.setIDs("keyslots", t.Keyslots)
	return marshal(map[string]json.RawMessage(o))
}

func readKeyslot(r *reader) *Keyslot {
	k := &Keyslot{raw: r.o}
	r.get("type", &k.Type)
	r.get("key_size", &k.KeySize)
	r.opt("priority", &k.Priority)
	area := r.object("area")
	area.get("type", &k.Area.Type)
	k.Area.Offset = area.size("offset")
	k.Area.Size = area.size("size")
	if k.Type == "luks2" {
		area.get("encryption", &k.Area.Encryption)
		area.get("key_size", &k.Area.KeySize)
		af := r.object("af")
		af.get("type", &k.AF.Type)
		af.get("stripes", &k.AF.Stripes)
		af.get("hash", &k.AF.Hash)
		kdf := r.object("kdf")
		kdf.get("type", &k.KDF.Type)
		k.KDF.Salt = kdf.bytes("salt")
		if k.KDF.Type == "pbkdf2" {
			kdf.get("hash", &k.KDF.Hash)
			kdf.get("iterations", &k.KDF.Iterations)
		} else {
			kdf.get("time", &k.KDF.Time)
			kdf.get("memory", &k.KDF.Memory)
			kdf.get("cpus", &k.KDF.CPUs)
		}
		r.err = errors.Join(r.err, af.err, kdf.err)
	}
	r.err = errors.Join(r.err, area.err)
	return k
}

func (k *Keyslot) MarshalJSON() ([]byte, error) {
	if k.Type != "luks2" {
		return marshal(map[string]json.RawMessage(k.raw)) // only carried along
	}
	o := k.raw.clone()
	o.set("type", k.Type)
	o.set("key_size", k.KeySize)
	if k.Priority != nil {
		o.set("priority", *k.Priority)
	}
	o.set("af", map[string]any{"type": k.AF.Type, "stripes": k.AF.Stripes, "hash": k.AF.Hash})
	area := object{}
	area.set("type", k.Area.Type)
	area.setSize("offset", k.Area.Offset)
	area.setSize("size", k.Area.Size)
	area.set("encryption", k.Area.Encryption)
	area.set("key_size", k.Area.KeySize)
	o.set("area", area)
	// cryptsetup wants exactly the members of the type: five for argon2, four
	// for pbkdf2 (lib/luks2/luks2_json_metadata.c, validate_kdf).
	kdf := object{}
	kdf.set("type", k.KDF.Type)
	kdf.setBytes("salt", k.KDF.Salt)
	if k.KDF.Type == "pbkdf2" {
		kdf.set("hash", k.KDF.Hash)
		kdf.set("iterations", k.KDF.Iterations)
	} else {
		kdf.set("time", k.KDF.Time)
		kdf.set("memory", k.KDF.Memory)
		kdf.set("cpus", k.KDF.CPUs)
	}
	o.set("kdf", kdf)
	return marshal(map[string]json.RawMessage(o))
}

func readConfig(r *reader) Config {
	c := Config{raw: r.o}
	c.JSONSize = r.size("json_size")
	c.KeyslotsSize = r.size("keyslots_size")
	r.opt("flags", &c.Flags)
	// The specification's text has an array here; cryptsetup writes and reads
	// an object with one array (luks2_json_metadata.c), so that is the format.
	if _, ok := r.o["requirements"]; ok {
		q := r.object("requirements")
		q.opt("mandatory", &c.Requirements)
		for name, value := range q.o {
			if name != "mandatory" {
				// A kind of requirement that nobody has defined yet: to take it
				// for optional would be a guess.
				c.Requirements = append(c.Requirements, name+":"+string(value))
			}
		}
		slices.Sort(c.Requirements)
		r.err = errors.Join(r.err, q.err)
	}
	return c
}

func (c *Config) encode() object {
	o := c.raw.clone()
	o.setSize("json_size", c.JSONSize)
	o.setSize("keyslots_size", c.KeyslotsSize)
	delete(o, "flags")
	if len(c.Flags) > 0 {
		o.set("flags", c.Flags)
	}
	delete(o, "requirements")
	if len(c.Requirements) > 0 {
		o.set("requirements", map[string][]string{"mandatory": c.Requirements})
	}
	return o
}

// encodeJSON returns the text of the JSON area, compact and without its zeros.
func (h *Header) encodeJSON() ([]byte, error) {
	o := h.raw.clone()
	o.set("keyslots", h.Keyslots)
	o.set("tokens", h.Tokens)
	o.set("segments", h.Segments)
	o.set("digests", h.Digests)
	o.set("config", h.Config.encode())
	return marshal(map[string]json.RawMessage(o))
}
