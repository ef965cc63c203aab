package receipt_test

import (
	"bytes"
	"testing"

	"github.com/coffer-run/coffer/attest/receipt"
)

func statement(change func(*receipt.PolicyStatement)) receipt.PolicyStatement {
	s := receipt.PolicyStatement{
		Version: receipt.PolicyVersion, Broker: "broker", Asset: "weights", Owner: "alice", Revision: 2,
		Policy: receipt.AssetPolicy{Approvals: []receipt.Rule{{Group: "approvers", Count: 2}}, LeaseSeconds: 60, GraceSeconds: 10},
		Labels: receipt.AssetLabels{Region: "eu"},
	}
	if change != nil {
		change(&s)
	}
	return s
}

func TestPolicyStatement(t *testing.T) {
	good, err := statement(nil).Canonical()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := receipt.ParsePolicyStatement(good); err != nil {
		t.Error(err)
	}
	for name, b := range map[string][]byte{
		"nothing":            nil,
		"a space more":       append(bytes.Clone(good), ' '),
		"an unknown field":   bytes.Replace(good, []byte(`"asset"`), []byte(`"assets"`), 1),
		"a field twice":      bytes.Replace(good, []byte(`"asset":"weights"`), []byte(`"asset":"weights","asset":"weights"`), 1),
		"other letters":      bytes.Replace(good, []byte(`"owner"`), []byte(`"Owner"`), 1),
		"too large":          append(bytes.Clone(good), make([]byte, receipt.MaxPolicyStatement)...),
		"a revision of zero": bytes.Replace(good, []byte(`"revision":2`), []byte(`"revision":0`), 1),
	} {
		if s, err := receipt.ParsePolicyStatement(b); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
	for name, change := range map[string]func(*receipt.PolicyStatement){
		"no version":  func(s *receipt.PolicyStatement) { s.Version = "" },
		"no broker":   func(s *receipt.PolicyStatement) { s.Broker = "" },
		"no asset":    func(s *receipt.PolicyStatement) { s.Asset = "" },
		"no owner":    func(s *receipt.PolicyStatement) { s.Owner = "" },
		"no revision": func(s *receipt.PolicyStatement) { s.Revision = 0 },
	} {
		if _, err := statement(change).Canonical(); err == nil {
			t.Errorf("%s: it has a canonical form", name)
		}
	}
}

// FuzzPolicyStatement: whatever is taken has one encoding.
func FuzzPolicyStatement(f *testing.F) {
	good, err := statement(nil).Canonical()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := receipt.ParsePolicyStatement(b)
		if err != nil {
			return
		}
		if again, err := s.Canonical(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q is read as %q, %v", b, again, err)
		}
	})
}
