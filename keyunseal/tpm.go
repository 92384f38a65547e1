package keyunseal

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"go.uber.org/zap"
)

// The TPM keeps nothing of ours. Its storage root key (SRK) is derived anew each
// time from a seed that never leaves it; under the SRK it seals a random secret
// made for one token, and gives it back while the platform configuration
// registers (PCRs) hold what they held then.
//
// The steps of sealing:
//
//	1. derive the SRK, and read the PCRs
//	2. let the TPM seal a random secret under the SRK and the PCR policy
//	3. seal the volume key under the secret (token.go)
//
// and of unsealing: derive the SRK, compare its name with the token's, load what
// was sealed, satisfy the policy, unseal, open the volume key.
//
// Secrets cross the bus encrypted, under a key that only the TPM with that SRK
// can find: the session is salted to it. That's also what makes an interposer on
// the bus show itself when a token is unsealed, but not when it's sealed.

// DefaultTPM is the device that an empty [Options.TPM] means.
const DefaultTPM = "/dev/tpmrm0"

const (
	tpmAlgorithm = "TPM2-ECC-P256"
	tpmBank      = tpm2.TPMAlgSHA256
	maxPCR       = 23
)

// defaultPCRs is the state of Secure Boot: on, and with which keys. Firmware,
// boot loader and kernel, which every update changes, are in others.
var defaultPCRs = []uint{7}

// parsePCRs parses "7+11".
func parsePCRs(s string) ([]uint, error) {
	var pcrs []uint
	for part := range strings.SplitSeq(s, "+") {
		n, err := strconv.ParseUint(part, 10, 8)
		if err != nil || part != strconv.FormatUint(n, 10) {
			return nil, fmt.Errorf("PCRs %.40q are not numbers with + between, such as 7+11", s)
		}
		pcrs = append(pcrs, uint(n))
	}
	slices.Sort(pcrs)
	if err := checkPCRs(pcrs); err != nil {
		return nil, err
	}
	return pcrs, nil
}

// formatPCRs is the reverse of parsePCRs.
func formatPCRs(pcrs []uint) string {
	var parts []string
	for _, n := range pcrs {
		parts = append(parts, strconv.FormatUint(uint64(n), 10))
	}
	return strings.Join(parts, "+")
}

func checkPCRs(pcrs []uint) error {
	if len(pcrs) == 0 {
		return errors.New("no PCRs")
	}
	for i, n := range pcrs {
		switch {
		case n > maxPCR:
			return fmt.Errorf("there is no PCR %d, the last is %d", n, maxPCR)
		case n == 16 || n == 23:
			return fmt.Errorf("PCR %d protects nothing: every program may reset it", n)
		case i > 0 && n <= pcrs[i-1]:
			return errors.New("PCRs are not in ascending order, each once")
		}
	}
	return nil
}

// A tpmToken holds a volume key sealed under a random secret, and that secret
// sealed by a TPM.
type tpmToken struct {
	tokenHead
	PCRs       []uint   `json:"pcrs"`
	PCRValues  [][]byte `json:"pcr_values"` // of the SHA-256 bank, when it was sealed: to tell which has changed
	SRKName    []byte   `json:"srk_name"`   // says which TPM, and that it wasn't cleared
	Public     []byte   `json:"public"`     // TPM2B_PUBLIC
	Private    []byte   `json:"private"`    // TPM2B_PRIVATE
	SecretHash []byte   `json:"secret_sha256"`
	envelope
}

func (t *tpmToken) check() error {
	if err := checkPCRs(t.PCRs); err != nil {
		return err
	}
	if len(t.PCRValues) != len(t.PCRs) {
		return fmt.Errorf("pcr_values has %d values, want %d", len(t.PCRValues), len(t.PCRs))
	}
	for _, v := range t.PCRValues {
		if len(v) != sha256.Size {
			return fmt.Errorf("pcr_values has a value of %d bytes, want %d", len(v), sha256.Size)
		}
	}
	if n := len(t.SRKName); n != 2+sha256.Size || !bytes.HasPrefix(t.SRKName, []byte{0x00, 0x0b}) {
		return fmt.Errorf("srk_name has %d bytes and is not the name of an object with SHA-256", n)
	}
	if n := len(t.SecretHash); n != sha256.Size {
		return fmt.Errorf("secret_sha256 has %d bytes, want %d", n, sha256.Size)
	}
	for name, v := range map[string][]byte{"public": t.Public, "private": t.Private} {
		if err := check2B(v); err != nil {
			return fmt.Errorf("%s %w", name, err)
		}
	}
	return t.envelope.check()
}

// check2B checks the form of a TPM2B structure: two bytes of length and as many
// bytes as they say.
func check2B(b []byte) error {
	if len(b) < 3 || len(b) > 2048 || int(b[0])<<8|int(b[1]) != len(b)-2 {
		return fmt.Errorf("has %d bytes, which are not a TPM2B structure", len(b))
	}
	return nil
}

// tpmID names a TPM's storage root key for people.
func tpmID(srkName []byte) string { return "tpm2:" + hex.EncodeToString(srkName[2:10]) }

func (t *tpmToken) keyID() string { return tpmID(t.SRKName) }

func (t *tpmToken) describe() Description {
	return Description{Type: t.Type, Version: t.Version, KeyID: t.keyID(), Algorithm: tpmAlgorithm, PCRs: formatPCRs(t.PCRs)}
}

func (o Options) tpm() string { return cmp.Or(o.TPM, DefaultTPM) }

// secureBootVar is what UEFI says of Secure Boot: four bytes of attributes, and 0 or 1.
const secureBootVar = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"

// secureBootOff tells whether the firmware says so.
func secureBootOff(name string) bool {
	b, err := os.ReadFile(name)
	return err == nil && len(b) == 5 && b[4] == 0
}

func sealTPM(ctx context.Context, opts Options, pcrs []uint, volume string, key *[KeySize]byte) (token, error) {
	t, err := trySealTPM(ctx, opts, pcrs, volume, key)
	if err != nil {
		return nil, classifyTPM("seal", opts.tpm(), err)
	}
	return t, nil
}

func trySealTPM(ctx context.Context, opts Options, pcrs []uint, volume string, key *[KeySize]byte) (*tpmToken, error) {
	c, err := openTPM(ctx, opts.tpm())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	srk, err := deriveSRK(c)
	if err != nil {
		return nil, err
	}
	defer srk.flush(c)

	values, err := readPCRs(c, pcrs)
	if err != nil {
		return nil, err
	}
	for i, v := range values {
		if n := pcrs[i]; n <= 15 && bytes.Equal(v, make([]byte, len(v))) {
			opts.log().Warn("this PCR holds zeros: the firmware has measured nothing into it, and sealing to it protects little",
				zap.Uint("pcr", n), zap.String("tpm", opts.tpm()))
		}
	}
	if slices.Contains(pcrs, 7) && strings.HasPrefix(opts.tpm(), "/dev/") && secureBootOff(secureBootVar) {
		opts.log().Warn("Secure Boot is off: PCR 7 is the same for whatever is started on this machine, so its TPM protects only a disk that is lost without it", zap.String("tpm", opts.tpm()))
	}
	policy, err := pcrPolicy(pcrs, values)
	if err != nil {
		return nil, err
	}

	var secret [KeySize]byte
	defer clear(secret[:])
	rand.Read(secret[:]) // never fails
	created, err := tpm2.Create{
		ParentHandle: srk.auth(),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret[:]}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type:    tpm2.TPMAlgKeyedHash,
			NameAlg: tpm2.TPMAlgSHA256,
			// Without UserWithAuth only the policy opens it; NoDA keeps power cuts
			// and failed boots from locking it out.
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy},
		}),
	}.Execute(c)
	if err != nil {
		return nil, err
	}
	e, err := sealEnvelope(&secret, TypeTPM, volume, key)
	if err != nil {
		return nil, fail("seal", opts.tpm(), ClassInternal, err)
	}
	hash := sha256.Sum256(secret[:])
	return &tpmToken{
		tokenHead: newHead(TypeTPM), PCRs: pcrs, PCRValues: values,
		SRKName: srk.name.Buffer, Public: tpm2.Marshal(created.OutPublic), Private: tpm2.Marshal(created.OutPrivate),
		SecretHash: hash[:], envelope: e,
	}, nil
}

func (t *tpmToken) unseal(ctx context.Context, opts Options, volume string, dst *[KeySize]byte) (err error) {
	defer opts.observeHere("unwrap", t.keyID(), time.Now(), &err)
	var secret [KeySize]byte
	defer clear(secret[:])
	if err := t.findSecret(ctx, opts, "unseal", &secret); err != nil {
		return err
	}
	if err := t.open(&secret, TypeTPM, volume, dst); err != nil {
		// The secret is the right one, so the token is altered or of another volume.
		return fail("unseal", t.keyID(), ClassIntegrity, err)
	}
	return nil
}

// probe unseals the secret and doesn't use it.
func (t *tpmToken) probe(ctx context.Context, opts Options, _ string) error {
	var secret [KeySize]byte
	defer clear(secret[:])
	return t.findSecret(ctx, opts, "probe", &secret)
}

// findSecret lets the TPM unseal the secret.
func (t *tpmToken) findSecret(ctx context.Context, opts Options, op string, secret *[KeySize]byte) error {
	if err := t.tryFindSecret(ctx, opts, secret); err != nil {
		return classifyTPM(op, t.keyID(), err)
	}
	if hash := sha256.Sum256(secret[:]); !bytes.Equal(hash[:], t.SecretHash) {
		return fail(op, t.keyID(), ClassIntegrity, errors.New("the TPM unseals something else than was sealed"))
	}
	return nil
}

func (t *tpmToken) tryFindSecret(ctx context.Context, opts Options, secret *[KeySize]byte) error {
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](t.Public)
	if err != nil {
		return &Error{Class: ClassIntegrity, Err: fmt.Errorf("public: %w", err)}
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](t.Private)
	if err != nil {
		return &Error{Class: ClassIntegrity, Err: fmt.Errorf("private: %w", err)}
	}
	c, err := openTPM(ctx, opts.tpm())
	if err != nil {
		return err
	}
	defer c.Close()
	srk, err := deriveSRK(c)
	if err != nil {
		return err
	}
	defer srk.flush(c)
	if !bytes.Equal(srk.name.Buffer, t.SRKName) {
		return &Error{Class: ClassWrongKey, Code: codeOtherTPM, Err: fmt.Errorf("the token was sealed by %s, the TPM here is %s", t.keyID(), tpmID(srk.name.Buffer))}
	}

	loaded, err := tpm2.Load{ParentHandle: srk.auth(), InPrivate: *private, InPublic: *public}.Execute(c)
	if rc, ok := errors.AsType[tpm2.TPMRC](err); ok && !rc.IsWarning() && !rc.Is(tpm2.TPMRCFailure) {
		// It's this TPM, and it doesn't take its own object back.
		return &Error{Class: ClassIntegrity, Code: rcName(rc), Err: errors.New("the TPM doesn't accept what the token holds")}
	} else if err != nil {
		return err
	}
	defer flushTPM(c, loaded.ObjectHandle)

	policy := tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(c transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: pcrSelection(t.PCRs)}.Execute(c)
		return err
	})
	resp, err := tpm2.Unseal{
		ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: policy},
	}.Execute(c, srk.encrypted())
	if errors.Is(err, tpm2.TPMRCPolicyFail) {
		return policyError(c, t)
	}
	if err != nil {
		return err
	}
	defer clear(resp.OutData.Buffer)
	if n := len(resp.OutData.Buffer); n != KeySize {
		return &Error{Class: ClassIntegrity, Err: fmt.Errorf("the TPM unseals %d bytes, want %d", n, KeySize)}
	}
	copy(secret[:], resp.OutData.Buffer)
	return nil
}

// policyError says which PCRs are to blame.
func policyError(c *tpmConn, t *tpmToken) error {
	e := &Error{Class: ClassTPMState, Code: rcName(tpm2.TPMRCPolicyFail), Err: errors.New("the TPM refuses: its PCRs don't hold what they held when the token was sealed")}
	values, err := readPCRs(c, t.PCRs)
	if err != nil {
		return e // the refusal says enough
	}
	var changed []uint
	for i, n := range t.PCRs {
		if !bytes.Equal(values[i], t.PCRValues[i]) {
			changed = append(changed, n)
		}
	}
	if len(changed) > 0 {
		e.Err = fmt.Errorf("PCR %s changed since the token was sealed", formatPCRs(changed))
	}
	return e
}

// rewrap seals key anew to what the PCRs hold now, if the token doesn't unseal any
// more: with PCRs that changed, or another TPM.
func (t *tpmToken) rewrap(ctx context.Context, opts Options, volume string, key *[KeySize]byte) (fresh token, err error) {
	begun := time.Now()
	err = t.probe(ctx, opts, volume)
	if err == nil {
		return nil, fail("rewrap", t.keyID(), ClassConfig, ErrCurrent)
	}
	defer opts.observeHere("wrap", t.keyID(), begun, &err)
	if e, ok := errors.AsType[*Error](err); !ok || e.Class != ClassTPMState && e.Class != ClassWrongKey && e.Class != ClassIntegrity {
		return nil, err
	}
	return sealTPM(ctx, opts, t.PCRs, volume, key)
}

// An srk is a TPM's storage root key, loaded.
type srk struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// deriveSRK makes the TPM derive its ECC P-256 storage root key by the TCG's
// template ("TPM v2.0 Provisioning Guidance", 7.5.1), as others do.
func deriveSRK(c *tpmConn) (*srk, error) {
	resp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(c)
	if err != nil {
		return nil, ownerError(err)
	}
	s := &srk{handle: resp.ObjectHandle, name: resp.Name}
	public, err := resp.OutPublic.Contents()
	if err == nil {
		s.public = *public
		// The session's salt is encrypted to this key: it has to be the one of the name.
		var name *tpm2.TPM2BName
		if name, err = tpm2.ObjectName(public); err == nil && !bytes.Equal(name.Buffer, s.name.Buffer) {
			err = errors.New("the TPM's storage root key doesn't have the name that it's given")
		}
	}
	if err != nil {
		s.flush(c)
		return nil, err
	}
	return s, nil
}

// ownerError says what is in the way of what takes the owner hierarchy.
func ownerError(err error) error {
	switch {
	case errors.Is(err, tpm2.TPMRCAuthFail) || errors.Is(err, tpm2.TPMRCBadAuth):
		return &Error{Class: ClassConfig, Code: codeOwnerAuth, Err: errors.New("the TPM's owner hierarchy has a password")}
	case errors.Is(err, tpm2.TPMRCHierarchy):
		return &Error{Class: ClassConfig, Code: "TPM_RC_HIERARCHY", Err: errors.New("the firmware has disabled the TPM's owner hierarchy")}
	}
	return err
}

// auth authorizes the use of the SRK as a parent, in a session that encrypts what
// goes to the TPM.
func (s *srk) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: s.handle, Name: s.name,
		Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(s.handle, s.public), tpm2.AESEncryption(128, tpm2.EncryptIn))}
}

// encrypted is a session that encrypts and authenticates what the TPM answers.
func (s *srk) encrypted() tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(s.handle, s.public), tpm2.AESEncryption(128, tpm2.EncryptOut))
}

func (s *srk) flush(c *tpmConn) { flushTPM(c, s.handle) }

// flushTPM gives the TPM's memory back, also when the operation has run out of
// time. A resource manager does so by itself when the device is closed, so
// failing is no error.
func flushTPM(c *tpmConn, h tpm2.TPMHandle) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.ctx), 500*time.Millisecond)
	defer cancel()
	_, _ = tpm2.FlushContext{FlushHandle: h}.Execute(&tpmConn{ctx, c.fd})
}

func pcrSelection(pcrs []uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpmBank, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...),
	}}}
}

// readPCRs reads the SHA-256 bank.
func readPCRs(c *tpmConn, pcrs []uint) ([][]byte, error) {
	values := make([][]byte, len(pcrs))
	for i, n := range pcrs {
		resp, err := tpm2.PCRRead{PCRSelectionIn: pcrSelection([]uint{n})}.Execute(c)
		if err != nil {
			return nil, err
		}
		if len(resp.PCRValues.Digests) != 1 || len(resp.PCRValues.Digests[0].Buffer) != sha256.Size {
			return nil, &Error{Class: ClassConfig, Code: codeNoBank, Err: fmt.Errorf("the TPM has no PCR %d of SHA-256", n)}
		}
		values[i] = resp.PCRValues.Digests[0].Buffer
	}
	return values, nil
}

// pcrPolicy computes what TPM2_PolicyPCR makes of the values.
func pcrPolicy(pcrs []uint, values [][]byte) ([]byte, error) {
	calc, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(bytes.Join(values, nil))
	err = tpm2.PolicyPCR{Pcrs: pcrSelection(pcrs), PcrDigest: tpm2.TPM2BDigest{Buffer: sum[:]}}.Update(calc)
	return calc.Hash().Digest, err
}

// Codes of our own, in the place where a TPM's response code would be.
const (
	codeOtherTPM  = "OtherTPM"
	codeOwnerAuth = "OwnerPassword"
	codeNoBank    = "NoPCRBank"
	codeNoRoom    = "TPM_RC_NV_SPACE"
)

// rcName returns "TPM_RC_POLICY_FAIL" and the like.
func rcName(rc tpm2.TPMRC) string {
	name := rc.Error()
	if i := strings.IndexAny(name, " :"); i > 0 {
		name = name[:i]
	}
	if !strings.HasPrefix(name, "TPM_RC_") {
		return fmt.Sprintf("TPM_RC 0x%x", uint32(rc))
	}
	return name
}

// classifyTPM turns whatever a use of the TPM returned into an *Error. It maps
// nil to nil.
func classifyTPM(op, keyID string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		filled := *e
		if filled.Op == "" {
			filled.Op, filled.KeyID = op, keyID
		}
		return &filled
	}
	e := &Error{Op: op, KeyID: keyID, Class: ClassNoTPM, Err: err}
	rc, ok := errors.AsType[tpm2.TPMRC](err)
	if !ok {
		if errors.Is(err, errTPMBusy) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			e.Class = ClassTPMBusy
		}
		return e
	}
	e.Code = rcName(rc)
	e.Err = errors.New("the TPM refused the command")
	if _, text, ok := strings.Cut(rc.Error(), ": "); ok {
		e.Err = errors.New(text)
	}
	switch {
	case rc == tpm2.TPMRCLockout:
		e.Class = ClassTPMLockout
	case rc.IsWarning() || rc == tpm2.TPMRCPCRChanged:
		// Out of memory or of handles, testing itself, or the PCRs changed meanwhile.
		e.Class = ClassTPMBusy
	}
	return e
}
