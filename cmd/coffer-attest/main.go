// Command coffer-attest collects the evidence of the machine that it runs on, for
// keys that its caller has, and prints what a verifier says of it. coffer-broker
// runs it for key stores that ask what their caller is, and so links no code that
// collects or parses evidence.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/collect/tsm"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/keystore/attestation"
	"github.com/coffer-run/coffer/runner/remote"
)

const emulatedPrefix = "emulated:"

// Config is the configuration file. Every field is required.
type Config struct {
	// TLS is an identity of role agent: verifiers judge agents' machines.
	TLS daemon.TLS `json:"tls"`
	// TSM is "configfs" for the kernel's SEV-SNP reports, or "emulated:SOCKET".
	TSM string `json:"tsm"`
	// Policy is the attestation policy to be judged by: one that asks for the CPU's
	// report alone.
	Policy   plan.Policy `json:"policy"`
	Verifier Verifier    `json:"verifier"`
}

// Verifier is the verifier to ask, with its public keys pinned.
type Verifier struct {
	URL      string `json:"url"`
	ID       string `json:"id"`
	KeysFile string `json:"keysFile"`
}

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	path, err := daemon.ConfigFlag("coffer-attest", args, stderr)
	if err != nil {
		return err
	}
	var c Config
	if err := daemon.ReadConfig(path, &c); err != nil {
		return err
	}
	in, err := io.ReadAll(io.LimitReader(stdin, attestation.MaxRequest+1))
	if err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	var r attestation.Request
	if err := plan.Decode(in, attestation.MaxRequest, &r); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	token, err := c.attest(ctx, r)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, token)
	return err
}

func (c Config) attest(ctx context.Context, r attestation.Request) (string, error) {
	if r.Audience == "" || len(r.RecipientKey) == 0 || len(r.SessionKey) == 0 {
		return "", errors.New("request names no audience or no keys")
	}
	snp, err := open(c.TSM)
	if err != nil {
		return "", err
	}
	jwks, err := os.ReadFile(c.Verifier.KeysFile)
	if err != nil {
		return "", fmt.Errorf("keys of verifier %s: %w", c.Verifier.ID, err)
	}
	client, err := c.TLS.HTTPClient(daemon.RoleVerifier)
	if err != nil {
		return "", err
	}
	defer client.CloseIdleConnections()
	v, err := remote.NewVerifier(remote.Service{URL: c.Verifier.URL, ID: c.Verifier.ID, HTTP: client, JWKS: jwks})
	if err != nil {
		return "", err
	}
	document, sandbox, err := documents(c.Policy)
	if err != nil {
		return "", err
	}
	nonce, err := v.Challenge(ctx)
	if err != nil {
		return "", err
	}
	collector := collect.Collector{SNP: snp}
	env, err := collector.Collect(ctx, collect.Request{
		VerifierID: v.ID(), Nonce: nonce, JobID: attestation.JobID, Plan: document, Sandbox: sandbox,
		RecipientKey: r.RecipientKey, SessionKey: r.SessionKey, Want: collect.Want{SNP: true},
	})
	if err != nil {
		return "", err
	}
	b, err := plan.Canonical(env)
	if err != nil {
		return "", fmt.Errorf("encode evidence: %w", err)
	}
	_, token, err := v.Appraise(ctx, b, receipt.Expect{Audience: r.Audience, JobID: attestation.JobID, Plan: plan.Sum(document), AllowSimulated: true})
	return token, err
}

func open(where string) (*tsm.Source, error) {
	if socket, ok := strings.CutPrefix(where, emulatedPrefix); ok {
		return tsm.New(emulate.NewTSM(emulate.Dial(socket))), nil
	}
	if where != "configfs" {
		return nil, fmt.Errorf("tsm %.80q: want configfs or emulated:SOCKET", where)
	}
	return tsm.Open()
}

// documents stand where a job's plan and sandbox do. They say nothing but which
// policy to judge by: no container is made from them.
func documents(policy plan.Policy) (document, sandbox []byte, err error) {
	none := plan.Sum([]byte("coffer/v1 no container"))
	profile := plan.Profile{Version: plan.SandboxVersion, Shim: "none", ShimDigest: none, RuntimeDigest: none, Trace: none, Rules: "none", RuntimeFlags: []string{}}
	digest, err := profile.Digest()
	if err != nil {
		return nil, nil, err
	}
	image := "sha256:" + strings.Repeat("0", 64)
	document, err = plan.Plan{
		Version: plan.Version, Name: "key-store-caller", Image: image, Command: []string{"none"}, Inputs: []plan.Input{}, Output: plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1}, Policy: policy, SandboxProfile: digest,
	}.Canonical()
	if err != nil {
		return nil, nil, err
	}
	sandbox, err = plan.Sandbox{
		Version: plan.SandboxVersion, JobID: attestation.JobID, Image: image, Profile: profile, Wrapper: []string{}, Trace: json.RawMessage(`{}`), Spec: json.RawMessage(`{}`),
	}.Canonical()
	return document, sandbox, err
}
