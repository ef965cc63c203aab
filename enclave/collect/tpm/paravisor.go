package tpm

import (
	"context"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Where Azure's paravisor keeps its attestation key and its report (Microsoft,
// "Azure confidential VM guest attestation").
const (
	paravisorAK     tpm2.TPMHandle = 0x81000003
	paravisorReport tpm2.TPMHandle = 0x01400001
)

// paravisorKey loads the key that the paravisor made. There is no making one in
// its place: the report names this one.
func paravisorKey(tr transport.TPM) (tpm2.TPM2BPublic, tpm2.TPM2BName, error) {
	read, err := tpm2.ReadPublic{ObjectHandle: paravisorAK}.Execute(tr)
	if err != nil {
		return tpm2.TPM2BPublic{}, tpm2.TPM2BName{}, fmt.Errorf("the paravisor's, at persistent handle %#x: %w", uint32(paravisorAK), err)
	}
	return read.OutPublic, read.Name, nil
}

// HCLReport returns the paravisor's report, byte for byte as it lies in the TPM.
func (t *TPM) HCLReport(ctx context.Context) ([]byte, error) {
	b, err := do(ctx, t, func(tr transport.TPM) ([]byte, error) { return readNV(tr, paravisorReport) })
	if err != nil {
		return nil, fmt.Errorf("read the paravisor's report: %w", err)
	}
	return b, nil
}
