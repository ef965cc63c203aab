package receipt_test

import (
	"testing"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
)

func TestMutations(t *testing.T) {
	l := newLab(t)
	token, err := l.signer.Sign(receipt.TypeResult, receipt.Result{Issuer: issuer, JobID: "job"})
	if err != nil {
		t.Fatal(err)
	}
	mutatetest.Run(t, mutatetest.Target{
		Kind: "signed result", Good: []byte(token), MaxAlloc: 1 << 20,
		Accepts: func(b []byte) bool {
			var r receipt.Result
			return l.keys.Open(receipt.TypeResult, string(b), &r) == nil
		},
	})
}
