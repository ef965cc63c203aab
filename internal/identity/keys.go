package identity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
)

const (
	// maxKeyAge is how long an issuer's keys count: one that it has withdrawn
	// is believed for no longer.
	maxKeyAge = 15 * time.Minute
	// minRefresh is how soon keys are asked for again, however many tokens come
	// with keys that nobody knows.
	minRefresh = 10 * time.Second
	// fetchTimeout bounds one look at an issuer, maxAnswer its answer in bytes.
	fetchTimeout = 5 * time.Second
	maxAnswer    = 256 << 10
	maxKeys      = 64
)

// outcomeKey is the context's place for an outcome.
type outcomeKey struct{}

// outcome is how the check of a signature came out, which the verifier's error
// does not carry.
type outcome struct {
	// unavailable is why the keys could not be had.
	unavailable error
	signed      bool
}

// keySet is the keys of one issuer, fetched when there is need and no more often
// than minRefresh. It implements oidc.KeySet.
type keySet struct {
	url    string
	client *http.Client
	now    func() time.Time

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	fetched time.Time
	tried   time.Time
	failure error
	// asking is closed when the issuer has answered, nil while nobody asks.
	asking chan struct{}
}

// VerifySignature returns the payload of a token that one of the keys signed.
// The verifier has checked the algorithm before.
func (s *keySet) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	out, ok := ctx.Value(outcomeKey{}).(*outcome)
	if !ok {
		return nil, errors.New("nowhere to say how it came out")
	}
	algs := make([]jose.SignatureAlgorithm, 0, len(algorithms()))
	for _, a := range algorithms() {
		algs = append(algs, jose.SignatureAlgorithm(a))
	}
	jws, err := jose.ParseSignedCompact(token, algs)
	if err != nil || len(jws.Signatures) != 1 {
		return nil, errors.New("not one signature")
	}
	h := jws.Signatures[0].Header
	for _, fresh := range []bool{false, true} {
		keys, err := s.current(ctx, fresh)
		if err != nil {
			out.unavailable = err
			return nil, err
		}
		for _, k := range keys {
			if h.KeyID != "" && k.KeyID != h.KeyID || k.Algorithm != "" && k.Algorithm != h.Algorithm || k.Use != "" && k.Use != "sig" {
				continue
			}
			if payload, err := jws.Verify(k.Key); err == nil {
				out.signed = true
				return payload, nil
			}
		}
		// A key that is there and does not verify gets no better by asking.
		if h.KeyID != "" && slices.ContainsFunc(keys, func(k jose.JSONWebKey) bool { return k.KeyID == h.KeyID }) {
			break
		}
	}
	return nil, errors.New("no key verifies the signature")
}

// current returns the keys. With fresh it asks the issuer again, unless that was
// done a moment ago. Whoever has no need of the answer does not wait for it.
func (s *keySet) current(ctx context.Context, fresh bool) ([]jose.JSONWebKey, error) {
	s.mu.Lock()
	if stale := s.stale(); !stale && !fresh || s.asking == nil && s.triedLately() {
		defer s.mu.Unlock()
		if stale {
			return nil, s.failure
		}
		return s.keys, nil
	}
	if s.asking == nil {
		s.asking, s.tried = make(chan struct{}), s.now()
		// Others wait for this answer too: it is not one caller's to give up.
		go s.refresh(context.WithoutCancel(ctx), s.asking)
	}
	answered := s.asking
	s.mu.Unlock()
	select {
	case <-answered:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stale() {
		return nil, s.failure
	}
	return s.keys, nil
}

func (s *keySet) stale() bool { return s.fetched.IsZero() || s.now().Sub(s.fetched) > maxKeyAge }

func (s *keySet) triedLately() bool { return !s.tried.IsZero() && s.now().Sub(s.tried) < minRefresh }

func (s *keySet) refresh(ctx context.Context, answered chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	keys, err := s.fetch(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.keys, s.fetched, err = keys, s.now(), errors.New("the keys are out of date")
	}
	s.failure, s.asking = err, nil
	close(answered)
}

// fetch asks the issuer where its keys are, and for them.
func (s *keySet) fetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	client := &http.Client{Transport: bounded{s.client.Transport}, CheckRedirect: s.client.CheckRedirect}
	// NewProvider checks that the document names the issuer that was asked.
	provider, err := oidc.NewProvider(oidc.ClientContext(ctx, client), s.url)
	if err != nil {
		return nil, fmt.Errorf("issuer %s: %w", s.url, err)
	}
	var doc struct {
		JWKS string `json:"jwks_uri"`
	}
	if err := provider.Claims(&doc); err != nil {
		return nil, fmt.Errorf("issuer %s: %w", s.url, err)
	}
	if u, err := url.Parse(doc.JWKS); err != nil || u.Scheme != "https" {
		return nil, fmt.Errorf("issuer %s: keys at %.120q: want https", s.url, doc.JWKS)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, doc.JWKS, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("issuer %s: %w", s.url, err)
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("issuer %s: %w", s.url, err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("issuer %s: keys: %s", s.url, res.Status), err)
	}
	var list struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(b, &list); err != nil || len(list.Keys) > maxKeys {
		return nil, errors.Join(fmt.Errorf("issuer %s: not a set of at most %d keys", s.url, maxKeys), err)
	}
	var out []jose.JSONWebKey
	for _, raw := range list.Keys {
		// RFC 7517, section 5: keys that are not understood are passed over.
		var k jose.JSONWebKey
		if err := json.Unmarshal(raw, &k); err == nil && k.Valid() && k.IsPublic() {
			out = append(out, k)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("issuer %s publishes no key that can be used", s.url)
	}
	return out, nil
}

// bounded limits every answer to maxAnswer bytes.
type bounded struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	next := b.next
	if next == nil {
		next = http.DefaultTransport
	}
	res, err := next.RoundTrip(r)
	if err == nil {
		res.Body = http.MaxBytesReader(nil, res.Body, maxAnswer)
	}
	return res, err
}
