// Package endorse finds what vendors publish about devices, keeps it, and says
// what of it an appraisal used: certificates and revocation lists of AMD's,
// certificate statuses and reference manifests of NVIDIA's.
//
// Trusted: the clock, and the anchors where it holds AMD's certificates against
// them. Checked: that an endorsement is in its form and is what it is asked for;
// what is fetched also by its signature where the issuer is known, and that it
// is not older than what is held. Not checked: whether a device is genuine; what
// is found here is verified again by attest/snp and attest/nvgpu, with checks of
// its own, at every appraisal. A folder can therefore be filled by anyone: a bad
// file makes for a refusal.
//
// An outage does not turn into acceptance: what cannot be had fails the check
// that needs it.
package endorse

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/plan"
)

var (
	// ErrMissing is wrapped by errors about what is held nowhere, where there is
	// nobody to ask.
	ErrMissing = errors.New("there is no copy")
	// ErrOutage is wrapped by errors about what the vendor's service did not
	// give, while it might have it.
	ErrOutage = errors.New("the vendor's service cannot be had")
	// ErrUnknown is wrapped by errors about what the vendor's service does not
	// have, by its own word.
	ErrUnknown = errors.New("the vendor's service does not have it")
)

// Request is a question to a vendor's service.
type Request struct {
	Key Key
	// Body is the OCSP request in DER for a Key of that kind, and nil for others.
	Body []byte
}

// Fetcher asks the vendors' services. An answer MUST be at most Key.Kind.MaxSize
// bytes, and need not be trusted. Fetch MUST end when ctx does. Errors that wrap
// ErrUnknown are the service's word; all others count as an outage.
type Fetcher interface {
	Fetch(ctx context.Context, r Request) ([]byte, error)
}

// Store keeps what is fetched. *Library is one that forgets.
type Store interface {
	// Get returns the version that is valid at a time, or else the one issued
	// last.
	Get(k Key, at time.Time) (Held, bool)
	// Newest returns the version issued last.
	Newest(k Key) (Held, bool)
	// ByDigest returns the version with that digest.
	ByDigest(k Key, d plan.Digest) (Held, bool)
	// Put takes in an item that was got at a time.
	Put(i Item, checked time.Time) error
}

// Put implements Store.
func (l *Library) Put(i Item, checked time.Time) error {
	_, err := l.Add(i, checked)
	return err
}

// Outage says what happens while a vendor's service does not answer. The zero
// value refuses.
type Outage string

const (
	// Refuse refuses what is due to be asked for again, even though the copy
	// has not expired.
	Refuse Outage = "refuse"
	// UseUnexpired uses a copy until it expires by its own word, and asks again
	// behind the caller's back when it is due. What is not there is refused.
	UseUnexpired Outage = "unexpired"
)

// Bounds on the waiting of one appraisal.
const (
	// Patience is how long one device's appraisal waits for vendors' services,
	// all that it needs together. What takes longer goes on without it.
	Patience = 5 * time.Second
	// fetchLimit bounds one fetch.
	fetchLimit = 30 * time.Second
	// unknownFor is how long the vendor's "there is none" is believed, and how
	// long a refused answer is not asked for again.
	unknownFor = time.Minute
	// maxRefusals bounds what is remembered of those.
	maxRefusals = 4096
)

// DefaultRefresh returns after how long a copy is due to be asked for again.
// Certificates are never due: they do not change until they expire.
func DefaultRefresh() map[Kind]time.Duration {
	return map[Kind]time.Duration{CRL: 24 * time.Hour, OCSP: 6 * time.Hour, RIM: 7 * 24 * time.Hour}
}

// Options are what a Cache needs; Store, Anchors and Clock are required.
type Options struct {
	Store   Store
	Anchors anchor.Set
	Clock   func() time.Time
	// Fetch asks the vendors' services. Without it there is what Store has.
	Fetch Fetcher
	// OnOutage is Refuse if empty.
	OnOutage Outage
	// Offer lists what is looked for; nil means every kind. What depends on
	// others is reported as not checked, for the policy to accept or refuse.
	Offer []Kind
	// Refresh replaces DefaultRefresh by kind.
	Refresh map[Kind]time.Duration
	// Report is told of fetches that failed. It may be nil.
	Report func(Key, error)
}

// Cache finds endorsements for appraisals. It may be used by many at once. A
// nil Cache offers nothing.
type Cache struct {
	store   Store
	anchors anchor.Set
	clock   func() time.Time
	fetch   Fetcher
	outage  Outage
	offer   []Kind
	refresh map[Kind]time.Duration
	report  func(Key, error)
	memory  *nvgpu.Memory

	base    context.Context // of fetches, which outlive who asked first
	cancel  context.CancelFunc
	flights singleflight.Group
	running sync.WaitGroup

	mu       sync.Mutex
	closed   bool            // guarded by mu
	refusals map[Key]refusal // guarded by mu
	doubts   map[Key]doubt   // guarded by mu
}

type refusal struct {
	err   error
	until time.Time
}

// doubt is of a version that made an appraisal fail: it is asked for again.
type doubt struct{ since, asked time.Time }

// New returns a cache. Close ends it.
func New(o Options) (*Cache, error) {
	switch {
	case o.Store == nil || o.Clock == nil || o.Anchors.Empty():
		return nil, errors.New("make endorsement cache: it needs a store, trust anchors and a clock")
	case o.OnOutage == "":
		o.OnOutage = Refuse
	case o.OnOutage != Refuse && o.OnOutage != UseUnexpired:
		return nil, fmt.Errorf("make endorsement cache: on outage %.40q: want %q or %q", string(o.OnOutage), Refuse, UseUnexpired)
	}
	if o.Offer == nil {
		o.Offer = Kinds()
	}
	for _, k := range o.Offer {
		if k.MaxSize() == 0 {
			return nil, fmt.Errorf("make endorsement cache: unknown kind of endorsement %.40q", string(k))
		}
	}
	c := &Cache{
		store: o.Store, anchors: o.Anchors, clock: o.Clock, fetch: o.Fetch, outage: o.OnOutage, offer: o.Offer, report: o.Report,
		refresh: DefaultRefresh(), memory: nvgpu.NewMemory(), refusals: map[Key]refusal{}, doubts: map[Key]doubt{},
	}
	for k, d := range o.Refresh {
		if k.MaxSize() == 0 || d < time.Minute {
			return nil, fmt.Errorf("make endorsement cache: refresh of %.40q after %s: want a known kind, and a minute or more", string(k), d)
		}
		c.refresh[k] = d
	}
	c.base, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// Offline returns a cache that has what a library has, at a stated clock: it
// offers the kinds that are there, so that an export of what one appraisal used
// leaves nothing else to look for. It needs no Close.
func Offline(l *Library, anchors anchor.Set, at time.Time) (*Cache, error) {
	offer := []Kind{}
	for _, h := range l.All() {
		if !slices.Contains(offer, h.Key.Kind) {
			offer = append(offer, h.Key.Kind)
		}
	}
	return New(Options{Store: l, Anchors: anchors, Clock: func() time.Time { return at }, Offer: offer})
}

// Close ends the fetches that are under way and waits for them.
func (c *Cache) Close() {
	if c == nil {
		return
	}
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.running.Wait()
}

func (c *Cache) offers(k Kind) bool { return c != nil && slices.Contains(c.offer, k) }

// question is what is looked for: how to ask for it and how to verify the answer.
type question struct {
	Request
	verify func(context.Context, Item) error
}

// Where an endorsement came from.
const (
	fromFolder = "folder"
	fromVendor = "vendor"
)

// get finds an endorsement. Without a Fetcher it returns what is held, valid or
// not: what is wrong with it is for the check that uses it to say.
func (c *Cache) get(ctx context.Context, q question) (Held, string, error) {
	now := c.clock()
	h, ok := c.store.Get(q.Key, now)
	if c.fetch == nil {
		if !ok {
			return Held{}, "", fmt.Errorf("%w of %s: import it into the verifier's folder", ErrMissing, q.Key)
		}
		return h, fromFolder, nil
	}
	current := ok && h.ValidAt(now)
	switch {
	case current && !c.due(h, now):
		if c.doubted(h, now) {
			c.inFlight(CallerOf(ctx), q) //nolint:contextcheck // a fetch outlives who asked first
		}
		return h, fromFolder, nil
	case current && c.outage == UseUnexpired:
		c.inFlight(CallerOf(ctx), q) //nolint:contextcheck // as above
		return h, fromFolder, nil
	}
	select {
	case r := <-c.inFlight(CallerOf(ctx), q): //nolint:contextcheck // as above
		if r.Err == nil {
			n, ok := r.Val.(Held)
			if !ok {
				return Held{}, "", fmt.Errorf("%w: fetch of %s returned nothing", ErrOutage, q.Key)
			}
			return n, fromVendor, nil
		}
		return Held{}, "", c.without(h, ok, current, q.Key, r.Err)
	case <-ctx.Done():
		return Held{}, "", c.without(h, ok, current, q.Key, fmt.Errorf("%w: no answer in time", ErrOutage))
	}
}

// without says why there is nothing to use.
func (c *Cache) without(h Held, ok, current bool, k Key, err error) error {
	switch {
	case current:
		return fmt.Errorf("%w; the copy of %s is not used for the verifier's configuration says to refuse", err, h.Checked.UTC().Format(time.RFC3339))
	case ok:
		return fmt.Errorf("%w; the copy expired at %s", err, h.Until.UTC().Format(time.RFC3339))
	}
	return fmt.Errorf("%w; there is no copy of %s", err, k)
}

// due reports whether a copy is to be asked for again.
func (c *Cache) due(h Held, now time.Time) bool {
	after, ever := c.refresh[h.Key.Kind]
	// A copy from the future is none that a clock can date.
	return ever && (now.Sub(h.Checked) >= after || now.Before(h.Checked.Add(-time.Minute)))
}

// doubted reports whether a copy that is not due led to a refusal. It says so
// at most once in a while, and keeps nobody waiting: evidence of one's making
// must not make others depend on a service that is away.
func (c *Cache) doubted(h Held, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	d, ok := c.doubts[h.Key]
	if !ok || h.Checked.After(d.since) || now.Before(d.asked.Add(unknownFor)) {
		return false
	}
	d.asked = now
	c.doubts[h.Key] = d
	return true
}

// distrust has what led to a refusal asked for again, so that one bad answer is
// not the reason for refusing all week.
func (c *Cache) distrust(keys []Key) {
	if c.fetch == nil {
		return
	}
	now := c.clock()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range keys {
		if _, ever := c.refresh[k.Kind]; !ever {
			continue
		}
		if len(c.doubts) >= maxRefusals {
			clear(c.doubts)
		}
		d := c.doubts[k]
		d.since = now
		c.doubts[k] = d
	}
}

// inFlight starts a fetch on a caller's account, or joins the one that is under
// way.
func (c *Cache) inFlight(caller string, q question) <-chan singleflight.Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.clock()
	if r, ok := c.refusals[q.Key]; ok && now.Before(r.until) {
		return settled(r.err)
	}
	delete(c.refusals, q.Key)
	if c.closed {
		return settled(fmt.Errorf("%w: the verifier is stopping", ErrOutage))
	}
	ch := c.flights.DoChan(q.Key.String(), func() (any, error) {
		ctx, cancel := context.WithTimeout(WithCaller(c.base, caller), fetchLimit)
		defer cancel()
		return c.fetchOne(ctx, q)
	})
	out := make(chan singleflight.Result, 1)
	c.running.Go(func() { out <- <-ch })
	return out
}

func settled(err error) <-chan singleflight.Result {
	out := make(chan singleflight.Result, 1)
	out <- singleflight.Result{Err: err}
	return out
}

// fetchOne asks the vendor, verifies the answer and keeps it.
func (c *Cache) fetchOne(ctx context.Context, q question) (Held, error) {
	h, err := func() (Held, error) {
		b, err := c.fetch.Fetch(ctx, q.Request)
		if err != nil {
			if !errors.Is(err, ErrUnknown) && !errors.Is(err, ErrOutage) {
				err = fmt.Errorf("%w: %w", ErrOutage, err)
			}
			return Held{}, err
		}
		now := c.clock()
		i, err := c.accept(ctx, q, b, now)
		if err != nil {
			return Held{}, fmt.Errorf("%w: its answer is not used: %w", ErrOutage, err)
		}
		h := Held{Item: i, Checked: now}
		if err := c.store.Put(i, now); err != nil {
			// What was verified serves whoever asked, kept or not.
			c.tell(q.Key, fmt.Errorf("keep %s: %w", q.Key, err))
		}
		return h, nil
	}()
	if err != nil {
		c.tell(q.Key, err)
		c.remember(q.Key, err)
		return Held{}, err
	}
	return h, nil
}

// remember keeps an answer that is no use from being asked for again at once.
func (c *Cache) remember(k Key, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !errors.Is(err, ErrUnknown) && !errors.As(err, new(*unusable)) {
		return // the Fetcher knows when to try a service again
	}
	if len(c.refusals) >= maxRefusals {
		clear(c.refusals)
	}
	c.refusals[k] = refusal{err, c.clock().Add(unknownFor)}
}

// unusable is of an answer that was got and is not what was asked for.
type unusable struct{ err error }

func (u *unusable) Error() string { return u.err.Error() }
func (u *unusable) Unwrap() error { return u.err }

// accept makes an item of an answer, if it is one to the question.
func (c *Cache) accept(ctx context.Context, q question, b []byte, now time.Time) (Item, error) {
	id := ""
	if q.Key.Kind == RIM || q.Key.Kind == CRL {
		id = q.Key.ID
	}
	i, err := Parse(q.Key.Kind, id, b)
	switch {
	case err != nil:
		return Item{}, &unusable{err}
	case i.Key != q.Key:
		return Item{}, &unusable{fmt.Errorf("it is about %s, not %s", i.Key, q.Key)}
	case !i.ValidAt(now):
		return Item{}, &unusable{fmt.Errorf("it is of %s to %s", i.From.UTC().Format(time.RFC3339), i.Until.UTC().Format(time.RFC3339))}
	}
	// A replayed answer must not take back a revocation.
	if h, ok := c.store.Newest(q.Key); ok && (i.Key.Kind == CRL || i.Key.Kind == OCSP) && i.From.Before(h.From) && !h.From.After(now) {
		return Item{}, &unusable{fmt.Errorf("it is of %s, older than the copy of %s", i.From.UTC().Format(time.RFC3339), h.From.UTC().Format(time.RFC3339))}
	}
	if err := q.verify(ctx, i); err != nil {
		return Item{}, &unusable{err}
	}
	return i, nil
}

func (c *Cache) tell(k Key, err error) {
	if c.report != nil {
		c.report(k, err)
	}
}

// Questions, by kind.

func (c *Cache) chainQuestion(k Key) question {
	return question{Request{Key: k}, func(_ context.Context, i Item) error { return verifyChain(i, c.anchors) }}
}

// signedQuestion is about what is verified by AMD's chain, which is looked for
// too if need be.
func (c *Cache) signedQuestion(k Key) question {
	return question{Request{Key: k}, func(ctx context.Context, i Item) error {
		chain, _, err := c.get(ctx, c.chainQuestion(chainKeyFor(k)))
		if err != nil {
			return err
		}
		if err := verifyChain(chain.Item, c.anchors); err != nil {
			return err
		}
		return verifySigned(i, chain.Item, c.anchors)
	}}
}

func (c *Cache) statusQuestion(cert, issuer *x509.Certificate) (question, error) {
	req, err := statusRequest(cert, issuer)
	if err != nil {
		return question{}, err
	}
	k := certID(req.IssuerNameHash, req.IssuerKeyHash, req.SerialNumber)
	body, err := req.Marshal()
	if err != nil {
		return question{}, fmt.Errorf("ask for the status of %s: %w", cert.Subject.CommonName, err)
	}
	return question{Request{k, body}, func(_ context.Context, i Item) error { return verifyStatus(i, cert, issuer) }}, nil
}

func (c *Cache) manifestQuestion(id string) (question, error) {
	k, err := RIMKey(strings.TrimSpace(id))
	return question{Request{Key: k}, func(context.Context, Item) error { return nil }}, err
}
