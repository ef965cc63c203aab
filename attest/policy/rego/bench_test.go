package rego_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"

	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
)

// BenchmarkDecide is one decision over SNP, TPM and one GPU, and BenchmarkDecideAgain
// one on a machine in a state on which the policy has decided before.
func BenchmarkDecide(b *testing.B) { decide(b, (*rego.Policy).Forget) }

func BenchmarkDecideAgain(b *testing.B) { decide(b, func(*rego.Policy) {}) }

func decide(b *testing.B, before func(*rego.Policy)) {
	source, err := policy.Named("simulation")
	if err != nil {
		b.Fatal(err)
	}
	p, e := compiled(b, source), jobEvidence(b)
	b.ReportAllocs()
	for b.Loop() {
		before(p)
		if len(p.Decide(e).All().Failed()) > 0 {
			b.Fatal("refused")
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	source, err := policy.Named("production")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := rego.Compile(source); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSignature is what a decision is compared with: one of the four
// signatures that every appraisal verifies.
func BenchmarkSignature(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	sum := make([]byte, 48)
	signature, err := ecdsa.SignASN1(rand.Reader, key, sum)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if !ecdsa.VerifyASN1(&key.PublicKey, sum, signature) {
			b.Fatal("does not verify")
		}
	}
}
