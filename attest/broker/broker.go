// Package broker holds the rules by which data keys are released under grants: to
// attested jobs and, of assets whose policy says so, to attested guests of the
// Confidential Containers KBS protocol.
//
// Trusted: the pinned keys of verifiers, the KeyStore, the Store, the Authorizer,
// the Directory and the clock. Checked: the result's signature, issuer, audience,
// lifetime and verdict; the session key's signature over the request; that the
// grant is of that plan and asset, active, unrevoked and unspent; its approvals,
// again at every release; that nothing which was taken back concerns the job;
// that a nonce, a result and an asset come together once; that one agent alone
// acts for a job. Of a guest, the result must be of the session, its nonce and its
// key; no session key signs. Not checked: evidence; the verifier appraised it. Who
// submitted a job is the agent's word. Not bounded: how many jobs an agent logs bundles for.
package broker

import (
	"context"
	"crypto/hpke"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

const (
	// MaxOwnerAssets bounds the assets of one owner.
	MaxOwnerAssets = 5_000
	// MaxList bounds how many assets or grants one call returns. What does not
	// fit is an error: a list cut short would pass for a whole one.
	MaxList = 10_000
	// MaxJobEntries bounds the log entries of one job, so that all of them fit
	// into one answer and one bundle.
	MaxJobEntries = 1_024
	// bundleEntries of them are left to bundles: a job that spent all its
	// releases can still be concluded.
	bundleEntries = 16
	// page is how many log entries are read at a time to check the whole log.
	page = 1_000
)

// Suite is the HPKE suite (RFC 9180) of wrapped data keys: ML-KEM-768+X25519,
// HKDF-SHA256, AES-256-GCM. To a recipient key of KEMX25519, which an asset's policy has
// to accept, its KEM is DHKEM(X25519) instead.
func Suite() (hpke.KEM, hpke.KDF, hpke.AEAD) {
	return hpke.MLKEM768X25519(), hpke.HKDFSHA256(), hpke.AES256GCM()
}

// Config is what a Broker is made of. Every field but KeyStores, Directory and
// Simulation is required.
type Config struct {
	// ID is the broker's name: audience of results, issuer of receipts.
	ID     string
	Signer *receipt.Signer
	// OwnerKey opens the data keys that owners hand over.
	OwnerKey hpke.PrivateKey
	Keys     KeyStore
	// KeyStores are further key stores by the names by which assets choose them.
	KeyStores map[string]KeyStore
	Store     Store
	// Access decides who may do what.
	Access Authorizer
	// Directory knows approvers. Without one no approval counts.
	Directory Directory
	// Verifiers are the pinned keys of those whose results count.
	Verifiers []receipt.Keys
	// Simulation lets grants accept results rooted in simulation anchors.
	Simulation bool
	Now        func() time.Time
}

// Broker applies the rules. It is safe for concurrent use.
type Broker struct {
	id         string
	signer     *receipt.Signer
	ownerKey   hpke.PrivateKey
	keys       map[string]KeyStore // the default one under ""
	store      Store
	access     Authorizer
	directory  Directory
	verifiers  map[string]receipt.Keys
	simulation bool
	now        func() time.Time
	signatures signatures
	turns      turns
	// policySets counts the sets of access policies that were put into force.
	policySets atomic.Uint64
}

// New returns a broker. An incomplete configuration is an error.
func New(c Config) (*Broker, error) {
	switch {
	case c.ID == "" || c.Signer == nil || c.Signer.Issuer() != c.ID:
		return nil, errors.New("broker needs an id and a signer under that id")
	case c.OwnerKey == nil || c.OwnerKey.KEM().ID() != hpke.MLKEM768X25519().ID():
		return nil, errors.New("broker needs an ML-KEM-768+X25519 key for owners to wrap to")
	case c.Keys == nil || c.Store == nil || c.Now == nil:
		return nil, errors.New("broker needs a key store, a store and a clock")
	case c.Access == nil:
		return nil, errors.New("broker needs an authorizer")
	case len(c.Verifiers) == 0:
		return nil, errors.New("broker needs the keys of at least one verifier")
	}
	vs := map[string]receipt.Keys{}
	for _, k := range c.Verifiers {
		if _, twice := vs[k.Issuer()]; k.Issuer() == "" || twice {
			return nil, fmt.Errorf("verifier %q has no name or is named twice", k.Issuer())
		}
		vs[k.Issuer()] = k
	}
	keys := map[string]KeyStore{"": c.Keys}
	for name, k := range c.KeyStores {
		if !keyStoreForm.MatchString(name) || k == nil {
			return nil, fmt.Errorf("key store %.80q has no name or is none", name)
		}
		keys[name] = k
	}
	return &Broker{
		id: c.ID, signer: c.Signer, ownerKey: c.OwnerKey, keys: keys, store: c.Store, access: c.Access, directory: c.Directory, verifiers: vs,
		simulation: c.Simulation, now: c.Now, turns: newTurns(),
	}, nil
}

// Info is what clients need to know of a broker.
type Info struct {
	ID           string
	OwnerWrapKey []byte
	JWKS         []byte
	Simulation   bool
}

// Info returns the broker's name and public keys.
func (b *Broker) Info() (Info, error) {
	jwks, err := b.signer.JWKS()
	if err != nil {
		return Info{}, fmt.Errorf("%w: encode keys: %w", ErrUnavailable, err)
	}
	return Info{ID: b.id, OwnerWrapKey: b.ownerKey.PublicKey().Bytes(), JWKS: jwks, Simulation: b.simulation}, nil
}

var (
	assetForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	jobForm   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
)

// NewAsset is an owner's request to register a sealed object.
type NewAsset struct {
	Name   string
	Kind   Kind
	Digest plan.Digest
	// Enc and Ciphertext are the data key, sealed to the broker's owner key with
	// info receipt.OwnerWrapInfo and the name as associated data. Both are empty
	// for checkpoints, and for what a job is to seal anew (CommitReseal), which has
	// no digest either: the broker makes their keys.
	Enc        []byte
	Ciphertext []byte
	Labels     Labels
	// Policy is DefaultPolicy if it is nil.
	Policy *Policy
	// KeyStore is empty for the broker's default.
	KeyStore string
	// Signed is the owner's receipt.PolicyStatement of revision 1, which an owner
	// whose keys the Directory knows must make. Without Policy and Labels it says
	// them.
	Signed *Signed
}

// CreateAsset registers a sealed object of owner.
func (b *Broker) CreateAsset(ctx context.Context, owner Actor, n NewAsset) (Asset, error) {
	if !assetForm.MatchString(n.Name) {
		return Asset{}, fmt.Errorf("%w: asset name %.80q: want lower-case letters, digits, '-' and '.', at most 63", ErrInvalid, n.Name)
	}
	if n.Policy == nil && n.Signed != nil {
		s, err := receipt.ParsePolicyStatement(n.Signed.Document)
		if err != nil {
			return Asset{}, fmt.Errorf("%w: asset %s: %w", ErrInvalid, n.Name, err)
		}
		p := Policy(s.Policy)
		n.Policy, n.Labels = &p, Labels(s.Labels)
	}
	if n.Policy == nil {
		p := DefaultPolicy()
		n.Policy = &p
	}
	policy, err := b.settled(*n.Policy)
	if err != nil {
		return Asset{}, err
	}
	if err := n.Labels.validate(); err != nil {
		return Asset{}, err
	}
	store, ok := b.keys[n.KeyStore]
	if !ok {
		return Asset{}, fmt.Errorf("%w: this broker has no key store %.80q", ErrInvalid, n.KeyStore)
	}
	a := Asset{
		Name: n.Name, Kind: n.Kind, Digest: n.Digest, Owner: owner.Name, Created: b.now().UTC().Truncate(time.Second), KeyStore: n.KeyStore, Labels: n.Labels, Policy: policy, Revision: 1,
	}
	if err := b.may(ctx, owner, ActionCreateAsset, a.resource()); err != nil {
		return Asset{}, err
	}
	if err := b.sign(ctx, &a, n.Signed); err != nil {
		return Asset{}, err
	}
	var key *DataKey
	switch n.Kind {
	case KindCheckpoints:
		if n.Digest != "" || len(n.Enc) != 0 || len(n.Ciphertext) != 0 {
			return Asset{}, fmt.Errorf("%w: checkpoints have no digest yet, and the broker makes their key", ErrInvalid)
		}
		key = GenerateDataKey()
	case KindDataset, KindWeights, KindSecret:
		if a.open() && len(n.Enc) == 0 && len(n.Ciphertext) == 0 {
			key = GenerateDataKey()
			break
		}
		if _, err := plan.ParseDigest(string(n.Digest)); err != nil {
			return Asset{}, fmt.Errorf("%w: asset %s: %w", ErrInvalid, n.Name, err)
		}
		if key, err = b.openOwnerKey(n); err != nil {
			return Asset{}, err
		}
	default:
		return Asset{}, fmt.Errorf("%w: asset kind %.40q: want dataset, weights, secret or checkpoints", ErrInvalid, n.Kind)
	}
	defer key.Destroy()

	doc, err := a.document()
	if err != nil {
		return Asset{}, err
	}
	ad, err := a.associated()
	if err != nil {
		return Asset{}, err
	}
	a.Wrapped, err = store.Wrap(ctx, key, ad)
	switch {
	case errors.Is(err, ErrKeyDisabled):
		return Asset{}, fmt.Errorf("%w: in %s the %w", ErrInvalid, a.keyStore(), ErrKeyDisabled)
	case err != nil:
		return Asset{}, fmt.Errorf("%w: wrap key of asset %s: %w", ErrUnavailable, a.Name, err)
	}
	err = b.update(ctx, func(ctx context.Context, tx Tx) error {
		switch n, err := tx.OwnedAssets(ctx, a.Owner); {
		case err != nil:
			return err
		case n >= MaxOwnerAssets:
			return fmt.Errorf("%w: %s has %d assets, which is as many as an owner may have", ErrTooMany, owner, n)
		}
		if err := tx.InsertAsset(ctx, a); err != nil {
			return fmt.Errorf("asset %s: %w", a.Name, err)
		}
		_, err := b.log(ctx, tx, translog.Body{Kind: translog.KindAsset, Actor: owner.String(), Asset: &translog.Asset{Name: a.Name, Kind: string(a.Kind), Digest: a.Digest, Policy: plan.Sum(doc)}})
		return err
	})
	if err != nil {
		return Asset{}, err
	}
	return a, nil
}

func (b *Broker) openOwnerKey(n NewAsset) (*DataKey, error) {
	_, kdf, aead := Suite()
	r, err := hpke.NewRecipient(n.Enc, b.ownerKey, kdf, aead, []byte(receipt.OwnerWrapInfo))
	if err != nil {
		return nil, fmt.Errorf("%w: asset %s: the encapsulated key is not one for this broker", ErrInvalid, n.Name)
	}
	pt, err := r.Open([]byte(n.Name), n.Ciphertext)
	if err != nil {
		return nil, fmt.Errorf("%w: asset %s: the wrapped key does not open: wrap it to this broker's key, for this name", ErrInvalid, n.Name)
	}
	k, err := NewDataKey(pt)
	if err != nil {
		clear(pt)
		return nil, fmt.Errorf("%w: asset %s: %w", ErrInvalid, n.Name, err)
	}
	return k, nil
}

// associated ties a wrapped key to what it is the key of, so that someone who
// can write to the store cannot move it to another asset or owner.
func (a Asset) associated() ([]byte, error) {
	return plan.Canonical(map[string]string{"label": "coffer/v1 asset", "name": a.Name, "kind": string(a.Kind), "digest": string(a.Digest), "owner": a.Owner})
}

// ReadAsset returns one asset.
func (b *Broker) ReadAsset(ctx context.Context, who Actor, name string) (Asset, error) {
	var a Asset
	err := b.view(ctx, func(ctx context.Context, r Reader) (err error) {
		if a, err = r.Asset(ctx, name); err != nil {
			return fmt.Errorf("asset %.80q: %w", name, err)
		}
		return b.may(ctx, who, ActionReadAsset, a.resource())
	})
	if err != nil {
		return Asset{}, err
	}
	return a, nil
}

// ReadAssets returns every asset that who may read. More than MaxList are
// ErrTooMany.
func (b *Broker) ReadAssets(ctx context.Context, who Actor) ([]Asset, error) {
	var l []Asset
	err := b.view(ctx, func(ctx context.Context, r Reader) (err error) {
		l, err = r.Assets(ctx, MaxList+1)
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(l) > MaxList {
		return nil, fmt.Errorf("%w: more than %d assets: ask for one by its name", ErrTooMany, MaxList)
	}
	return slices.DeleteFunc(l, func(a Asset) bool { return b.may(ctx, who, ActionReadAsset, a.resource()) != nil }), nil
}

// LogBundle records the digest of a job's bundle statement and returns a
// signed translog.Receipt. The same digest of the same job is recorded once, and
// only the agent that first released or logged for the job may add to it.
func (b *Broker) LogBundle(ctx context.Context, agent Actor, job string, digest plan.Digest) (string, error) {
	if !jobForm.MatchString(job) {
		return "", fmt.Errorf("%w: job id %.80q", ErrInvalid, job)
	}
	if _, err := plan.ParseDigest(string(digest)); err != nil {
		return "", fmt.Errorf("%w: bundle: %w", ErrInvalid, err)
	}
	if err := b.may(ctx, agent, ActionLogBundle, Resource{Kind: "job", Name: job}); err != nil {
		return "", err
	}
	var entry translog.Entry
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		var l check.List
		if err := checkAgent(ctx, tx, &l, job, agent); err != nil {
			return err
		}
		if len(l) > 0 {
			return check.Refuse("log", l)
		}
		var err error
		if entry, err = tx.BundleEntry(ctx, job, digest); !errors.Is(err, ErrNotFound) {
			return err
		}
		if err := b.room(ctx, tx, job); err != nil {
			return err
		}
		// A job that has its record is over. One that was told to stop stays open
		// for the report that it did.
		switch lease, err := tx.Lease(ctx, job); {
		case err == nil && lease.Ended.IsZero() && lease.Stop == "":
			lease.Ended = b.now().UTC().Truncate(time.Second)
			if err := tx.PutLease(ctx, lease); err != nil {
				return err
			}
		case err != nil && !errors.Is(err, ErrNotFound):
			return err
		}
		entry, err = b.log(ctx, tx, translog.Body{Kind: translog.KindBundle, Actor: agent.String(), Job: job, Bundle: &translog.Bundle{Digest: digest}})
		return err
	})
	if err != nil {
		return "", err
	}
	token, err := b.signer.Sign(translog.TypeReceipt, translog.Receipt{
		Issuer: b.id, IssuedAt: b.now().Unix(), Job: job, Digest: digest, Index: entry.Index, Hash: entry.Hash,
		Head: translog.Head{Size: entry.Index + 1, Hash: entry.Hash},
	})
	if err != nil {
		return "", fmt.Errorf("%w: sign log receipt: %w", ErrUnavailable, err)
	}
	return token, nil
}

// checkAgent fails l if another agent than this one acts for the job: the one
// that its first log entry names.
func checkAgent(ctx context.Context, r Reader, l *check.List, job string, agent Actor) error {
	first, err := r.Entries(ctx, job, 0, 1)
	if err != nil || len(first) == 0 {
		return err
	}
	body, err := first[0].Open()
	if err != nil {
		return err
	}
	if body.Actor != agent.String() {
		notTheAgent(l, agent)
	}
	return nil
}

// notTheAgent refuses an agent whose job it is not. Whose it is stays untold.
func notTheAgent(l *check.List, agent Actor) {
	l.Fail("job.agent", "the agent that first acted for this job", agent.String(), "act for jobs of this agent only")
}

// Entries returns the log entries of one job in order.
func (b *Broker) Entries(ctx context.Context, who Actor, job string) ([]translog.Entry, error) {
	if !jobForm.MatchString(job) {
		return nil, fmt.Errorf("%w: job id %.80q", ErrInvalid, job)
	}
	if err := b.may(ctx, who, ActionEntries, Resource{Kind: "job", Name: job}); err != nil {
		return nil, err
	}
	var l []translog.Entry
	err := b.view(ctx, func(ctx context.Context, r Reader) (err error) {
		l, err = r.Entries(ctx, job, 0, MaxJobEntries)
		return err
	})
	return l, err
}

// LogPolicySet records another set of access policies and then has use put it into
// force, which a set that is refused never is. by is who put it there,
// "ROLE/NAME". The set that the log names last is recorded once. No release that
// commits after LogPolicySet has returned rests on the set before.
func (b *Broker) LogPolicySet(ctx context.Context, by Actor, serial uint64, digest plan.Digest, use func() error) error {
	if serial == 0 || digest.Bytes() == nil || use == nil {
		return fmt.Errorf("%w: a policy set has a serial number, a digest and a way to use it", ErrInvalid)
	}
	if err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		switch last, err := tx.PolicySet(ctx); {
		case err == nil && last.Serial == serial && last.Digest == digest:
			return nil
		case err == nil && last.Serial >= serial:
			var l check.List
			l.Fail("policy.serial", fmt.Sprintf("a serial number after %d", last.Serial), strconv.FormatUint(serial, 10), "sign the set with the next serial number")
			return check.Refuse("policy", l)
		case err != nil && !errors.Is(err, ErrNotFound):
			return err
		}
		p := translog.Policy{Serial: serial, Digest: digest}
		if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindPolicy, Actor: by.String(), Policy: &p}); err != nil {
			return err
		}
		return tx.PutPolicySet(ctx, p)
	}); err != nil {
		return err
	}
	defer b.policySets.Add(1)
	return use()
}

// CheckLog verifies the whole log as the store holds it.
func (b *Broker) CheckLog(ctx context.Context) (translog.Head, error) {
	c := translog.NewChecker(b.id)
	err := b.view(ctx, func(ctx context.Context, r Reader) error {
		for {
			l, err := r.Entries(ctx, "", c.Head().Size, page)
			if err != nil {
				return err
			}
			for _, e := range l {
				if err := c.Add(e); err != nil {
					return err
				}
			}
			if len(l) < page {
				return nil
			}
		}
	})
	return c.Head(), err
}

// log appends an entry to the log in tx, in its place within its job.
func (b *Broker) log(ctx context.Context, tx Tx, body translog.Body) (translog.Entry, error) {
	return b.logAfter(ctx, tx, nil, body)
}

// logAfter is log where the heads may be known already.
func (b *Broker) logAfter(ctx context.Context, tx Tx, known *heads, body translog.Body) (translog.Entry, error) {
	if known == nil {
		known = &heads{}
		var err error
		if known.log, err = tx.Head(ctx); err != nil {
			return translog.Entry{}, err
		}
		if body.Job != "" {
			if known.job, err = tx.JobHead(ctx, body.Job); err != nil {
				return translog.Entry{}, err
			}
		}
	}
	head := known.log
	if head.Size == 0 {
		head = translog.Genesis(b.id)
	}
	if body.Job != "" {
		body.JobSequence, body.JobPrev = known.job.Size+1, known.job.Hash
	}
	var bundle plan.Digest
	if body.Bundle != nil {
		bundle = body.Bundle.Digest
	}
	body.TimeMillis = b.now().UnixMilli()
	e, _, err := translog.Append(head, body)
	if err != nil {
		return translog.Entry{}, err
	}
	return e, tx.InsertEntry(ctx, e, body.Job, bundle)
}

func (b *Broker) update(ctx context.Context, f func(context.Context, Tx) error) error {
	return settle(b.store.Update(ctx, f))
}

func (b *Broker) view(ctx context.Context, f func(context.Context, Reader) error) error {
	return settle(b.store.View(ctx, f))
}

// peek is view for an f of microseconds.
func (b *Broker) peek(ctx context.Context, f func(context.Context, Reader) error) error {
	if p, ok := b.store.(Peeker); ok {
		return settle(p.Peek(ctx, f))
	}
	return b.view(ctx, f)
}

// settle takes every error that is not an answer for a store that did not do
// its part: full, closed, slow, or cancelled half-way.
func settle(err error) error {
	var refusal *check.Refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refusal), errors.Is(err, ErrNotFound), errors.Is(err, ErrExists), errors.Is(err, ErrInvalid), errors.Is(err, ErrTooMany), errors.Is(err, ErrUnavailable):
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

func set(l []string) map[string]struct{} {
	m := make(map[string]struct{}, len(l))
	for _, s := range l {
		m[s] = struct{}{}
	}
	return m
}

// newID returns a name nobody can guess or repeat.
func newID(kind string) string { return kind + "-" + strings.ToLower(rand.Text()) }

// issuerOf reads who a token says it is from, only to choose whose keys must
// verify it.
func issuerOf(token string) string {
	parts := strings.Split(token, ".")
	if len(token) > receipt.MaxToken || len(parts) != 3 {
		return ""
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var c struct {
		Issuer string `json:"iss"`
	}
	if json.Unmarshal(body, &c) != nil {
		return ""
	}
	return c.Issuer
}
