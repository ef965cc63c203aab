// Command coffer-verifier appraises evidence against the vendors' trust anchors
// and signs attestation results.
//
// It holds no code that can load a simulation's anchors, and it does not start
// with a policy that accepts them.
package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/verifierd"
)

const name = "coffer-verifier"

// maxRoots bounds a file of root certificates, in bytes.
const maxRoots = 1 << 20

// Config is the daemon's configuration file.
type Config struct {
	verifierd.Config
	// EKRoots are the makers of TPMs whose endorsement keys count.
	EKRoots []EKRoots `json:"ekRoots"`
}

// EKRoots is a file of root certificates in PEM, all of one trust class:
// "hypervisor", "hcl-vmpl0", "svsm" or "discrete".
type EKRoots struct {
	Class anchor.Class `json:"class"`
	File  string       `json:"file"`
}

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) error {
	path, err := daemon.ConfigFlag(name, args, stderr)
	if err != nil {
		return err
	}
	var c Config
	if err := daemon.ReadConfig(path, &c); err != nil {
		return err
	}
	anchors := anchor.Vendor()
	for _, r := range c.EKRoots {
		certs, err := readRoots(r.File)
		if err != nil {
			return fmt.Errorf("configuration %s: %w", path, err)
		}
		if anchors, err = anchors.WithEKRoots(r.Class, certs...); err != nil {
			return fmt.Errorf("configuration %s: %s: %w", path, r.File, err)
		}
	}
	return verifierd.Run(ctx, name, c.Config, anchors, []string{"production", "cpu-only"}, stderr)
}

func readRoots(path string) ([]*x509.Certificate, error) {
	b, err := verifierd.ReadFile(path, maxRoots)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s holds a %.40q: want certificates only", path, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New(path + " holds no certificate in PEM")
	}
	return out, nil
}
