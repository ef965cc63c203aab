package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier/serve"
	"github.com/coffer-run/coffer/attest/verifier/verifiertest"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/pki"
)

// documentedPolicy is the one in docs/formats/kbs.md, for the emulated guest. A
// simulation has no revocation list here.
func documentedPolicy(t *testing.T) []byte {
	t.Helper()
	page, err := os.ReadFile("../../docs/formats/kbs.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(page), "```json\n")
	text, _, closed := strings.Cut(text, "```")
	if !found || !closed {
		t.Fatal("the page has no policy")
	}
	if _, err := policy.Parse([]byte(text)); err != nil {
		t.Fatal(err)
	}
	m := simulate.DefaultMeasurement()
	for from, to := range map[string]string{
		`"allowSimulated": false`: `"allowSimulated": true`, `, "snp.crl"`: "",
		"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f": hex.EncodeToString(m[:]),
	} {
		if strings.Count(text, from) != 1 {
			t.Fatalf("the policy has no %s", from)
		}
		text = strings.Replace(text, from, to, 1)
	}
	return []byte(text)
}

// TestAppraisesKBSGuests has the daemon appraise a guest for a broker, under the
// policy that its operator wrote and named.
func TestAppraisesKBSGuests(t *testing.T) {
	dir, c, _ := setup(t)
	if err := pki.Issue(filepath.Join(dir, "pki"), daemon.RoleBroker, "x"); err != nil {
		t.Fatal(err)
	}
	document := documentedPolicy(t)
	policies := filepath.Join(dir, "policies")
	if err := os.Mkdir(policies, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(policies, "guests.json"), document, 0o600); err != nil {
		t.Fatal(err)
	}
	c["policiesDir"], c["kbsPolicy"] = policies, "guests"
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	path := write(t, dir, c)
	go func() { done <- run(ctx, []string{"--config", path}, nil, nil, io.Discard) }()

	broker, err := pki.Files(filepath.Join(dir, "pki"), daemon.RoleBroker, "x").HTTPClient(daemon.RoleVerifier)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := pki.Files(filepath.Join(dir, "pki"), daemon.RoleAgent, "x").HTTPClient(daemon.RoleVerifier)
	if err != nil {
		t.Fatal(err)
	}
	base := fmt.Sprintf("https://%s", c["listen"])
	get := func(path string) (b []byte) {
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if resp, err := broker.Get(base + path); err == nil {
				defer resp.Body.Close()
				if b, err = io.ReadAll(resp.Body); err != nil {
					t.Fatal(err)
				}
				return b
			}
		}
		t.Fatal("the verifier does not answer")
		return nil
	}
	keys, err := receipt.ParseKeys("verifier.simulated.test", get(serve.JWKSPath))
	if err != nil {
		t.Fatal(err)
	}
	chip, _, err := simulate.LoadDevices(filepath.Join(dir, "simulation"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	g := &verifiertest.KBSGuest{Chip: chip, Key: key, InitData: "version = \"0.1.0\"\n"}
	a, err := g.Attestation("nonce")
	if err != nil {
		t.Fatal(err)
	}
	request, err := verifiertest.KBSRequest("broker", "kbs-1", "snp", "nonce", a)
	if err != nil {
		t.Fatal(err)
	}
	post := func(hc *http.Client) (int, string) {
		resp, err := hc.Post(base+serve.KBSPath, "application/json", bytes.NewReader(request))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var out struct{ Token string }
		if resp.StatusCode == http.StatusOK {
			if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
				t.Fatal(err)
			}
		}
		return resp.StatusCode, out.Token
	}
	if code, _ := post(agent); code != http.StatusForbidden {
		t.Errorf("an agent: %d", code)
	}
	code, token := post(broker)
	if code != http.StatusOK {
		t.Fatalf("a broker: %d", code)
	}
	jwk := g.JWK()
	thumbprint, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	want := receipt.KBSExpect{Audience: "broker", Nonce: "nonce", Session: "kbs-1", TEE: "snp", Key: thumbprint, AllowSimulated: true}
	r, err := receipt.VerifyKBS(keys, token, want, time.Now())
	if err != nil || r.InitData != plan.Sum([]byte(g.InitData)) || !r.Simulated {
		t.Errorf("%+v, %v", r, err)
	}
	want.AllowSimulated = false
	if _, err := receipt.VerifyKBS(keys, token, want, time.Now()); err == nil {
		t.Error("a simulated guest passes for a real one")
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
