package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/oklog/ulid/v2"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/collect/tpm"
	"github.com/coffer-run/coffer/enclave/collect/tsm"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/runner/remote"
)

// attacker is root on the node: it has the agent's identity, the devices, the
// plan and the sandbox description of a job that was approved, and keys of its
// own. What it lacks is an attested job.
type attacker struct {
	node       *node
	verifier   *remote.Verifier
	broker     brokerv1connect.BrokerServiceClient
	brokerID   string
	brokerKeys receipt.Keys
	tpm        *tpm.TPM
	credential string
	collector  collect.Collector
	gpus       []string
	chip       *simulate.Chip
	plan       []byte
	digest     plan.Digest
	sandbox    plan.Sandbox
	recipient  *keys.Recipient
	session    *keys.Session
}

// newAttacker takes plan and sandbox from the bundle of an honest job.
func newAttacker(t *testing.T, n *node, honest []byte) *attacker {
	t.Helper()
	ctx := t.Context()
	a := &attacker{node: n}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := bundle.Parse(honest)
	must(err)
	a.plan = b.Parts[bundle.Plan]
	a.digest = plan.Sum(a.plan)
	a.sandbox, err = plan.ParseSandbox(b.Parts[bundle.Sandbox])
	must(err)

	ep, err := stack.OpenEndpoint(n.dir)
	must(err)
	client := func(server string) *http.Client {
		c, err := ep.HTTPClient(daemon.RoleAgent, server)
		must(err)
		return c
	}
	read := func(parts ...string) []byte {
		b, err := os.ReadFile(filepath.Join(append([]string{n.dir}, parts...)...))
		must(err)
		return b
	}
	var cfg struct {
		Verifier, Broker struct{ ID string }
		TPM              string `json:"tpm"`
	}
	must(json.Unmarshal(read("config", "cofferd.json"), &cfg))
	a.verifier, err = remote.NewVerifier(remote.Service{URL: ep.Verifier(), ID: cfg.Verifier.ID, HTTP: client(daemon.RoleVerifier), JWKS: read("verifier", "jwks.json")})
	must(err)
	a.brokerID = cfg.Broker.ID
	a.broker = brokerv1connect.NewBrokerServiceClient(client(daemon.RoleBroker), ep.Broker())
	a.brokerKeys, err = receipt.ParseKeys(a.brokerID, read("broker", "jwks.json"))
	must(err)

	a.tpm, err = tpm.Open(ctx, cfg.TPM, tpm.Options{})
	must(err)
	t.Cleanup(func() { a.tpm.Close() })
	log := filepath.Join(t.TempDir(), "event-log")
	must(os.WriteFile(log, read("agent", "event-log"), 0o600))
	events, err := vtpm.ParseLog(read("agent", "event-log"))
	must(err)
	// What was measured last is in the log, so that nothing is extended.
	_, err = a.tpm.Measure(ctx, log, events[len(events)-1:])
	must(err)
	chain, err := a.tpm.EKChain(ctx)
	must(err)
	a.credential, err = a.verifier.Enrol(ctx, chain, a.tpm.AKPublic(), a.tpm.Activate)
	must(err)

	devices := emulate.Dial(ep.Emulator())
	inventory, err := devices.Do(ctx, emulate.Request{Op: emulate.OpGPUs})
	must(err)
	for _, g := range inventory.GPUs.Devices {
		a.gpus = append(a.gpus, g.UUID)
	}
	a.collector = collect.Collector{TPM: a.tpm, SNP: tsm.New(emulate.NewTSM(devices)), GPUs: gpuSource{devices}}
	a.chip, _, err = simulate.LoadDevices(filepath.Join(n.dir, "simulation"))
	must(err)
	a.recipient, err = keys.GenerateRecipient()
	must(err)
	a.session, err = keys.GenerateSession()
	must(err)
	return a
}

// gpuSource asks the emulated GPUs without the plugin in between.
type gpuSource struct{ devices *emulate.Client }

func (g gpuSource) Collect(ctx context.Context, nonce [32]byte, uuids []string) ([]evidence.GPU, error) {
	inv, err := g.devices.Do(ctx, emulate.Request{Op: emulate.OpGPUs})
	if err != nil {
		return nil, err
	}
	var out []evidence.GPU
	for _, d := range inv.GPUs.Devices {
		for _, u := range uuids {
			if u != d.UUID {
				continue
			}
			r, err := g.devices.Do(ctx, emulate.Request{Op: emulate.OpGPUReport, UUID: u, Nonce: nonce[:]})
			if err != nil {
				return nil, err
			}
			out = append(out, evidence.GPU{UUID: u, Report: r.Report, Chain: d.Chain, DriverVersion: inv.GPUs.DriverVersion, VBIOSVersion: d.VBIOSVersion})
		}
	}
	return out, nil
}

// request is what an honest agent would ask its collector for, with a fresh nonce.
func (a *attacker) request(t *testing.T) collect.Request {
	t.Helper()
	nonce, err := a.verifier.Challenge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := collect.Request{
		VerifierID: a.verifier.ID(), Nonce: nonce, JobID: ulid.Make().String(), Plan: a.plan,
		RecipientKey: a.recipient.Public(), SessionKey: a.session.Public(), AKCredential: a.credential,
		Want: collect.Want{TPM: true, SNP: true, GPUs: a.gpus},
	}
	r.Sandbox = a.describe(t, r.JobID, nil)
	return r
}

// describe returns the approved sandbox's description for another job.
func (a *attacker) describe(t *testing.T, job string, edit func(*plan.Sandbox)) []byte {
	t.Helper()
	s := a.sandbox
	s.JobID = job
	if edit != nil {
		edit(&s)
	}
	b, err := s.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (a *attacker) collect(t *testing.T, r collect.Request) *evidence.Envelope {
	t.Helper()
	env, err := a.collector.Collect(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if len(env.Failures) > 0 {
		t.Fatalf("collection failed: %v", env.Failures)
	}
	return env
}

// appraise sends evidence to the verifier for an audience and checks the result
// as the broker would.
func (a *attacker) appraise(t *testing.T, env *evidence.Envelope, audience string) (receipt.Verified, string, error) {
	t.Helper()
	b, err := plan.Canonical(env)
	if err != nil {
		t.Fatal(err)
	}
	return a.verifier.Appraise(t.Context(), b, receipt.Expect{Audience: audience, AnyJob: true, AllowSimulated: true})
}

// attest is an appraisal that must succeed.
func (a *attacker) attest(t *testing.T) (receipt.Verified, string) {
	t.Helper()
	v, token, err := a.appraise(t, a.collect(t, a.request(t)), a.brokerID)
	if err != nil {
		t.Fatalf("honest evidence is refused: %v", err)
	}
	return v, token
}

// release asks the broker for a key, signing with session.
func (a *attacker) release(t *testing.T, token, resultID, grant, asset string, session *keys.Session) (*brokerv1.ReleaseResponse, error) {
	t.Helper()
	req, err := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: a.brokerID, Grant: grant, Attempt: 1, ResultID: resultID, Asset: asset}.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	sig, err := session.SignRelease(req)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := a.broker.Release(ctx, connect.NewRequest(&brokerv1.ReleaseRequest{Result: token, Request: req, Signature: sig}))
	if err != nil {
		if ref, ok := refusal.Decode(err); ok {
			return nil, ref
		}
		return nil, err
	}
	return r.Msg, nil
}

// verifierSigner is the verifier's own key, which only a test may take.
func (a *attacker) verifierSigner(t *testing.T) *receipt.Signer {
	t.Helper()
	key, err := keyfile.ReadP384(filepath.Join(a.node.dir, "verifier", "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(a.verifier.ID(), key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// production starts the production verifier beside the stack's, with a key of
// its own, and returns an attacker whose TPM is enrolled there and whose plan is
// under the production policy.
func (a *attacker) production(t *testing.T) *attacker {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const id = "verifier.production.test"
	key, nonce := filepath.Join(dir, "key.pem"), filepath.Join(dir, "nonce.key")
	must(keyfile.CreateP384(key))
	must(keyfile.CreateSecret(nonce, verifier.NonceKeySize))
	pki := filepath.Join(a.node.dir, "pki")
	addr := fmt.Sprintf("127.0.0.1:%d", a.node.portBase+7)
	config, err := json.Marshal(map[string]any{
		"listen": addr, "id": id, "keyFile": key, "nonceKeyFile": nonce,
		"tls":     daemon.TLS{CA: filepath.Join(pki, "ca.pem"), Cert: filepath.Join(pki, "verifier-verifier.pem"), Key: filepath.Join(pki, "verifier-verifier.key")},
		"ekRoots": []map[string]string{{"class": "discrete", "file": filepath.Join(a.node.dir, "simulation", simulate.EKRootFile)}},
	})
	must(err)
	path := filepath.Join(dir, "config.json")
	must(os.WriteFile(path, config, 0o600))
	var log bytes.Buffer
	cmd := exec.Command(filepath.Join(a.node.bin, "coffer-verifier"), "--config", path)
	cmd.Stderr = &log
	must(cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("production verifier: %s", &log)
		}
	})

	read, err := keyfile.ReadP384(key)
	must(err)
	signer, err := receipt.NewSigner(id, read)
	must(err)
	jwks, err := signer.JWKS()
	must(err)
	client, err := daemon.TLS{CA: filepath.Join(pki, "ca.pem"), Cert: filepath.Join(pki, "agent-node-1.pem"), Key: filepath.Join(pki, "agent-node-1.key")}.HTTPClient(daemon.RoleVerifier)
	must(err)
	p := *a
	p.verifier, err = remote.NewVerifier(remote.Service{URL: "https://" + addr, ID: id, HTTP: client, JWKS: jwks})
	must(err)
	chain, err := a.tpm.EKChain(t.Context())
	must(err)
	p.credential, err = p.verifier.Enrol(t.Context(), chain, a.tpm.AKPublic(), a.tpm.Activate)
	must(err)
	pl, err := plan.Parse(a.plan)
	must(err)
	pol, err := policy.Named("production")
	must(err)
	pl.Policy, err = pol.Ref()
	must(err)
	p.plan, err = pl.Canonical()
	must(err)
	return &p
}
