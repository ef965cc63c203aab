package serve_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

// withSource makes the fixture's policy ask for reference values of a source.
func (f *fixture) withSource(t *testing.T, source *receipt.Signer, keys []byte, until time.Time) {
	t.Helper()
	f.options.Policies[0].Sources = []policy.Source{{Issuer: source.Issuer(), Keys: keys}}
	token, err := policy.SignValues(source, policy.Values{IssuedAt: time.Now().Unix(), Expires: until.Unix(), GPU: &policy.GPUValues{FeatureFlags: []string{"SPT"}}})
	if err != nil {
		t.Fatal(err)
	}
	f.options.References = []string{token}
}

func get(t *testing.T, h http.Handler, path string, header ...string) (int, string) {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, path, nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// series are the names and labels of what is exported of ours.
func series(t *testing.T, url string) []string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Test-Role", "operator")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var out []string
	for _, line := range strings.Split(readAll(t, resp.Body), "\n") {
		if strings.HasPrefix(line, "coffer_verifier_") {
			out = append(out, line)
		}
	}
	return out
}

func TestMetrics(t *testing.T) {
	f := newFixture(t)
	agent := f.as("agent")
	e := f.attest(t, challenge(t, agent))
	for range 2 {
		if _, err := agent.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: e, Audience: "broker"})); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = agent.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: []byte("{}"), Audience: "broker"}))
	_, _ = f.as("engineer").Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
	all := strings.Join(series(t, f.url), "\n")
	for _, want := range []string{
		`coffer_verifier_appraisals_total{call="Appraise",result="accepted",role="agent"} 1`,
		`coffer_verifier_appraisals_total{call="Appraise",result="refused",role="agent"} 1`,
		`coffer_verifier_refusals_total{check="nonce.unused"} 1`,
		`coffer_verifier_nonce_refusals_total{check="nonce.unused"} 1`,
		`coffer_verifier_calls_total{call="Appraise",code="invalid_argument",role="agent"} 1`,
		`coffer_verifier_calls_total{call="Appraise",code="ok",role="agent"} 2`,
		`coffer_verifier_calls_total{call="Challenge",code="permission_denied",role="engineer"} 1`,
		`coffer_verifier_call_duration_seconds_count{call="Appraise"} 3`,
		`coffer_verifier_calls_in_flight 0`,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("lacks %s in\n%s", want, all)
		}
	}
	for _, role := range []string{"agent", "relying-party", "engineer", "root"} {
		if code, _ := get(t, f.handler(t, f.verifier), "/metrics", "Test-Role", role); code != http.StatusForbidden {
			t.Errorf("metrics as %s: %d", role, code)
		}
	}
}

// Whatever callers make up, the number of series does not grow with it.
func TestMetricsAreBounded(t *testing.T) {
	f := newFixture(t)
	hostile := func(i int) {
		role, name := fmt.Sprintf("role-%d", i), fmt.Sprintf("name-%d", i)
		c := client(http.DefaultClient, f.url, role, name)
		_, _ = c.Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
		agent := client(http.DefaultClient, f.url, "agent", name)
		e, err := f.machine.Attest("verifier", "a-nonce-of-no-verifier", "job-1")
		if err != nil {
			t.Fatal(err)
		}
		e.Nonce, e.JobID, e.VerifierID = name+"-of-sixteen-or-more", name, name
		e.GPUs[0].DriverVersion, e.GPUs[0].UUID = name, name
		b, err := e.JSON()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := agent.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: b, Audience: name})); err != nil {
			t.Fatal(err)
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.url+"/coffer.verifier.v1.VerifierService/"+name, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Test-Role", role)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	hostile(0)
	before := len(series(t, f.url))
	for i := 1; i < 30; i++ {
		hostile(i)
	}
	after := series(t, f.url)
	if len(after) != before {
		t.Errorf("%d series became %d", before, len(after))
	}
	if all := strings.Join(after, "\n"); strings.Contains(all, "name-") || strings.Contains(all, "role-") {
		t.Errorf("a caller's words are labels:\n%s", all)
	}
}
