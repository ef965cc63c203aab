package vtpm_test

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// swtpm is a provisioned software TPM that speaks the real protocol.
type swtpm struct {
	tpm    transport.TPM
	root   *x509.Certificate
	caCert []byte
}

// startSWTPM provisions and starts swtpm with a CA of its own.
func startSWTPM(t *testing.T) *swtpm {
	t.Helper()
	for _, tool := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", tool)
			}
			t.Skipf("%s is not installed: install the Debian packages swtpm and swtpm-tools", tool)
		}
	}
	dir, err := os.MkdirTemp("", "swtpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ca, state := filepath.Join(dir, "ca"), filepath.Join(dir, "state")
	for _, d := range []string{ca, state} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	options := write("localca.options", "--platform-manufacturer coffer\n--platform-version 1\n--platform-model test\n")
	localca := write("localca.conf", "statedir = "+ca+"\nsigningkey = "+ca+"/signkey.pem\nissuercert = "+ca+"/issuercert.pem\ncertserial = "+ca+"/certserial\n")
	setup := write("setup.conf", "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = "+localca+
		"\ncreate_certs_tool_options = "+options+"\nactive_pcr_banks = sha256\n")
	args := []string{"--tpm2", "--create-ek-cert", "--tpmstate", state, "--config", setup}
	if os.Getuid() == 0 {
		args = append(args, "--runas", "root")
	}
	if out, err := exec.CommandContext(t.Context(), "swtpm_setup", args...).CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}
	sock := filepath.Join(dir, "tpm.sock")
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state,
		"--server", "type=unixio,path="+sock, "--ctrl", "type=unixio,path="+sock+".ctrl", "--flags", "not-need-init,startup-clear")
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("swtpm did not start")
		}
	}
	tpm, err := linuxudstpm.Open(sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tpm.Close() })

	s := &swtpm{tpm: tpm}
	read := func(name string) *x509.Certificate {
		b, err := os.ReadFile(filepath.Join(ca, name)) //nolint:gosec // a path of this test's
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(b)
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	s.root, s.caCert = read("swtpm-localca-rootca-cert.pem"), read("issuercert.pem").Raw
	return s
}

// readNV reads an endorsement key certificate (TCG EK Credential Profile, 2.2.1.4).
func (s *swtpm) readNV(t *testing.T, index tpm2.TPMHandle) []byte {
	t.Helper()
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(s.tpm)
	if err != nil {
		t.Fatalf("no endorsement key certificate at %#x: %v", index, err)
	}
	contents, err := pub.NVPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for len(out) < int(contents.DataSize) {
		rsp, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Size:       min(512, contents.DataSize-uint16(len(out))), Offset: uint16(len(out)), //nolint:gosec // bounded by DataSize
		}.Execute(s.tpm)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, rsp.Data.Buffer...)
	}
	return out
}

type loaded struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public []byte
}

func (s *swtpm) primary(t *testing.T, hierarchy tpm2.TPMHandle, template tpm2.TPMTPublic) loaded {
	t.Helper()
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(s.tpm)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(s.tpm) })
	return loaded{rsp.ObjectHandle, rsp.Name, rsp.OutPublic.Bytes()}
}

func akTemplate(alg tpm2.TPMAlgID) tpm2.TPMTPublic {
	pub := tpm2.TPMTPublic{
		Type: alg, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
		},
	}
	switch alg {
	case tpm2.TPMAlgECC:
		pub.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
		})
	case tpm2.TPMAlgRSASSA:
		pub.Type = tpm2.TPMAlgRSA
		pub.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			KeyBits: 2048,
			Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSASSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})},
		})
	case tpm2.TPMAlgRSAPSS:
		pub.Type = tpm2.TPMAlgRSA
		pub.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			KeyBits: 2048,
			Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSAPSS,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSAPSS, &tpm2.TPMSSigSchemeRSAPSS{HashAlg: tpm2.TPMAlgSHA256})},
		})
	}
	return pub
}

func (s *swtpm) activate(t *testing.T, ek, ak loaded, blob, secret []byte) ([]byte, error) {
	t.Helper()
	// The fields of the command have no size prefix of their own.
	strip := func(b []byte) []byte {
		if len(b) < 2 || int(binary.BigEndian.Uint16(b)) != len(b)-2 {
			t.Fatal("not a sized buffer")
		}
		return b[2:]
	}
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: ak.handle, Name: ak.name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle: tpm2.AuthHandle{Handle: ek.handle, Name: ek.name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16,
			func(tpm transport.TPM, h tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
				_, err := tpm2.PolicySecret{
					AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
					PolicySession: h, NonceTPM: nonce,
				}.Execute(tpm)
				return err
			})},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: strip(blob)},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: strip(secret)},
	}.Execute(s.tpm)
	if err != nil {
		return nil, err
	}
	return rsp.CertInfo.Buffer, nil
}

func (s *swtpm) quote(t *testing.T, ak loaded, extra []byte, index ...uint) (quote, signature []byte, pcrs map[int][]byte) {
	t.Helper()
	sel := tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(index...)}}}
	rsp, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: ak.handle, Name: ak.name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: extra}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: sel,
	}.Execute(s.tpm)
	if err != nil {
		t.Fatal(err)
	}
	pcrs = map[int][]byte{}
	for _, i := range index {
		r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(i)}}}}.Execute(s.tpm)
		if err != nil {
			t.Fatal(err)
		}
		pcrs[int(i)] = r.PCRValues.Digests[0].Buffer //nolint:gosec // a PCR index
	}
	return rsp.Quoted.Bytes(), tpm2.Marshal(rsp.Signature), pcrs
}

func (s *swtpm) extend(t *testing.T, events []vtpm.Event) {
	t.Helper()
	for _, e := range events {
		x := e.Extension()
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)}, //nolint:gosec // a PCR index
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: x[:]}}},
		}.Execute(s.tpm)
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestRealTPM(t *testing.T) {
	s := startSWTPM(t)
	now := time.Now()
	anchors, err := anchor.Vendor().WithEKRoots(anchor.Discrete, s.root)
	if err != nil {
		t.Fatal(err)
	}
	events := testEvents()
	s.extend(t, events)
	log, err := vtpm.EncodeLog(events)
	if err != nil {
		t.Fatal(err)
	}

	// swtpm_setup makes an RSA-2048 and a P-384 endorsement key; the latter is
	// none of the default templates that are accepted.
	chain := [][]byte{s.readNV(t, 0x01c00002), s.caCert}
	ek := s.primary(t, tpm2.TPMRHEndorsement, tpm2.RSAEKTemplate)
	for _, alg := range []tpm2.TPMAlgID{tpm2.TPMAlgECC, tpm2.TPMAlgRSASSA, tpm2.TPMAlgRSAPSS} {
		name := map[tpm2.TPMAlgID]string{tpm2.TPMAlgECC: "ECDSA", tpm2.TPMAlgRSASSA: "RSASSA", tpm2.TPMAlgRSAPSS: "RSAPSS"}[alg]
		t.Run(name, func(t *testing.T) {
			ak := s.primary(t, tpm2.TPMRHOwner, akTemplate(alg))
			e, err := vtpm.BeginEnrolment(chain, ak.public, anchors, now)
			if err != nil {
				t.Fatal(err)
			}
			if e.Class != anchor.Discrete || e.Simulated {
				t.Errorf("class %q, simulated %v", e.Class, e.Simulated)
			}
			secret, err := s.activate(t, ek, ak, e.CredentialBlob, e.EncryptedSecret)
			if err != nil {
				t.Fatal(err)
			}
			if string(secret) != string(e.Secret[:]) {
				t.Fatal("the TPM opened another secret")
			}

			var extra [32]byte
			_, _ = rand.Read(extra[:])
			quote, sig, pcrs := s.quote(t, ak, extra[:], 0, 7, vtpm.AgentPCR)
			signer := newSigner(t, "verifier")
			res := vtpm.Appraise(vtpm.Evidence{
				AKPublic: ak.public, AKCredential: credentialFor(t, signer, e, now), Quote: quote, Signature: sig, PCRs: pcrs, EventLog: log,
			}, vtpm.Want{ExtraData: extra, CredentialKeys: keysOf(t, signer), PCRs: []int{7}}, now)
			if f := res.Checks.Failed(); len(f) > 0 {
				t.Fatalf("genuine quote refused: %+v", f)
			}
			if len(res.Events) != len(events) || res.Class != "discrete" || res.Simulated {
				t.Errorf("result %+v", res)
			}
		})
	}

	t.Run("credential for another key does not open", func(t *testing.T) {
		mine := s.primary(t, tpm2.TPMRHOwner, akTemplate(tpm2.TPMAlgECC))
		other := s.primary(t, tpm2.TPMRHOwner, akTemplate(tpm2.TPMAlgRSASSA))
		e, err := vtpm.BeginEnrolment(chain, other.public, anchors, now)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.activate(t, ek, mine, e.CredentialBlob, e.EncryptedSecret); err == nil {
			t.Fatal("the TPM opened a credential for another attestation key")
		}
	})
	t.Run("root that the verifier does not have", func(t *testing.T) {
		ak := s.primary(t, tpm2.TPMRHOwner, akTemplate(tpm2.TPMAlgECC))
		_, err := vtpm.BeginEnrolment(chain, ak.public, anchor.Vendor(), now)
		wantRefusal(t, err, "ek.chain")
	})
}
