package snp_test

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

// A simulation's report is genuine under the simulation's anchors, and says so.
// Under the vendors' it is refused.
func ExampleAppraise() {
	vendor, err := simulate.New(simulate.Options{Fast: true, GPUs: -1})
	if err != nil {
		fmt.Println(err)
		return
	}
	challenge := [64]byte{1, 2, 3}
	report, err := vendor.Chip().Report(challenge, simulate.SNPOptions{})
	if err != nil {
		fmt.Println(err)
		return
	}
	evidence := snp.Evidence{Report: report, Certificates: vendor.Chip().CertTable()}
	for _, anchors := range []anchor.Set{vendor.Anchors(), anchor.Vendor()} {
		result := snp.Appraise(evidence, snp.Want{ReportData: challenge}, anchors, time.Now())
		fmt.Println(result.Genuine(), result.Simulated, result.Claims["snp.policy.debug"])
		for _, c := range result.Checks.Failed() {
			fmt.Println(c.ID)
		}
	}
	// Output:
	// true true false
	// false false false
	// snp.chain
}

// The floor is one P-384 signature, the report's: the chain is remembered.
func BenchmarkAppraise(b *testing.B) {
	v := simulation(b, anchor.Genoa)
	ev := snp.Evidence{Report: report(b, v.Chip(), simulate.SNPOptions{}), Certificates: v.Chip().CertTable()}
	b.Run("floor", func(b *testing.B) {
		der, _, _ := v.Chip().Certificates()
		c, err := x509.ParseCertificate(der)
		if err != nil {
			b.Fatal(err)
		}
		key, ok := c.PublicKey.(*ecdsa.PublicKey)
		if !ok {
			b.Fatal("not an ECDSA key")
		}
		scalar := func(at int) *big.Int {
			s := slices.Clone(ev.Report[at : at+72])
			slices.Reverse(s)
			return new(big.Int).SetBytes(s)
		}
		r, s := scalar(0x2A0), scalar(0x2E8)
		for b.Loop() {
			sum := sha512.Sum384(ev.Report[:0x2A0])
			if !ecdsa.Verify(key, sum[:], r, s) {
				b.Fatal("floor does not verify")
			}
		}
	})
	run := func(b *testing.B, anchors anchor.Set) {
		if res := snp.Appraise(ev, snp.Want{ReportData: data}, anchors, time.Now()); !res.Genuine() {
			b.Fatal(res.Checks.Failed())
		}
	}
	b.Run("warm", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			run(b, v.Anchors())
		}
	})
}
