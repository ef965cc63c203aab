// Package identity finds out who a person is from an OpenID Connect ID token.
//
// Trusted: the issuers in the configuration and the clock. Checked: the
// signature by a key that the issuer publishes, its algorithm against a list
// without "none" and shared secrets, issuer, audience, lifetime, kind of token,
// and the form of names. Not checked: whether the issuer has ended the session
// since; tokens live for minutes.
//
// Sources: OpenID Connect Core 1.0, section 3.1.3.7; RFC 7519; RFC 8725.
package identity

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/coffer-run/coffer/attest/check"
)

const (
	// MaxToken bounds a token, in bytes.
	MaxToken = 16 << 10
	// MaxLifetime bounds how long after its issue a token counts, whatever it
	// says itself.
	MaxLifetime = 12 * time.Hour
	// Skew is how far an issuer's clock may be from this one.
	Skew = 30 * time.Second
	// maxGroups bounds the groups of one token.
	maxGroups = 1_000
)

// Levels of assurance, as access policies count them.
const (
	assuranceUnknown  = 0
	assuranceSingle   = 1
	assuranceMulti    = 2
	assuranceHardware = 3
)

// algorithms are those that an issuer may sign with: no "none", and no HS*,
// whose key everyone who checks would have.
func algorithms() []string {
	return []string{oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA, oidc.PS256, oidc.PS384, oidc.PS512, oidc.RS256, oidc.RS384, oidc.RS512}
}

// Issuer is one OpenID provider whose people may call. URL and Audience are
// required.
type Issuer struct {
	// URL is the issuer, exactly as its tokens name it.
	URL string `json:"url"`
	// Audience is the client id of the command line there.
	Audience string `json:"audience"`
	// Algorithms are those that it signs with; default ES256 and RS256.
	Algorithms []string `json:"algorithms,omitempty"`
	// NameClaim names the claim with a person's name, default "sub"; others are
	// only as good as the issuer's promise never to give a name again.
	NameClaim string `json:"nameClaim,omitempty"`
	// GroupsClaim names the claim with a person's groups, default "groups".
	GroupsClaim string `json:"groupsClaim,omitempty"`
	// Domain is appended to names as "@DOMAIN". Two issuers have two. Where it is
	// empty, a name may bring its own domain, but none of another issuer's.
	Domain string `json:"domain,omitempty"`
	// Assurance says which level, 0 to 3, a value of the claim acr stands for.
	// Without it "phr" is 2 and "phrh" is 3 (OpenID Connect EAP ACR Values), and
	// the claim amr gives 2 for "mfa" and 1 for anything (RFC 8176).
	Assurance map[string]int `json:"assurance,omitempty"`
}

// Person is who a token is of.
type Person struct {
	Name   string
	Groups []string
	// ACR is the token's claim, Assurance the level that it stands for.
	ACR       string
	Assurance int
	// SignedIn is when the person signed in (auth_time), zero if not said.
	SignedIn time.Time
	// Expires is when the token ends.
	Expires time.Time
}

// ErrUnavailable says that an issuer's keys could not be had: ask again later.
var ErrUnavailable = errors.New("keys of the OpenID provider are not available")

// Verifier checks tokens. It is safe for concurrent use.
type Verifier struct {
	issuers map[string]*issuer
	now     func() time.Time
}

type issuer struct {
	Issuer
	keys *keySet
	// domains are those of all issuers, in lower case.
	domains map[string]bool
}

// New returns a verifier of the issuers' tokens, who are asked for their keys
// through client when there is need. Without an issuer every token is refused.
func New(issuers []Issuer, client *http.Client, now func() time.Time) (*Verifier, error) {
	if now == nil || client == nil && len(issuers) > 0 {
		return nil, errors.New("identity: no clock, or no client")
	}
	v := &Verifier{issuers: map[string]*issuer{}, now: now}
	domains := map[string]bool{}
	for _, i := range issuers {
		u, err := url.Parse(i.URL)
		switch {
		case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
			return nil, fmt.Errorf("issuer %.120q: want an https URL", i.URL)
		case v.issuers[i.URL] != nil:
			return nil, fmt.Errorf("issuer %s is there twice", i.URL)
		case i.Audience == "":
			return nil, fmt.Errorf("issuer %s: no audience", i.URL)
		case domains[strings.ToLower(i.Domain)]:
			return nil, fmt.Errorf("issuer %s: another issuer has the same domain %q, so that its people could pass for these", i.URL, i.Domain)
		case i.Domain != "" && !nameForm.MatchString(i.Domain):
			return nil, fmt.Errorf("issuer %s: domain %.120q", i.URL, i.Domain)
		}
		domains[strings.ToLower(i.Domain)] = true
		if len(i.Algorithms) == 0 {
			i.Algorithms = []string{oidc.ES256, oidc.RS256}
		}
		for _, a := range i.Algorithms {
			if !slices.Contains(algorithms(), a) {
				return nil, fmt.Errorf("issuer %s: algorithm %.20q: want some of %s", i.URL, a, strings.Join(algorithms(), ", "))
			}
		}
		for acr, level := range i.Assurance {
			if level < assuranceUnknown || level > assuranceHardware {
				return nil, fmt.Errorf("issuer %s: assurance %d of %.60q: want 0 to 3", i.URL, level, acr)
			}
		}
		if i.NameClaim == "" {
			i.NameClaim = "sub"
		}
		if i.GroupsClaim == "" {
			i.GroupsClaim = "groups"
		}
		v.issuers[i.URL] = &issuer{i, &keySet{url: i.URL, client: client, now: now}, domains}
	}
	return v, nil
}

// nameForm is that of names and groups.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._@+-]{0,126}[A-Za-z0-9])?$`)

// claims are those of a token besides the ones that a configuration names.
type claims struct {
	Issuer    string   `json:"iss"`
	IssuedAt  *numeric `json:"iat"`
	Expires   *numeric `json:"exp"`
	NotBefore *numeric `json:"nbf"`
	AuthTime  *numeric `json:"auth_time"`
	Party     string   `json:"azp"`
	ACR       string   `json:"acr"`
	AMR       []string `json:"amr"`
}

// numeric is a NumericDate (RFC 7519, section 2): seconds, perhaps with a fraction.
type numeric float64

func (n *numeric) time() time.Time { return time.Unix(int64(*n), 0) }

// maxSeconds is the year 9999: what lies beyond is no date.
const maxSeconds = 253402300799

func (n *numeric) ok() bool { return n != nil && *n > 0 && *n < maxSeconds }

// Verify returns who a token is of. What is wrong with a token is a
// check.Refusal with one check; ErrUnavailable says that nobody could tell.
func (v *Verifier) Verify(ctx context.Context, token string) (Person, error) {
	if len(token) > MaxToken {
		return Person{}, refuse("token.malformed", fmt.Sprintf("a token of at most %d bytes", MaxToken), fmt.Sprintf("%d bytes", len(token)))
	}
	// Until the signature is checked, what a token says only selects the rules
	// that it is held to.
	var header struct {
		Algorithm string `json:"alg"`
		Type      string `json:"typ"`
	}
	var unchecked claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 || decode(parts[0], &header) != nil || decode(parts[1], &unchecked) != nil {
		return Person{}, refuse("token.malformed", "a signed JSON Web Token", "something else")
	}
	i := v.issuers[unchecked.Issuer]
	if i == nil {
		return Person{}, refuse("token.issuer", "an issuer that this service's operator configured: "+strings.Join(slices.Sorted(maps.Keys(v.issuers)), ", "), quote(unchecked.Issuer))
	}
	if !slices.Contains(i.Algorithms, header.Algorithm) {
		return Person{}, refuse("token.algorithm", "one of "+strings.Join(i.Algorithms, ", "), quote(header.Algorithm))
	}
	if t := strings.ToUpper(header.Type); t != "" && t != "JWT" {
		return Person{}, refuse("token.type", "an ID token (JWT)", quote(header.Type))
	}
	// go-oidc checks signature and issuer; the rest stands below, one reason each.
	var out outcome
	checked, err := oidc.NewVerifier(i.URL, i.keys, &oidc.Config{SupportedSigningAlgs: i.Algorithms, SkipClientIDCheck: true, SkipExpiryCheck: true}).
		Verify(context.WithValue(ctx, outcomeKey{}, &out), token)
	switch {
	case out.unavailable != nil:
		return Person{}, fmt.Errorf("%w: %w", ErrUnavailable, out.unavailable)
	case err != nil && out.signed:
		return Person{}, refuse("token.malformed", "claims of an ID token", trim(err.Error()))
	case err != nil:
		return Person{}, refuse("token.signature", "a signature by a key that "+i.URL+" publishes", "none that verifies")
	}
	return v.judge(i, checked)
}

// judge checks the claims of a token whose signature holds.
func (v *Verifier) judge(i *issuer, t *oidc.IDToken) (Person, error) {
	var c claims
	all := map[string]json.RawMessage{}
	if err := errors.Join(t.Claims(&c), t.Claims(&all)); err != nil {
		return Person{}, refuse("token.malformed", "claims of an ID token", trim(err.Error()))
	}
	now := v.now()
	switch {
	case !slices.Contains(t.Audience, i.Audience) || c.Party != "" && c.Party != i.Audience || c.Party == "" && len(t.Audience) > 1:
		return Person{}, refuse("token.audience", quote(i.Audience)+" alone", quote(strings.Join(t.Audience, ", ")+" for "+c.Party))
	case !c.Expires.ok() || !c.IssuedAt.ok():
		return Person{}, refuse("token.lifetime", "times of issue and expiry", "not both")
	case !now.Before(c.Expires.time().Add(Skew)) || !now.Before(c.IssuedAt.time().Add(MaxLifetime+Skew)):
		return Person{}, refuse("token.expired", "a token that lasts", "expired at "+stamp(earlier(c.Expires.time(), c.IssuedAt.time().Add(MaxLifetime))))
	case now.Add(Skew).Before(c.IssuedAt.time()) || c.NotBefore != nil && (!c.NotBefore.ok() || now.Add(Skew).Before(c.NotBefore.time())):
		return Person{}, refuse("token.not-yet-valid", "a token that is valid at "+stamp(now), "one for later")
	}
	p := Person{ACR: c.ACR, Assurance: i.level(c), Expires: c.Expires.time()}
	if c.AuthTime.ok() {
		p.SignedIn = c.AuthTime.time()
	}
	if err := json.Unmarshal(all[i.NameClaim], &p.Name); err != nil || !nameForm.MatchString(p.Name) || i.Domain != "" && strings.Contains(p.Name, "@") {
		return Person{}, refuse("token.name", "a name of letters, digits and ._@+- in the claim "+i.NameClaim, quote(p.Name))
	}
	if i.Domain != "" {
		p.Name += "@" + i.Domain
	} else if _, domain, ok := strings.Cut(p.Name, "@"); ok && i.domains[strings.ToLower(domain)] {
		return Person{}, refuse("token.name", "a name that is not of another issuer's domain", quote(p.Name))
	}
	if raw, there := all[i.GroupsClaim]; there {
		if err := json.Unmarshal(raw, &p.Groups); err != nil || len(p.Groups) > maxGroups {
			return Person{}, refuse("token.groups", fmt.Sprintf("a list of at most %d names in the claim %s", maxGroups, i.GroupsClaim), "something else")
		}
	}
	return p, nil
}

// level is the assurance of a sign-in.
func (i *issuer) level(c claims) int {
	if level, ok := i.Assurance[c.ACR]; ok && c.ACR != "" {
		return level
	}
	switch {
	case i.Assurance == nil && c.ACR == "phrh":
		return assuranceHardware
	case i.Assurance == nil && c.ACR == "phr", slices.Contains(c.AMR, "mfa"):
		return assuranceMulti
	case len(c.AMR) > 0:
		return assuranceSingle
	}
	return assuranceUnknown
}

// Bearer returns the token of a request, "" if it carries none (RFC 6750,
// section 2.1). Two of them, or another kind of authorization, are an error.
func Bearer(r *http.Request) (string, error) {
	values := r.Header.Values("Authorization")
	if len(values) == 0 {
		return "", nil
	}
	kind, token, _ := strings.Cut(values[0], " ")
	if len(values) > 1 || !strings.EqualFold(kind, "Bearer") || token == "" {
		return "", refuse("token.malformed", "one Authorization header: Bearer TOKEN", "something else")
	}
	return token, nil
}

func decode(part string, v any) error {
	b, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func refuse(id, expected, found string) error {
	var l check.List
	l.Fail(id, expected, found, "sign in again with `coffer login`")
	return check.Refuse("authenticate", l)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func quote(s string) string { return fmt.Sprintf("%q", trim(s)) }

func trim(s string) string {
	if len(s) > 120 {
		return s[:120] + "..."
	}
	return s
}
