package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/verifier/verifiertest"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/loopback"
)

type config map[string]any

func setup(t *testing.T) (dir string, c config, tpm *vtpmtest.TPM) {
	t.Helper()
	dir = t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := filepath.Join(dir, "pki")
	must(pki.Create(p))
	must(pki.Issue(p, daemon.RoleVerifier, "x"))
	must(pki.Issue(p, daemon.RoleAgent, "x"))
	must(keyfile.CreateP384(filepath.Join(dir, "key.pem")))
	must(keyfile.CreateSecret(filepath.Join(dir, "nonce.key"), verifier.NonceKeySize))
	sim, tpm := mint(t, dir)
	return dir, config{
		"listen": loopback.Addr(t), "tls": pki.Files(p, daemon.RoleVerifier, "x"), "id": "verifier.simulated.test",
		"keyFile": filepath.Join(dir, "key.pem"), "nonceKeyFile": filepath.Join(dir, "nonce.key"), "simulationDir": sim,
	}, tpm
}

// trust makes a TPM whose maker a simulation trusts.
func trust(t *testing.T, simulation string) *vtpmtest.TPM {
	t.Helper()
	tpm, err := vtpmtest.New(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(simulation, simulate.EKRootFile)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tpm.Root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tpm
}

// machine has the devices that the simulation minted.
func machine(t *testing.T, dir string, tpm *vtpmtest.TPM, credential string) *verifiertest.Machine {
	t.Helper()
	chip, gpus, err := simulate.LoadDevices(filepath.Join(dir, "simulation"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	return &verifiertest.Machine{Chip: chip, GPU: gpus[0], TPM: tpm, Policy: p, Credential: credential}
}

func write(t *testing.T, dir string, c config) string {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestAppraisesOverTheWire takes the devices that a simulation minted through
// enrolment and appraisal by the daemon, to a result that a broker accepts.
func TestAppraisesOverTheWire(t *testing.T) {
	dir, c, tpm := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	var log bytes.Buffer
	done := make(chan error, 1)
	path := write(t, dir, c)
	go func() { done <- run(ctx, []string{"--config", path}, nil, nil, &log) }()

	hc, err := pki.Files(filepath.Join(dir, "pki"), daemon.RoleAgent, "x").HTTPClient(daemon.RoleVerifier)
	if err != nil {
		t.Fatal(err)
	}
	client := verifierv1connect.NewVerifierServiceClient(hc, fmt.Sprintf("https://%s", c["listen"]))
	var keys *connect.Response[verifierv1.KeysResponse]
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if keys, err = client.Keys(t.Context(), connect.NewRequest(&verifierv1.KeysRequest{})); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := receipt.ParseKeys("verifier.simulated.test", keys.Msg.GetJwks())
	if err != nil {
		t.Fatal(err)
	}

	begun, err := client.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: tpm.EKChain, AkPublic: tpm.AKPublic}))
	if err != nil {
		t.Fatal(err)
	}
	secret, err := tpm.Activate(begun.Msg.GetCredentialBlob(), begun.Msg.GetEncryptedSecret())
	if err != nil {
		t.Fatal(err)
	}
	cred, err := client.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{Enrolment: begun.Msg.GetEnrolment(), Secret: secret}))
	if err != nil {
		t.Fatal(err)
	}
	nonce, err := client.Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	e, err := machine(t, dir, tpm, cred.Msg.GetAkCredential()).Attest(nonce.Msg.GetVerifierId(), nonce.Msg.GetNonce(), "job-1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.JSON()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: b, Audience: "broker"}))
	if err != nil {
		t.Fatal(err)
	}
	want := receipt.Expect{Audience: "broker", JobID: "job-1", Plan: plan.Sum(e.Plan), AllowSimulated: true}
	v, err := receipt.VerifyResult(pinned, resp.Msg.GetResult(), want, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if !v.Result().Simulated || len(v.Result().Submods) != 3 {
		t.Errorf("result %+v", v.Result())
	}
	// Whoever does not accept simulation is told so by the result itself.
	want.AllowSimulated = false
	if _, err := receipt.VerifyResult(pinned, resp.Msg.GetResult(), want, time.Now()); err == nil || !strings.Contains(err.Error(), "result.simulated") {
		t.Errorf("a simulated result passes for a real one: %v", err)
	}

	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{`"simulated":true`, `"accepted":true`, name} {
		if !strings.Contains(log.String(), s) {
			t.Errorf("the log lacks %s", s)
		}
	}
	if strings.Contains(log.String(), string(e.Nonce)) {
		t.Error("the log holds a nonce")
	}
}

func TestRefusesToStart(t *testing.T) {
	dir := t.TempDir()
	good := config{"listen": "127.0.0.1:0", "id": "verifier.simulated.test", "simulationDir": dir}
	for situation, row := range map[string]struct {
		change func(c config)
		says   string
	}{
		"no simulation":               {func(c config) { delete(c, "simulationDir") }, "simulationDir"},
		"folder without a simulation": {func(c config) { c["simulationDir"] = dir }, "simulation"},
		"name that hides it":          {func(c config) { c["id"] = "verifier.test" }, "must say"},
		"real roots for a simulation": {func(c config) { c["anchors"] = "vendor" }, "unknown field"},
	} {
		t.Run(situation, func(t *testing.T) {
			c := config{}
			for k, v := range good {
				c[k] = v
			}
			row.change(c)
			err := run(t.Context(), []string{"--config", write(t, t.TempDir(), c)}, nil, nil, &bytes.Buffer{})
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Fatalf("got %v, want something about %q", err, row.says)
			}
		})
	}
	if err := run(t.Context(), nil, nil, nil, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "--config") {
		t.Errorf("without a configuration: %v", err)
	}
}
