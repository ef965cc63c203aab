package vtpm

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
)

const (
	tpmGenerated = 0xff544347 // TPM_GENERATED_VALUE, Part 2, section 6.2
	tpmSTQuote   = 0x8018     // TPM_ST_ATTEST_QUOTE, Part 2, section 6.9
)

// Evidence is a quote and what is needed to judge it.
type Evidence struct {
	// AKPublic is TPMT_PUBLIC, AKCredential the verifier's word for it.
	AKPublic     []byte
	AKCredential string
	// Quote is TPMS_ATTEST, Signature TPMT_SIGNATURE.
	Quote     []byte
	Signature []byte
	// PCRs are the values of the SHA-256 bank by index.
	PCRs map[int][]byte
	// EventLog is what EncodeLog wrote.
	EventLog []byte
	// TCGLog is the firmware's event log. Without one, how the machine booted is
	// reported as not checked.
	TCGLog []byte
}

// Want is what the quote must be of. Its zero value refuses.
//
// An attestation key is believed on one of three words, the first of them that
// there is: the evidence's credential, the platform's report, the anchors.
type Want struct {
	ExtraData [32]byte
	// Alone is the extra data that a caller named for a quote by itself, which
	// speaks of no job: 1 to 64 bytes, in the place of ExtraData. AgentPCR then
	// need not be quoted, and an agent's log that is not there is not checked.
	Alone []byte
	// CredentialKeys are the keys of the verifier whose credentials count.
	CredentialKeys receipt.Keys
	// Platform is the key that a genuine report of the platform names; nil
	// where there is no such report.
	Platform *PlatformKey
	// Anchors hold the attestation keys that are trusted by name.
	Anchors anchor.Set
	// PCRs must be among the quoted ones. AgentPCR always is.
	PCRs []int
	// Memory of attestation keys; nil remembers none.
	Memory *Memory
}

func (w Want) extraData() []byte {
	if len(w.Alone) > 0 {
		return w.Alone
	}
	return w.ExtraData[:]
}

// required are the PCRs that must be among the quoted ones.
func (w Want) required(ev Evidence) []int {
	if len(w.Alone) > 0 && len(ev.EventLog) == 0 {
		return w.PCRs
	}
	return append([]int{AgentPCR}, w.PCRs...)
}

// PlatformKey is a TPM's attestation key by the word of the platform's own
// report, which the caller has found genuine.
type PlatformKey struct {
	Key *rsa.PublicKey
	// Class is the trust class of such TPMs.
	Class anchor.Class
	// Simulated is true if the report's chain ended in a simulation's anchor.
	Simulated bool
}

// Signs reports whether akPublic, a TPMT_PUBLIC, has this key.
func (p *PlatformKey) Signs(akPublic []byte) bool {
	ak, missing, err := readAK(akPublic)
	if err != nil || len(missing) > 0 || p.Key == nil {
		return false
	}
	key, ok := ak.key.(*rsa.PublicKey)
	return ok && key.Equal(p.Key)
}

// Whose word stands for an attestation key, in the claim "tpm.ak-by".
const (
	AKByCredential = "credential"
	AKByPlatform   = "platform-report"
	AKByPin        = "pinned"
)

// Result is how an appraisal came out. The quote is genuine if no check failed.
type Result struct {
	Claims map[string]any
	Checks check.List
	// Simulated is true if the word on the attestation key goes back to a
	// simulation's anchor: that of the endorsement key's chain when the key was
	// enrolled, of the platform's report, or the one that pins the key.
	Simulated bool
	// Class is the trust class of the TPM; empty if nobody's word stands for it.
	Class string
	// PCRs are the quoted values; nil unless a genuine quote covers them.
	PCRs map[int][sha256.Size]byte
	// Events explain PCR 14; nil unless they replay to it.
	Events []Event
}

// Appraise judges one quote at the given time.
func Appraise(ev Evidence, want Want, now time.Time) Result {
	r := Result{Claims: make(map[string]any, 20), Checks: make(check.List, 0, 12)}
	l := &r.Checks

	ak := parseAK(ev.AKPublic, want.Memory, l)
	if ak != nil {
		r.Claims["tpm.ak-name"] = hex.EncodeToString(ak.name)
	}
	switch {
	case ev.AKCredential != "":
		r.credential(ev.AKCredential, want.CredentialKeys, ak, now)
	case want.Platform != nil:
		r.platform(want.Platform, ak)
	default:
		r.pinned(want.Anchors, ak)
	}

	switch {
	case ak == nil:
		l.Fail("tpm.signature", "a quote signed by the attestation key", "no usable attestation key", "")
	default:
		if err := ak.verify(ev.Quote, ev.Signature); err != nil {
			l.Fail("tpm.signature", "a quote signed by the attestation key", err.Error(), "send quote and signature as the TPM returned them")
		} else {
			l.Pass("tpm.signature", "by the attestation key")
		}
	}

	quoted := r.quote(ev, want)
	left := r.tcgLog(ev.TCGLog, quoted)
	if len(want.Alone) > 0 && len(ev.EventLog) == 0 {
		l.Skip("tpm.event-log", "the quote is by itself: no agent's log was sent")
	} else {
		r.eventLog(ev.EventLog, quoted, left)
	}
	if len(r.Checks.Failed()) == 0 {
		r.PCRs = quoted
	} else {
		r.Events = nil
	}
	return r
}

const hintEnrol = "enrol the attestation key with this verifier"

func (r *Result) credential(token string, keys receipt.Keys, ak *attestationKey, now time.Time) {
	l := &r.Checks
	c, err := OpenCredential(keys, token, now)
	if err != nil {
		l.Fail("tpm.ak-credential", "a credential from this verifier that is valid now", err.Error(), hintEnrol)
		return
	}
	r.vouched(AKByCredential, c.Class, c.Simulated)
	r.Claims["tpm.ek-digest"] = c.EKDigest
	if ak == nil {
		l.Fail("tpm.ak-credential", "an attestation key that a credential can speak of", "no usable attestation key", "")
		return
	}
	l.Equal("tpm.ak-credential", c.AKName, hex.EncodeToString(ak.name), "the credential speaks of another key")
}

func (r *Result) vouched(by, class string, simulated bool) {
	r.Class, r.Simulated = class, simulated
	r.Claims["tpm.trust-class"], r.Claims["tpm.ak-by"] = class, by
}

// platform believes the key that the platform's report names. The report names
// its numbers only: that the TPM restricts its use is the platform's word too.
func (r *Result) platform(p *PlatformKey, ak *attestationKey) {
	l := &r.Checks
	if p.Key == nil || p.Class == "" || ak == nil {
		l.Fail("tpm.ak-credential", "the attestation key that the platform's report names", "no usable attestation key", "")
		return
	}
	if key, ok := ak.key.(*rsa.PublicKey); !ok || !key.Equal(p.Key) {
		l.Fail("tpm.ak-credential", "the attestation key that the platform's report names", "another key", "quote with the key that the platform made")
		return
	}
	r.vouched(AKByPlatform, string(p.Class), p.Simulated)
	l.Pass("tpm.ak-credential", "named by the platform's report")
}

func (r *Result) pinned(anchors anchor.Set, ak *attestationKey) {
	l := &r.Checks
	var class anchor.Class
	ok := false
	if ak != nil {
		class, ok = anchors.AK(hex.EncodeToString(ak.name))
	}
	if !ok {
		l.Fail("tpm.ak-credential", "a credential from this verifier", "none", hintEnrol)
		return
	}
	r.vouched(AKByPin, string(class), anchors.Simulated())
	l.Pass("tpm.ak-credential", "pinned by name")
}

// quote checks TPMS_ATTEST and returns the PCR values that it covers.
func (r *Result) quote(ev Evidence, want Want) map[int][sha256.Size]byte {
	l := &r.Checks
	// The first six bytes are read apart: a structure of another kind is no damage.
	if len(ev.Quote) < 6 {
		l.Fail("tpm.magic", fmt.Sprintf("%08x", uint32(tpmGenerated)), fmt.Sprintf("%d bytes", len(ev.Quote)), "send TPMS_ATTEST as the TPM returned it")
		return nil
	}
	magic, kind := binary.BigEndian.Uint32(ev.Quote), binary.BigEndian.Uint16(ev.Quote[4:])
	ok := l.Equal("tpm.magic", fmt.Sprintf("%08x", uint32(tpmGenerated)), fmt.Sprintf("%08x", magic), "the structure was not made by a TPM")
	ok = l.Equal("tpm.type", fmt.Sprintf("%04x", tpmSTQuote), fmt.Sprintf("%04x", kind), "the structure is not a quote") && ok
	if !ok {
		return nil
	}
	q, err := readQuote(ev.Quote)
	if err != nil {
		l.Fail("tpm.quote", "TPMS_ATTEST", err.Error(), "send TPMS_ATTEST as the TPM returned it")
		return nil
	}
	l.Pass("tpm.quote", "TPMS_ATTEST")
	r.Claims["tpm.firmware-version"] = fmt.Sprintf("%016x", q.firmwareVersion)
	r.Claims["tpm.clock"] = q.clock
	r.Claims["tpm.clock-safe"] = q.clockSafe
	r.Claims["tpm.reset-count"] = q.resetCount
	r.Claims["tpm.restart-count"] = q.restartCount

	// Compared by length and value: a shorter value is not padded.
	l.Equal("tpm.extra-data", hex.EncodeToString(want.extraData()), hex.EncodeToString(q.extraData),
		"the quote speaks of another challenge, job or GPU")

	index, ok := r.selection(q.selections, ev.PCRs, want.required(ev))
	if !ok {
		return nil
	}
	// Part 3, section 18.4: the digest is over the values in ascending order,
	// under the hash of the signing scheme, which parseAK requires to be SHA-256.
	h := sha256.New()
	quoted := map[int][sha256.Size]byte{}
	values := map[string]string{}
	for _, i := range index {
		h.Write(ev.PCRs[i])
		quoted[i] = [sha256.Size]byte(ev.PCRs[i])
		values[strconv.Itoa(i)] = hex.EncodeToString(ev.PCRs[i])
	}
	if !l.Equal("tpm.pcr-digest", hex.EncodeToString(q.pcrDigest), hex.EncodeToString(h.Sum(nil)), "the PCR values sent are not those quoted") {
		return nil
	}
	r.Claims["tpm.pcrs"] = values
	return quoted
}

// selection checks that exactly the PCRs sent were quoted, in the SHA-256 bank
// alone, and returns their indexes in ascending order.
func (r *Result) selection(s []selection, sent map[int][]byte, required []int) ([]int, bool) {
	l := &r.Checks
	const hint = "quote exactly the PCRs that are sent, in the SHA-256 bank"
	if len(s) != 1 || s[0].hash != tpm2.TPMAlgSHA256 {
		l.Fail("tpm.pcr-selection", "the SHA-256 bank alone", fmt.Sprintf("%d banks", len(s)), hint)
		return nil, false
	}
	var index, values []int
	for i, b := range s[0].octets {
		for bit := range 8 {
			if b&(1<<bit) != 0 {
				index = append(index, 8*i+bit)
			}
		}
	}
	for i, v := range sent {
		if len(v) != sha256.Size {
			l.Fail("tpm.pcr-selection", "32 bytes for each PCR", fmt.Sprintf("%d for PCR %d", len(v), i), hint)
			return nil, false
		}
		values = append(values, i)
	}
	slices.Sort(values)
	if !slices.Equal(index, values) {
		l.Fail("tpm.pcr-selection", fmt.Sprintf("the quoted PCRs %v", index), fmt.Sprint(values), hint)
		return nil, false
	}
	for _, p := range required {
		if !slices.Contains(index, p) {
			l.Fail("tpm.pcr-selection", fmt.Sprintf("PCR %d among the quoted", p), fmt.Sprint(index), hint)
			return nil, false
		}
	}
	l.Pass("tpm.pcr-selection", fmt.Sprint(index))
	return index, true
}

// tcgLog checks that the firmware's log leads to every PCR that belongs to
// firmware and boot loader, those without an event included, and tells how the
// machine booted. It returns the value at which it leaves AgentPCR: shim extends
// that one too.
func (r *Result) tcgLog(b []byte, quoted map[int][sha256.Size]byte) (left [sha256.Size]byte) {
	const id = "tpm.tcg-log"
	l := &r.Checks
	if len(b) == 0 {
		l.Skip(id, "no firmware event log was sent")
		return left
	}
	if quoted == nil {
		l.Fail(id, "a quote that the firmware's event log can be held against", "none", "")
		return left
	}
	log, err := ParseTCGLog(b)
	if err != nil {
		l.Fail(id, "an event log of firmware and boot loader", err.Error(), "send the log as the kernel keeps it")
		return left
	}
	replayed := log.Replay()
	var missing, wrong []string
	for _, i := range firmwarePCRs() {
		switch v, ok := quoted[i]; {
		case !ok:
			missing = append(missing, strconv.Itoa(i))
		case v != replayed[i]:
			wrong = append(wrong, strconv.Itoa(i))
		}
	}
	switch {
	case len(missing) > 0:
		l.Fail(id, fmt.Sprintf("PCRs %v among the quoted", firmwarePCRs()), "without "+strings.Join(missing, ", "), "quote every PCR that the log explains")
		return left
	case len(wrong) > 0:
		l.Fail(id, "a log that leads to the quoted PCRs", fmt.Sprintf("%d events lead elsewhere in PCR %s", len(log.Events), strings.Join(wrong, ", ")),
			"send the log as the kernel keeps it; a PCR that something outside the log extends cannot be explained")
		return left
	}
	l.Pass(id, fmt.Sprintf("%d events lead to PCRs 0 to 9 and 11 to 13", len(log.Events)))
	r.Claims["tpm.tcg-events"] = len(log.Events)
	if on, err := secureBoot(log.of(7)); err != nil {
		r.Claims["tpm.secure-boot-untold"] = err.Error()
	} else {
		r.Claims["tpm.secure-boot"] = on
	}
	if line, err := commandLine(log.of(8)); err != nil {
		r.Claims["tpm.kernel-command-line-untold"] = err.Error()
	} else {
		r.Claims["tpm.kernel-command-line"] = line
	}
	return replayed[AgentPCR]
}

// eventLog checks that the log leads from where the firmware left AgentPCR to
// what was quoted, and to nothing else: an unexplained extension is as much a
// failure as a wrong one.
func (r *Result) eventLog(b []byte, quoted map[int][sha256.Size]byte, start [sha256.Size]byte) {
	l := &r.Checks
	if quoted == nil {
		l.Fail("tpm.event-log", "a quote that the log can be held against", "none", "")
		return
	}
	events, err := ParseLog(b)
	if err != nil {
		l.Fail("tpm.event-log", "an event log", err.Error(), "send the log that the agent kept while extending")
		return
	}
	got, want := Replay(start, events), quoted[AgentPCR]
	if !bytes.Equal(got[:], want[:]) {
		l.Fail("tpm.event-log", fmt.Sprintf("PCR %d is %x", AgentPCR, want), fmt.Sprintf("log of %d events leads to %x", len(events), got),
			"send the log that the agent kept while extending; after a restart the TPM must be reset")
		return
	}
	l.Pass("tpm.event-log", fmt.Sprintf("%d events lead to PCR %d", len(events), AgentPCR))
	r.Events = events
	names := make([]any, 0, len(events))
	by := []string{}
	for _, e := range events {
		names = append(names, map[string]any{"name": e.Name, "digest": e.Digest.String(), "measured-by": e.MeasuredBy})
		if !slices.Contains(by, e.MeasuredBy) {
			by = append(by, e.MeasuredBy)
		}
	}
	r.Claims["tpm.events"] = names
	r.Claims["tpm.measured-by"] = by
}
