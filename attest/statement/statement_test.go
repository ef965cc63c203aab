package statement_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	provenance "github.com/in-toto/attestation/go/predicates/provenance/v1"
	vsa "github.com/in-toto/attestation/go/predicates/vsa/v1"
	intoto "github.com/in-toto/attestation/go/v1"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/statement"
)

var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

var lab = sync.OnceValues(func() (*bundletest.Lab, error) {
	v, err := simulate.New(simulate.Options{Now: clock, Fast: true})
	if err != nil {
		return nil, err
	}
	return bundletest.On(v.Chip(), v.GPUs(), v.Anchors(), clock)
})

func input(t *testing.T, o bundletest.Options, change func(*bundletest.Job)) statement.Input {
	t.Helper()
	l, err := lab()
	if err != nil {
		t.Fatal(err)
	}
	j, err := l.Job(o)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(j)
	}
	file, err := j.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	trust := verify.Trust{Anchors: l.Anchors}
	if trust.VerifierKeys, err = l.Verifier.JWKS(); err != nil {
		t.Fatal(err)
	}
	if trust.BrokerKeys, err = l.Broker.JWKS(); err != nil {
		t.Fatal(err)
	}
	return statement.Input{Report: verify.Verify(file, trust), File: file, Now: clock.Add(time.Hour), Verifier: "coffer-verify", Version: "test"}
}

func write(t *testing.T, f statement.Format, in statement.Input) []byte {
	t.Helper()
	b, err := statement.Write(f, in)
	if err != nil {
		t.Fatalf("%s: %v", f, err)
	}
	again, err := statement.Write(f, in)
	if err != nil || string(again) != string(b) {
		t.Errorf("%s is not the same twice, %v", f, err)
	}
	return b
}

// parsed reads a statement with in-toto's own library, and its predicate into p.
func parsed(t *testing.T, b []byte, p proto.Message) *intoto.Statement {
	t.Helper()
	var s intoto.Statement
	if err := protojson.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	if err := s.Validate(); err != nil {
		t.Error(err)
	}
	if p != nil {
		body, err := protojson.Marshal(s.GetPredicate())
		if err != nil {
			t.Fatal(err)
		}
		if err := protojson.Unmarshal(body, p); err != nil {
			t.Fatal(err)
		}
	}
	return &s
}

func TestProvenance(t *testing.T) {
	in := input(t, bundletest.Options{}, nil)
	var p provenance.Provenance
	s := parsed(t, write(t, statement.Provenance, in), &p)
	if err := p.Validate(); err != nil {
		t.Error(err)
	}
	if s.GetPredicateType() != statement.ProvenanceType || len(s.GetSubject()) != 3 {
		t.Errorf("type %s, %d subjects", s.GetPredicateType(), len(s.GetSubject()))
	}
	if got := p.GetRunDetails().GetBuilder().GetId(); got != statement.BuilderSimulated {
		t.Errorf("simulated devices, and the builder is %s", got)
	}
	if got := p.GetBuildDefinition().GetResolvedDependencies(); len(got) != 3 || got[1].GetDigest()["sha384"] == "" || got[0].GetDigest()["sha256"] == "" {
		t.Errorf("dependencies %v", got)
	}
	plan := p.GetBuildDefinition().GetExternalParameters().GetFields()["plan"].GetStructValue().GetFields()
	if plan["name"].GetStringValue() != "fashion" {
		t.Errorf("the plan is %v", plan)
	}
	in.Report.Simulated = false
	parsed(t, write(t, statement.Provenance, in), &p)
	if got := p.GetRunDetails().GetBuilder().GetId(); got != statement.BuilderAttested {
		t.Errorf("the builder is %s", got)
	}
}

func TestSummary(t *testing.T) {
	good := input(t, bundletest.Options{}, nil)
	real := good
	real.Report.Simulated = false
	bad := input(t, bundletest.Options{}, func(j *bundletest.Job) { j.Parts[bundle.Trace] = []byte("[]") })
	none := statement.Input{Report: verify.Verify([]byte("{}"), verify.Trust{}), File: []byte("{}"), Now: clock, Verifier: "coffer-verify"}
	unknown := good
	unknown.Report.Verdict = verify.Unknown
	zero := good
	zero.Report.Verdict = ""
	for name, try := range map[string]struct {
		in            statement.Input
		result, level string
	}{
		"verified":               {good, "PASSED", statement.LevelSimulated},
		"verified, not emulated": {real, "PASSED", statement.LevelAttested},
		"failed":                 {bad, "FAILED", statement.LevelFailed},
		"no bundle":              {none, "FAILED", statement.LevelFailed},
		"nobody can tell":        {unknown, "FAILED", statement.LevelFailed},
		"no verdict":             {zero, "FAILED", statement.LevelFailed},
	} {
		var p vsa.VerificationSummary
		s := parsed(t, write(t, statement.Summary, try.in), &p)
		if p.GetVerificationResult() != try.result || !slices.Equal(p.GetVerifiedLevels(), []string{try.level}) || s.GetPredicateType() != statement.SummaryType {
			t.Errorf("%s: %s, %v", name, p.GetVerificationResult(), p.GetVerifiedLevels())
		}
		if got := p.GetInputAttestations()[0].GetDigest()["sha384"]; "sha384:"+got != string(plan.Sum(try.in.File)) {
			t.Errorf("%s: the bundle's digest is %s", name, got)
		}
	}
}

// TestOnlyOfWhatVerifies tries each verdict that is no pass.
func TestOnlyOfWhatVerifies(t *testing.T) {
	in := input(t, bundletest.Options{}, nil)
	for _, v := range []verify.Verdict{verify.Failed, verify.Unknown, ""} {
		in.Report.Verdict = v
		for _, f := range statement.Formats() {
			if _, err := statement.Write(f, in); f != statement.Summary && !errors.Is(err, statement.ErrUnverified) {
				t.Errorf("%s of a bundle that is %q: %v", f, v, err)
			}
		}
	}
	in.Report.Verdict = verify.Verified
	if _, err := statement.Write("x", in); err == nil || !strings.Contains(err.Error(), "want vsa") {
		t.Errorf("an unknown format: %v", err)
	}
}

type trained struct {
	Predicate struct {
		Checked, Declared map[string]statement.Claim
		Simulated         bool
		NotProven         []string
	}
}

func TestTraining(t *testing.T) {
	in := input(t, bundletest.Options{}, nil)
	read := func(in statement.Input) trained {
		t.Helper()
		b := write(t, statement.Training, in)
		parsed(t, b, nil)
		var s trained
		if err := json.Unmarshal(b, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := read(in)
	for _, name := range []string{"plan", "image", "bill of materials of the image", "command", "input data", "input model", "devices", "checkpoint epoch-2", "keys released to this job alone"} {
		if _, ok := s.Predicate.Checked[name]; !ok {
			t.Errorf("%q is not among what was checked: %v", name, s.Predicate.Declared[name])
		}
	}
	for _, name := range []string{"node", "contents of the image", "submitter", "runtime", "outcome", "network", "approvals", "memory scrubbed", "record in the log's tree"} {
		if _, ok := s.Predicate.Declared[name]; !ok {
			t.Errorf("%q is not among what is declared", name)
		}
	}
	if !s.Predicate.Simulated || len(s.Predicate.NotProven) == 0 {
		t.Error("it does not say what is simulated, or not proven")
	}
	// Any check that was not made, or is missing, moves what rests on it.
	for _, id := range []string{"plan.bound", "result.signature", "sandbox.image"} {
		for _, drop := range []bool{false, true} {
			c := in
			c.Report.Groups = nil
			for _, g := range in.Report.Groups {
				g.Checks = slices.Clone(g.Checks)
				for i := range g.Checks {
					if g.Checks[i].ID == id {
						g.Checks[i].Outcome = check.NotChecked
					}
				}
				if drop {
					g.Checks = slices.DeleteFunc(g.Checks, func(c check.Check) bool { return c.ID == id })
				}
				c.Report.Groups = append(c.Report.Groups, g)
			}
			s := read(c)
			if _, ok := s.Predicate.Checked["image"]; ok || !slices.Contains(s.Predicate.Declared["image"].Checks, id) {
				t.Errorf("without %s, the image is still checked", id)
			}
		}
	}
}

// schemas are CycloneDX's own, from its library's module.
func schemas(t *testing.T) *jsonschema.Schema {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	for url, name := range map[string]string{"bom-1.6.schema.json": "bom-1.6.schema.json", "spdx.schema.json": "spdx.schema.json", "jsf-0.82.schema.json": "jsf-0.82.schemax.json"} {
		f, err := os.Open(filepath.Join(strings.TrimSpace(string(dir)), "schema", name))
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		if err := c.AddResource("http://cyclonedx.org/schema/"+url, doc); err != nil {
			t.Fatal(err)
		}
	}
	s, err := c.Compile("http://cyclonedx.org/schema/bom-1.6.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestBOM(t *testing.T) {
	schema := schemas(t)
	in := input(t, bundletest.Options{}, nil)
	b := write(t, statement.CycloneDX, in)
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(doc); err != nil {
		t.Error(err)
	}
	// The schema does refuse.
	wrong, err := jsonschema.UnmarshalJSON(strings.NewReader(strings.Replace(string(b), `"SHA-384"`, `"SHA-385"`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	if schema.Validate(wrong) == nil {
		t.Error("the schema takes a hash that there is not")
	}
	for _, want := range []string{`"coffer:declared:metric loss"`, `"type": "loss"`, `"value": "0.3125"`, `"slice": "last of 20 values, as the job declared them"`, `"name": "numpy"`, `"pkg:deb/debian/python3@3.11.2-1"`, `"machine-learning-model"`, `"coffer:checked:plan"`, `"coffer:declared:node"`, `"coffer:simulated"`, `"input-model"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the document has no %s", want)
		}
	}
}

// Whatever a list of an image's contents says, the document is CycloneDX.
func TestBOMOfWhatNobodySigned(t *testing.T) {
	image := "sha256:" + strings.Repeat("00", 32)
	list, err := plan.Canonical(bundle.ImageSBOM{Document: []byte(`{"bomFormat":"CycloneDX","metadata":{"component":{"version":"` + image + `"}},"components":[` +
		`{},{"type":"poem","name":"\u0000<b>","hashes":[{"alg":"CRC","content":"0"},{"alg":"SHA-256","content":"no digits"},{"alg":"MD5","content":"` + strings.Repeat("0", 32) + `"}]}]}`)})
	if err != nil {
		t.Fatal(err)
	}
	b := write(t, statement.CycloneDX, input(t, bundletest.Options{ImageSBOM: list}, nil))
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := schemas(t).Validate(doc); err != nil {
		t.Error(err)
	}
	if !strings.Contains(string(b), "nobody who signed it") || !strings.Contains(string(b), `"coffer:declared:bill of materials of the image"`) {
		t.Error("the document does not say that nobody signed the list")
	}
}

func TestSign(t *testing.T) {
	body := write(t, statement.Summary, input(t, bundletest.Options{}, nil))
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys := []crypto.Signer{ed}
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	for i, key := range keys {
		signed, err := statement.Sign(t.Context(), body, key)
		if err != nil {
			t.Fatal(err)
		}
		var e dsse.Envelope
		if err := json.Unmarshal(signed, &e); err != nil {
			t.Fatal(err)
		}
		open := func(k crypto.PublicKey) error {
			v, err := dsse.NewEnvelopeVerifier(verifier{k})
			if err != nil {
				t.Fatal(err)
			}
			_, err = v.Verify(t.Context(), &e)
			return err
		}
		if err := open(key.Public()); err != nil || e.PayloadType != statement.PayloadType || !strings.HasPrefix(e.Signatures[0].KeyID, "SHA256:") {
			t.Errorf("key %d: %v, %s, key id %s", i, err, e.PayloadType, e.Signatures[0].KeyID)
		}
		if open(keys[(i+1)%len(keys)].Public()) == nil {
			t.Errorf("key %d: holds under another key", i)
		}
		e.PayloadType = "text/plain"
		if open(key.Public()) == nil {
			t.Errorf("key %d: holds for another type of payload", i)
		}
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []crypto.Signer{p521, r} {
		if _, err := statement.Sign(t.Context(), body, k); err == nil {
			t.Errorf("signed with %T", k)
		}
	}
}

// verifier checks as another tool would.
type verifier struct{ key crypto.PublicKey }

func (v verifier) Verify(_ context.Context, data, sig []byte) error {
	ok := false
	switch k := v.key.(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, data, sig)
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(data)
		digest := sum[:]
		if k.Curve == elliptic.P384() {
			long := sha512.Sum384(data)
			digest = long[:]
		}
		ok = ecdsa.VerifyASN1(k, digest, sig)
	}
	if !ok {
		return errors.New("does not hold")
	}
	return nil
}

func (v verifier) KeyID() (string, error) { return "", nil }

func (v verifier) Public() crypto.PublicKey { return v.key }
