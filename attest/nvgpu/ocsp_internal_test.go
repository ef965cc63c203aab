package nvgpu

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
)

// answer is a good answer of the vendor's responder about one certificate.
func answer(t testing.TB) (der []byte, cert, issuer *x509.Certificate) {
	t.Helper()
	v, err := simulate.New(simulate.Options{Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for rest := v.GPUs()[0].ChainPEM(); len(rest) > 0; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	cert, issuer = chain[1], chain[2]
	if der, err = v.OCSPAnswer(cert, issuer, simulate.OCSPOptions{ThisUpdate: time.Now().Add(-time.Minute)}); err != nil {
		t.Fatal(err)
	}
	return der, cert, issuer
}

func TestMutationsOfAnAnswer(t *testing.T) {
	der, cert, issuer := answer(t)
	good, err := parseOCSP(der, cert, issuer)
	if err != nil {
		t.Fatal(err)
	}
	r, err := ocsp.ParseResponse(der, nil)
	if err != nil {
		t.Fatal(err)
	}
	from := bytes.Index(der, r.TBSResponseData)
	mutatetest.Run(t, mutatetest.Target{
		Kind: "OCSP answer", Good: der, Lengths: derLengths(der), MaxAlloc: 1 << 20,
		Free: func(bit int) bool { return bit/8 < from || bit/8 >= from+len(r.TBSResponseData) },
		Accepts: func(b []byte) bool {
			s, err := parseOCSP(b, cert, issuer)
			if err == nil && (s.good != nil || !s.thisUpdate.Equal(good.thisUpdate) || !s.nextUpdate.Equal(good.nextUpdate)) {
				t.Error("accepted what was not signed")
			}
			return err == nil
		},
	})
}

// derLengths are the lengths of two bytes in DER.
func derLengths(der []byte) []mutatetest.Length {
	var out []mutatetest.Length
	for i := range len(der) - 4 {
		if der[i] == 0x30 && der[i+1] == 0x82 {
			out = append(out, mutatetest.Length{At: i + 2, Size: 2, Big: true})
		}
	}
	return out
}

// An answer that is accepted says what the responder signed.
func FuzzStatus(f *testing.F) {
	der, cert, issuer := answer(f)
	good, err := parseOCSP(der, cert, issuer)
	if err != nil || good.good != nil {
		f.Fatal(err, good)
	}
	f.Add(der)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseOCSP(b, cert, issuer)
		if err == nil && (s.good != nil || !s.thisUpdate.Equal(good.thisUpdate) || !s.nextUpdate.Equal(good.nextUpdate)) {
			t.Fatal("accepted what was not signed")
		}
	})
}
