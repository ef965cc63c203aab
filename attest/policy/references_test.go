package policy_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

var now = time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)

func newSigner(t testing.TB, issuer string) *receipt.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(issuer, k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sourced is the good document with signers of reference values.
func sourced(t testing.TB, signers ...*receipt.Signer) policy.Policy {
	t.Helper()
	p, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range signers {
		keys, err := s.JWKS()
		if err != nil {
			t.Fatal(err)
		}
		p.Sources = append(p.Sources, policy.Source{Issuer: s.Issuer(), Keys: keys})
	}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if p, err = policy.Parse(b); err != nil {
		t.Fatal(err)
	}
	return p
}

func values() policy.Values {
	return policy.Values{IssuedAt: now.Unix(), Expires: now.Add(time.Hour).Unix(), SNP: &policy.SNPValues{Measurements: []string{measurement}}}
}

func TestOpenReferences(t *testing.T) {
	s, other := newSigner(t, "vendor"), newSigner(t, "vendor")
	p := sourced(t, newSigner(t, "first"), s)
	token, err := policy.SignValues(s, values())
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.OpenReferences(token, now)
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := p.Digest(); r.Policy() != d || r.Values().Issuer != "vendor" || r.Values().SNP.Measurements[0] != measurement {
		t.Errorf("opened %+v", r.Values())
	}
	if r.ValidAt(now.Add(time.Hour)) || r.ValidAt(time.Time{}) || (policy.References{}).ValidAt(now) {
		t.Error("valid when it must not be")
	}

	raw := func(s *receipt.Signer, typ string, change func(map[string]any)) string {
		b, err := json.Marshal(values())
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]any{}
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		m["version"], m["iss"] = policy.ReferencesVersion, s.Issuer()
		change(m)
		token, err := s.Sign(typ, m)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	set := func(key string, v any) string {
		return raw(s, policy.TypeReferences, func(m map[string]any) { m[key] = v })
	}
	if _, err := p.OpenReferences(set("iat", now.Unix()), now); err != nil {
		t.Fatal(err)
	}
	for situation, token := range map[string]string{
		"not signed":                     "eyJhbGciOiJub25lIn0." + strings.Split(token, ".")[1] + ".",
		"signature of another token":     token[:len(token)-4] + "AAAA",
		"key that the policy lacks":      raw(other, policy.TypeReferences, func(map[string]any) {}),
		"issuer that the policy lacks":   raw(newSigner(t, "somebody"), policy.TypeReferences, func(map[string]any) {}),
		"name of another source":         set("iss", "first"),
		"another kind of token":          raw(s, receipt.TypeResult, func(map[string]any) {}),
		"expired":                        set("exp", now.Unix()),
		"issued after now":               set("iat", now.Add(time.Minute).Unix()),
		"expires before it is issued":    set("exp", now.Add(-time.Hour).Unix()),
		"no expiry":                      raw(s, policy.TypeReferences, func(m map[string]any) { delete(m, "exp") }),
		"no time of issue":               set("iat", 0),
		"unknown version":                set("version", "coffer.run/reference-values/v2"),
		"unknown field":                  set("nic", map[string]any{}),
		"unknown field of a part":        set("snp", map[string]any{"measurement": measurement}),
		"no values":                      set("snp", nil),
		"short measurement":              set("snp", map[string]any{"measurements": []string{"ab"}}),
		"upper-case measurement":         set("snp", map[string]any{"measurements": []string{strings.ToUpper(measurement)}}),
		"short chip id":                  set("snp", map[string]any{"chipIds": []string{"ab"}}),
		"malformed id key":               set("snp", map[string]any{"idKeyDigests": []string{"key"}}),
		"minimum of an unknown product":  set("snp", map[string]any{"minimumTCB": map[string]any{"Rome": map[string]any{"snp": 1}}}),
		"component that there is not":    set("snp", map[string]any{"minimumTCB": map[string]any{"Milan": map[string]any{"psp": 1}}}),
		"component that is too large":    set("snp", map[string]any{"minimumTCB": map[string]any{"Milan": map[string]any{"snp": 256}}}),
		"PCR that there is not":          set("tpm", map[string]any{"pcrs": map[string]any{"24": []string{pcr14}}}),
		"PCR without values":             set("tpm", map[string]any{"pcrs": map[string]any{"7": []string{}}}),
		"short PCR value":                set("tpm", map[string]any{"pcrs": map[string]any{"7": []string{"ab"}}}),
		"unknown GPU mode":               set("gpu", map[string]any{"featureFlags": []string{"DEVTOOLS"}}),
		"malformed driver version":       set("gpu", map[string]any{"driverVersions": []string{"any"}}),
		"more values than anybody reads": set("gpu", map[string]any{"driverVersions": make([]string, 257)}),
		"size of a book":                 strings.Repeat("x", receipt.MaxToken+1),
	} {
		if _, err := p.OpenReferences(token, now); err == nil {
			t.Errorf("%s: accepted", situation)
		}
	}
	if _, err := sourced(t).OpenReferences(token, now); err == nil {
		t.Error("accepted by a policy that names no source")
	}
	if _, err := (policy.Policy{}).OpenReferences(token, now); err == nil {
		t.Error("accepted by the zero policy")
	}
	if _, err := policy.SignValues(s, policy.Values{}); err == nil {
		t.Error("signed values that there are not")
	}
}

func TestParseRefusesRules(t *testing.T) {
	keys, err := newSigner(t, "vendor").JWKS()
	if err != nil {
		t.Fatal(err)
	}
	for situation, change := range map[string]func(*policy.Policy){
		"no rules": func(p *policy.Policy) { p.Rules = map[string]string{} },
		"too many modules": func(p *policy.Policy) {
			for _, c := range "abcdefghijklmnopq" {
				p.Rules[string(c)+".rego"] = "x"
			}
		},
		"module that is a path":  func(p *policy.Policy) { p.Rules["../x.rego"] = "x" },
		"module of another kind": func(p *policy.Policy) { p.Rules["x.json"] = "{}" },
		"source without a name":  func(p *policy.Policy) { p.Sources = []policy.Source{{Keys: keys}} },
		"source without keys":    func(p *policy.Policy) { p.Sources = []policy.Source{{Issuer: "a", Keys: []byte(`{"keys":[]}`)}} },
		"source that comes twice": func(p *policy.Policy) {
			p.Sources = []policy.Source{{Issuer: "a", Keys: keys}, {Issuer: "a", Keys: keys}}
		},
	} {
		p, err := policy.Parse([]byte(document))
		if err != nil {
			t.Fatal(err)
		}
		change(&p)
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := policy.Parse(b); err == nil {
			t.Errorf("%s: accepted", situation)
		}
		if _, err := p.Digest(); err == nil {
			t.Errorf("%s: has a digest", situation)
		}
	}
}

// The digest that a plan pins changes with whatever decides.
func TestDigestCovers(t *testing.T) {
	p, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for situation, change := range map[string]func(*policy.Policy){
		"nothing":       func(*policy.Policy) {},
		"a requirement": func(p *policy.Policy) { p.SNP.MaxVMPL = 1 },
		"a rule":        func(p *policy.Policy) { p.Rules["appraisal.rego"] += "\n" },
		"a module's name": func(p *policy.Policy) {
			p.Rules = map[string]string{"other.rego": p.Rules["appraisal.rego"]}
		},
		"a further module": func(p *policy.Policy) { p.Rules["x.rego"] = "package coffer.appraisal" },
		"data":             func(p *policy.Policy) { p.Data = map[string]any{"x": 1} },
		"a source":         func(p *policy.Policy) { *p = sourced(t, newSigner(t, "vendor")) },
	} {
		q, err := policy.Parse([]byte(document))
		if err != nil {
			t.Fatal(err)
		}
		change(&q)
		d, err := q.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if was, again := seen[string(d)]; again {
			t.Errorf("%s changes the digest no more than %s", situation, was)
		}
		seen[string(d)] = situation
	}
	// A document and its parsed form are one policy.
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	again, err := policy.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := p.Digest(); a == "" {
		t.Error("no digest")
	} else if b, _ := again.Digest(); a != b {
		t.Errorf("digest %s became %s", a, b)
	}
}

func TestParseFolder(t *testing.T) {
	rules, err := policy.StandardRules()
	if err != nil {
		t.Fatal(err)
	}
	whole, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	folder := func() fstest.MapFS {
		return fstest.MapFS{"policy.json": {Data: []byte(document)}, "appraisal.rego": {Data: []byte(rules["appraisal.rego"])}, "README": {Data: []byte("for people")}}
	}
	p, err := policy.ParseFolder(folder())
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := p.Digest(); a == "" {
		t.Error("no digest")
	} else if b, _ := whole.Digest(); a != b {
		t.Errorf("the folder is %s, the document %s", a, b)
	}
	for situation, change := range map[string]func(fstest.MapFS){
		"no document": func(f fstest.MapFS) { delete(f, "policy.json") },
		"no rules":    func(f fstest.MapFS) { delete(f, "appraisal.rego") },
		"rules twice": func(f fstest.MapFS) {
			f["policy.json"].Data = []byte(strings.Replace(document, "{", `{"rules":{"x.rego":"x"},`, 1))
		},
		"large module": func(f fstest.MapFS) { f["appraisal.rego"].Data = make([]byte, policy.MaxSize+1) },
		"large in sum": func(f fstest.MapFS) {
			f["x.rego"] = &fstest.MapFile{Data: []byte(strings.Repeat("#", policy.MaxSize-1))}
		},
		"large document": func(f fstest.MapFS) { f["policy.json"].Data = make([]byte, policy.MaxSize+1) },
		"unknown field":  func(f fstest.MapFS) { f["policy.json"].Data = []byte(strings.Replace(document, "{", `{"x":1,`, 1)) },
		"not UTF-8":      func(f fstest.MapFS) { f["appraisal.rego"].Data = []byte{0xff} },
		"module's name":  func(f fstest.MapFS) { f["A B.rego"] = f["appraisal.rego"] },
		"too many": func(f fstest.MapFS) {
			for _, c := range "abcdefghijklmnopq" {
				f[string(c)+".rego"] = f["appraisal.rego"]
			}
		},
	} {
		f := folder()
		change(f)
		if _, err := policy.ParseFolder(f); err == nil {
			t.Errorf("%s: accepted", situation)
		}
	}
}
