package broker

import (
	"context"
	"errors"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// Errors that are not refusals. Callers tell them apart by errors.Is.
var (
	// ErrNotFound says that what was named does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists says that a name is taken.
	ErrExists = errors.New("exists already")
	// ErrInvalid says that a request makes no sense; it will not later either.
	ErrInvalid = errors.New("invalid request")
	// ErrTooMany says that a bound on what the broker keeps or lists is reached.
	ErrTooMany = errors.New("too many")
	// ErrUnavailable says that the store, the key store or the signer did not
	// do its part: the same request may succeed later. Nothing was released
	// that the same request will not get again.
	ErrUnavailable = errors.New("broker is unavailable, try again")
)

// Kind is what an asset is.
type Kind string

// Kinds of assets.
const (
	KindDataset     Kind = "dataset"
	KindWeights     Kind = "weights"
	KindCheckpoints Kind = "checkpoints"
	// KindSecret is one small file that jobs find below /run/secrets.
	KindSecret Kind = "secret"
)

// Asset is a sealed object, or a family of them, under one data key.
type Asset struct {
	Name string
	Kind Kind
	// Digest is that of the sealed manifest; empty for checkpoints, and for what a
	// job is to seal (CommitReseal).
	Digest  plan.Digest
	Owner   string
	Created time.Time
	// Wrapped is the data key as the KeyStore wrapped it, and KeyStore that one's
	// name, empty for the default.
	Wrapped  []byte
	KeyStore string
	Labels   Labels
	Policy   Policy
	// Revision counts the changes of Labels and Policy, from 1.
	Revision int64
	// Statement is the owner's signed receipt.PolicyStatement; empty if nobody
	// signed.
	Statement Signed
}

// Grant lets one plan use assets of one owner, once it has the approvals that
// the assets' policies ask for.
type Grant struct {
	// Seq orders grants by when they were made; the Store gives it.
	Seq            int64
	ID             string
	Assets         []string
	Plan           plan.Digest
	NotBefore      time.Time
	NotAfter       time.Time
	MaxReleases    int
	Used           int
	Owner          string
	AllowSimulated bool
	// Requester is who asked, "ROLE/NAME", and Key the idempotency key.
	Requester string
	Key       string
	Requested time.Time
	// Principals are who may use it: agents ("agent/NAME" or a SPIFFE ID) and
	// submitters ("ROLE/NAME"). None of a kind is all of that kind.
	Principals []string
	Purpose    string
	// Consented is whether the owner of the assets made or accepted it.
	Consented bool
	// Revoked and Denied are zero unless that happened; Reason and EndedBy are
	// about either.
	Revoked time.Time
	Denied  time.Time
	Reason  string
	EndedBy string
}

// State is how a grant stands.
type State string

// States of a grant.
const (
	StateRequested State = "requested"
	StateApproved  State = "approved"
	StateActive    State = "active"
	StateExpired   State = "expired"
	StateExhausted State = "exhausted"
	StateRevoked   State = "revoked"
	StateDenied    State = "denied"
)

// State says how a grant stands at now, if it lacks approvals or not. An
// exhausted grant still serves the attempts that it already counted.
func (g Grant) State(now time.Time, lacking bool) State {
	switch {
	case !g.Revoked.IsZero():
		return StateRevoked
	case !g.Denied.IsZero():
		return StateDenied
	case !now.Before(g.NotAfter):
		return StateExpired
	case lacking:
		return StateRequested
	case g.Used >= g.MaxReleases:
		return StateExhausted
	case now.Before(g.NotBefore):
		return StateApproved
	}
	return StateActive
}

// GrantFilter says which grants to list. Empty fields match all.
type GrantFilter struct {
	Plan plan.Digest
	// Principal is one of Principals.
	Principal string
	// Requester asked for them.
	Requester string
	// After is the Seq of the last grant already seen.
	After int64
	// Limit is at most how many are returned.
	Limit int
}

// StoredApproval is a signed decision on a grant: an approval, a consent or a
// denial.
type StoredApproval struct {
	Grant     string
	Approver  string
	Document  []byte
	Signature []byte
	// Digest is the SHA-384 of Document.
	Digest plan.Digest
}

// Lease is what a job runs under. One is made or added to by each release.
type Lease struct {
	JobID string
	// Agent is the Actor that acts for the job, and Submitter as in the release
	// request.
	Agent     string
	Submitter string
	Plan      plan.Digest
	// Session is the job's session key, PKIX DER.
	Session []byte
	Seconds int64
	Grace   int64
	// StopAt is when the job has to stop because a grant ends; zero is never.
	StopAt time.Time
	// Image is empty if the broker was not shown the plan.
	Image        string
	Chips        []string
	Measurements []string
	Uses         []LeaseUse
	Opened       time.Time
	// Stop says why the job has to stop; Told is when a renewal first said so.
	Stop string
	Told time.Time
	// Attested is the newest attestation result that the job has shown.
	Attested Attested
	// Ended is when the agent reported the job gone or logged its bundle.
	Ended time.Time
}

// LeaseUse is one key that a job has.
type LeaseUse struct {
	Grant     string `json:"grant"`
	Requester string `json:"requester"`
	Asset     string `json:"asset"`
	Owner     string `json:"owner"`
}

// RevocationKind says what a revocation is of.
type RevocationKind string

// Kinds of revocations.
const (
	RevokeGrant       RevocationKind = "grant"
	RevokeAsset       RevocationKind = "asset"
	RevokePrincipal   RevocationKind = "principal"
	RevokeNode        RevocationKind = "node"
	RevokeChip        RevocationKind = "chip-id"
	RevokeImage       RevocationKind = "image"
	RevokeMeasurement RevocationKind = "measurement"
)

// Target is what a revocation is of.
type Target struct {
	Kind  RevocationKind
	Value string
}

func (t Target) String() string { return string(t.Kind) + " " + t.Value }

// Revocation takes a target back. Those of grants are kept with the grants.
type Revocation struct {
	Target
	// Scope is the owner whose assets alone it concerns; empty for all.
	Scope  string
	Reason string
	By     string
	Time   time.Time
}

// Head is the newest checkpoint of a job under an asset.
type Head struct {
	JobID    string
	Asset    string
	Plan     plan.Digest
	Sequence uint64
	// Digest is that of the sealed manifest, Record that of the signed record.
	Digest   plan.Digest
	Record   plan.Digest
	Time     time.Time
	LogIndex uint64
	LogHash  []byte
}

// ReleaseKey names a release: one asset under one attestation result.
type ReleaseKey struct {
	Verifier string
	ResultID string
	Asset    string
}

// Release is a stored answer with all that its receipt says.
type Release struct {
	ReleaseKey
	ID          string
	Grant       string
	Attempt     int
	JobID       string
	Plan        plan.Digest
	AssetDigest plan.Digest
	// Request is the digest of the signed request's bytes.
	Request    plan.Digest
	Enc        []byte
	Ciphertext []byte
	Time       time.Time
	NotAfter   time.Time
	Simulated  bool
	// LeaseSeconds is how long the job may run without a renewal.
	LeaseSeconds int64
	// LeaseKey is the id of the key that signs the job's leases.
	LeaseKey string
	// ResultSeconds is receipt.Release's.
	ResultSeconds int64
	Approvals     []plan.Digest
	// Policy is the digest of the signed policy statement, if there was one, and
	// Held says where the key was.
	Policy   plan.Digest
	Held     *receipt.Held
	LogIndex uint64
	LogHash  []byte
}

// Use records which result spent a nonce, and for which recipient key.
type Use struct {
	Verifier  string
	Nonce     string
	ResultID  string
	Recipient plan.Digest
}

// Reader reads one consistent state of a store. What does not exist is
// ErrNotFound; lists come in a stable order.
type Reader interface {
	Asset(ctx context.Context, name string) (Asset, error)
	// Assets returns at most limit assets.
	Assets(ctx context.Context, limit int) ([]Asset, error)
	// OwnedAssets returns how many assets an owner has.
	OwnedAssets(ctx context.Context, owner string) (int, error)
	Grant(ctx context.Context, id string) (Grant, error)
	// Grants returns what f matches, in the order of Seq.
	Grants(ctx context.Context, f GrantFilter) ([]Grant, error)
	// GrantByKey returns the grant that requester asked for under a key.
	GrantByKey(ctx context.Context, requester, key string) (Grant, error)
	// RequestedGrants returns how many grants of a plan someone asked for, of all
	// plans if p is empty.
	RequestedGrants(ctx context.Context, requester string, p plan.Digest) (int, error)
	// Approvals returns the approvals of a grant in the order of their making.
	Approvals(ctx context.Context, grant string) ([]StoredApproval, error)
	Lease(ctx context.Context, job string) (Lease, error)
	// OpenLeases returns at most limit leases that have not ended, of jobs whose
	// id sorts after after.
	OpenLeases(ctx context.Context, after string, limit int) ([]Lease, error)
	// Revoked returns every revocation of any of the targets, whatever its scope.
	// For a target without a value it returns, for each scope in which there are any
	// of the kind, one revocation with the kind and the scope alone.
	Revoked(ctx context.Context, of []Target) ([]Revocation, error)
	// Revocations returns at most limit revocations.
	Revocations(ctx context.Context, limit int) ([]Revocation, error)
	// OwnRevocations returns how many revocations an owner is the scope of.
	OwnRevocations(ctx context.Context, owner string) (int, error)
	CheckpointHead(ctx context.Context, job, asset string) (Head, error)
	// Line returns the line of checkpoints of a plan under an asset.
	Line(ctx context.Context, p plan.Digest, asset string) (Line, error)
	// PolicySet returns the set of access policies that was put last.
	PolicySet(ctx context.Context) (translog.Policy, error)
	Release(ctx context.Context, k ReleaseKey) (Release, error)
	// Uses returns every use by verifier of the nonce or of the result id.
	Uses(ctx context.Context, verifier, nonce, resultID string) ([]Use, error)
	// Counted reports whether grant was already used for a job's recipient.
	Counted(ctx context.Context, grant, job string, recipient plan.Digest) (bool, error)
	// Head returns the log's head, the zero Head if the log is empty.
	Head(ctx context.Context) (translog.Head, error)
	// JobHead returns the number of a job's log entries and the chain hash of the
	// last one, the zero Head if there is none.
	JobHead(ctx context.Context, job string) (translog.Head, error)
	// BundleEntry returns a job's log entry that records a bundle's digest.
	BundleEntry(ctx context.Context, job string, bundle plan.Digest) (translog.Entry, error)
	// Entries returns a job's log entries in order, all jobs' if job is empty,
	// at most limit from index from on.
	Entries(ctx context.Context, job string, from uint64, limit int) ([]translog.Entry, error)
}

// Tx reads and changes a store. Inserting what exists is ErrExists.
type Tx interface {
	Reader
	InsertAsset(ctx context.Context, a Asset) error
	// SetAssetPolicy changes Policy, Labels, Revision and Statement of the asset
	// a.Name.
	SetAssetPolicy(ctx context.Context, a Asset) error
	// SetAssetKey changes Wrapped and KeyStore of the asset a.Name.
	SetAssetKey(ctx context.Context, a Asset) error
	// SetAssetDigest changes Digest and Wrapped of the asset a.Name, whose Digest is
	// empty; otherwise it is ErrNotFound.
	SetAssetDigest(ctx context.Context, a Asset) error
	InsertGrant(ctx context.Context, g Grant) error
	// SetGrant changes Used, Consented, Revoked, Denied, Reason and EndedBy of
	// the grant g.ID.
	SetGrant(ctx context.Context, g Grant) error
	InsertApproval(ctx context.Context, a StoredApproval) error
	// PutLease makes or replaces the lease of l.JobID.
	PutLease(ctx context.Context, l Lease) error
	InsertRevocation(ctx context.Context, r Revocation) error
	// DeleteRevocation removes one; the log keeps that it was there.
	DeleteRevocation(ctx context.Context, t Target, scope string) error
	// PutCheckpointHead makes or replaces the head of h.JobID and h.Asset.
	PutCheckpointHead(ctx context.Context, h Head) error
	// PutLine makes or replaces the line of l.Plan and l.Asset.
	PutLine(ctx context.Context, l Line) error
	PutPolicySet(ctx context.Context, p translog.Policy) error
	InsertRelease(ctx context.Context, r Release) error
	InsertUse(ctx context.Context, u Use) error
	InsertCounted(ctx context.Context, grant, job string, recipient plan.Digest) error
	// InsertEntry appends to the log. job is empty for entries of no job, and
	// bundle for those that record no bundle.
	InsertEntry(ctx context.Context, e translog.Entry, job string, bundle plan.Digest) error
}

// Store keeps assets, grants, releases and the log.
//
// Update MUST run f alone: no other Update may read or write between f's first
// read and its end. It MUST commit everything that f did, durably, before it
// returns nil, and nothing of it if f or the commit fails. Several updates may
// share a commit, each seeing what those before it did; if that commit fails,
// Update MUST return its error for every one of them, also where f returned one,
// which may rest on what is gone. Otherwise an error that f returns comes back as
// it is (errors.Is and errors.As see it). View MUST show f
// one committed state, and everything that any Update returned nil for before.
type Store interface {
	View(ctx context.Context, f func(context.Context, Reader) error) error
	Update(ctx context.Context, f func(context.Context, Tx) error) error
}

// Peeker is what a Store may be besides. Peek is View for an f of microseconds: it
// MAY keep an Update waiting until f returns.
type Peeker interface {
	Peek(ctx context.Context, f func(context.Context, Reader) error) error
}
