package broker

import (
	"context"
	"errors"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
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
)

// Asset is a sealed object, or a family of them, under one data key.
type Asset struct {
	Name string
	Kind Kind
	// Digest is that of the sealed manifest; empty for checkpoints.
	Digest  plan.Digest
	Owner   string
	Created time.Time
	// Wrapped is the data key as the KeyStore wrapped it.
	Wrapped []byte
}

// Grant lets one plan use assets of one owner.
type Grant struct {
	ID             string
	Assets         []string
	Plan           plan.Digest
	NotBefore      time.Time
	NotAfter       time.Time
	MaxReleases    int
	Used           int
	Owner          string
	AllowSimulated bool
	// Revoked is zero unless the grant was taken back.
	Revoked time.Time
	Reason  string
}

// States of a grant.
const (
	StateApproved  = "approved"
	StateActive    = "active"
	StateExpired   = "expired"
	StateExhausted = "exhausted"
	StateRevoked   = "revoked"
)

// State says how a grant stands at now. An exhausted grant still serves the
// attempts that it already counted.
func (g Grant) State(now time.Time) string {
	switch {
	case !g.Revoked.IsZero():
		return StateRevoked
	case !now.Before(g.NotAfter):
		return StateExpired
	case g.Used >= g.MaxReleases:
		return StateExhausted
	case now.Before(g.NotBefore):
		return StateApproved
	}
	return StateActive
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
	LogIndex   uint64
	LogHash    []byte
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
	// Grants returns at most limit grants of a plan, of all plans if p is empty.
	Grants(ctx context.Context, p plan.Digest, limit int) ([]Grant, error)
	// OwnedGrants returns how many grants of a plan an owner made.
	OwnedGrants(ctx context.Context, owner string, p plan.Digest) (int, error)
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
	InsertGrant(ctx context.Context, g Grant) error
	// SetGrant changes Used, Revoked and Reason of the grant g.ID.
	SetGrant(ctx context.Context, g Grant) error
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
// read and its commit. It MUST commit everything that f did, durably, before it
// returns nil, and nothing of it if f or the commit fails. An error that f
// returns comes back as it is (errors.Is and errors.As see it). View MUST show f
// one committed state, and everything that any Update returned nil for before.
type Store interface {
	View(ctx context.Context, f func(context.Context, Reader) error) error
	Update(ctx context.Context, f func(context.Context, Tx) error) error
}
