package receipt_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

const issuer = "verifier.test"

// lab is a verifier and the session key of an attested job.
type lab struct {
	key     *ecdsa.PrivateKey
	signer  *receipt.Signer
	keys    receipt.Keys
	session *ecdsa.PrivateKey
	now     time.Time
}

func newKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{key: newKey(t, elliptic.P384()), session: newKey(t, elliptic.P256()), now: time.Unix(1_800_000_000, 0)}
	var err error
	if l.signer, err = receipt.NewSigner(issuer, l.key); err != nil {
		t.Fatal(err)
	}
	jwks, err := l.signer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	if l.keys, err = receipt.ParseKeys(issuer, jwks); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lab) result(t *testing.T) receipt.Result {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&l.session.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := receipt.SessionJWK(der)
	if err != nil {
		t.Fatal(err)
	}
	digest := plan.Sum([]byte("x"))
	var checks check.List
	checks.Pass("snp.signature", "found <&> \"this\"")
	checks.Skip("snp.crl", "why")
	return receipt.Result{
		Profile: receipt.Profile, Issuer: issuer, Audience: "broker.test", ID: "r1", Nonce: "n1", IssuedAt: l.now.Unix(), Expires: l.now.Add(time.Minute).Unix(),
		Submods: map[string]receipt.Appraisal{"cpu0": {
			Status: receipt.Affirming, Vector: receipt.TrustVector{InstanceIdentity: 2, Hardware: 2, Executables: 3},
			// A TCB is a 64-bit integer that no double holds.
			Claims: map[string]any{"tcb": uint64(0xd31a_0000_0000_0004), "big": 1e300, "list": []any{"a", nil, true, -0.5}, "text": "\u2028<é>"}, Checks: checks,
		}},
		Confirmation: receipt.Confirmation{JWK: jwk, Recipient: []byte{1, 2, 3}},
		JobID:        "job-1", PlanDigest: digest, SandboxDigest: digest, EvidenceDigest: digest, Policy: plan.Policy{},
	}
}

func (l *lab) verify(t *testing.T, r receipt.Result) (receipt.Verified, error) {
	t.Helper()
	token, err := l.signer.Sign(receipt.TypeResult, r)
	if err != nil {
		t.Fatal(err)
	}
	return receipt.VerifyResult(l.keys, token, receipt.Expect{Audience: "broker.test", AnyJob: true}, l.now)
}

// raw signs a body as it is.
func (l *lab) raw(t *testing.T, body string) string {
	t.Helper()
	kid, err := receipt.KeyID(&l.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES384, Key: jose.JSONWebKey{Key: l.key, KeyID: kid}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := s.Sign([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestResultRoundTrip(t *testing.T) {
	l := newLab(t)
	want := l.result(t)
	v, err := l.verify(t, want)
	if err != nil {
		t.Fatal(err)
	}
	if got := v.Result(); got.ID != want.ID || !reflect.DeepEqual(got.Submods["cpu0"].Checks, want.Submods["cpu0"].Checks) || len(got.Submods["cpu0"].Claims) != 4 {
		t.Errorf("got %+v", got)
	}
}

// TestTokensReadOneWay signs bodies that two readers could read in two ways.
func TestTokensReadOneWay(t *testing.T) {
	type claims struct {
		Issuer string            `json:"iss"`
		Job    string            `json:"job"`
		Inner  map[string]string `json:"inner,omitempty"`
		Keys   []byte            `json:"keys,omitempty"`
		N      uint64            `json:"n,omitempty"`
	}
	const head = `"coffer.type":"t","iss":"` + issuer + `"`
	l := newLab(t)
	for name, tc := range map[string]struct {
		body string
		ok   bool
	}{
		"as signed":                    {`{` + head + `,"job":"a"}`, true},
		"other order and white space":  {"{ \"job\": \"a\",\n" + head + `}`, true},
		"a large integer":              {`{` + head + `,"job":"a","n":18446744073709551615}`, true},
		"a claim twice":                {`{` + head + `,"job":"b","job":"a"}`, false},
		"the type twice":               {`{"coffer.type":"u",` + head + `,"job":"a"}`, false},
		"the issuer twice":             {`{"iss":"u",` + head + `,"job":"a"}`, false},
		"a claim twice, deeper":        {`{` + head + `,"job":"a","inner":{"x":"1","x":"2"}}`, false},
		"a claim in other letters":     {`{` + head + `,"Job":"a"}`, false},
		"and again in its own":         {`{` + head + `,"JOB":"b","job":"a"}`, false},
		"the issuer in other letters":  {`{` + head + `,"ISS":"u","job":"a"}`, false},
		"letters that fold to others":  {`{` + head + `,"job":"a","\u212aeys":"AQ=="}`, false},
		"a claim that is not known":    {`{` + head + `,"job":"a","more":1}`, false},
		"null for an object":           {`{` + head + `,"job":"a","inner":null}`, false},
		"bytes in another form":        {`{` + head + `,"job":"a","keys":"AR=="}`, false},
		"data after the claims":        {`{` + head + `,"job":"a"}{}`, false},
		"no object":                    {`["coffer.type"]`, false},
		"a type in other letters only": {`{"Coffer.Type":"t","iss":"` + issuer + `","job":"a"}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			var c claims
			err := l.keys.Open("t", l.raw(t, tc.body), &c)
			if ok := err == nil; ok != tc.ok {
				t.Errorf("%s: %+v, %v", tc.body, c, err)
			}
		})
	}
}

// TestVectorContradictsItsTier is a verifier whose words and vector differ.
func TestVectorContradictsItsTier(t *testing.T) {
	l := newLab(t)
	for name, tc := range map[string]struct {
		v    receipt.TrustVector
		tier receipt.Tier
		ok   bool
	}{
		"says nothing":                {receipt.TrustVector{}, receipt.None, true},
		"verifier malfunction":        {receipt.TrustVector{Hardware: -1}, receipt.None, true},
		"affirms":                     {receipt.TrustVector{Hardware: 2, StorageOpaque: 31, SourcedData: -32}, receipt.Affirming, true},
		"warns":                       {receipt.TrustVector{Hardware: 2, Configuration: 32}, receipt.Warning, false},
		"warns below zero":            {receipt.TrustVector{FileSystem: -33, Hardware: 2}, receipt.Warning, false},
		"contraindicates":             {receipt.TrustVector{Executables: 96, Hardware: 2}, receipt.Contraindicated, false},
		"contraindicates and warns":   {receipt.TrustVector{Executables: 32, SourcedData: 99}, receipt.Contraindicated, false},
		"contraindicates at the edge": {receipt.TrustVector{RuntimeOpaque: 127}, receipt.Contraindicated, false},
		"contraindicates below zero":  {receipt.TrustVector{InstanceIdentity: -97}, receipt.Contraindicated, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tc.v.Tier(); got != tc.tier {
				t.Errorf("tier %s, want %s", got, tc.tier)
			}
			r := l.result(t)
			a := r.Submods["cpu0"]
			a.Vector = tc.v
			r.Submods["cpu0"] = a
			_, err := l.verify(t, r)
			var refused *check.Refusal
			switch {
			case tc.ok && err != nil:
				t.Error(err)
			case !tc.ok && (!errors.As(err, &refused) || len(refused.Checks) != 1 || refused.Checks[0].ID != "result.cpu0"):
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestReleaseRequestForm signs requests with the right key in forms that are
// not the one form of a request.
func TestReleaseRequestForm(t *testing.T) {
	l := newLab(t)
	v, err := l.verify(t, l.result(t))
	if err != nil {
		t.Fatal(err)
	}
	good := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker.test", Grant: "g", Attempt: receipt.MaxAttempt, ResultID: "r1", Asset: "a"}
	canonical, err := good.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	parse := func(request []byte) error {
		sum := sha256.Sum256(request)
		sig, err := ecdsa.SignASN1(rand.Reader, l.session, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		_, err = receipt.ParseReleaseRequest(v, request, sig)
		return err
	}
	if err := parse(canonical); err != nil {
		t.Fatal(err)
	}
	indented := &bytes.Buffer{}
	if err := json.Indent(indented, canonical, "", " "); err != nil {
		t.Fatal(err)
	}
	text := string(canonical)
	for name, request := range map[string]string{
		"attempt too large":          strings.Replace(text, "1000000", "1000001", 1),
		"attempt that is no double":  strings.Replace(text, "1000000", "9223372036854775807", 1),
		"attempt with an exponent":   strings.Replace(text, "1000000", "1e6", 1),
		"attempt of none":            strings.Replace(text, "1000000", "0", 1),
		"negative attempt":           strings.Replace(text, "1000000", "-1", 1),
		"white space":                indented.String(),
		"space after":                text + " ",
		"key twice":                  strings.Replace(text, `"asset":"a"`, `"asset":"b","asset":"a"`, 1),
		"key in other letters":       strings.Replace(text, `"asset"`, `"Asset"`, 1),
		"key in both":                strings.Replace(text, `"asset":"a"`, `"Asset":"b","asset":"a"`, 1),
		"other order":                `{"version"` + strings.SplitN(text, `"version"`, 2)[1][:len(`:"`+receipt.RequestVersion+`"`)] + `,` + strings.Replace(text[1:], `,"version":"`+receipt.RequestVersion+`"`, "", 1),
		"escape that is not needed":  strings.Replace(text, `"asset":"a"`, `"asset":"\u0061"`, 1),
		"key that is not known":      strings.Replace(text, `"asset"`, `"also":1,"asset"`, 1),
		"version that is not known":  strings.Replace(text, "request/v1", "request/v2", 1),
		"no asset":                   strings.Replace(text, `"asset":"a"`, `"asset":""`, 1),
		"two requests":               text + text,
		"broken off in the middle":   text[:len(text)/2],
		"larger than any request is": strings.Replace(text, `"g"`, `"`+strings.Repeat("g", receipt.MaxRequest)+`"`, 1),
	} {
		t.Run(name, func(t *testing.T) {
			if request == text {
				t.Fatal("nothing was changed")
			}
			if err := parse([]byte(request)); err == nil {
				t.Errorf("parsed %s", request)
			}
		})
	}
	bad := good
	bad.Attempt = receipt.MaxAttempt + 1
	if _, err := bad.Canonical(); err == nil {
		t.Error("encoded an attempt that is too large")
	}
}

// TestResultsReadOneWay changes the bytes that a verifier writes: they are taken
// without the second look that other bytes get.
func TestResultsReadOneWay(t *testing.T) {
	l := newLab(t)
	token, err := l.signer.Sign(receipt.TypeResult, l.result(t))
	if err != nil {
		t.Fatal(err)
	}
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	body := string(b)
	change := func(old, by string) string {
		t.Helper()
		if strings.Count(body, old) == 0 {
			t.Fatalf("%s is not in %s", old, body)
		}
		return strings.Replace(body, old, by, 1)
	}
	for name, tc := range map[string]struct {
		body string
		ok   bool
	}{
		"as written":                 {body, true},
		"with white space":           {change(`,"iss"`, `, "iss"`), true},
		"of another type":            {change(`"coffer.type":"`+receipt.TypeResult, `"coffer.type":"x`), false},
		"without a type":             {change(`"coffer.type":"`+receipt.TypeResult+`",`, ``), false},
		"of another issuer":          {change(`"iss":"`+issuer, `"iss":"x`), false},
		"the issuer twice":           {change(`"iss"`, `"iss":"`+issuer+`","iss"`), false},
		"the job twice, at the end":  {strings.TrimSuffix(body, "}") + `,"coffer.job":"other"}`, false},
		"a member that is not known": {strings.TrimSuffix(body, "}") + `,"more":1}`, false},
		"an evidence claim twice":    {change(`"ear.veraison.annotated-evidence":{`, `"ear.veraison.annotated-evidence":{"snp.guest-svn":9,"snp.guest-svn":9,`), false},
		"the session key twice":      {change(`"cnf":{"jwk":{`, `"cnf":{"jwk":{"kty":"EC",`), false},
	} {
		t.Run(name, func(t *testing.T) {
			var r receipt.Result
			err := l.keys.Open(receipt.TypeResult, l.raw(t, tc.body), &r)
			if ok := err == nil; ok != tc.ok {
				t.Errorf("%v", err)
			}
		})
	}
}

// A claim of the type's own name would be a second one in the token.
func TestClaimsCannotChooseTheirType(t *testing.T) {
	l := newLab(t)
	token, err := l.signer.Sign("one", map[string]string{"iss": issuer, "coffer.type": "two"})
	if err != nil {
		t.Fatal(err)
	}
	for _, typ := range []string{"one", "two"} {
		var claims map[string]any
		if err := l.keys.Open(typ, token, &claims); err == nil {
			t.Errorf("opened as %q", typ)
		}
	}
	for _, claims := range []any{nil, 1, "text", []string{"a"}} {
		if _, err := l.signer.Sign("one", claims); err == nil {
			t.Errorf("signed claims %v, which are no object", claims)
		}
	}
}
