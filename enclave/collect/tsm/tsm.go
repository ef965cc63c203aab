// Package tsm asks the kernel's configfs-tsm interface for SEV-SNP reports
// (Documentation/ABI/testing/configfs-tsm).
//
// Trusted: the kernel behind the client. Checked: that the provider is SEV-SNP,
// the report's length, and, by the generation counter, that nobody else wrote
// to the entry between question and answer. Not checked: the report itself.
package tsm

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"

	"github.com/coffer-run/coffer/attest/evidence"
)

const (
	// provider is what the kernel's sev-guest driver calls itself.
	provider = "sev_guest"
	// reportSize is that of ATTESTATION_REPORT (SEV-SNP firmware ABI, table 23).
	reportSize = 1184
)

// Source makes SEV-SNP reports. Each report has a configfs entry of its own, so
// that concurrent jobs do not see each other's.
type Source struct {
	client configfsi.Client
}

// New returns a Source over client: Open's, or an emulated one.
func New(client configfsi.Client) *Source { return &Source{client: client} }

// Open returns a Source over this machine's configfs.
func Open() (*Source, error) {
	client, err := linuxtsm.MakeClient()
	if err != nil {
		return nil, fmt.Errorf("open configfs-tsm: %w", err)
	}
	return New(client), nil
}

// Report returns an SEV-SNP report over reportData and the certificate table
// that came with it, which is empty where the host gives none.
func (s *Source) Report(ctx context.Context, reportData [64]byte) (rep, certificates []byte, err error) {
	if s == nil || s.client == nil {
		return nil, nil, errors.New("get SEV-SNP report: no configfs-tsm client")
	}
	type answer struct {
		resp *report.Response
		err  error
	}
	// configfs has no cancellation: a read that the firmware does not answer is
	// left behind, and removes its entry when it ends.
	ch := make(chan answer, 1)
	go func() {
		resp, err := report.Get(s.client, &report.Request{InBlob: reportData[:], GetAuxBlob: true})
		ch <- answer{resp, err}
	}()
	select {
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("get SEV-SNP report: %w", ctx.Err())
	case a := <-ch:
		if a.err != nil {
			return nil, nil, fmt.Errorf("get SEV-SNP report: %w", a.err)
		}
		// The kernel ends attributes of text with a newline.
		if p := strings.TrimSuffix(a.resp.Provider, "\n"); p != provider {
			return nil, nil, fmt.Errorf("get SEV-SNP report: provider is %.40q: want %q", p, provider)
		}
		if n := len(a.resp.OutBlob); n != reportSize {
			return nil, nil, fmt.Errorf("get SEV-SNP report: report has %d bytes: want %d", n, reportSize)
		}
		if n := len(a.resp.AuxBlob); n > evidence.MaxPart {
			return nil, nil, fmt.Errorf("get SEV-SNP report: certificate table has %d bytes, at most %d are allowed", n, evidence.MaxPart)
		}
		return a.resp.OutBlob, a.resp.AuxBlob, nil
	}
}
