package vtpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

func newSigner(t testing.TB, issuer string) *receipt.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(issuer, k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func keysOf(t testing.TB, s *receipt.Signer) receipt.Keys {
	t.Helper()
	b, err := s.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	k, err := receipt.ParseKeys(s.Issuer(), b)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, s *receipt.Signer, typ string, claims any) string {
	t.Helper()
	token, err := s.Sign(typ, claims)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func credential(s *receipt.Signer, e *vtpm.Enrolment, now time.Time) vtpm.Credential {
	return vtpm.Credential{
		Issuer: s.Issuer(), ID: "1", IssuedAt: now.Unix(), Expires: now.Add(time.Hour).Unix(),
		AKName: e.AKName, EKDigest: e.EKDigest, Class: string(e.Class), Simulated: e.Simulated,
	}
}

func credentialFor(t testing.TB, s *receipt.Signer, e *vtpm.Enrolment, now time.Time) string {
	t.Helper()
	return sign(t, s, vtpm.TypeCredential, credential(s, e, now))
}

func wantRefusal(t *testing.T, err error, id string) {
	t.Helper()
	var r *check.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("got %v, want a refusal by %s", err, id)
	}
	for _, c := range r.Checks {
		if c.ID == id {
			return
		}
	}
	t.Fatalf("refused by %+v, want %s", r.Checks, id)
}

func testEvents() []vtpm.Event {
	var out []vtpm.Event
	for _, n := range []string{"agent", "holder", "runsc", "shim", "gpu-plugin", "configuration"} {
		out = append(out, vtpm.Event{PCR: vtpm.AgentPCR, Name: n, Digest: sha256.Sum256([]byte(n)), MeasuredBy: vtpm.MeasuredBySelf})
	}
	return out
}

// scene is one genuine appraisal; a test spoils it in one place.
type scene struct {
	tpm     *vtpmtest.TPM
	signer  *receipt.Signer
	enrol   *vtpm.Enrolment
	ev      vtpm.Evidence
	want    vtpm.Want
	now     time.Time
	anchors anchor.Set
}

func newScene(t testing.TB) *scene {
	t.Helper()
	now := time.Now()
	tpm, err := vtpmtest.New(now)
	if err != nil {
		t.Fatal(err)
	}
	anchors, err := anchor.Vendor().WithEKRoots(anchor.Discrete, tpm.Root)
	if err != nil {
		t.Fatal(err)
	}
	e, err := vtpm.BeginEnrolment(tpm.EKChain, tpm.AKPublic, anchors, now)
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{tpm: tpm, signer: newSigner(t, "verifier"), enrol: e, now: now, anchors: anchors}
	tpm.Extend(testEvents()...)
	_, _ = rand.Read(s.want.ExtraData[:])
	s.want.CredentialKeys = keysOf(t, s.signer)
	s.ev = vtpm.Evidence{AKPublic: tpm.AKPublic, AKCredential: credentialFor(t, s.signer, e, now)}
	s.quote(t, nil, 0, 7, vtpm.AgentPCR)
	s.log(t, tpm.Events)
	// Every attack meets a verifier that has seen the honest evidence.
	s.want.Memory = &vtpm.Memory{}
	if r := vtpm.Appraise(s.ev, s.want, now); len(r.Checks.Failed()) > 0 {
		t.Fatal(r.Checks.Failed())
	}
	return s
}

func (s *scene) quote(t testing.TB, change func(*tpm2.TPMSAttest), index ...int) {
	t.Helper()
	var err error
	s.ev.Quote, s.ev.Signature, err = s.tpm.Quote(s.want.ExtraData[:], change, index...)
	if err != nil {
		t.Fatal(err)
	}
	s.ev.PCRs = s.tpm.PCRs(index...)
}

func (s *scene) log(t testing.TB, events []vtpm.Event) {
	t.Helper()
	b, err := vtpm.EncodeLog(events)
	if err != nil {
		t.Fatal(err)
	}
	s.ev.EventLog = b
}

func (s *scene) credential(t testing.TB, change func(*vtpm.Credential)) {
	t.Helper()
	c := credential(s.signer, s.enrol, s.now)
	change(&c)
	s.ev.AKCredential = sign(t, s.signer, vtpm.TypeCredential, c)
}

// otherAK replaces the attestation key by one of the attacker's making, with a
// credential and a quote that fit it, so that its attributes alone stand in the way.
func (s *scene) otherAK(t testing.TB, change func(*tpm2.TPMTPublic)) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := vtpmtest.AKPublic(&k.PublicKey, change)
	if err != nil {
		t.Fatal(err)
	}
	s.ev.AKPublic = pub
	sum := sha256.Sum256(pub)
	s.credential(t, func(c *vtpm.Credential) { c.AKName = "000b" + vtpm.Digest(sum).String() })
	h := sha256.Sum256(s.ev.Quote)
	r, v, err := ecdsaSign(k, h[:])
	if err != nil {
		t.Fatal(err)
	}
	s.ev.Signature = tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r}, SignatureS: tpm2.TPM2BECCParameter{Buffer: v}})})
}

func ecdsaSign(k *ecdsa.PrivateKey, sum []byte) (r, s []byte, _ error) {
	der, err := ecdsa.SignASN1(rand.Reader, k, sum)
	if err != nil {
		return nil, nil, err
	}
	var v struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &v); err != nil {
		return nil, nil, err
	}
	return v.R.FillBytes(make([]byte, 32)), v.S.FillBytes(make([]byte, 32)), nil
}

func TestAppraiseGenuine(t *testing.T) {
	s := newScene(t)
	r := vtpm.Appraise(s.ev, s.want, s.now)
	if f := r.Checks.Failed(); len(f) > 0 {
		t.Fatalf("refused: %+v", f)
	}
	if r.Simulated || r.Class != "discrete" || len(r.Events) != 6 || r.PCRs[vtpm.AgentPCR] != vtpm.Replay([32]byte{}, s.tpm.Events) {
		t.Errorf("result %+v", r)
	}
	for _, c := range []string{"tpm.ak-name", "tpm.trust-class", "tpm.ek-digest", "tpm.clock", "tpm.reset-count", "tpm.pcrs", "tpm.events", "tpm.measured-by"} {
		if r.Claims[c] == nil {
			t.Errorf("no claim %s", c)
		}
	}
}

func TestAppraiseZeroValueRefuses(t *testing.T) {
	r := vtpm.Appraise(vtpm.Evidence{}, vtpm.Want{}, time.Time{})
	if len(r.Checks.Failed()) == 0 || r.PCRs != nil {
		t.Fatalf("accepted nothing at all: %+v", r)
	}
	s := newScene(t)
	if r := vtpm.Appraise(s.ev, vtpm.Want{ExtraData: s.want.ExtraData}, s.now); len(r.Checks.Failed()) == 0 {
		t.Fatal("accepted without credential keys")
	}
}

// Each row leaves one check alone between the attacker and acceptance.
func TestAppraiseRefuses(t *testing.T) {
	rows := []struct {
		situation string
		spoil     func(t *testing.T, s *scene)
		by        string
	}{
		{"magic is not the TPM's", func(t *testing.T, s *scene) {
			s.ev.Quote[0] ^= 1
			s.ev.Signature, _ = s.tpm.Sign(s.ev.Quote)
		}, "tpm.magic"},
		{"signed structure is a certification, not a quote", func(t *testing.T, s *scene) {
			s.ev.Quote[5] = 0x17
			s.ev.Signature, _ = s.tpm.Sign(s.ev.Quote)
		}, "tpm.type"},
		{"bytes after the quote", func(t *testing.T, s *scene) {
			s.ev.Quote = append(s.ev.Quote, 0)
			s.ev.Signature, _ = s.tpm.Sign(s.ev.Quote)
		}, "tpm.quote"},
		{"quote over other extra data", func(t *testing.T, s *scene) { s.want.ExtraData[31] ^= 1 }, "tpm.extra-data"},
		{"extra data shorter by a trailing zero", func(t *testing.T, s *scene) {
			s.want.ExtraData[31] = 0
			s.quote(t, func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = s.want.ExtraData[:31] }, 0, vtpm.AgentPCR)
		}, "tpm.extra-data"},
		{"extra data longer by a zero", func(t *testing.T, s *scene) {
			s.quote(t, func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = append(s.want.ExtraData[:], 0) }, 0, vtpm.AgentPCR)
		}, "tpm.extra-data"},
		{"a PCR value that was not quoted", func(t *testing.T, s *scene) { s.ev.PCRs[0][0] ^= 1 }, "tpm.pcr-digest"},
		{"a PCR more than was quoted", func(t *testing.T, s *scene) { s.ev.PCRs[3] = make([]byte, 32) }, "tpm.pcr-selection"},
		{"a PCR less than was quoted", func(t *testing.T, s *scene) { delete(s.ev.PCRs, 0) }, "tpm.pcr-selection"},
		{"a PCR of another length", func(t *testing.T, s *scene) { s.ev.PCRs[0] = s.ev.PCRs[0][:31] }, "tpm.pcr-selection"},
		{"quote without the agent's PCR", func(t *testing.T, s *scene) { s.quote(t, nil, 0, 7); s.log(t, nil) }, "tpm.pcr-selection"},
		{"quote without a required PCR", func(t *testing.T, s *scene) { s.want.PCRs = []int{4} }, "tpm.pcr-selection"},
		{"quote of the SHA-1 bank", func(t *testing.T, s *scene) {
			s.quote(t, func(a *tpm2.TPMSAttest) {
				q, _ := a.Attested.Quote()
				q.PCRSelect.PCRSelections[0].Hash = tpm2.TPMAlgSHA1
			}, vtpm.AgentPCR)
		}, "tpm.pcr-selection"},
		{"quote of two banks", func(t *testing.T, s *scene) {
			s.quote(t, func(a *tpm2.TPMSAttest) {
				q, _ := a.Attested.Quote()
				q.PCRSelect.PCRSelections = append(q.PCRSelect.PCRSelections, tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA1, PCRSelect: []byte{0, 0, 0}})
			}, vtpm.AgentPCR)
		}, "tpm.pcr-selection"},
		{"signature by another TPM", func(t *testing.T, s *scene) {
			o, err := vtpmtest.New(s.now)
			if err != nil {
				t.Fatal(err)
			}
			s.ev.Signature, _ = o.Sign(s.ev.Quote)
		}, "tpm.signature"},
		{"no signature", func(t *testing.T, s *scene) { s.ev.Signature = nil }, "tpm.signature"},
		{"bytes after the signature", func(t *testing.T, s *scene) { s.ev.Signature = append(s.ev.Signature, 0) }, "tpm.signature"},
		{"signature in the null scheme", func(t *testing.T, s *scene) { s.ev.Signature = []byte{0x00, 0x10} }, "tpm.signature"},
		{"unrestricted attestation key", func(t *testing.T, s *scene) {
			s.otherAK(t, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false })
		}, "tpm.ak"},
		{"attestation key that may leave its TPM", func(t *testing.T, s *scene) {
			s.otherAK(t, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false })
		}, "tpm.ak"},
		{"attestation key that may change parents", func(t *testing.T, s *scene) {
			s.otherAK(t, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedParent = false })
		}, "tpm.ak"},
		{"imported attestation key", func(t *testing.T, s *scene) {
			s.otherAK(t, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false })
		}, "tpm.ak"},
		{"attestation key that also decrypts", func(t *testing.T, s *scene) {
			s.otherAK(t, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = true })
		}, "tpm.ak"},
		{"key that does not sign", func(t *testing.T, s *scene) {
			s.otherAK(t, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SignEncrypt = false })
		}, "tpm.ak"},
		{"bytes after the attestation key", func(t *testing.T, s *scene) {
			s.ev.AKPublic = append(bytes.Clone(s.ev.AKPublic), 0)
			sum := sha256.Sum256(s.ev.AKPublic)
			s.credential(t, func(c *vtpm.Credential) { c.AKName = "000b" + vtpm.Digest(sum).String() })
		}, "tpm.ak"},
		{"no credential", func(t *testing.T, s *scene) { s.ev.AKCredential = "" }, "tpm.ak-credential"},
		{"credential of another attestation key", func(t *testing.T, s *scene) {
			s.credential(t, func(c *vtpm.Credential) { c.AKName = "000b" + strings.Repeat("00", 32) })
		}, "tpm.ak-credential"},
		{"credential from another verifier", func(t *testing.T, s *scene) {
			s.ev.AKCredential = credentialFor(t, newSigner(t, "another"), s.enrol, s.now)
		}, "tpm.ak-credential"},
		{"credential from another verifier under this one's name", func(t *testing.T, s *scene) {
			s.ev.AKCredential = credentialFor(t, newSigner(t, "verifier"), s.enrol, s.now)
		}, "tpm.ak-credential"},
		{"token of another type by this verifier", func(t *testing.T, s *scene) {
			s.ev.AKCredential = sign(t, s.signer, receipt.TypeResult, credential(s.signer, s.enrol, s.now))
		}, "tpm.ak-credential"},
		{"signature by the key, in another hash", func(t *testing.T, s *scene) {
			// TPMT_SIGNATURE: scheme, hash, values.
			s.ev.Signature = bytes.Clone(s.ev.Signature)
			s.ev.Signature[3] = byte(tpm2.TPMAlgSHA384)
		}, "tpm.signature"},
		{"expired credential", func(t *testing.T, s *scene) { s.now = s.now.Add(2 * time.Hour) }, "tpm.ak-credential"},
		{"credential from the future", func(t *testing.T, s *scene) { s.now = s.now.Add(-time.Hour) }, "tpm.ak-credential"},
		{"credential that never ends", func(t *testing.T, s *scene) {
			s.credential(t, func(c *vtpm.Credential) { c.Expires = s.now.AddDate(1, 0, 0).Unix() })
		}, "tpm.ak-credential"},
		{"credential without a trust class", func(t *testing.T, s *scene) {
			s.credential(t, func(c *vtpm.Credential) { c.Class = "" })
		}, "tpm.ak-credential"},
		{"log with an event left out", func(t *testing.T, s *scene) { s.log(t, s.tpm.Events[1:]) }, "tpm.event-log"},
		{"log with two events exchanged", func(t *testing.T, s *scene) {
			e := testEvents()
			e[0], e[1] = e[1], e[0]
			s.log(t, e)
		}, "tpm.event-log"},
		{"log with two names exchanged", func(t *testing.T, s *scene) {
			e := testEvents()
			e[0].Name, e[1].Name = e[1].Name, e[0].Name
			s.log(t, e)
		}, "tpm.event-log"},
		{"log with another digest", func(t *testing.T, s *scene) {
			e := testEvents()
			e[0].Digest[0] ^= 1
			s.log(t, e)
		}, "tpm.event-log"},
		{"empty log for a PCR that was extended", func(t *testing.T, s *scene) { s.log(t, nil) }, "tpm.event-log"},
		{"no log", func(t *testing.T, s *scene) { s.ev.EventLog = nil }, "tpm.event-log"},
	}
	for _, row := range rows {
		t.Run(row.situation, func(t *testing.T) {
			s := newScene(t)
			row.spoil(t, s)
			r := vtpm.Appraise(s.ev, s.want, s.now)
			var ids []string
			found := false
			for _, c := range r.Checks.Failed() {
				ids = append(ids, c.ID)
				found = found || c.ID == row.by
			}
			if !found {
				t.Fatalf("failed checks %v, want %s", ids, row.by)
			}
			if r.PCRs != nil || r.Events != nil {
				t.Error("a refused quote yields PCRs or events")
			}
			// What follows from the first failure may fail too; nothing else may.
			follows := map[string][]string{
				"tpm.magic": {"tpm.event-log"}, "tpm.type": {"tpm.event-log"}, "tpm.quote": {"tpm.event-log"},
				"tpm.pcr-digest": {"tpm.event-log"}, "tpm.pcr-selection": {"tpm.event-log"}, "tpm.ak": {"tpm.signature", "tpm.ak-credential"},
			}
			for _, id := range ids {
				if id != row.by && !contains(follows[row.by], id) {
					t.Errorf("also failed %s: the row does not isolate %s", id, row.by)
				}
			}
		})
	}
}

func contains(l []string, s string) bool {
	for _, x := range l {
		if x == s {
			return true
		}
	}
	return false
}

func TestEnrolment(t *testing.T) {
	s := newScene(t)
	secret, err := s.tpm.Activate(s.enrol.CredentialBlob, s.enrol.EncryptedSecret)
	if err != nil || !bytes.Equal(secret, s.enrol.Secret[:]) {
		t.Fatalf("the TPM opened %x: %v", secret, err)
	}
	other, err := vtpmtest.New(s.now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Activate(s.enrol.CredentialBlob, s.enrol.EncryptedSecret); err == nil {
		t.Fatal("another TPM opened the credential")
	}
}

// ekCA makes endorsement key certificates of every bad kind.
func TestEnrolmentRefuses(t *testing.T) {
	now := time.Now()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	anchors, err := anchor.Vendor().WithEKRoots(anchor.Discrete, root)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa3072, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(pub any, change func(*x509.Certificate)) [][]byte {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0), BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageKeyAgreement, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
			// As real ones have it: critical, and holding a directory name alone.
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: []byte{0x30, 0x04, 0xa4, 0x02, 0x30, 0x00}}},
		}
		if change != nil {
			change(c)
		}
		der, err := x509.CreateCertificate(rand.Reader, c, root, pub, caKey)
		if err != nil {
			t.Fatal(err)
		}
		return [][]byte{der}
	}
	tpm, err := vtpmtest.New(now)
	if err != nil {
		t.Fatal(err)
	}
	good := issue(&p256.PublicKey, nil)
	if _, err := vtpm.BeginEnrolment(good, tpm.AKPublic, anchors, now); err != nil {
		t.Fatalf("good certificate refused: %v", err)
	}
	unrestricted, err := vtpmtest.AKPublic(&p256.PublicKey, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false })
	if err != nil {
		t.Fatal(err)
	}
	many := make([][]byte, 7)
	for i := range many {
		many[i] = good[0]
	}
	for _, row := range []struct {
		situation string
		chain     [][]byte
		ak        []byte
		anchors   anchor.Set
		now       time.Time
		by        string
	}{
		{"no certificate", nil, tpm.AKPublic, anchors, now, "ek.chain"},
		{"too many certificates", many, tpm.AKPublic, anchors, now, "ek.chain"},
		{"not a certificate", [][]byte{{1, 2, 3}}, tpm.AKPublic, anchors, now, "ek.chain"},
		{"certificate of unreasonable size", [][]byte{make([]byte, 9<<10)}, tpm.AKPublic, anchors, now, "ek.chain"},
		{"no anchors", good, tpm.AKPublic, anchor.Set{}, now, "ek.chain"},
		{"anchors without this root", good, tpm.AKPublic, anchor.Vendor(), now, "ek.chain"},
		{"root sent along by the attester", [][]byte{good[0], root.Raw}, tpm.AKPublic, anchor.Vendor(), now, "ek.chain"},
		{"expired certificate", good, tpm.AKPublic, anchors, now.AddDate(11, 0, 0), "ek.chain"},
		{"certificate from the future", good, tpm.AKPublic, anchors, now.AddDate(-1, 0, 0), "ek.chain"},
		{"CA certificate of the root itself", [][]byte{root.Raw}, tpm.AKPublic, anchors, now, "ek.chain"},
		{"certificate for another use", issue(&p256.PublicKey, func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{2, 23, 133, 8, 3}} }), tpm.AKPublic, anchors, now, "ek.chain"},
		{"unknown critical extension", issue(&p256.PublicKey, func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}})
		}), tpm.AKPublic, anchors, now, "ek.chain"},
		{"P-384 key", issue(&p384.PublicKey, nil), tpm.AKPublic, anchors, now, "ek.key"},
		{"RSA-3072 key", issue(&rsa3072.PublicKey, nil), tpm.AKPublic, anchors, now, "ek.key"},
		{"unrestricted attestation key", good, unrestricted, anchors, now, "tpm.ak"},
		{"no attestation key", good, nil, anchors, now, "tpm.ak"},
		{"attestation key of unreasonable size", good, make([]byte, 2<<10), anchors, now, "tpm.ak"},
	} {
		t.Run(row.situation, func(t *testing.T) {
			e, err := vtpm.BeginEnrolment(row.chain, row.ak, row.anchors, row.now)
			wantRefusal(t, err, row.by)
			if e != nil {
				t.Error("a refused enrolment yields a credential")
			}
		})
	}
}

func TestEventLog(t *testing.T) {
	good, err := vtpm.EncodeLog(testEvents())
	if err != nil {
		t.Fatal(err)
	}
	got, err := vtpm.ParseLog(good)
	if err != nil || len(got) != 6 || got[0] != testEvents()[0] {
		t.Fatalf("read back %+v, %v", got, err)
	}
	if b, err := vtpm.EncodeLog(nil); err != nil {
		t.Fatal(err)
	} else if l, err := vtpm.ParseLog(b); err != nil || len(l) != 0 || vtpm.Replay([32]byte{1}, l) != [32]byte{1} {
		t.Fatalf("empty log: %v, %v", l, err)
	}
	text := string(good)
	for situation, b := range map[string]string{
		"nothing":            "",
		"not JSON":           "x",
		"two values":         text + text,
		"white space":        text + " ",
		"unknown version":    strings.Replace(text, "/v1", "/v2", 1),
		"unknown field":      strings.Replace(text, `"events"`, `"extra":1,"events"`, 1),
		"upper-case digest":  strings.Replace(text, `"digest":"`, `"digest":"A`, 1),
		"short digest":       strings.Replace(text, `"digest":"`, `"digest":"00","x":"`, 1),
		"another PCR":        strings.Replace(text, `"pcr":14`, `"pcr":7`, 1),
		"PCR out of range":   strings.Replace(text, `"pcr":14`, `"pcr":99`, 1),
		"measured by a fake": strings.Replace(text, `"measuredBy":"self"`, `"measuredBy":"firmware"`, 1),
		"no name":            strings.Replace(text, `"name":"agent"`, `"name":""`, 1),
		"name with a line":   strings.Replace(text, `"name":"agent"`, `"name":"a\nb"`, 1),
		"long name":          strings.Replace(text, `"name":"agent"`, `"name":"`+strings.Repeat("a", 256)+`"`, 1),
		"too long":           strings.Repeat(" ", vtpm.MaxLog+1),
		"null events":        `{"events":null,"version":"coffer.run/event-log/v1"}`,
	} {
		if _, err := vtpm.ParseLog([]byte(b)); err == nil {
			t.Errorf("%s: accepted", situation)
		}
	}
	if _, err := vtpm.EncodeLog(make([]vtpm.Event, vtpm.MaxEvents+1)); err == nil {
		t.Error("encoded too many events")
	}
}

// Logs are written without a library, in the form that others read and write.
func TestEventLogIsCanonical(t *testing.T) {
	var all []byte
	for c := byte('!'); c <= '~'; c++ {
		all = append(all, c)
	}
	for _, events := range [][]vtpm.Event{{}, testEvents(), {
		{PCR: vtpm.AgentPCR, Name: string(all), Digest: vtpm.Digest{1, 0xab, 31: 0xff}, MeasuredBy: vtpm.MeasuredBySelf},
		{PCR: vtpm.AgentPCR, Name: `"\`, MeasuredBy: vtpm.MeasuredBySelf},
	}} {
		got, err := vtpm.EncodeLog(events)
		if err != nil {
			t.Fatal(err)
		}
		want, err := plan.Canonical(map[string]any{"version": vtpm.LogVersion, "events": events})
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s\nwant, %v\n%s", got, err, want)
		}
		if back, err := vtpm.ParseLog(got); err != nil || !slices.Equal(back, events) {
			t.Errorf("read back %+v, %v", back, err)
		}
	}
}

func FuzzAppraise(f *testing.F) {
	s := newScene(f)
	f.Add(s.ev.AKPublic, s.ev.Quote, s.ev.Signature, s.ev.EventLog)
	f.Fuzz(func(t *testing.T, ak, quote, sig, log []byte) {
		same := bytes.Equal(ak, s.ev.AKPublic) && bytes.Equal(quote, s.ev.Quote) && bytes.Equal(log, s.ev.EventLog)
		ev := s.ev
		ev.AKPublic, ev.Quote, ev.Signature, ev.EventLog = ak, quote, sig, log
		if r := vtpm.Appraise(ev, s.want, s.now); len(r.Checks.Failed()) == 0 && !same {
			t.Fatal("accepted changed evidence")
		}
	})
}

func FuzzBeginEnrolment(f *testing.F) {
	s := newScene(f)
	f.Add(s.tpm.EKChain[0], s.tpm.AKPublic)
	f.Fuzz(func(t *testing.T, cert, ak []byte) {
		_, _ = vtpm.BeginEnrolment([][]byte{cert}, ak, s.anchors, s.now)
	})
}

func TestDigestIsStable(t *testing.T) {
	// The extension is part of the format: a change of it breaks every log.
	e := vtpm.Event{PCR: vtpm.AgentPCR, Name: "agent", Digest: sha256.Sum256([]byte("agent")), MeasuredBy: vtpm.MeasuredBySelf}
	h := sha256.New()
	for _, p := range []string{"\x00\x00\x00\x0fcoffer/v1 event", "\x00\x00\x00\x05agent", "\x00\x00\x00\x04self", "\x00\x00\x00\x20" + string(e.Digest[:])} {
		h.Write([]byte(p))
	}
	if x := e.Extension(); !bytes.Equal(x[:], h.Sum(nil)) {
		t.Errorf("extension %x", x)
	}
	if plan.Sum(nil).Bytes() == nil {
		t.Error("digest form")
	}
}
