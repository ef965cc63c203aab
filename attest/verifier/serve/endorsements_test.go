package serve_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier/serve"
)

// An agent gets what its appraisal used, for the signed result and nothing else.
func TestEndorsementsAreHandedOut(t *testing.T) {
	f := newFixture(t)
	v, err := vendor()
	if err != nil {
		t.Fatal(err)
	}
	lib := endorse.NewLibrary()
	c, err := endorse.New(endorse.Options{Store: lib, Anchors: f.options.Anchors, Clock: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	f.options.Endorsements = c
	server := httptest.NewServer(f.handler(t, f.replica(t)))
	t.Cleanup(server.Close)
	var used []any
	add := func(i endorse.Item, held bool) {
		if held {
			if err := lib.Put(i, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		used = append(used, map[string]any{"kind": string(i.Key.Kind), "id": i.Key.ID, "digest": string(i.Digest)})
	}
	result := func() string {
		token, err := f.options.Signer.Sign(receipt.TypeResult, receipt.Result{Issuer: "verifier", Submods: map[string]receipt.Appraisal{"cpu0": {Claims: map[string]any{endorse.ClaimUsed: used}}}})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	post := func(role, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+serve.EndorsementsPath, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Test-Role", role)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close() //nolint:errcheck // read only
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}

	var items []endorse.Item
	for k, b := range endorsetest.New(t, v, time.Now()).Answers() {
		i, err := endorse.Parse(k.Kind, k.ID, b)
		if err != nil {
			t.Fatal(err)
		}
		items = append(items, i)
	}
	for _, i := range items[1:] {
		add(i, true)
	}
	token := result()
	status, body := post("agent", token)
	if got, err := endorse.Decode([]byte(body)); status != http.StatusOK || err != nil || len(got) != len(items)-1 {
		t.Errorf("%d, %d endorsements, %v", status, len(got), err)
	}
	for situation, row := range map[string]struct {
		role, body string
		status     int
	}{
		"another role":       {"broker", token, http.StatusForbidden},
		"nobody":             {"", token, http.StatusUnauthorized},
		"no result":          {"agent", "", http.StatusBadRequest},
		"a changed result":   {"agent", token[:len(token)-4] + "AAAA", http.StatusBadRequest},
		"more than a result": {"agent", strings.Repeat("a", receipt.MaxToken+1), http.StatusBadRequest},
	} {
		if status, body := post(row.role, row.body); status != row.status {
			t.Errorf("%s: %d %s", situation, status, body)
		}
	}
	add(items[0], false)
	if status, body := post("agent", result()); status != http.StatusGone || !strings.Contains(body, items[0].Key.String()) {
		t.Errorf("one that is gone: %d %s", status, body)
	}
}
