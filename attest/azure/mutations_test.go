package azure_test

import (
	"bytes"
	"crypto/rsa"
	"math/big"
	"testing"

	"github.com/coffer-run/coffer/attest/azure"
	"github.com/coffer-run/coffer/attest/azure/azuretest"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
	"github.com/coffer-run/coffer/attest/snp"
)

// A change is an error, or is of the SEV-SNP report, which is signed, or of the
// report data that this must have.
func TestMutations(t *testing.T) {
	key := &rsa.PublicKey{N: new(big.Int).SetBytes(bytes.Repeat([]byte{0xab}, 256)), E: 65537}
	claims, err := azuretest.Claims(key)
	if err != nil {
		t.Fatal(err)
	}
	const runtime = 32 + snp.ReportSize
	good := azuretest.Report(make([]byte, snp.ReportSize), claims)
	whole, err := azure.Parse(good)
	if err != nil {
		t.Fatal(err)
	}
	mutatetest.Run(t, mutatetest.Target{
		Kind: "HCL report", Good: good, MaxAlloc: 1 << 20,
		Lengths: []mutatetest.Length{{At: 8, Size: 4}, {At: runtime, Size: 4}, {At: runtime + 16, Size: 4}},
		// Versions 1 and 2 of the header differ in nothing that is read.
		Free: func(bit int) bool { return bit/8 == 4 },
		// Zeros after the claims may be missing.
		Whole: func(n int) bool { return n >= runtime+20+len(claims) },
		Accepts: func(b []byte) bool {
			r, err := azure.Parse(b)
			return err == nil && bytes.Equal(r.SNP, whole.SNP) && r.ReportData() == whole.ReportData()
		},
	})
}
