// Package verifierd is what the two verifier daemons share. It has no way to
// come by the vendors' or a simulation's trust anchors: its callers give it
// theirs, to which the configuration adds what is a deployment's choice.
package verifierd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/coffer-run/coffer/attest/anchor"
	endorsements "github.com/coffer-run/coffer/attest/endorse/serve"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/verifier/serve"
	"github.com/coffer-run/coffer/internal/daemon"
)

// Config is the part of the configuration that both daemons have. Listen, TLS,
// ID, KeyFile and NonceKeyFile are required.
type Config struct {
	// Listen is the address to answer on, 127.0.0.1:7441 in the embedded stack.
	Listen string     `json:"listen"`
	TLS    daemon.TLS `json:"tls"`
	// ID is the verifier's name: evidence binds it, results are issued under it.
	ID string `json:"id"`
	KeyFiles

	// PoliciesDir holds further policies: one JSON document a file, or a folder
	// with policy.json and its rules beside it.
	PoliciesDir string `json:"policiesDir,omitempty"`
	// KBSPolicy names the policy, of those that ship and of PoliciesDir, that guests
	// of the Confidential Containers KBS protocol are held against. Without it all
	// of them are refused.
	KBSPolicy string `json:"kbsPolicy,omitempty"`
	// ReferenceValues are files of signed reference values. One that none of the
	// policies' sources signed, or that is not valid now, keeps the daemon from
	// starting.
	ReferenceValues []string `json:"referenceValues,omitempty"`
	// EKRoots are the makers of TPMs whose endorsement keys count.
	EKRoots []EKRoots `json:"ekRoots,omitempty"`
	// AttestationKeys are keys that are trusted by name, without a certificate.
	AttestationKeys []AttestationKeys `json:"attestationKeys,omitempty"`
	// Paravisors are digests of the id keys whose signed guests keep a TPM, as
	// SEV-SNP reports have them: SHA-384 in lower-case hex.
	Paravisors []string `json:"paravisors,omitempty"`
	// Endorsements says where certificates, revocation and reference values come
	// from. Without it, what the evidence does not carry is reported as not
	// checked, and policies that require it refuse.
	Endorsements *endorsements.Config `json:"endorsements,omitempty"`
}

// GCPercent lets garbage grow to four times what lives (runtime/debug,
// SetGCPercent): a verifier keeps little, and at the default a tenth of each
// appraisal goes into collecting what those before it left.
const GCPercent = 400

// Run serves a verifier with the given anchors and the named policies that ship
// with coffer, until ctx ends. On SIGHUP it reads the configuration again, with
// every file that it names, and takes all of it but what Config.fixed keeps.
func Run(ctx context.Context, name string, read func() (Config, error), anchors anchor.Set, policies []string, stderr io.Writer) error {
	c, err := read()
	if err != nil {
		return err
	}
	if c.Listen == "" {
		return errors.New("configuration: listen is required")
	}
	debug.SetGCPercent(GCPercent)
	log := daemon.Logger(stderr, name)
	tlsConfig, err := c.TLS.Server()
	if err != nil {
		return err
	}
	o, err := c.options(anchors, policies)
	if err != nil {
		return err
	}
	r := &reloader{log: log, began: c, read: read, anchors: anchors, policies: policies}
	so := serve.Options{Identify: daemon.Identity, Log: log, Reloads: r.counts}
	if c.Endorsements != nil {
		e, err := endorsements.Open(*c.Endorsements, o.Anchors, log)
		if err != nil {
			return err
		}
		defer e.Close()
		o.Endorsements, so.FetchFailures = e.Cache, e.Failures
	}
	r.v, err = verifier.New(o) //nolint:contextcheck // rules are compiled within limits of their own
	wipe(o)
	if err != nil {
		return err
	}
	so.Verifier = r.v
	handler, err := serve.Handler(so)
	if err != nil {
		return err
	}
	attrs, err := c.describe(o)
	if err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "serving", append(attrs, slog.String("address", c.Listen), slog.String("id", c.ID), slog.Bool("simulated", r.v.Simulated()),
		slog.Bool("endorsements", c.Endorsements != nil), slog.Bool("fetch", c.Endorsements != nil && c.Endorsements.Fetch))...)
	defer onHangup(func() { r.reload(ctx) })()
	return daemon.Serve(ctx, c.Listen, tlsConfig, handler, log)
}

// onHangup calls f for every SIGHUP until the returned function is called.
func onHangup(f func()) (stop func()) {
	signals, done, ended := make(chan os.Signal, 1), make(chan struct{}), make(chan struct{})
	signal.Notify(signals, syscall.SIGHUP)
	go func() {
		defer close(ended)
		for {
			select {
			case <-signals:
				f()
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
		<-ended
	}
}

// policies returns those that ship, by name, and those of the folder.
func (c Config) policies(named []string) ([]policy.Policy, error) {
	var out []policy.Policy
	for _, n := range named {
		p, err := policy.Named(n)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	more, err := readPolicies(c.PoliciesDir)
	return append(out, more...), err
}

// build names the program in results: its version and commit, as far as the
// Go toolchain recorded them.
func build() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "coffer unknown"
	}
	out := "coffer " + info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			out += " " + s.Value
		}
	}
	return out
}
