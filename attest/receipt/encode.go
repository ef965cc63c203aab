package receipt

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"sync"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/check"
)

// appender is what writes its own JSON, in the very bytes of encoding/json.
type appender interface {
	appendJSON(b []byte) ([]byte, error)
}

// appendClaims appends claims as JSON with the type added.
func appendClaims(b []byte, typ string, claims any) ([]byte, error) {
	w := writer{b: append(b, `{"coffer.type":`...)}
	w.text(typ)
	// In front of the other claims: a claim of the same name would be a second
	// one, which no reader accepts.
	at := len(w.b)
	if a, ok := claims.(appender); ok {
		w.append(a.appendJSON)
	} else {
		w.other(claims)
	}
	switch {
	case w.err != nil:
		return nil, w.err
	case w.b[at] != '{':
		return nil, errors.New("claims are not an object")
	case w.b[at+1] == '}':
		return append(w.b[:at], '}'), nil
	}
	w.b[at] = ','
	return w.b, nil
}

// appendJSON writes a result without reflection, which took as long as half of a
// signature of P-384: a result has a hundred claims and as many checks.
func (r Result) appendJSON(b []byte) ([]byte, error) {
	w := writer{b: append(b, '{')}
	w.named("eat_profile", r.Profile)
	w.name("ear.verifier-id")
	w.open('{')
	w.named("developer", r.Verifier.Developer)
	w.named("build", r.Verifier.Build)
	w.close('}')
	w.named("iss", r.Issuer)
	w.named("aud", r.Audience)
	w.named("jti", r.ID)
	w.name("iat")
	w.number(r.IssuedAt)
	w.name("exp")
	w.number(r.Expires)
	w.named("eat_nonce", r.Nonce)
	w.name("submods")
	appendMap(&w, r.Submods, w.appraisal)
	w.name("cnf")
	w.open('{')
	w.name("jwk")
	w.key(r.Confirmation.JWK)
	w.name("coffer.recipient-key")
	w.bytes(r.Confirmation.Recipient)
	w.close('}')
	w.named("coffer.job", r.JobID)
	w.named("coffer.plan", string(r.PlanDigest))
	w.named("coffer.sandbox", string(r.SandboxDigest))
	w.name("coffer.policy")
	w.open('{')
	w.named("name", r.Policy.Name)
	w.named("digest", string(r.Policy.Digest))
	w.close('}')
	w.named("coffer.evidence", string(r.EvidenceDigest))
	w.name("coffer.simulated")
	w.boolean(r.Simulated)
	w.checks("coffer.checks", r.Checks)
	w.close('}')
	return w.b, w.err
}

// writer appends JSON as encoding/json writes it. It is for claims alone: the names
// of members must be ones that need no escape.
type writer struct {
	b   []byte
	err error // the first
}

func (w *writer) fail(err error) {
	if w.err == nil {
		w.err = err
	}
}

func (w *writer) append(f func([]byte) ([]byte, error)) {
	b, err := f(w.b)
	w.fail(err)
	if err == nil {
		w.b = b
	}
}

func (w *writer) open(c byte)  { w.b = append(w.b, c) }
func (w *writer) close(c byte) { w.b = append(w.b, c) }

// next separates a member or an element from the one before it.
func (w *writer) next() {
	if c := w.b[len(w.b)-1]; c != '{' && c != '[' {
		w.b = append(w.b, ',')
	}
}

func (w *writer) name(s string) {
	w.next()
	w.b = append(append(append(w.b, '"'), s...), '"', ':')
}

func (w *writer) named(name, value string) {
	w.name(name)
	w.text(value)
}

func (w *writer) null()          { w.b = append(w.b, "null"...) }
func (w *writer) boolean(v bool) { w.b = strconv.AppendBool(w.b, v) }
func (w *writer) number(v int64) { w.b = strconv.AppendInt(w.b, v, 10) }

func (w *writer) bytes(v []byte) {
	if v == nil {
		w.null()
		return
	}
	w.b = append(base64.StdEncoding.AppendEncode(append(w.b, '"'), v), '"')
}

// key writes a session key (RFC 7518, section 6.2.1) as the library does, and leaves
// every other key to it.
func (w *writer) key(k *jose.JSONWebKey) {
	if k == nil {
		w.null()
		return
	}
	if pub, ok := k.Key.(*ecdsa.PublicKey); ok && k.KeyID == "" && k.Algorithm != "" && k.Use != "" && len(k.Certificates) == 0 && k.CertificatesURL == nil &&
		len(k.CertificateThumbprintSHA1) == 0 && len(k.CertificateThumbprintSHA256) == 0 && pub.Curve == elliptic.P256() {
		// The point, uncompressed: a byte of its form, and 32 for each number.
		if point, err := pub.Bytes(); err == nil && len(point) == 65 {
			w.open('{')
			w.named("use", k.Use)
			w.named("kty", "EC")
			w.named("crv", "P-256")
			w.named("alg", k.Algorithm)
			w.named("x", base64.RawURLEncoding.EncodeToString(point[1:33]))
			w.named("y", base64.RawURLEncoding.EncodeToString(point[33:]))
			w.close('}')
			return
		}
	}
	b, err := k.MarshalJSON()
	w.fail(err)
	w.b = append(w.b, b...)
}

func (w *writer) text(s string) {
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ', c > '~', c == '"', c == '\\', c == '<', c == '>', c == '&':
			w.other(s)
			return
		}
	}
	w.b = append(append(append(w.b, '"'), s...), '"')
}

// other writes what this file has no form for.
func (w *writer) other(v any) {
	b, err := json.Marshal(v)
	w.fail(err)
	w.b = append(w.b, b...)
}

func (w *writer) appraisal(a Appraisal) {
	w.open('{')
	w.named("ear.status", string(a.Status))
	w.name("ear.trustworthiness-vector")
	w.open('{')
	v := a.Vector
	for _, c := range [...]struct {
		name  string
		value int8
	}{
		{"instance-identity", v.InstanceIdentity}, {"configuration", v.Configuration}, {"executables", v.Executables}, {"file-system", v.FileSystem},
		{"hardware", v.Hardware}, {"runtime-opaque", v.RuntimeOpaque}, {"storage-opaque", v.StorageOpaque}, {"sourced-data", v.SourcedData},
	} {
		w.name(c.name)
		w.number(int64(c.value))
	}
	w.close('}')
	w.named("ear.appraisal-policy-id", a.PolicyID)
	w.name("ear.veraison.annotated-evidence")
	appendMap(w, a.Claims, w.claim)
	w.checks("coffer.checks", a.Checks)
	w.close('}')
}

func (w *writer) checks(name string, l check.List) {
	w.name(name)
	if l == nil {
		w.null()
		return
	}
	w.open('[')
	for _, c := range l {
		w.next()
		w.open('{')
		w.named("id", c.ID)
		w.named("outcome", string(c.Outcome))
		for _, m := range [...]struct{ name, value string }{{"expected", c.Expected}, {"found", c.Found}, {"hint", c.Hint}} {
			if m.value != "" {
				w.named(m.name, m.value)
			}
		}
		w.close('}')
	}
	w.close(']')
}

// claim writes a claim of a device: the forms that appraisals make.
func (w *writer) claim(v any) {
	switch v := v.(type) {
	case string:
		w.text(v)
	case bool:
		w.boolean(v)
	case int:
		w.number(int64(v))
	case uint32:
		w.number(int64(v))
	case uint64:
		w.b = strconv.AppendUint(w.b, v, 10)
	case map[string]any:
		appendMap(w, v, w.claim)
	case map[string]string:
		appendMap(w, v, w.text)
	default:
		w.other(v)
	}
}

// appendMap writes a map with its names in order.
func appendMap[V any](w *writer, m map[string]V, value func(V)) {
	if m == nil {
		w.null()
		return
	}
	names := make([]string, 0, 64)
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	w.open('{')
	for _, n := range names {
		w.next()
		w.text(n)
		w.open(':')
		value(m[n])
	}
	w.close('}')
}

// scratch is memory in which tokens are put together.
type scratch struct{ pool sync.Pool }

// maxScratch bounds what is kept of it for the next token, in bytes.
const maxScratch = 1 << 20

func (s *scratch) get() []byte {
	if b, ok := s.pool.Get().(*[]byte); ok {
		return (*b)[:0]
	}
	return make([]byte, 0, 48<<10)
}

func (s *scratch) put(b []byte) {
	if cap(b) <= maxScratch {
		s.pool.Put(&b)
	}
}
