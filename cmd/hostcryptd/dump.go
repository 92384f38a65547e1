package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
	"hostcryptd/sector/luks2"
)

// A tokenInfo is what dump and format tell of a token.
type tokenInfo struct {
	ID    int      `json:"id"`
	Type  string   `json:"type"`
	Key   *keyInfo `json:"key,omitempty"`   // of a token that holds the volume key
	Error string   `json:"error,omitempty"` // why Key could not be read

	// Of a token that another has replaced: it still opens the volume.
	Retired   *time.Time `json:"retired,omitempty"`
	KeepUntil *time.Time `json:"keep_until,omitempty"`
}

// text describes a token in one line.
func (t *tokenInfo) text() string {
	s := t.Type
	switch {
	case t.Error != "":
		s += ", unreadable: " + t.Error
	case t.Key != nil:
		s += ": " + t.Key.text()
	}
	if t.Retired != nil {
		s += fmt.Sprintf(", retired %s, kept until %s", t.Retired.Format(time.RFC3339), t.KeepUntil.Format(time.RFC3339))
	}
	return s
}

type keyInfo struct{ keyunseal.Description }

func (k *keyInfo) text() string {
	s := k.KeyID
	if k.Type == keyunseal.TypeHostKey {
		s = "host key " + k.KeyID
	}
	if k.KeyVersion != "" {
		s += ", version " + k.KeyVersion
	}
	s += ", " + k.Algorithm
	if k.PCRs != "" {
		s += ", bound to PCR " + k.PCRs
	}
	if k.Identity != "" {
		s += ", identity " + k.Identity
	}
	if k.Tenant != "" {
		s += ", tenant " + k.Tenant
	}
	return s
}

func tokenInfos(h *luks2.Header) []tokenInfo {
	list := []tokenInfo{}
	retired := map[int]sector.KeyToken{}
	for _, k := range sector.KeyTokens(h) {
		if !k.Retired.IsZero() {
			retired[k.ID] = k
		}
	}
	for _, id := range slices.Sorted(maps.Keys(h.Tokens)) {
		t := h.Tokens[id]
		info := tokenInfo{ID: id, Type: t.Type}
		if strings.HasPrefix(t.Type, sector.TokenPrefix) && t.Type != sector.TokenPrefix+"volume" {
			text, err := t.MarshalJSON()
			if err == nil {
				var d keyunseal.Description
				d, err = keyunseal.Describe(text)
				info.Key = &keyInfo{d}
			}
			if err != nil {
				info.Key, info.Error = nil, err.Error()
			}
		}
		if k, ok := retired[id]; ok {
			info.Retired, info.KeepUntil = &k.Retired, &k.KeepUntil
		}
		list = append(list, info)
	}
	return list
}

// headerInfo is the answer of dump.
type headerInfo struct {
	Device     string            `json:"device"`
	UUID       string            `json:"uuid"`
	Label      string            `json:"label"`
	Subsystem  string            `json:"subsystem"`
	SequenceID uint64            `json:"sequence_id"`
	Generation uint64            `json:"generation"` // of the changes that were made with the volume key
	Copies     string            `json:"copies"`     // "good", or what is wrong
	Data       []segmentInfo     `json:"data"`
	Tokens     []tokenInfo       `json:"tokens"`
	Keyslots   []keyslotInfo     `json:"keyslots"`
	Signature  *sector.Signature `json:"signature,omitempty"`
	Required   []string          `json:"requirements"`
	Flags      []string          `json:"flags"`
}

type segmentInfo struct {
	ID         int    `json:"id"`
	Offset     uint64 `json:"offset"`
	Size       uint64 `json:"size"`
	Cipher     string `json:"cipher"`
	SectorSize uint32 `json:"sector_size"`
}

type keyslotInfo struct {
	ID   int    `json:"id"`
	Type string `json:"type"`
	KDF  string `json:"kdf,omitempty"`
}

func (a *app) dumpCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dump DEVICE",
		Short: "show the header of a volume, never a secret",
		Args:  oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			d, err := sector.OpenDevice(args[0], sector.DeviceOptions{ReadOnly: true, Shared: true})
			if err != nil {
				return err
			}
			defer d.Close()
			h, copies, err := sector.ReadHeader(c.Context(), d)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			info := describeHeader(args[0], uint64(d.Size()), h, copies)
			if a.json {
				return a.printJSON(info)
			}
			a.printHeader(info)
			return nil
		},
	}
	return a.jsonFlag(c)
}

func describeHeader(device string, size uint64, h *luks2.Header, copies luks2.Copies) headerInfo {
	info := headerInfo{
		Device: device, UUID: h.UUID, Label: h.Label, Subsystem: h.Subsystem, SequenceID: h.SeqID,
		Copies: copies.Describe(), Tokens: tokenInfos(h), Keyslots: []keyslotInfo{},
		Required: append([]string{}, h.Config.Requirements...), Flags: append([]string{}, h.Config.Flags...),
	}
	info.Signature = sector.SignatureOf(h)
	info.Generation, _ = sector.Generation(h) // 0: a LUKS2 header that isn't ours
	if info.Copies == "" {
		info.Copies = "good"
	}
	for _, id := range slices.Sorted(maps.Keys(h.Segments)) {
		s := h.Segments[id]
		n := s.Size
		if s.Dynamic && size > s.Offset {
			n = size - s.Offset
			if s.SectorSize > 0 {
				n -= n % uint64(s.SectorSize)
			}
		}
		info.Data = append(info.Data, segmentInfo{id, s.Offset, n, s.Encryption, s.SectorSize})
	}
	for _, id := range slices.Sorted(maps.Keys(h.Keyslots)) {
		k := h.Keyslots[id]
		info.Keyslots = append(info.Keyslots, keyslotInfo{id, k.Type, k.KDF.Type})
	}
	return info
}

func (a *app) printHeader(i headerInfo) {
	p := func(name, format string, args ...any) {
		fmt.Fprintln(a.stdout, printable(fmt.Sprintf("%-15s "+format, append([]any{name + ":"}, args...)...)))
	}
	p("device", "%s", i.Device)
	p("UUID", "%s", i.UUID)
	p("label", "%s", orNone(i.Label))
	p("subsystem", "%s", orNone(i.Subsystem))
	p("header copies", "%s, sequence id %d, generation %d", i.Copies, i.SequenceID, i.Generation)
	for _, s := range i.Data {
		p(fmt.Sprintf("data %d", s.ID), "%s at %d, %s, sectors of %d bytes", bytesText(s.Size), s.Offset, s.Cipher, s.SectorSize)
	}
	for _, t := range i.Tokens {
		p(fmt.Sprintf("token %d", t.ID), "%s", t.text())
	}
	if len(i.Keyslots) == 0 {
		p("keyslots", "none, so there is no recovery key")
	}
	for _, k := range i.Keyslots {
		p(fmt.Sprintf("keyslot %d", k.ID), "%s, %s", k.Type, orNone(k.KDF))
	}
	if s := i.Signature; s != nil {
		p("signature", "%s, %s; not checked here", s.KeyID, s.Algorithm)
	}
	if len(i.Required) > 0 {
		p("requirements", "%s", strings.Join(i.Required, ", "))
	}
	if len(i.Flags) > 0 {
		p("flags", "%s", strings.Join(i.Flags, ", "))
	}
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}
