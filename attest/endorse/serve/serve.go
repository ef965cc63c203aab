// Package serve gives an endorsement cache its folder and its way to the
// vendors' services, and moves endorsements between folders.
//
// Trusted: the machine's clock, and whoever configures it. Checked: sizes, how
// long services take, that they are asked over HTTPS and redirect nowhere. Not
// checked: what they answer; attest/endorse looks at that, and every appraisal
// again. A service that lies can keep the verifier from accepting, and no more.
package serve

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/endorse"
)

// Config says where a verifier has its endorsements from.
type Config struct {
	// Dir is the folder that holds them. It must exist.
	Dir string `json:"dir"`
	// Fetch asks the vendors' services for what the folder lacks and keeps the
	// answers there. Without it the folder is all there is.
	Fetch bool `json:"fetch,omitempty"`
	// OnOutage is "refuse" (the default) or "unexpired": whether a copy that is
	// due to be asked for again is used while a service does not answer, until
	// it expires by its own word. What is not there is refused in either case.
	OnOutage endorse.Outage `json:"onOutage,omitempty"`
	// Kinds lists what is looked for: "vek", "chain", "crl", "ocsp", "rim". The
	// default is all. What depends on others is reported as not checked.
	Kinds []endorse.Kind `json:"kinds,omitempty"`
	// KDS, RIM and OCSP replace the vendors' services, by a mirror for example.
	KDS  string `json:"kds,omitempty"`
	RIM  string `json:"rim,omitempty"`
	OCSP string `json:"ocsp,omitempty"`
	// CAFile verifies the TLS certificates of those; the default is the
	// system's roots.
	CAFile string `json:"caFile,omitempty"`
}

// Endorsements is a cache over a folder and, if so configured, the vendors'
// services.
type Endorsements struct {
	*endorse.Cache
	folder   *Folder
	client   *Client
	failures map[endorse.Kind]*atomic.Uint64
}

// Open opens what the configuration says.
func Open(c Config, anchors anchor.Set, log *slog.Logger) (*Endorsements, error) {
	folder, err := OpenFolder(c.Dir, func(p endorse.Problem) {
		log.Warn("endorsement not used", slog.String("file", p.File), slog.String("error", p.Err.Error()))
	})
	if err != nil {
		return nil, err
	}
	e := &Endorsements{folder: folder, failures: map[endorse.Kind]*atomic.Uint64{}}
	for _, k := range endorse.Kinds() {
		e.failures[k] = &atomic.Uint64{}
	}
	o := endorse.Options{Store: folder, Anchors: anchors, Clock: time.Now, OnOutage: c.OnOutage, Offer: c.Kinds, Report: func(k endorse.Key, err error) {
		if n := e.failures[k.Kind]; n != nil {
			n.Add(1)
		}
		log.Warn("endorsement not fetched", slog.String("kind", string(k.Kind)), slog.String("id", k.ID), slog.String("error", err.Error()))
	}}
	if c.Fetch {
		roots, err := roots(c.CAFile)
		if err != nil {
			return nil, err
		}
		if e.client, err = NewClient(ClientOptions{KDS: c.KDS, RIM: c.RIM, OCSP: c.OCSP, Roots: roots}); err != nil {
			return nil, err
		}
		o.Fetch = e.client
	} else if c.KDS+c.RIM+c.OCSP+c.CAFile != "" {
		return nil, errors.New("endorsements: services are named, and fetch is off")
	}
	if e.Cache, err = endorse.New(o); err != nil {
		return nil, err
	}
	return e, nil
}

// Folder returns the folder.
func (e *Endorsements) Folder() *Folder { return e.folder }

// Failures returns how many endorsements of a kind could not be fetched, or were
// not used or kept when they came.
func (e *Endorsements) Failures(k endorse.Kind) uint64 {
	if n := e.failures[k]; n != nil {
		return n.Load()
	}
	return 0
}

// Close ends the fetches under way.
func (e *Endorsements) Close() {
	e.Cache.Close()
	if e.client != nil {
		e.client.Close()
	}
}

func roots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return nil, fmt.Errorf("endorsements: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, endorse.MaxFile))
	if err != nil {
		return nil, fmt.Errorf("endorsements: read %s: %w", path, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("endorsements: %s holds no certificate in PEM", path)
	}
	return pool, nil
}
