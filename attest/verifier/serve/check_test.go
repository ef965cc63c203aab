package serve_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
)

func TestCheckOverTheWire(t *testing.T) {
	f := newFixture(t)
	party := f.as("relying-party")
	ask := func(evidence []byte, nonce string) (string, error) {
		r, err := party.Check(t.Context(), connect.NewRequest(&verifierv1.CheckRequest{Evidence: evidence, Audience: "party.test", Nonce: nonce}))
		if err != nil {
			return "", err
		}
		return r.Msg.GetResult(), nil
	}
	failed := func(token string) []string {
		t.Helper()
		var r receipt.Result
		if err := f.keys(t).Open(verifier.TypeCheck, token, &r); err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, c := range r.AllChecks().Failed() {
			ids = append(ids, c.ID)
		}
		if len(ids) == 0 {
			for name, s := range r.Submods {
				if s.Status != receipt.Affirming {
					t.Errorf("%s: %s, and no check failed", name, s.Status)
				}
			}
		}
		return ids
	}
	const own = "a-nonce-of-the-relying-party?"
	mine := f.attest(t, own)
	for _, row := range []struct {
		situation string
		evidence  []byte
		nonce     string
		refused   string
	}{
		{"the relying party's nonce", mine, own, ""},
		{"the same again: its freshness is the relying party's affair", mine, own, ""},
		{"evidence that answers another nonce", mine, own + "-2", "nonce.given"},
		{"evidence for a nonce that looks like it", f.attest(t, own[:len(own)-1]+"\x01"), own, "nonce.given"},
		{"a nonce that this verifier did not make, and none given", mine, "", "nonce.authentic"},
		{"this verifier's nonce", f.attest(t, challenge(t, party)), "", ""},
	} {
		token, err := ask(row.evidence, row.nonce)
		if err != nil {
			t.Fatalf("%s: %v", row.situation, err)
		}
		if got := strings.Join(failed(token), " "); got != row.refused {
			t.Errorf("%s: failed %q, want %q", row.situation, got, row.refused)
		}
	}
	theirs := f.attest(t, challenge(t, party))
	if _, err := ask(theirs, ""); err != nil {
		t.Fatal(err)
	}
	token, err := ask(theirs, "")
	if err != nil || strings.Join(failed(token), " ") != "nonce.unused" {
		t.Errorf("this verifier's nonce again: %v", err)
	}
	for _, bad := range []string{"short", strings.Repeat("n", 89), "with a space", "line\nbreak"} {
		if _, err := ask(mine, bad); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("nonce %q: %v", bad, err)
		}
	}
}

// What Check signs is of no use to a broker, whatever audience was asked for:
// only the type of the token stands between old evidence and a key.
func TestForeignResultsAreUnusable(t *testing.T) {
	f := newFixture(t)
	e := f.attest(t, "chosen-by-the-attacker")
	r, err := f.as("relying-party").Check(t.Context(), connect.NewRequest(&verifierv1.CheckRequest{Evidence: e, Audience: "broker", Nonce: "chosen-by-the-attacker"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := relyOn(f.keys(t), r.Msg.GetResult()); err == nil || !strings.Contains(err.Error(), verifier.TypeCheck) {
		t.Errorf("a broker is told %v", err)
	}
	// Nor is what it signs for an agent, which asks before there is a job.
	p, err := f.as("agent").Check(t.Context(), connect.NewRequest(&verifierv1.CheckRequest{Evidence: f.attest(t, challenge(t, f.as("agent"))), Audience: "broker"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := relyOn(f.keys(t), p.Msg.GetResult()); err == nil || !strings.Contains(err.Error(), verifier.TypeCheck) {
		t.Errorf("a broker is told %v", err)
	}
	// Nor has a relying party a way to the broker's kind of result.
	if _, err := f.as("relying-party").Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: e, Audience: "broker"})); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("a relying party asks for a broker's result: %v", err)
	}
	// The agent's own way, over the same evidence, is refused by the nonce.
	a, err := f.as("agent").Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: e, Audience: "broker"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := relyOn(f.keys(t), a.Msg.GetResult()); err == nil || !strings.Contains(err.Error(), "nonce.authentic") {
		t.Errorf("a nonce of the attester's choice: %v", err)
	}
	good, err := f.as("agent").Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: f.attest(t, challenge(t, f.as("agent"))), Audience: "broker"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := relyOn(f.keys(t), good.Msg.GetResult()); err != nil {
		t.Errorf("the honest way: %v", err)
	}
}

// A verifier whose reference values have all expired says so to who balances
// the load.
func TestReadiness(t *testing.T) {
	f := newFixture(t)
	source := newSigner(t)
	keys, err := source.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	f.withSource(t, source, keys, now.Add(time.Minute))
	f.options.Clock = func() time.Time { return now }
	v := f.replica(t)
	h := f.handler(t, v)
	if code, body := get(t, h, "/readyz"); code != http.StatusOK {
		t.Errorf("%d %s", code, body)
	}
	now = now.Add(2 * time.Minute)
	if code, body := get(t, h, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "reference values") {
		t.Errorf("expired: %d %s", code, body)
	}
	if code, _ := get(t, h, "/livez"); code != http.StatusOK {
		t.Errorf("live: %d", code)
	}
}
