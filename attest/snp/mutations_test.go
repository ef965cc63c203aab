package snp_test

import (
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
	"github.com/coffer-run/coffer/attest/snp"
)

func TestMutations(t *testing.T) {
	v := simulation(t, anchor.Genoa)
	vcek, ask, ark := v.Chip().Certificates()
	at := time.Now()
	good := report(t, v.Chip(), simulate.SNPOptions{})
	mutatetest.Run(t, mutatetest.Target{
		Kind: "SEV-SNP report", Good: good, MaxAlloc: 1 << 20,
		Accepts: func(b []byte) bool {
			want := snp.Want{ReportData: data}
			if len(b) == snp.ReportSize {
				// What a flip changes in the report data is granted: the signature is left.
				want.ReportData = [64]byte(b[0x50:])
			}
			return snp.Appraise(snp.Evidence{Report: b, Chain: [][]byte{vcek, ask, ark}}, want, v.Anchors(), at).Genuine()
		},
	})

	// The table is not a report: one bit in 13 of its certificates will do.
	table := v.Chip().CertTable()
	var lengths []mutatetest.Length
	for entry := range 3 {
		lengths = append(lengths, mutatetest.Length{At: 24*entry + 16, Size: 4}, mutatetest.Length{At: 24*entry + 20, Size: 4})
	}
	mutatetest.Run(t, mutatetest.Target{
		Kind: "SEV-SNP certificate table", Good: table, Lengths: lengths, MaxAlloc: 1 << 20, Every: 13,
		Accepts: func(b []byte) bool {
			return snp.Appraise(snp.Evidence{Report: good, Certificates: b}, snp.Want{ReportData: data}, v.Anchors(), at).Genuine()
		},
	})
}
