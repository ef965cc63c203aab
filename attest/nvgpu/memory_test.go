package nvgpu_test

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"math/big"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
)

// cached answers each question once, as a cache of endorsements does.
func cached(t testing.TB, v *simulate.Vendor, o simulate.OCSPOptions) source {
	var mu sync.Mutex
	known := map[string][]byte{}
	get := func(key string, make func() ([]byte, error)) ([]byte, error) {
		mu.Lock()
		defer mu.Unlock()
		if b, ok := known[key]; ok {
			return b, nil
		}
		b, err := make()
		known[key] = b
		return b, err
	}
	return source{
		rim: func(id string) ([]byte, error) {
			return get(id, func() ([]byte, error) { return v.RIM(t.Context(), id) })
		},
		ocsp: func(cert, issuer *x509.Certificate) ([]byte, error) {
			return get(string(cert.Raw), func() ([]byte, error) { return v.OCSPAnswer(cert, issuer, o) })
		},
	}
}

func TestMemoryChangesNoResult(t *testing.T) {
	v := simulation(t)
	s, err := stranger()
	if err != nil {
		t.Fatal(err)
	}
	ev := evidence(t, v.GPUs()[0], simulate.GPUOptions{})
	appraise := func(e nvgpu.Endorsements, anchors anchor.Set, at time.Time) nvgpu.Result {
		return nvgpu.AppraiseWith(t.Context(), ev, nvgpu.Want{Nonce: nonce}, anchors, e, at)
	}
	e := nvgpu.Endorsements{Source: cached(t, v, simulate.OCSPOptions{}), Memory: nvgpu.NewMemory()}
	now := time.Now()
	for i := range 3 {
		if res := appraise(e, v.Anchors(), now); !res.Genuine() {
			t.Fatalf("time %d: refused: %v", i, check.Refuse("appraise", res.Checks))
		}
	}
	onlyFails(t, appraise(e, s.Anchors(), now), nvgpu.CheckChain)
	onlyFails(t, appraise(e, v.Anchors(), now.AddDate(0, 0, 2)), nvgpu.CheckOCSP, "gpu.driver-rim-ocsp", "gpu.vbios-rim-ocsp")
	onlyFails(t, appraise(e, v.Anchors(), now.AddDate(3, 0, 0)), nvgpu.CheckOCSP, "gpu.driver-rim-validity", "gpu.vbios-rim-validity")
	if res := appraise(e, v.Anchors(), now); !res.Genuine() {
		t.Errorf("refused: %v", res.Checks.Failed())
	}
	revoked := nvgpu.Endorsements{Source: cached(t, v, simulate.OCSPOptions{Status: ocsp.Revoked}), Memory: e.Memory}
	for range 2 {
		onlyFails(t, appraise(revoked, v.Anchors(), now), nvgpu.CheckOCSP, "gpu.driver-rim-ocsp", "gpu.vbios-rim-ocsp")
	}
}

// The floor is one P-384 signature, the report's: all else is remembered.
func BenchmarkAppraise(b *testing.B) {
	v, err := minted()
	if err != nil {
		b.Fatal(err)
	}
	ev := evidence(b, v.GPUs()[0], simulate.GPUOptions{})
	src := cached(b, v, simulate.OCSPOptions{})
	run := func(b *testing.B, anchors anchor.Set, e nvgpu.Endorsements) {
		res := nvgpu.AppraiseWith(b.Context(), ev, nvgpu.Want{Nonce: nonce}, anchors, e, time.Now())
		if !res.Genuine() {
			b.Fatal(res.Checks.Failed())
		}
	}
	run(b, v.Anchors(), nvgpu.Endorsements{Source: src})
	b.Run("floor", func(b *testing.B) {
		c := parseOne(b, ev.Chain)
		key, ok := c.PublicKey.(*ecdsa.PublicKey)
		if !ok {
			b.Fatal("not an ECDSA key")
		}
		n := len(ev.Report) - 96
		r, s := new(big.Int).SetBytes(ev.Report[n:n+48]), new(big.Int).SetBytes(ev.Report[n+48:])
		for b.Loop() {
			sum := sha512.Sum384(ev.Report[:n])
			if !ecdsa.Verify(key, sum[:], r, s) {
				b.Fatal("floor does not verify")
			}
		}
	})
	b.Run("warm", func(b *testing.B) {
		e := nvgpu.Endorsements{Source: src, Memory: nvgpu.NewMemory()}
		b.ReportAllocs()
		for b.Loop() {
			run(b, v.Anchors(), e)
		}
	})
	b.Run("no memory", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			run(b, v.Anchors(), nvgpu.Endorsements{Source: src})
		}
	})
}

func BenchmarkParse(b *testing.B) {
	v, err := minted()
	if err != nil {
		b.Fatal(err)
	}
	r := report(b, v.GPUs()[0], simulate.GPUOptions{})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := nvgpu.Parse(r); err != nil {
			b.Fatal(err)
		}
	}
}
