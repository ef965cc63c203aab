package composite

import (
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// maxExtraData bounds the extra data of a quote, in bytes: a digest of the
// largest kind that a TPM has (TPM 2.0 Part 2, section 10.4.3, TPM2B_DATA).
const maxExtraData = 64

// Alone is what a caller says that devices by themselves must speak of, where no
// job binds them together. Nothing that it says makes evidence fresh: that
// follows from how the caller came by it.
type Alone struct {
	// SNPReportData is the report data of the SEV-SNP report. Of a report of
	// Azure's paravisor it is the SHA-256 of the runtime claims, and zeros; it may
	// be left out there if a quote comes with the report.
	SNPReportData *[64]byte
	// TPMExtraData is the qualifying data of the quote, 1 to 64 bytes.
	TPMExtraData []byte
	// GPUNonce is the nonce of every GPU's report.
	GPUNonce *[32]byte
}

// names reports whether the caller named this report data.
func (a *Alone) names(data [64]byte) bool {
	return a != nil && a.SNPReportData != nil && *a.SNPReportData == data
}

// OpenAlone makes a statement of the devices of an envelope that has nothing but
// devices. Each must come with what it must speak of, and nothing may be named
// for one that is not there: what is not compared must not look as if it were.
func OpenAlone(e *evidence.Envelope, want Alone) (*Statement, error) {
	if err := e.Bounded(); err != nil {
		return nil, err
	}
	hcl := e.SNP != nil && len(e.SNP.HCLReport) > 0
	switch {
	case e.SNP == nil && e.TPM == nil && len(e.GPUs) == 0:
		return nil, errors.New("no device")
	case e.SNP != nil && want.SNPReportData == nil && (!hcl || e.TPM == nil):
		return nil, errors.New("snp: no report data to compare is named")
	case e.TPM != nil && (len(want.TPMExtraData) == 0 || len(want.TPMExtraData) > maxExtraData):
		return nil, fmt.Errorf("tpm: extra data of %d bytes is named: want 1 to %d", len(want.TPMExtraData), maxExtraData)
	case len(e.GPUs) > 0 && want.GPUNonce == nil:
		return nil, errors.New("gpu: no nonce to compare is named")
	case e.SNP == nil && want.SNPReportData != nil, e.TPM == nil && len(want.TPMExtraData) > 0, len(e.GPUs) == 0 && want.GPUNonce != nil:
		return nil, errors.New("something is named for a device that is not there")
	}
	return &Statement{envelope: e, failures: map[string]string{}, alone: &want}, nil
}

// quoteOf adds to what a quote must be of what it must speak of.
func (s *Statement) quoteOf(w vtpm.Want) vtpm.Want {
	if s.alone != nil {
		w.Alone = s.alone.TPMExtraData
	} else {
		w.ExtraData = s.bound.TPMExtraData(s.devices)
	}
	return w
}

func (s *Statement) reportData() [64]byte {
	if s.alone != nil {
		return *s.alone.SNPReportData
	}
	var quote, log, firmware []byte
	if t := s.envelope.TPM; t != nil {
		quote, log, firmware = t.Quote, t.EventLog, t.TCGLog
	}
	return s.bound.SNPReportData(s.devices, quote, log, firmware)
}

func (s *Statement) gpuNonce() [32]byte {
	if s.alone != nil {
		return *s.alone.GPUNonce
	}
	return s.bound.GPUNonce()
}
