// Package translog is the evidence log's arithmetic: what an entry is, how
// entries are chained and stand in a Merkle tree, and how a reader checks that
// none was changed, dropped or reordered.
//
// Trusted: a receipt's signature by the log's broker, a checkpoint's by the log's
// key, and cosignatures by witnesses that the reader names. Checked: form, index,
// chain hash, the chain of a job's entries, inclusion, and consistency of two
// checkpoints. Not checked: that the broker shows everyone the same log, where no
// witness is named; that a broker logs all that it does.
package translog

import (
	"bytes"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// MaxBody bounds the encoded body of one entry, in bytes.
const MaxBody = 16 << 10

// Kind says what an entry records.
type Kind string

// Kinds of entries.
const (
	KindAsset   Kind = "asset"
	KindGrant   Kind = "grant"
	KindRevoke  Kind = "revoke"
	KindRelease Kind = "release"
	KindBundle  Kind = "bundle"
	// KindAssetPolicy is a change of an asset's policy or labels.
	KindAssetPolicy Kind = "asset-policy"
	// KindRewrap is an asset's data key wrapped under another key-encryption key.
	KindRewrap   Kind = "rewrap"
	KindApproval Kind = "approval"
	KindDeny     Kind = "deny"
	// KindLift is the end of a revocation.
	KindLift Kind = "lift"
	// KindStop is that a job was first told to stop, KindStopped that it is gone.
	KindStop       Kind = "stop"
	KindStopped    Kind = "stopped"
	KindCheckpoint Kind = "checkpoint"
	// KindResume is that a job goes on with its plan's line of checkpoints.
	KindResume Kind = "resume"
	// KindReseal is an open asset's digest, set to what a job sealed.
	KindReseal Kind = "reseal"
	// KindReattest is a newer attestation result of a running job.
	KindReattest Kind = "reattest"
	// KindPolicy is another set of access policies.
	KindPolicy Kind = "policy"
)

// parts is what each kind of entry holds.
func (b Body) parts() map[Kind]bool {
	return map[Kind]bool{
		KindAsset: b.Asset != nil, KindGrant: b.Grant != nil, KindRevoke: b.Revoke != nil, KindRelease: b.Release != nil, KindBundle: b.Bundle != nil,
		KindAssetPolicy: b.AssetPolicy != nil, KindRewrap: b.Rewrap != nil, KindApproval: b.Approval != nil, KindDeny: b.Deny != nil, KindLift: b.Lift != nil,
		KindStop: b.Stop != nil, KindStopped: b.Stopped != nil, KindCheckpoint: b.Checkpoint != nil, KindResume: b.Resume != nil, KindReseal: b.Reseal != nil, KindReattest: b.Reattest != nil, KindPolicy: b.Policy != nil,
	}
}

// ofJob says which kinds of entries belong to a job.
func (k Kind) ofJob() bool {
	switch k {
	case KindRelease, KindBundle, KindStop, KindStopped, KindCheckpoint, KindResume, KindReseal, KindReattest:
		return true
	default:
		return false
	}
}

// Body is what one entry says. Exactly the part that Kind names is present.
type Body struct {
	Index uint64 `json:"index"`
	// TimeMillis is the broker's clock when the entry was committed.
	TimeMillis int64 `json:"timeMillis"`
	Kind       Kind  `json:"kind"`
	// Prev is the chain hash of the entry before, or Genesis.
	Prev []byte `json:"prev"`
	// Actor is who asked, "ROLE/NAME".
	Actor string `json:"actor"`
	// Job and JobSequence are present for what belongs to a job; its entries
	// are numbered from 1, so that a reader of one job's entries sees a gap.
	Job         string `json:"job,omitempty"`
	JobSequence uint64 `json:"jobSequence,omitempty"`
	// JobPrev is the chain hash of the job's entry before, absent in the first.
	// Whoever trusts the hash of one entry so trusts every earlier one of the
	// job, without those of other jobs between them.
	JobPrev []byte `json:"jobPrev,omitempty"`

	Asset   *Asset   `json:"asset,omitempty"`
	Grant   *Grant   `json:"grant,omitempty"`
	Revoke  *Revoke  `json:"revoke,omitempty"`
	Release *Release `json:"release,omitempty"`
	Bundle  *Bundle  `json:"bundle,omitempty"`

	AssetPolicy *AssetPolicy   `json:"assetPolicy,omitempty"`
	Rewrap      *Rewrap        `json:"rewrap,omitempty"`
	Approval    *Approval      `json:"approval,omitempty"`
	Deny        *Deny          `json:"deny,omitempty"`
	Lift        *Revoke        `json:"lift,omitempty"`
	Stop        *Stop          `json:"stop,omitempty"`
	Stopped     *Stopped       `json:"stopped,omitempty"`
	Checkpoint  *JobCheckpoint `json:"checkpoint,omitempty"`
	Resume      *Resume        `json:"resume,omitempty"`
	Reseal      *Reseal        `json:"reseal,omitempty"`
	Reattest    *Reattest      `json:"reattest,omitempty"`
	Policy      *Policy        `json:"policy,omitempty"`
}

// Asset records a new asset.
type Asset struct {
	Name   string      `json:"name"`
	Kind   string      `json:"kind"`
	Digest plan.Digest `json:"digest,omitempty"`
	// Policy is the digest of its canonical policy and labels.
	Policy plan.Digest `json:"policy,omitempty"`
}

// AssetPolicy records a change of an asset's policy or labels.
type AssetPolicy struct {
	Name     string `json:"name"`
	Revision int64  `json:"revision"`
	// Policy is the canonical policy with the labels.
	Policy json.RawMessage `json:"policy"`
}

// Rewrap records that an asset's data key was wrapped anew.
type Rewrap struct {
	Asset string `json:"asset"`
	// KeyStore is the name of the key store; empty for the broker's default.
	KeyStore string `json:"keyStore,omitempty"`
}

// Approval records one approval of a grant.
type Approval struct {
	Grant    string      `json:"grant"`
	Plan     plan.Digest `json:"plan"`
	Approver string      `json:"approver"`
	// Document is the digest of the signed document and Key the SHA-256
	// fingerprint of the key that signed it, as OpenSSH writes it. Both are
	// missing where an owner consented of whom the broker knows no key.
	Document plan.Digest `json:"document,omitempty"`
	Key      string      `json:"key,omitempty"`
}

// Deny records that a request for a grant was turned down.
type Deny struct {
	Grant  string `json:"grant"`
	Reason string `json:"reason"`
	// Document and Key are as in Approval.
	Document plan.Digest `json:"document,omitempty"`
	Key      string      `json:"key,omitempty"`
}

// Stop records that a job was told to stop.
type Stop struct {
	Reason string `json:"reason"`
}

// Stopped records that a job is gone. Times are by the agent's clock, in
// milliseconds since 1970, 0 for what did not happen.
type Stopped struct {
	Reason   string `json:"reason,omitempty"`
	Told     int64  `json:"told"`
	Gone     int64  `json:"gone"`
	Scrubbed int64  `json:"scrubbed"`
}

// JobCheckpoint records the newest checkpoint of a job.
type JobCheckpoint struct {
	Asset    string `json:"asset"`
	Sequence uint64 `json:"sequence"`
	// Digest is that of the sealed manifest, Record that of the signed record.
	Digest plan.Digest `json:"digest"`
	Record plan.Digest `json:"record"`
}

// Resume records that a job goes on with its plan's line of checkpoints.
type Resume struct {
	Asset string      `json:"asset"`
	Plan  plan.Digest `json:"plan"`
	// From is the job whose checkpoint the job goes on from. It is empty, and so is
	// all that follows, where there was none.
	From     string      `json:"from,omitempty"`
	Sequence uint64      `json:"sequence,omitempty"`
	Digest   plan.Digest `json:"digest,omitempty"`
	Record   plan.Digest `json:"record,omitempty"`
}

// Reseal records that a job sealed an asset anew as another one.
type Reseal struct {
	Plan plan.Digest `json:"plan"`
	// From is the source and FromDigest that of its sealed manifest.
	From       string      `json:"from"`
	FromDigest plan.Digest `json:"fromDigest"`
	// Asset is the one whose digest was open, Digest what it is set to, and Record
	// that of the signed record.
	Asset  string      `json:"asset"`
	Digest plan.Digest `json:"digest"`
	Record plan.Digest `json:"record"`
}

// Reattest records a newer attestation result of a running job.
type Reattest struct {
	Result
	// IssuedAt is the verifier's, in seconds since 1970.
	IssuedAt int64 `json:"issuedAt"`
	// Refused is why the verifier does not affirm, empty if it does.
	Refused string `json:"refused,omitempty"`
}

// Policy records which set of access policies is in force.
type Policy struct {
	Serial uint64      `json:"serial"`
	Digest plan.Digest `json:"digest"`
}

// Grant records a new grant.
type Grant struct {
	ID             string      `json:"id"`
	Assets         []string    `json:"assets"`
	Plan           plan.Digest `json:"plan"`
	NotBefore      int64       `json:"notBefore"`
	NotAfter       int64       `json:"notAfter"`
	MaxReleases    int         `json:"maxReleases"`
	AllowSimulated bool        `json:"allowSimulated"`
	// Terms is the digest of the grant's canonical terms, and Requested whether
	// it waits for approvals.
	Terms     plan.Digest `json:"terms,omitempty"`
	Requested bool        `json:"requested,omitempty"`
}

// Revoke records that something was taken back: a grant, or what Kind and Value name.
type Revoke struct {
	Grant string `json:"grant,omitempty"`
	Kind  string `json:"kind,omitempty"`
	Value string `json:"value,omitempty"`
	// Scope is the owner whose assets alone it concerns; empty for all.
	Scope  string `json:"scope,omitempty"`
	Reason string `json:"reason"`
}

// Release records that one key was wrapped to an attested job.
type Release struct {
	Grant    string      `json:"grant"`
	Attempt  int         `json:"attempt"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	Verifier string      `json:"verifier"`
	ResultID string      `json:"resultId"`
	// Recipient, Request and Wrapped are digests of the recipient key, of the
	// signed request, and of enc and ciphertext.
	Recipient plan.Digest `json:"recipient"`
	Request   plan.Digest `json:"request"`
	Wrapped   plan.Digest `json:"wrapped"`
	Evidence  plan.Digest `json:"evidence"`
	Simulated bool        `json:"simulated"`
	// Used is how many of the grant's releases are spent after this one.
	Used int `json:"used"`
	// Approvals are the digests of the signed approvals that counted.
	Approvals []plan.Digest `json:"approvals,omitempty"`
	// More are the other results that the asset's policy asked for.
	More []Result `json:"more,omitempty"`
}

// Result names an attestation result.
type Result struct {
	Verifier string      `json:"verifier"`
	ResultID string      `json:"resultId"`
	Evidence plan.Digest `json:"evidence"`
}

// Bundle records the digest of a job's bundle statement.
type Bundle struct {
	Digest plan.Digest `json:"digest"`
}

// Entry is one committed entry.
type Entry struct {
	Index uint64 `json:"index"`
	// Body is the canonical JSON (RFC 8785) of a Body.
	Body []byte `json:"body"`
	// Hash is the chain hash after this entry.
	Hash []byte `json:"hash"`
}

// Head is where a log stands: how many entries it holds and the chain hash of
// the last one.
type Head struct {
	Size uint64 `json:"size"`
	Hash []byte `json:"hash"`
}

// Genesis is the chain hash before the first entry of origin's log.
func Genesis(origin string) Head {
	h := sha512.Sum384([]byte("coffer/v1 log\x00" + origin))
	return Head{Hash: h[:]}
}

// Hash returns SHA-384(prev || SHA-384(body)).
func Hash(prev, body []byte) []byte {
	b := sha512.Sum384(body)
	h := sha512.Sum384(append(append(make([]byte, 0, len(prev)+len(b)), prev...), b[:]...))
	return h[:]
}

// Append makes the entry that follows head, filling in b's index and link, and
// the head after it. An entry that Open would not take, or would take for another
// one, is an error: the log only grows, and what stands in it must be readable
// for ever.
func Append(head Head, b Body) (Entry, Head, error) {
	b.Index, b.Prev = head.Size, head.Hash
	if err := b.validate(); err != nil {
		return Entry{}, Head{}, fmt.Errorf("log entry %d: %w", b.Index, err)
	}
	enc, err := plan.Canonical(b)
	if err != nil {
		return Entry{}, Head{}, fmt.Errorf("log entry %d: %w", b.Index, err)
	}
	if len(enc) > MaxBody {
		return Entry{}, Head{}, fmt.Errorf("log entry %d has %d bytes, at most %d are allowed", b.Index, len(enc), MaxBody)
	}
	e := Entry{Index: b.Index, Body: enc, Hash: Hash(head.Hash, enc)}
	if err := b.sameAs(e); err != nil {
		return Entry{}, Head{}, err
	}
	return e, Head{Size: b.Index + 1, Hash: e.Hash}, nil
}

// sameAs checks that e, which is in canonical form, can be read and says what b
// says: RFC 8785 writes numbers as doubles, and JSON knows no bytes that are not
// UTF-8.
func (b Body) sameAs(e Entry) error {
	var read Body
	if err := plan.Decode(e.Body, MaxBody, &read); err != nil {
		return fmt.Errorf("written entry does not open: %w", err)
	}
	want, err := json.Marshal(b)
	if err != nil {
		return fmt.Errorf("log entry %d: %w", e.Index, err)
	}
	got, err := json.Marshal(read)
	if err != nil {
		return fmt.Errorf("log entry %d: %w", e.Index, err)
	}
	if !bytes.Equal(want, got) {
		return fmt.Errorf("log entry %d holds a value that canonical form (RFC 8785) changes", e.Index)
	}
	return nil
}

func (b Body) validate() error {
	held, named := 0, false
	for kind, there := range b.parts() {
		if there {
			held++
			named = named || kind == b.Kind
		}
	}
	switch {
	case held != 1 || !named:
		return fmt.Errorf("kind %.40q does not say what the entry holds", b.Kind)
	case len(b.Prev) != sha512.Size384:
		return errors.New("no link to the entry before")
	case b.Actor == "" || b.TimeMillis <= 0:
		return errors.New("no actor or time")
	case (b.Job == "") != (b.JobSequence == 0):
		return errors.New("a job and its sequence number come together")
	case b.JobSequence <= 1 && len(b.JobPrev) != 0:
		return errors.New("a link to an entry of the job before its first")
	case b.JobSequence > 1 && len(b.JobPrev) != sha512.Size384:
		return errors.New("no link to the job's entry before")
	case b.Job == "" && b.Kind.ofJob():
		return fmt.Errorf("%s without a job", b.Kind)
	}
	return nil
}

// Open checks one entry by itself and returns what it says: canonical form, its
// index, and its hash over body and link.
func (e Entry) Open() (Body, error) {
	var b Body
	if err := plan.Decode(e.Body, MaxBody, &b); err != nil {
		return Body{}, fmt.Errorf("log entry %d: %w", e.Index, err)
	}
	if err := b.validate(); err != nil {
		return Body{}, fmt.Errorf("log entry %d: %w", e.Index, err)
	}
	c, err := plan.Canonical(b)
	if err != nil {
		return Body{}, fmt.Errorf("log entry %d: %w", e.Index, err)
	}
	switch {
	case !bytes.Equal(c, e.Body):
		return Body{}, fmt.Errorf("log entry %d: not in canonical form (RFC 8785)", e.Index)
	case b.Index != e.Index:
		return Body{}, fmt.Errorf("log entry %d says that it is entry %d", e.Index, b.Index)
	case !bytes.Equal(Hash(b.Prev, e.Body), e.Hash):
		return Body{}, fmt.Errorf("log entry %d: hash does not fit body and link", e.Index)
	}
	return b, nil
}

// follows checks b's place among the entries of its job, of which last is the
// number so far and the chain hash of the latest.
func (b Body) follows(last Head) error {
	if b.JobSequence != last.Size+1 {
		return fmt.Errorf("log entry %d is number %d of its job, want %d", b.Index, b.JobSequence, last.Size+1)
	}
	if !bytes.Equal(b.JobPrev, last.Hash) {
		return fmt.Errorf("log entry %d does not follow the job's entry before", b.Index)
	}
	return nil
}

// Checker follows a log from its first entry on. Make one with NewChecker.
type Checker struct {
	head Head
	jobs map[string]Head
}

// NewChecker returns a checker of origin's log.
func NewChecker(origin string) *Checker {
	return &Checker{head: Genesis(origin), jobs: map[string]Head{}}
}

// Add checks the next entry. After an error the checker is of no more use.
func (c *Checker) Add(e Entry) error {
	b, err := e.Open()
	switch {
	case err != nil:
		return err
	case b.Index != c.head.Size:
		return fmt.Errorf("log entry %d stands where entry %d belongs", b.Index, c.head.Size)
	case !bytes.Equal(b.Prev, c.head.Hash):
		return fmt.Errorf("log entry %d does not follow what stands before it", b.Index)
	}
	if b.Job != "" {
		last := c.jobs[b.Job]
		if err := b.follows(last); err != nil {
			return err
		}
		c.jobs[b.Job] = Head{Size: last.Size + 1, Hash: e.Hash}
	}
	c.head = Head{Size: b.Index + 1, Hash: e.Hash}
	return nil
}

// Head returns the head after the entries so far, which the caller holds
// against a signed one: a log that was cut short is whole in itself.
func (c *Checker) Head() Head { return c.head }

// VerifyChain checks a log from its first entry on and returns its head.
func VerifyChain(origin string, entries []Entry) (Head, error) {
	c := NewChecker(origin)
	for _, e := range entries {
		if err := c.Add(e); err != nil {
			return Head{}, err
		}
	}
	return c.Head(), nil
}

// VerifyJob checks the entries of one job, which other jobs' entries may
// separate: all of the job, complete from the first on, in order, each naming
// the chain hash of the one before. The caller holds one against a receipt
// (Receipt.Includes), which proves it and all before it; those after it are
// proven by nothing.
func VerifyJob(origin, job string, entries []Entry) ([]Body, error) {
	if job == "" {
		return nil, errors.New("verify log entries: no job")
	}
	out := make([]Body, 0, len(entries))
	for i, e := range entries {
		b, err := e.Open()
		switch {
		case err != nil:
			return nil, err
		case b.Job != job:
			return nil, fmt.Errorf("log entry %d is of another job", b.Index)
		case b.Index == 0 && !bytes.Equal(b.Prev, Genesis(origin).Hash):
			return nil, fmt.Errorf("log entry 0 does not begin the log of %q", origin)
		}
		var before Head
		if i > 0 {
			before = Head{Size: uint64(i), Hash: entries[i-1].Hash}
		}
		if err := b.follows(before); err != nil {
			return nil, err
		}
		if i > 0 {
			last := out[i-1]
			if b.Index <= last.Index {
				return nil, fmt.Errorf("log entry %d stands after entry %d", b.Index, last.Index)
			}
			if b.Index == last.Index+1 && !bytes.Equal(b.Prev, entries[i-1].Hash) {
				return nil, fmt.Errorf("log entry %d does not follow entry %d", b.Index, last.Index)
			}
		}
		out = append(out, b)
	}
	return out, nil
}

// TypeReceipt is the token type of log receipts.
const TypeReceipt = "log-entry"

// Receipt is the claims set by which a broker promises that an entry is in its
// log.
type Receipt struct {
	Issuer   string      `json:"iss"`
	IssuedAt int64       `json:"iat"`
	Job      string      `json:"job"`
	Digest   plan.Digest `json:"digest"`
	Index    uint64      `json:"index"`
	Hash     []byte      `json:"hash"`
	// Head is the log right after the entry.
	Head Head `json:"head"`
	// Witnessed is whether anyone but the broker has signed Head. Nobody does.
	Witnessed bool `json:"witnessed"`
}

// OpenReceipt checks a receipt's signature by the broker whose keys these are,
// and that its claims fit together.
func OpenReceipt(keys receipt.Keys, token string) (Receipt, error) {
	var r Receipt
	if err := keys.Open(TypeReceipt, token, &r); err != nil {
		return Receipt{}, err
	}
	if r.Job == "" || r.Digest.Bytes() == nil || r.IssuedAt <= 0 || len(r.Hash) != sha512.Size384 {
		return Receipt{}, errors.New("log receipt is incomplete")
	}
	if r.Head.Size != r.Index+1 || !bytes.Equal(r.Head.Hash, r.Hash) {
		return Receipt{}, errors.New("log receipt: the head is not the one after the entry")
	}
	if r.Witnessed {
		return Receipt{}, errors.New("log receipt claims a witness, whose signature it does not carry")
	}
	return r, nil
}

// Includes checks that e is the entry that the receipt promises: the bundle
// entry of the receipt's job and digest.
func (r Receipt) Includes(e Entry) error {
	b, err := e.Open()
	switch {
	case err != nil:
		return err
	case b.Index != r.Index || !bytes.Equal(e.Hash, r.Hash):
		return fmt.Errorf("log entry %d is not the one in the receipt", e.Index)
	case b.Kind != KindBundle || b.Job != r.Job || b.Bundle.Digest != r.Digest:
		return fmt.Errorf("log entry %d does not record the digest in the receipt", e.Index)
	}
	return nil
}
