// Package verifierd is what the two verifier daemons share. It has no way to
// come by trust anchors: its callers give it theirs.
package verifierd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	endorsements "github.com/coffer-run/coffer/attest/endorse/serve"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/verifier/serve"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// maxPolicies bounds the documents in a policy folder.
const maxPolicies = 256

// Config is the part of the configuration that both daemons have. Every field
// is required but PoliciesDir and Endorsements.
type Config struct {
	// Listen is the address to answer on, 127.0.0.1:7441 in the embedded stack.
	Listen string     `json:"listen"`
	TLS    daemon.TLS `json:"tls"`
	// ID is the verifier's name: evidence binds it, results are issued under it.
	ID string `json:"id"`
	// KeyFile holds the P-384 key that signs results (PKCS#8 PEM), NonceKeyFile
	// the 32-byte key that replicas share. Both are mode 0600 and must exist.
	KeyFile      string `json:"keyFile"`
	NonceKeyFile string `json:"nonceKeyFile"`
	// PoliciesDir holds further policies, one JSON document a file.
	PoliciesDir string `json:"policiesDir,omitempty"`
	// Endorsements says where certificates, revocation and reference values come
	// from. Without it, what the evidence does not carry is reported as not
	// checked, and policies that require it refuse.
	Endorsements *endorsements.Config `json:"endorsements,omitempty"`
}

// Run serves a verifier with the given anchors and the named policies that ship
// with coffer, until ctx ends.
func Run(ctx context.Context, name string, c Config, anchors anchor.Set, policies []string, stderr io.Writer) error {
	if c.Listen == "" {
		return errors.New("configuration: listen is required")
	}
	log := daemon.Logger(stderr, name)
	tlsConfig, err := c.TLS.Server()
	if err != nil {
		return err
	}
	o := verifier.Options{ID: c.ID, Anchors: anchors, Clock: time.Now, Build: build()}
	for _, n := range policies {
		p, err := policy.Named(n)
		if err != nil {
			return err
		}
		o.Policies = append(o.Policies, p)
	}
	more, err := readPolicies(c.PoliciesDir)
	if err != nil {
		return err
	}
	o.Policies = append(o.Policies, more...)
	key, err := keyfile.ReadP384(c.KeyFile)
	if err != nil {
		return err
	}
	if o.Signer, err = receipt.NewSigner(c.ID, key); err != nil {
		return err
	}
	nonce, err := keyfile.ReadSecret(c.NonceKeyFile, verifier.NonceKeySize)
	if err != nil {
		return err
	}
	defer clear(nonce)
	o.NonceKeys = [][]byte{nonce}
	if c.Endorsements != nil {
		e, err := endorsements.Open(*c.Endorsements, anchors, log)
		if err != nil {
			return err
		}
		defer e.Close()
		o.Endorsements = e.Cache
	}
	v, err := verifier.New(o)
	if err != nil {
		return err
	}
	handler, err := serve.Handler(serve.Options{Verifier: v, Identify: daemon.Identity, Log: log})
	if err != nil {
		return err
	}
	names := make([]string, len(o.Policies))
	for i, p := range o.Policies {
		d, err := p.Digest()
		if err != nil {
			return err
		}
		names[i] = p.Name + "@" + string(d)
	}
	log.LogAttrs(ctx, slog.LevelInfo, "serving", slog.String("address", c.Listen), slog.String("id", c.ID), slog.Bool("simulated", v.Simulated()),
		slog.Int("endorsementKeyRoots", len(anchors.EKRoots())), slog.Any("policies", names), slog.Bool("endorsements", c.Endorsements != nil), slog.Bool("fetch", c.Endorsements != nil && c.Endorsements.Fetch))
	return daemon.Serve(ctx, c.Listen, tlsConfig, handler, log)
}

// readPolicies reads every *.json in dir. A document that is no policy keeps
// the daemon from starting: half of the policies is not what was configured.
func readPolicies(dir string) ([]policy.Policy, error) {
	if dir == "" {
		return nil, nil
	}
	if _, err := os.ReadDir(dir); err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	paths, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, fmt.Errorf("read policies in %s: %w", dir, err)
	}
	if len(paths) > maxPolicies {
		return nil, fmt.Errorf("read policies in %s: %d documents, at most %d are allowed", dir, len(paths), maxPolicies)
	}
	out := make([]policy.Policy, 0, len(paths))
	for _, path := range paths {
		b, err := ReadFile(path, policy.MaxSize)
		if err != nil {
			return nil, err
		}
		p, err := policy.Parse(b)
		if err != nil {
			return nil, fmt.Errorf("policy %s: %w", path, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// ReadFile reads a file of at most limit bytes.
func ReadFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, limit)
	}
	return b, nil
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
