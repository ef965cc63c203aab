package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/internal/daemon"
)

// TestHangupTakesEverything changes what the verifier trusts while callers ask it
// without pause. Each change is taken as a whole or not at all, and every call is
// answered by what there was before or by what there is after.
func TestHangupTakesEverything(t *testing.T) {
	dir, c := setup(t)
	log, stop := start(t, dir, c)
	hc, url := client(t, dir, c, daemon.RoleRelyingParty)
	party := verifierv1connect.NewVerifierServiceClient(hc, url)
	ask := func() (r verifier.DevicesResult, err error) {
		answer, err := party.CheckDevices(t.Context(), connect.NewRequest(&verifierv1.CheckDevicesRequest{
			Audience: "party.test", Policy: "ours", Snp: &verifierv1.SNPDevice{Report: make([]byte, 1184), ReportData: make([]byte, 64)},
		}))
		if err != nil {
			return r, err
		}
		b, err := base64.RawURLEncoding.DecodeString(strings.Split(answer.Msg.GetResult(), ".")[1])
		if err != nil {
			return r, err
		}
		return r, json.Unmarshal(b, &r)
	}
	// known tells whether the verifier has the policy, and whether it has reference
	// values for it.
	known := func(r verifier.DevicesResult) string {
		var out []string
		for _, id := range []string{"policy.known", "policy.references"} {
			if slices.ContainsFunc(r.Checks, func(k check.Check) bool { return k.ID == id && k.Outcome == check.Pass }) {
				out = append(out, id)
			}
		}
		return strings.Join(out, " ")
	}
	const none, all = "", "policy.known policy.references"
	want := func(situation, have string) {
		t.Helper()
		r, err := ask()
		if err != nil || known(r) != have {
			t.Fatalf("%s: %q, %v, want %q", situation, known(r), err, have)
		}
	}
	want("at the start", none)

	done := make(chan struct{})
	var load sync.WaitGroup
	for range 3 {
		load.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if r, err := ask(); err != nil || known(r) != none && known(r) != all {
					t.Errorf("under load: %q, %v", known(r), err)
					return
				}
			}
		})
	}
	hangup := func(says string) {
		t.Helper()
		n := strings.Count(log.String(), says)
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		file(t, dir, "config.json", string(b))
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); strings.Count(log.String(), says) == n; time.Sleep(2 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the log does not say %q: %s", says, log)
			}
		}
	}
	source := newSource(t)
	withSource(t, dir, c, source)
	c["referenceValues"] = []string{file(t, dir, "values.jwt", values(t, source, time.Hour))}
	c["attestationKeys"] = []config{{"class": "discrete", "names": []string{"000b" + strings.Repeat("ab", 32)}}}
	c["paravisors"] = []string{strings.Repeat("ab", 48)}
	hangup(`"configuration read"`)
	want("after the change", all)
	if !strings.Contains(log.String(), `"paravisors":1`) || !strings.Contains(log.String(), `"referenceValues":1`) {
		t.Errorf("log %s", log)
	}
	refused := 0
	for situation, spoil := range map[string]func() (undo func()){
		"a policy that is none": func() func() {
			path := file(t, dir, "policies/bad.json", "{}")
			return func() { _ = os.Remove(path) }
		},
		"reference values that were changed": func() func() {
			file(t, dir, "values.jwt", values(t, newSource(t), time.Hour))
			return func() { file(t, dir, "values.jwt", values(t, source, time.Hour)) }
		},
		"no policies folder": func() func() {
			was := c["policiesDir"]
			c["policiesDir"] = filepath.Join(dir, "none")
			return func() { c["policiesDir"] = was }
		},
		"a paravisor that is none": func() func() {
			was := c["paravisors"]
			c["paravisors"] = []string{"00"}
			return func() { c["paravisors"] = was }
		},
		"the software class of TPM": func() func() {
			was := c["attestationKeys"]
			c["attestationKeys"] = []config{{"class": "software", "names": []string{"000b" + strings.Repeat("ab", 32)}}}
			return func() { c["attestationKeys"] = was }
		},
		"good policies, and a key nobody was told of": func() func() {
			was := c["nonceKeyFile"]
			c["nonceKeyFile"] = file(t, dir, "other-nonce.key", strings.Repeat("k", 32))
			c["referenceValues"] = []string{}
			return func() { c["nonceKeyFile"], c["referenceValues"] = was, []string{filepath.Join(dir, "values.jwt")} }
		},
	} {
		undo := spoil()
		hangup(`"configuration not changed"`)
		want(situation, all)
		undo()
		refused++
	}
	delete(c, "referenceValues")
	delete(c, "policiesDir")
	hangup(`"configuration read"`)
	want("after it was taken back", none)
	close(done)
	load.Wait()

	operator, _ := client(t, dir, c, daemon.RoleOperator)
	resp, err := operator.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%d %v", resp.StatusCode, err)
	}
	for _, line := range []string{`coffer_verifier_reloads_total{result="taken"} 2`, fmt.Sprintf(`coffer_verifier_reloads_total{result="refused"} %d`, refused)} {
		if !strings.Contains(string(text), line) {
			t.Errorf("metrics lack %s", line)
		}
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}
