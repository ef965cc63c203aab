package serve

import (
	"context"
	"fmt"
	"log/slog"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
)

func (s *service) CheckDevices(ctx context.Context, req *connect.Request[verifierv1.CheckDevicesRequest]) (*connect.Response[verifierv1.CheckDevicesResponse], error) {
	d, err := devices(req.Msg)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", verifier.ErrMalformed, err)
	}
	token, r, err := s.v.CheckDevices(ctx, d, req.Msg.GetAudience())
	if err != nil {
		return nil, err
	}
	procedure := req.Spec().Procedure
	as := receipt.Result{IssuedAt: r.IssuedAt, Submods: r.Submods, Checks: r.Checks}
	s.metrics.result(procedure, callerOf(ctx).role, as)
	failed := failedIDs(as)
	s.log.LogAttrs(ctx, slog.LevelInfo, "appraised", slog.String("result", r.ID), slog.String("call", procedure), slog.Int("devices", len(r.Submods)),
		slog.String("audience", r.Audience), slog.Bool("simulated", r.Simulated), slog.Bool("accepted", len(failed) == 0), slog.Any("failed", failed))
	return connect.NewResponse(&verifierv1.CheckDevicesResponse{Result: token}), nil
}

// devices reads a request. What must have a fixed length has it or is an error:
// nothing is padded or cut.
func devices(m *verifierv1.CheckDevicesRequest) (verifier.Devices, error) {
	d := verifier.Devices{Policy: m.GetPolicy()}
	if p := m.GetSnp(); p != nil {
		d.SNP = &verifier.SNPDevice{SNP: evidence.SNP{Report: p.GetReport(), Certificates: p.GetCertificates(), HCLReport: p.GetHclReport()}, Chain: p.GetChain()}
		if b := p.GetReportData(); len(b) > 0 {
			if len(b) != 64 {
				return d, fmt.Errorf("snp: report data of %d bytes: want 64", len(b))
			}
			data := [64]byte(b)
			d.Named.SNPReportData = &data
		}
	}
	if p := m.GetTpm(); p != nil {
		d.TPM = &evidence.TPM{AKPublic: p.GetAkPublic(), AKCredential: p.GetAkCredential(), Quote: p.GetQuote(), Signature: p.GetSignature(), TCGLog: p.GetTcgLog(), PCRs: map[int][]byte{}}
		for i, v := range p.GetPcrs() {
			d.TPM.PCRs[int(i)] = v
		}
		d.Named.TPMExtraData = p.GetExtraData()
	}
	for _, g := range m.GetGpus() {
		d.GPUs = append(d.GPUs, evidence.GPU{UUID: g.GetUuid(), Report: g.GetReport(), Chain: g.GetChain(), DriverVersion: g.GetDriverVersion(), VBIOSVersion: g.GetVbiosVersion()})
	}
	if b := m.GetGpuNonce(); len(b) > 0 {
		if len(b) != 32 {
			return d, fmt.Errorf("gpu: nonce of %d bytes: want 32", len(b))
		}
		nonce := [32]byte(b)
		d.Named.GPUNonce = &nonce
	}
	return d, nil
}
