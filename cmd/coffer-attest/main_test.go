package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/emulate/server"
	"github.com/coffer-run/coffer/internal/keystore"
	"github.com/coffer-run/coffer/internal/keystore/attestation"
	"github.com/coffer-run/coffer/internal/loopback"
	"github.com/coffer-run/coffer/plugins/host"
)

// asCommand makes the test's binary this program.
const asCommand = "COFFER_ATTEST_TEST_COMMAND"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == asCommand {
		os.Args = append(os.Args[:1], os.Args[2:]...)
		daemon.Main(run)
	}
	os.Exit(m.Run())
}

// machinePolicy asks for the CPU's report alone.
const machinePolicy = `{
  "version": "coffer.run/policy/v1", "name": %q, "allowSimulated": true,
  "snp": {"require": ["snp.chain", "snp.signature", "snp.report-data"], "allowDebug": false, "allowMigration": false, "maxVMPL": 0, "products": ["Milan", "Genoa", "Turin"]}
}`

// site is a verifier, as its program, an emulated machine and a key store.
type site struct {
	dir, verifier string
	tsm           string
	policies      map[string]plan.Policy
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{dir: t.TempDir(), policies: map[string]plan.Policy{}}
	for _, program := range []string{"coffer-verifier-simulated", "coffer-keystore-local"} {
		if bin := os.Getenv("COFFER_BIN"); bin != "" {
			try(t, os.Symlink(filepath.Join(bin, program), s.path(program)))
			continue
		}
		cmd := exec.Command("go", "build", "-o", s.path(program), "../"+program)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	try(t, simulate.Mint(s.path("simulation"), simulate.Options{Fast: true}))
	s.tsm = emulatedPrefix + s.devices(t)
	try(t, pki.Create(s.path("pki")))
	for role, name := range map[string]string{daemon.RoleVerifier: "verifier", daemon.RoleAgent: "broker-machine"} {
		try(t, pki.Issue(s.path("pki"), role, name))
	}
	try(t, keyfile.CreateP384(s.path("verifier.pem")))
	try(t, keyfile.CreateSecret(s.path("nonce.key"), 32))
	try(t, os.Mkdir(s.path("policies"), 0o700))
	for _, name := range []string{"machine", "laxer"} {
		b := fmt.Appendf(nil, machinePolicy, name)
		s.write(t, "policies/"+name+".json", b)
		p, err := policy.Parse(b)
		try(t, err)
		s.policies[name], err = p.Ref()
		try(t, err)
	}
	s.verifier = loopback.Addr(t)
	s.json(t, "verifier.json", map[string]any{
		"listen": s.verifier, "tls": pki.Files(s.path("pki"), daemon.RoleVerifier, "verifier"), "id": "verifier-simulated", "keyFile": s.path("verifier.pem"),
		"nonceKeyFile": s.path("nonce.key"), "simulationDir": s.path("simulation"), "policiesDir": s.path("policies"),
	})
	key, err := keyfile.ReadP384(s.path("verifier.pem"))
	try(t, err)
	signer, err := receipt.NewSigner("verifier-simulated", key)
	try(t, err)
	jwks, err := signer.JWKS()
	try(t, err)
	s.write(t, "jwks.json", jwks)
	s.run(t)
	return s
}

// devices plays the machine's and returns the socket.
func (s *site) devices(t *testing.T) string {
	t.Helper()
	d, err := server.Load(server.Config{SimulationDir: s.path("simulation"), GPUs: 1}, slog.New(slog.DiscardHandler))
	try(t, err)
	// A socket's path has little room.
	dir, err := os.MkdirTemp("", "attest")
	try(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	l, err := server.Listen(ctx, filepath.Join(dir, "devices"))
	try(t, err)
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "devices")
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(t *testing.T, name string, b []byte) {
	t.Helper()
	try(t, os.WriteFile(s.path(name), b, 0o600))
}

func (s *site) json(t *testing.T, name string, v any) {
	t.Helper()
	b, err := json.Marshal(v)
	try(t, err)
	s.write(t, name, b)
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run starts the verifier and waits until it answers.
func (s *site) run(t *testing.T) {
	t.Helper()
	var log bytes.Buffer
	cmd := exec.Command(s.path("coffer-verifier-simulated"), "--config", s.path("verifier.json"))
	cmd.Stderr = &log
	try(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Logf("the verifier: %v\n%s", err, log.String())
		}
	})
	for range 2400 {
		if c, err := net.Dial("tcp", s.verifier); err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	t.Fatalf("the verifier does not answer: %s", log.String())
}

// store makes a key store that asks for results by a policy, and starts it for a
// broker whose machine attests under another.
func (s *site) store(t *testing.T, name, wants, attestsUnder string, simulated bool) (*keystore.Store, error) {
	t.Helper()
	s.write(t, name+".passphrase", []byte("correct horse battery staple\n"))
	s.json(t, name+".json", map[string]any{
		"store": name, "file": s.path(name + ".keys"), "passphraseFile": s.path(name + ".passphrase"),
		"attestation": attestation.Config{Verifier: "verifier-simulated", KeysFile: s.path("jwks.json"), Policy: s.policies[wants].Digest, Simulated: simulated},
	})
	program := s.path("coffer-keystore-local")
	if out, err := exec.Command(program, "--config", s.path(name+".json"), "create", "default").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	sum, err := host.Checksum(program)
	try(t, err)
	s.json(t, name+"-attest.json", Config{
		TLS: pki.Files(s.path("pki"), daemon.RoleAgent, "broker-machine"), TSM: s.tsm, Policy: s.policies[attestsUnder],
		Verifier: Verifier{URL: "https://" + s.verifier, ID: "verifier-simulated", KeysFile: s.path("jwks.json")},
	})
	exe, err := os.Executable()
	try(t, err)
	own, err := host.Checksum(exe)
	try(t, err)
	prover, err := attestation.NewProver(attestation.Program(host.Config{Path: exe, SHA256: own, Args: []string{asCommand, "--config", s.path(name + "-attest.json")}}), time.Now)
	try(t, err)
	k, err := keystore.Start(t.Context(), keystore.Config{Name: name, Plugin: host.Config{Path: program, SHA256: sum, Args: []string{"--config", s.path(name + ".json")}}}, prover, slog.New(slog.DiscardHandler))
	if k != nil {
		t.Cleanup(func() { _ = k.Close() })
	}
	return k, err
}

// TestKeyStoreAsks is a broker whose machine attests, by this program, to a real
// verifier for a key store's program that asks: simulated evidence of an emulated
// chip, and everything else as in production.
func TestKeyStoreAsks(t *testing.T) {
	s := newSite(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ad := []byte("weights")
	t.Run("a machine as the owner wants it", func(t *testing.T) {
		k, err := s.store(t, "good", "machine", "machine", true)
		try(t, err)
		key := broker.GenerateDataKey()
		plain := bytes.Clone(key.Reveal())
		wrapped, err := k.Wrap(ctx, key, ad)
		try(t, err)
		got, held, err := k.UnwrapHeld(ctx, wrapped, ad)
		try(t, err)
		if !bytes.Equal(got.Reveal(), plain) {
			t.Error("another key came back")
		}
		if held.Store != "good" || held.Key != "default" || held.Version != 1 || held.Attested.Bytes() == nil {
			t.Errorf("held by %+v", held)
		}
	})
	t.Run("another policy", func(t *testing.T) { s.refused(ctx, t, "other", "machine", "laxer", true, "result.policy") })
	t.Run("simulated", func(t *testing.T) { s.refused(ctx, t, "strict", "machine", "machine", false, "result.simulated") })
}

func (s *site) refused(ctx context.Context, t *testing.T, name, wants, under string, simulated bool, id string) {
	t.Helper()
	k, err := s.store(t, name, wants, under, simulated)
	try(t, err)
	if _, err := k.Wrap(ctx, broker.GenerateDataKey(), nil); err == nil || !strings.Contains(err.Error(), id) {
		t.Errorf("wrapped, which looks whether it opens: %v", err)
	}
}

func TestRequestRefused(t *testing.T) {
	c := filepath.Join(t.TempDir(), "attest.json")
	try(t, os.WriteFile(c, []byte(`{"tsm": "emulated:/nowhere"}`), 0o600))
	for name, in := range map[string]string{
		"nothing":          "",
		"no keys":          `{"audience": "key-store:a"}`,
		"an unknown field": `{"audience": "a", "more": 1}`,
		"too much":         `{"audience": "` + strings.Repeat("x", attestation.MaxRequest) + `"}`,
	} {
		var out bytes.Buffer
		if err := run(t.Context(), []string{"--config", c}, strings.NewReader(in), &out, io.Discard); err == nil || out.Len() > 0 {
			t.Errorf("%s: %v, %q", name, err, out.String())
		}
	}
}
