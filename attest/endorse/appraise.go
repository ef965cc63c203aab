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

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/snp"
)

// ClaimUsed is the claim of a device that lists the endorsements with which it
// was appraised, besides those in its evidence.
const ClaimUsed = "coffer.endorsements"

// user is one device's appraisal: what it asks for is answered once, and noted.
type user struct {
	c        *Cache
	deadline time.Time

	mu      sync.Mutex
	answers map[Key]answer // guarded by mu
}

type answer struct {
	held   Held
	source string
	err    error
}

func (c *Cache) user() *user {
	return &user{c: c, deadline: time.Now().Add(Patience), answers: map[Key]answer{}}
}

func (u *user) get(ctx context.Context, q question) (Held, error) {
	u.mu.Lock()
	a, ok := u.answers[q.Key]
	u.mu.Unlock()
	if ok {
		return a.held, a.err
	}
	ctx, cancel := context.WithDeadline(ctx, u.deadline)
	defer cancel()
	a.held, a.source, a.err = u.c.get(ctx, q)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.answers[q.Key] = a
	return a.held, a.err
}

// used returns what was found, in order of key, as claims have it.
func (u *user) used() ([]any, []Key) {
	u.mu.Lock()
	defer u.mu.Unlock()
	var found []answer
	for _, a := range u.answers {
		if a.err == nil {
			found = append(found, a)
		}
	}
	slices.SortFunc(found, func(a, b answer) int { return strings.Compare(a.held.Key.String(), b.held.Key.String()) })
	claims, keys := make([]any, 0, len(found)), make([]Key, 0, len(found))
	for _, a := range found {
		h := a.held
		keys = append(keys, h.Key)
		claims = append(claims, map[string]any{
			"kind": string(h.Key.Kind), "id": h.Key.ID, "digest": string(h.Digest), "source": a.source,
			"until": h.Until.UTC().Format(time.RFC3339), "checked": h.Checked.UTC().Format(time.RFC3339),
		})
	}
	return claims, keys
}

// finish notes what was used, and what of it is to be asked for again because
// the device was refused.
func (u *user) finish(claims map[string]any, refused bool) {
	used, keys := u.used()
	if len(used) > 0 {
		claims[ClaimUsed] = used
	}
	if refused {
		u.c.distrust(keys)
	}
}

// RIM implements nvgpu.Source.
func (u *user) RIM(ctx context.Context, id string) ([]byte, error) {
	if !u.c.offers(RIM) {
		return nil, nvgpu.ErrNotOffered
	}
	q, err := u.c.manifestQuestion(id)
	if err != nil {
		return nil, err
	}
	h, err := u.get(ctx, q)
	return h.Bytes, err
}

// OCSP implements nvgpu.Source.
func (u *user) OCSP(ctx context.Context, cert, issuer *x509.Certificate) ([]byte, error) {
	if !u.c.offers(OCSP) {
		return nil, nvgpu.ErrNotOffered
	}
	q, err := u.c.statusQuestion(cert, issuer)
	if err != nil {
		return nil, err
	}
	h, err := u.get(ctx, q)
	return h.Bytes, err
}

// AppraiseGPU is nvgpu.AppraiseWith, with what the cache has.
func (c *Cache) AppraiseGPU(ctx context.Context, ev nvgpu.Evidence, want nvgpu.Want, anchors anchor.Set, now time.Time) nvgpu.Result {
	if c == nil {
		return nvgpu.AppraiseWith(ctx, ev, want, anchors, nvgpu.Endorsements{}, now)
	}
	u := c.user()
	res := nvgpu.AppraiseWith(ctx, ev, want, anchors, nvgpu.Endorsements{Source: u, Memory: c.memory}, now)
	u.finish(res.Claims, slices.ContainsFunc(res.Checks.Failed(), func(f check.Check) bool {
		return f.ID == nvgpu.CheckOCSP || f.ID == nvgpu.CheckMeasurements || f.ID == nvgpu.CheckRIMConflict ||
			strings.HasPrefix(f.ID, nvgpu.CheckDriverRIM) || strings.HasPrefix(f.ID, nvgpu.CheckVBIOSRIM)
	}))
	return res
}

// AppraiseSNP is snp.Appraise, with what the cache has: certificates that the
// evidence lacks, and the revocation list.
//
// A list in the evidence never passes the check: who shows the evidence chose it,
// and may have chosen one from before the revocation.
func (c *Cache) AppraiseSNP(ctx context.Context, ev snp.Evidence, want snp.Want, anchors anchor.Set, now time.Time) snp.Result {
	report, err := snp.Parse(ev.Report)
	if c == nil || err != nil {
		return snp.Appraise(ev, want, anchors, now)
	}
	u := c.user()
	product := report.Product
	crlErr := u.crl(ctx, product, report.Signer, &ev)
	u.heldChain(product, report.Signer, &ev)
	res := snp.Appraise(ev, want, anchors, now)
	if lacksCertificates(res) {
		ev, res = u.withCertificates(ctx, report, ev, want, anchors, now, res)
	}
	if product == "" && chained(res) {
		// Version 2 names no product: the certificates do.
		p, _ := res.Claims["snp.product"].(string)
		product = anchor.Product(p)
		if crlErr = u.crl(ctx, product, report.Signer, &ev); ev.CRL != nil {
			res = snp.Appraise(ev, want, anchors, now)
		}
	}
	if crlErr != nil && chained(res) {
		for i, k := range res.Checks {
			if k.ID == snp.CheckCRL && k.Outcome == check.NotChecked {
				res.Checks[i] = check.Check{ID: snp.CheckCRL, Outcome: check.Fail, Expected: "the current revocation list of ARK-" + string(product), Found: crlErr.Error(),
					Hint: "import the list, or wait until the vendor's service is there again"}
			}
		}
	}
	u.finish(res.Claims, slices.ContainsFunc(res.Checks.Failed(), func(f check.Check) bool { return f.ID == snp.CheckCRL }))
	return res
}

func chained(r snp.Result) bool {
	return slices.ContainsFunc(r.Checks, func(k check.Check) bool { return k.ID == snp.CheckChain && k.Outcome == check.Pass })
}

// lacksCertificates reports whether other certificates could make a difference.
func lacksCertificates(r snp.Result) bool {
	return slices.ContainsFunc(r.Checks.Failed(), func(k check.Check) bool {
		return k.ID == snp.CheckChain || k.ID == snp.CheckTCB || k.ID == snp.CheckHWID || k.ID == snp.CheckProduct || k.ID == snp.CheckValidity
	})
}

// crl puts the revocation list into the evidence. An error means that there is
// none to rely on.
func (u *user) crl(ctx context.Context, p anchor.Product, s snp.Signer, ev *snp.Evidence) error {
	if p == "" || !u.c.offers(CRL) {
		return nil
	}
	h, err := u.get(ctx, u.c.signedQuestion(CRLKey(p, s)))
	switch {
	case err == nil:
		ev.CRL = h.Bytes
	case !errors.Is(err, ErrMissing):
		// Empty, and not nil: what the evidence carries does not stand in.
		ev.CRL = []byte{}
	}
	return err
}

// heldChain fills in the issuer and the root, which many platforms leave out,
// if they are held.
func (u *user) heldChain(p anchor.Product, s snp.Signer, ev *snp.Evidence) {
	if p == "" || len(ev.Chain) > 0 || !u.c.offers(Chain) {
		return
	}
	h, ok := u.c.store.Get(ChainKey(p, s), u.c.clock())
	if !ok {
		return
	}
	if issuer, root, ok := chainDER(h.Item); ok {
		ev.Chain = [][]byte{nil, issuer, root}
		u.note(h)
	}
}

// note records what was found without asking.
func (u *user) note(h Held) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.answers[h.Key] = answer{held: h, source: fromFolder}
}

// withCertificates appraises again: first with the issuer and root that the
// evidence lacks, then with the signing key's certificate as well. It returns
// the first appraisal whose chain holds and what it was of, and the given ones
// if none does.
func (u *user) withCertificates(ctx context.Context, report *snp.Report, ev snp.Evidence, want snp.Want, anchors anchor.Set, now time.Time, res snp.Result) (snp.Evidence, snp.Result) {
	products := []anchor.Product{report.Product}
	if report.Product == "" {
		products = []anchor.Product{anchor.Milan, anchor.Genoa}
	}
	given := ev
	var errs []error
	for _, p := range products {
		if !u.c.offers(Chain) {
			continue
		}
		h, err := u.get(ctx, u.c.chainQuestion(ChainKey(p, report.Signer)))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		issuer, root, ok := chainDER(h.Item)
		if !ok {
			errs = append(errs, fmt.Errorf("%s is malformed", h.Key))
			continue
		}
		ev.Chain = [][]byte{nil, issuer, root}
		if again := snp.Appraise(ev, want, anchors, now); chained(again) && !lacksCertificates(again) {
			return ev, again
		}
		vek, err := u.vek(ctx, report, p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		with := snp.Evidence{Report: ev.Report, Chain: [][]byte{vek, issuer, root}, CRL: ev.CRL}
		if again := snp.Appraise(with, want, anchors, now); chained(again) && !lacksCertificates(again) {
			return with, again
		}
	}
	if err := errors.Join(errs...); err != nil {
		for i, k := range res.Checks {
			if k.ID == snp.CheckChain && k.Outcome == check.Fail {
				res.Checks[i].Found += "; " + strings.ReplaceAll(err.Error(), "\n", "; ")
			}
		}
	}
	return given, res
}

func (u *user) vek(ctx context.Context, r *snp.Report, p anchor.Product) ([]byte, error) {
	if !u.c.offers(VEK) {
		return nil, errors.New("certificates of signing keys are not offered here")
	}
	k, ok := VLEKKey(p, r.ReportedTCB), true
	if r.Signer == snp.VCEK {
		k, ok = VCEKKey(p, r.ChipID, r.ReportedTCB)
	}
	if !ok {
		return nil, errors.New("the report names no chip whose certificate could be looked for")
	}
	h, err := u.get(ctx, u.c.signedQuestion(k))
	return h.Bytes, err
}

// Used is an endorsement that an appraisal used, as its result lists it.
type Used struct {
	Key    Key
	Digest plan.Digest
}

// UsedIn returns the endorsements that a result says were used, each once.
func UsedIn(r receipt.Result) ([]Used, error) {
	var out []Used
	for name, s := range r.Submods {
		list, ok := s.Claims[ClaimUsed]
		if !ok {
			continue
		}
		entries, ok := list.([]any)
		if !ok {
			return nil, fmt.Errorf("claim %s of %.40q is not a list", ClaimUsed, name)
		}
		for _, e := range entries {
			m, _ := e.(map[string]any)
			kind, _ := m["kind"].(string)
			id, _ := m["id"].(string)
			digest, _ := m["digest"].(string)
			d, err := plan.ParseDigest(digest)
			if err != nil || Kind(kind).MaxSize() == 0 {
				return nil, fmt.Errorf("claim %s of %.40q has an entry that is none", ClaimUsed, name)
			}
			out = append(out, Used{Key{Kind(kind), id}, d})
		}
	}
	slices.SortFunc(out, func(a, b Used) int {
		return strings.Compare(a.Key.String()+string(a.Digest), b.Key.String()+string(b.Digest))
	})
	return slices.Compact(out), nil
}
