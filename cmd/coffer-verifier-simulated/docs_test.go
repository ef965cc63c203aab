package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/daemon"
)

var fence = regexp.MustCompile("(?ms)^```(sh|json)\n(.*?)^```$")

// TestDocumentedByItself types what docs/verifier.md says, in its order, against
// the daemon over TLS. What the page leaves to the attester is a simulation's.
func TestDocumentedByItself(t *testing.T) {
	for _, tool := range []string{"openssl", "curl", "jq", "base64", "bash"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	page, err := os.ReadFile("../../docs/verifier.md")
	if err != nil {
		t.Fatal(err)
	}
	var shell []string
	var document string
	for _, m := range fence.FindAllStringSubmatch(string(page), -1) {
		if m[1] == "json" {
			document = m[2]
		} else {
			shell = append(shell, m[2])
		}
	}
	if len(shell) != 4 || document == "" {
		t.Fatalf("the page has %d fences of commands: this test follows four, and a configuration", len(shell))
	}
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	const documented = "127.0.0.1:7441"
	bash := func(commands string) {
		t.Helper()
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", strings.ReplaceAll(commands, documented, addr))
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s\n%v\n%s", commands, err, out)
		}
	}
	read := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}

	bash(shell[0])
	bash(shell[1])
	tpm := startDocumented(t, dir, strings.ReplaceAll(document, documented, addr))

	hc, err := daemon.TLS{CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, "party.pem"), Key: filepath.Join(dir, "party.key")}.HTTPClient(daemon.RoleVerifier)
	if err != nil {
		t.Fatal(err)
	}
	client := verifierv1connect.NewVerifierServiceClient(hc, "https://"+addr)
	credential := enrol(t, client, tpm)
	bash(shell[2])
	nonce := read("nonce.txt")
	e, err := machine(t, dir, tpm, credential).Attest("verifier.example.simulated", nonce, "attempt-1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "evidence.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	bash(shell[3])

	if got := read("status.txt"); got != "affirming\naffirming\naffirming" {
		t.Errorf("status %q: %s", got, read("answer.json"))
	}
	keys, err := receipt.ParseKeys("verifier.example.simulated", []byte(read("verifier.jwks")))
	if err != nil {
		t.Fatal(err)
	}
	var r receipt.Result
	if err := keys.Open(verifier.TypeCheck, read("result.jwt"), &r); err != nil {
		t.Fatal(err)
	}
	if r.Nonce != nonce || r.Audience != "party.example" || !r.Simulated || len(r.AllChecks().Failed()) > 0 {
		t.Errorf("nonce %s, audience %s, simulated %v, failed %v", r.Nonce, r.Audience, r.Simulated, r.AllChecks().Failed())
	}
}

func enrol(t *testing.T, c verifierv1connect.VerifierServiceClient, tpm *vtpmtest.TPM) string {
	t.Helper()
	var begun *connect.Response[verifierv1.BeginEnrolmentResponse]
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if begun, err = c.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: tpm.EKChain, AkPublic: tpm.AKPublic})); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	secret, err := tpm.Activate(begun.Msg.GetCredentialBlob(), begun.Msg.GetEncryptedSecret())
	if err != nil {
		t.Fatal(err)
	}
	done, err := c.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{Enrolment: begun.Msg.GetEnrolment(), Secret: secret}))
	if err != nil {
		t.Fatal(err)
	}
	return done.Msg.GetAkCredential()
}

// startDocumented runs the daemon with the page's configuration, over the roots
// of a simulation, and stops it when the test ends.
func startDocumented(t *testing.T, dir, document string) *vtpmtest.TPM {
	t.Helper()
	simulation, tpm := mint(t, dir)
	var c map[string]any
	if err := json.Unmarshal([]byte(document), &c); err != nil {
		t.Fatal(err)
	}
	c["simulationDir"], c["id"] = simulation, c["id"].(string)+".simulated"
	if err := os.Mkdir(filepath.Join(dir, c["policiesDir"].(string)), 0o700); err != nil {
		t.Fatal(err)
	}
	c["policiesDir"] = filepath.Join(dir, c["policiesDir"].(string))
	for _, k := range []string{"keyFile", "nonceKeyFile"} {
		c[k] = filepath.Join(dir, c[k].(string))
	}
	for k, v := range c["tls"].(map[string]any) {
		c["tls"].(map[string]any)[k] = filepath.Join(dir, v.(string))
	}
	path := write(t, dir, c)
	ctx, cancel := context.WithCancel(context.Background())
	var log bytes.Buffer
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"--config", path}, nil, nil, &log) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil || t.Failed() {
			t.Errorf("the daemon: %v\n%s", err, &log)
		}
	})
	return tpm
}

// mint makes a simulation, and a TPM that it trusts.
func mint(t *testing.T, dir string) (string, *vtpmtest.TPM) {
	t.Helper()
	simulation := filepath.Join(dir, "simulation")
	if err := simulate.Mint(simulation, simulate.Options{Fast: true}); err != nil {
		t.Fatal(err)
	}
	return simulation, trust(t, simulation)
}
