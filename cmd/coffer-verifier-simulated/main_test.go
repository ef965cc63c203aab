package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
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
	sim := filepath.Join(dir, "simulation")
	must(simulate.Mint(sim, simulate.Options{Fast: true}))
	tpm, err := vtpmtest.New(time.Now())
	must(err)
	must(os.MkdirAll(filepath.Join(sim, "roots", "tpm"), 0o700))
	must(os.WriteFile(filepath.Join(sim, simulate.EKRootFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tpm.Root.Raw}), 0o600))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	addr := l.Addr().String()
	must(l.Close())
	return dir, config{
		"listen": addr, "tls": pki.Files(p, daemon.RoleVerifier, "x"), "id": "verifier.simulated.test",
		"keyFile": filepath.Join(dir, "key.pem"), "nonceKeyFile": filepath.Join(dir, "nonce.key"), "simulationDir": sim,
	}, tpm
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
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
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
	e := collect(t, filepath.Join(dir, "simulation"), tpm, nonce.Msg, cred.Msg.GetAkCredential())
	b, err := json.Marshal(e)
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

func collect(t *testing.T, sim string, tpm *vtpmtest.TPM, ch *verifierv1.ChallengeResponse, credential string) evidence.Envelope {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	chip, gpus, err := simulate.LoadDevices(sim)
	must(err)
	profile := plan.Profile{Version: plan.SandboxVersion, ShimDigest: plan.Sum([]byte("shim")), RuntimeDigest: plan.Sum([]byte("runsc")), Trace: plan.Sum([]byte("trace"))}
	pd, err := profile.Digest()
	must(err)
	pol, err := policy.Named("simulation")
	must(err)
	ref, err := pol.Ref()
	must(err)
	image := "sha256:" + strings.Repeat("ab", 32)
	pb, err := plan.Plan{
		Version: plan.Version, Name: "job", Image: image, Command: []string{"/bin/true"}, Inputs: []plan.Input{}, Output: plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, GPUs: 1, MaxSeconds: 1}, Policy: ref, SandboxProfile: pd,
	}.Canonical()
	must(err)
	sb, err := plan.Sandbox{Version: plan.SandboxVersion, JobID: "job-1", Image: image, Profile: profile, Trace: json.RawMessage(`{}`), Spec: json.RawMessage(`{}`)}.Canonical()
	must(err)
	rk, err := hpke.MLKEM768X25519().GenerateKey()
	must(err)
	sk, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	session, err := x509.MarshalPKIXPublicKey(&sk.PublicKey)
	must(err)
	e := evidence.Envelope{
		Version: evidence.Version, VerifierID: ch.GetVerifierId(), Nonce: ch.GetNonce(), JobID: "job-1", Plan: pb, Sandbox: sb,
		RecipientKey: rk.PublicKey().Bytes(), SessionKey: session, TPM: &evidence.TPM{AKPublic: tpm.AKPublic, AKCredential: credential},
	}
	bound, err := e.Challenge().Bind()
	must(err)
	g := gpus[0]
	report, err := g.Report(bound.GPUNonce(), simulate.GPUOptions{})
	must(err)
	e.GPUs = []evidence.GPU{{UUID: g.UUID(), Report: report, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()}}
	extra := bound.TPMExtraData(e.Devices())
	e.TPM.Quote, e.TPM.Signature, err = tpm.Quote(extra[:], nil, vtpm.AgentPCR)
	must(err)
	e.TPM.PCRs = tpm.PCRs(vtpm.AgentPCR)
	e.TPM.EventLog, err = vtpm.EncodeLog(nil)
	must(err)
	r, err := chip.Report(bound.SNPReportData(e.Devices(), e.TPM.Quote, e.TPM.EventLog), simulate.SNPOptions{})
	must(err)
	e.SNP = &evidence.SNP{Report: r, Certificates: chip.CertTable()}
	return e
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
		"endorsement key roots":       {func(c config) { c["ekRoots"] = []config{} }, "unknown field"},
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
