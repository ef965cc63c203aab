package vtpm

import (
	"bytes"
	"errors"
	"math/big"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// aQuote is TPMS_ATTEST of a quote over PCRs 0 and 14.
func aQuote() []byte {
	return tpm2.Marshal(&tpm2.TPMSAttest{
		Magic: tpmGenerated, Type: tpmSTQuote, QualifiedSigner: tpm2.TPM2BName{Buffer: []byte("name")}, ExtraData: tpm2.TPM2BData{Buffer: []byte("extra")},
		ClockInfo: tpm2.TPMSClockInfo{Clock: 1, ResetCount: 2, RestartCount: 3, Safe: true}, FirmwareVersion: 4,
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{1, 0x40, 0}}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: []byte("digest")},
		}),
	})
}

func someSignatures() [][]byte {
	two := func(b string) tpm2.TPM2BECCParameter { return tpm2.TPM2BECCParameter{Buffer: []byte(b)} }
	key := &tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: []byte("signature")}}
	var out [][]byte
	for _, s := range []tpm2.TPMTSignature{
		{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256, SignatureR: two("r"), SignatureS: two("s")})},
		{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, key)},
		{SigAlg: tpm2.TPMAlgRSAPSS, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSAPSS, key)},
	} {
		out = append(out, tpm2.Marshal(&s))
	}
	return out
}

// FuzzStructures holds what is read of quotes and signatures against what the
// library reads: they take the same bytes, and find the same in them.
func FuzzStructures(f *testing.F) {
	add := func(b []byte) {
		f.Add(b)
		f.Add(b[:len(b)-1])
		f.Add(append(bytes.Clone(b), 0))
		for i := range b {
			for _, v := range []byte{0, 1, 0xff, b[i] + 1} {
				c := bytes.Clone(b)
				c[i] = v
				f.Add(c)
			}
		}
	}
	add(aQuote())
	for _, b := range someSignatures() {
		add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		sameQuote(t, b)
		sameSignature(t, b)
	})
}

func sameQuote(t *testing.T, b []byte) {
	q, err := readQuote(b)
	att, theirs := decode[tpm2.TPMSAttest](b, maxAttest)
	// The library reads a structure of any magic and type.
	if theirs == nil && (att.Magic != tpmGenerated || att.Type != tpm2.TPMSTAttestQuote) {
		theirs = errors.New("another structure")
	}
	if (err == nil) != (theirs == nil) {
		t.Fatalf("%x: %v, the library: %v", b, err, theirs)
	}
	if err != nil {
		return
	}
	info, err := att.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	c := att.ClockInfo
	if !bytes.Equal(q.extraData, att.ExtraData.Buffer) || q.clock != c.Clock || q.resetCount != c.ResetCount || q.restartCount != c.RestartCount ||
		q.clockSafe != bool(c.Safe) || q.firmwareVersion != att.FirmwareVersion || !bytes.Equal(q.pcrDigest, info.PCRDigest.Buffer) ||
		len(q.selections) != len(info.PCRSelect.PCRSelections) {
		t.Fatalf("%x: read %+v, the library %+v", b, q, att)
	}
	for i, s := range info.PCRSelect.PCRSelections {
		if q.selections[i].hash != s.Hash || !bytes.Equal(q.selections[i].octets, s.PCRSelect) {
			t.Fatalf("%x: selection %d: read %+v, the library %+v", b, i, q.selections[i], s)
		}
	}
}

func sameSignature(t *testing.T, b []byte) {
	s, err := readSignature(b)
	sig, theirs := decode[tpm2.TPMTSignature](b, maxAttest)
	known := theirs == nil && (sig.SigAlg == tpm2.TPMAlgECDSA || sig.SigAlg == tpm2.TPMAlgRSASSA || sig.SigAlg == tpm2.TPMAlgRSAPSS)
	if (err == nil) != known {
		t.Fatalf("%x: %v, the library: %v", b, err, theirs)
	}
	if err != nil {
		return
	}
	if s.scheme == tpm2.TPMAlgECDSA {
		e, err := sig.Signature.ECDSA()
		if err != nil || s.hash != e.Hash || s.r.Cmp(new(big.Int).SetBytes(e.SignatureR.Buffer)) != 0 || s.s.Cmp(new(big.Int).SetBytes(e.SignatureS.Buffer)) != 0 {
			t.Fatalf("%x: read %+v, the library %+v, %v", b, s, e, err)
		}
		return
	}
	of := sig.Signature.RSASSA
	if s.scheme == tpm2.TPMAlgRSAPSS {
		of = sig.Signature.RSAPSS
	}
	if e, err := of(); err != nil || s.hash != e.Hash || !bytes.Equal(s.rsa, e.Sig.Buffer) {
		t.Fatalf("%x: read %+v, the library %+v, %v", b, s, e, err)
	}
}
