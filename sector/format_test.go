package sector

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/pbkdf2"

	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"

	"hostcryptd/sector/luks2"
	"hostcryptd/sector/sectortest"
)

var update = flag.Bool("update", false, "rewrite the examples in FORMAT.md")

// example finds a code block in FORMAT.md by its name.
func example(t *testing.T, doc []byte, name string) []byte {
	t.Helper()
	m := regexp.MustCompile("(?s)<!-- example: " + name + " -->\n```[a-z]*\n(.*?)```").FindSubmatch(doc)
	if m == nil {
		t.Fatalf("FORMAT.md has no example %q", name)
	}
	return m[1]
}

// lines reads "name: value" lines.
func lines(b []byte) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ": "); ok {
			m[name] = strings.TrimSpace(value)
		}
	}
	return m
}

// exampleHeader is the header of the worked example, made of its keys alone.
func exampleHeader(t *testing.T, volumeKey *[32]byte, dek *[64]byte) *luks2.Header {
	t.Helper()
	d := sectortest.New(dataOffset + 1<<20)
	h, err := newHeader(d, &FormatOptions{UUID: "0f1e2d3c-4b5a-4968-8776-655443322110", Label: "example", SectorSize: 4096, Seal: []Sealer{testSeal}})
	if err != nil {
		t.Fatal(err)
	}
	h.SeqID = 1
	salt := bytes.Repeat([]byte{0x5a}, 32)
	h.Digests[0] = &luks2.Digest{Type: "pbkdf2", Segments: []int{0}, Hash: "sha256", Iterations: digestIterations, Salt: salt,
		Digest: pbkdf2.Key(dek[:], salt, digestIterations, 32, sha256.New)}
	nonce := bytes.Repeat([]byte{0x4e}, 12)
	deks := map[string]wrappedKey{"0": wrapDEK(volumeKey, dek, h.UUID, "0", 4096, nonce)}
	h.Tokens[0], err = luks2.NewToken([]byte(`{"type":"hostcryptd-example","keyslots":[],"version":1,"key":"a wrapped key"}`))
	if err != nil {
		t.Fatal(err)
	}
	v := &volumeToken{Size: strconv.FormatInt(dataSize(d.Size(), h), 10), DEKs: deks}
	v.setGeneration(1)
	if err := setVolumeToken(h, volumeKey, v); err != nil {
		t.Fatal(err)
	}
	return h
}

// TestFormatExamples recomputes the examples of FORMAT.md, and opens the header
// that stands there with the keys that stand there.
func TestFormatExamples(t *testing.T) {
	doc, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		doc = updateExamples(t, doc)
		if err := os.WriteFile("FORMAT.md", doc, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	given := lines(example(t, doc, "keys"))
	var volumeKey [32]byte
	var dek [64]byte
	unhex(t, volumeKey[:], given["volume key"])
	unhex(t, dek[:], given["DEK"])

	// The JSON of the document, put into a header, opens.
	var text bytes.Buffer
	if err := json.Compact(&text, example(t, doc, "header")); err != nil {
		t.Fatal(err)
	}
	encoded, err := exampleHeader(t, &volumeKey, &dek).Encode(0)
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := json.Compact(&want, bytes.TrimRight(encoded[4096:], "\x00")); err != nil {
		t.Fatal(err)
	}
	if text.String() != want.String() {
		t.Errorf("the header in FORMAT.md is not what the code writes:\n%s\n%s", text.String(), want.String())
	}
	h, err := luks2.Decode(encoded, 0)
	if err != nil {
		t.Fatal(err)
	}
	var got [64]byte
	if err := openDEK(h, &volumeKey, &got); err != nil || got != dek {
		t.Errorf("the example does not open: %v", err)
	}

	if g, w := string(example(t, doc, "values")), exampleValues(t, h, &volumeKey, &dek, given["recovery key"]); g != w {
		t.Errorf("values in FORMAT.md:\n%s\nvalues by the code:\n%s", g, w)
	}
	// This one was made by OpenSSL.
	signed := lines(example(t, doc, "signature"))
	der, err := base64.StdEncoding.DecodeString(signed["public key"])
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		t.Fatal(err)
	}
	name := fingerprint(&volumeKey, h.UUID)
	if d := SignatureDigest(h.UUID, name); hex.EncodeToString(d[:]) != signed["signed digest"] {
		t.Errorf("the signed digest is %x by the code", d)
	}
	s := Signature{Algorithm: AlgorithmPS256, Value: signed["value"]}
	if err := s.verify(h.UUID, name, []TrustedKey{public.(*rsa.PublicKey)}); err != nil {
		t.Errorf("the signature in FORMAT.md: %v", err)
	}
	if g, w := string(example(t, doc, "binary")), hexdump(encoded[:512]); g != w {
		t.Errorf("binary header in FORMAT.md:\n%s\nby the code:\n%s", g, w)
	}
}

// TestFormatTable checks the rows of the sector table.
func TestFormatTable(t *testing.T) {
	doc, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\| (512|4096) \| (\d+) \| (\d+) \| (\d+) \|$`).FindAllSubmatch(doc, -1)
	if len(rows) != 4 {
		t.Fatalf("%d rows found", len(rows))
	}
	for _, row := range rows {
		var n [4]int64
		for i := range n {
			n[i], _ = strconv.ParseInt(string(row[i+1]), 10, 64)
		}
		v := &Volume{offset: dataOffset, sector: n[0]}
		if v.offset+n[1] != n[2] || v.tweakAt(n[1]) != uint64(n[3]) {
			t.Errorf("row %s: device byte %d, tweak %d", row[0], v.offset+n[1], v.tweakAt(n[1]))
		}
	}
}

// exampleRecovery is the recovery key of the worked example.
const exampleRecovery = "000000-000011-000022-000033-000044-000055-000066-000077"

func exampleValues(t *testing.T, h *luks2.Header, volumeKey *[32]byte, dek *[64]byte, recoveryKey string) string {
	t.Helper()
	_, v, err := findVolumeToken(h)
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := base64.StdEncoding.DecodeString(v.DEKs["0"].Wrapped)
	if err != nil {
		t.Fatal(err)
	}
	mac, err := headerMAC(volumeKey, h, v)
	if err != nil {
		t.Fatal(err)
	}
	token, err := canonical(h.Tokens[0])
	if err != nil {
		t.Fatal(err)
	}
	forRecovery := recoverySecret(dek, []byte(recoveryKey))
	v.wrapVolumeKey(&keys{volumeKey: volumeKey, dek: dek}, []byte(recoveryKey), h.UUID, 0, bytes.Repeat([]byte{0x4e}, 12))
	wrappedKey, err := base64.StdEncoding.DecodeString(v.Recovery["0"].Wrapped)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("wrapping key: %x\nadditional data: %x\nwrapped DEK: %x\nMAC key: %x\ntoken 0: %s\nMAC: %x\ndigest: %x\nfingerprint: %s\nrecovery wrapping key: %x\nrecovery additional data: %x\nwrapped volume key: %x\nkeyslot MAC key: %x\nkeyslot MAC: %x\n",
		deriveKey(volumeKey[:], h.UUID, purposeWrap), dekData(h.UUID, "0", 4096), wrapped,
		deriveKey(volumeKey[:], h.UUID, purposeMAC), token, mac, h.Digests[0].Digest, fingerprint(volumeKey, h.UUID),
		deriveKey(forRecovery, h.UUID, purposeRecovery), recoveryData(h.UUID, 0), wrappedKey,
		deriveKey(volumeKey[:], h.UUID, purposeKeyslot), keyslotMAC(volumeKey, h.UUID, 0, exampleKeyslot(), exampleArea()))
}

// exampleKeyslot is the first keyslot, with 32 bytes of 5a for salt; exampleArea is as many
// bytes as an area has, of which the one at i is i modulo 251.
func exampleKeyslot() *luks2.Keyslot {
	k := newKeyslot(2 * copySize)
	k.KDF.Salt = bytes.Repeat([]byte{0x5a}, 32)
	return k
}

func exampleArea() []byte {
	b := make([]byte, keyslotAreaSize)
	for i := range b {
		b[i] = byte(i % 251)
	}
	return b
}

func hexdump(b []byte) string {
	var s strings.Builder
	for i := 0; i < len(b); i += 32 {
		fmt.Fprintf(&s, "%03x: %x\n", i, b[i:i+32])
	}
	return s.String()
}

func unhex(t *testing.T, dst []byte, s string) {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(dst) {
		t.Fatalf("%q is not %d bytes of hexadecimal", s, len(dst))
	}
	copy(dst, b)
}

func updateExamples(t *testing.T, doc []byte) []byte {
	t.Helper()
	var volumeKey [32]byte
	var dek [64]byte
	for i := range volumeKey {
		volumeKey[i] = byte(i)
	}
	for i := range dek {
		dek[i] = byte(0x40 + i)
	}
	h := exampleHeader(t, &volumeKey, &dek)
	encoded, err := h.Encode(0)
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if err := json.Indent(&text, bytes.TrimRight(encoded[4096:], "\x00"), "", "  "); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"keys":   fmt.Sprintf("volume key: %x\nDEK: %x\nrecovery key: %s\n", volumeKey, dek, exampleRecovery),
		"header": text.String() + "\n",
		"values": exampleValues(t, h, &volumeKey, &dek, exampleRecovery),
		"binary": hexdump(encoded[:512]),
	} {
		re := regexp.MustCompile("(?s)(<!-- example: " + name + " -->\n```[a-z]*\n).*?```")
		doc = re.ReplaceAll(doc, []byte("${1}"+content+"```"))
	}
	return doc
}
