package tpm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/enclave/collect/tpm"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
)

// machine is a software TPM that can be switched off and on.
type machine struct{ *emulatetest.TPM }

func newMachine(t *testing.T) *machine {
	t.Helper()
	return &machine{emulatetest.NewTPM(t)}
}

func (m *machine) open(t *testing.T) *tpm.TPM {
	t.Helper()
	d, err := tpm.Open(t.Context(), m.Socket, tpm.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func (m *machine) raw(t *testing.T) transport.TPM {
	t.Helper()
	tr, err := linuxudstpm.Open(m.Socket)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func events(names ...string) []vtpm.Event {
	var out []vtpm.Event
	for _, n := range names {
		name, _, _ := strings.Cut(n, "@")
		out = append(out, vtpm.Event{PCR: vtpm.AgentPCR, Name: name, Digest: sha256.Sum256([]byte(n)), MeasuredBy: vtpm.MeasuredBySelf})
	}
	return out
}

func measure(t *testing.T, d *tpm.TPM, path string, evs []vtpm.Event) []byte {
	t.Helper()
	log, err := d.Measure(t.Context(), path, evs)
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// TestQuote checks the quote as a verifier would, by hand.
func TestQuote(t *testing.T) {
	m := newMachine(t)
	d := m.open(t)
	measure(t, d, filepath.Join(t.TempDir(), "log"), events("agent", "holder"))

	var want [32]byte
	_, _ = rand.Read(want[:])
	q, err := d.Quote(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attest)
	if err != nil {
		t.Fatal(err)
	}
	if attest.Type != tpm2.TPMSTAttestQuote || !bytes.Equal(attest.ExtraData.Buffer, want[:]) {
		t.Errorf("type %x extra data %x, want %x", attest.Type, attest.ExtraData.Buffer, want)
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	replayed := vtpm.Replay([32]byte{}, events("agent", "holder"))
	if got := q.PCRs[vtpm.AgentPCR]; !bytes.Equal(got, replayed[:]) {
		t.Errorf("PCR 14 is %x, want %x", got, replayed)
	}
	h := sha256.New()
	for i := range 24 {
		h.Write(q.PCRs[i])
	}
	if sum := h.Sum(nil); !bytes.Equal(info.PCRDigest.Buffer, sum) {
		t.Errorf("PCR digest %x, want %x", info.PCRDigest.Buffer, sum)
	}
	ak, err := tpm2.Unmarshal[tpm2.TPMTPublic](d.AKPublic())
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm2.ECDSAPub(mustECC(t, ak))
	if err != nil {
		t.Fatal(err)
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
	if err != nil {
		t.Fatal(err)
	}
	s, err := sig.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	if !verifies(key, q.Attest, s) {
		t.Error("the attestation key did not sign the quote")
	}
	a := ak.ObjectAttributes
	if !a.Restricted || !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.SignEncrypt || a.Decrypt {
		t.Errorf("attestation key attributes %+v", a)
	}
}

func TestQuoteBeforeMeasure(t *testing.T) {
	d := newMachine(t).open(t)
	if _, err := d.Quote(t.Context(), [32]byte{1}); err == nil || !strings.Contains(err.Error(), "nothing was measured") {
		t.Fatalf("got %v", err)
	}
}

func TestMeasure(t *testing.T) {
	m := newMachine(t)
	path := filepath.Join(t.TempDir(), "log")
	d := m.open(t)
	first := measure(t, d, path, events("agent", "holder"))

	t.Run("an agent that restarts in the same boot does not extend again", func(t *testing.T) {
		if again := measure(t, m.open(t), path, events("agent", "holder")); !bytes.Equal(first, again) {
			t.Errorf("log is now %s", again)
		}
	})
	t.Run("a file that changed in the same boot is measured again", func(t *testing.T) {
		want := append(events("agent", "holder"), events("agent@2")...)
		d := m.open(t)
		got, err := vtpm.ParseLog(measure(t, d, path, events("agent@2", "holder")))
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 3 || got[2] != want[2] {
			t.Errorf("events %v", got)
		}
		if _, err := d.Quote(t.Context(), [32]byte{1}); err != nil {
			t.Error(err)
		}
	})
	t.Run("killed between storing the log and extending", func(t *testing.T) {
		longer, err := vtpm.EncodeLog(append(append(events("agent", "holder"), events("agent@2")...), events("agent@3")...))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, longer, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := measure(t, m.open(t), path, events("agent@3", "holder")); !bytes.Equal(got, longer) {
			t.Errorf("log is now %s", got)
		}
	})
	t.Run("somebody else extended the PCR", func(t *testing.T) {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: vtpm.AgentPCR, Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
		}.Execute(m.raw(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.open(t).Measure(t.Context(), path, events("agent@3", "holder")); err == nil || !strings.Contains(err.Error(), "something else extended it") {
			t.Errorf("measure: %v", err)
		}
		if _, err := d.Quote(t.Context(), [32]byte{1}); err == nil || !strings.Contains(err.Error(), "something else extended it") {
			t.Errorf("quote: %v", err)
		}
	})
	t.Run("the log is lost while the PCR is not", func(t *testing.T) {
		if _, err := m.open(t).Measure(t.Context(), path+"-missing", events("agent")); err == nil || !strings.Contains(err.Error(), "missing") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the TPM restarts under the agent", func(t *testing.T) {
		ak := d.AKPublic()
		m.Off()
		m.On(t)
		if _, err := d.Quote(t.Context(), [32]byte{1}); err == nil || !strings.Contains(err.Error(), "reset since") {
			t.Errorf("quote: %v", err)
		}
		log := measure(t, d, path, events("agent@4"))
		if want, _ := vtpm.EncodeLog(events("agent@4")); !bytes.Equal(log, want) {
			t.Errorf("a new boot kept old events: %s", log)
		}
		if _, err := d.Quote(t.Context(), [32]byte{1}); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(ak, m.open(t).AKPublic()) {
			t.Error("the attestation key changed")
		}
	})
}

func TestEventsOfFiles(t *testing.T) {
	p := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(p, []byte("agent"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := tpm.Events([]tpm.File{{Name: "agent", Path: p}})
	if err != nil || len(got) != 1 || got[0] != events("agent")[0] {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := tpm.Events([]tpm.File{{Name: "agent", Path: p + "-missing"}}); err == nil {
		t.Error("a missing file was measured")
	}
}

// TestEnrol opens a credential made in software for the certified endorsement key.
func TestEnrol(t *testing.T) {
	m := newMachine(t)
	d := m.open(t)
	chain, err := d.EKChain(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if !issuedBy(cert, m.CA) {
		t.Error("the endorsement certificate is not of the provisioned authority")
	}

	ek := endorsementKey(t, m, tpm2.RSAEKTemplate)
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	blob, enc := makeCredential(t, ek, d.AKPublic(), secret)
	got, err := d.Activate(t.Context(), blob, enc)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, secret) {
		t.Errorf("opened %x, want %x", got, secret)
	}

	other := bytes.Clone(d.AKPublic())
	other[len(other)-1] ^= 1
	otherBlob, otherEnc := makeCredential(t, ek, other, secret)
	for name, c := range map[string][2][]byte{
		"a credential for another attestation key": {otherBlob, otherEnc},
		"a blob that was changed":                  {append(bytes.Clone(blob[:len(blob)-1]), blob[len(blob)-1]^1), enc},
		"a blob with a byte after it":              {append(bytes.Clone(blob), 0), enc},
		"a secret with a byte after it":            {blob, append(bytes.Clone(enc), 0)},
		"nothing":                                  {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := d.Activate(t.Context(), c[0], c[1]); err == nil {
				t.Errorf("opened %x", got)
			}
		})
	}
	noLeaks(t, m)
}

func TestConcurrentQuotes(t *testing.T) {
	m := newMachine(t)
	d := m.open(t)
	measure(t, d, filepath.Join(t.TempDir(), "log"), events("agent"))
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if i%4 == 3 {
				if _, err := d.EKChain(t.Context()); err != nil {
					t.Error(err)
				}
				return
			}
			if _, err := d.Quote(t.Context(), [32]byte{byte(i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	noLeaks(t, m)
}

func TestOpenFlushesWhatAKilledAgentLeft(t *testing.T) {
	m := newMachine(t)
	for range 3 {
		if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}).Execute(m.raw(t)); err != nil {
			t.Fatal(err)
		}
	}
	m.open(t)
	noLeaks(t, m)
}

func TestForeignKeyAtTheHandle(t *testing.T) {
	m := newMachine(t)
	tr := m.raw(t)
	p, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}).Execute(tr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.EvictControl{Auth: tpm2.TPMRHOwner, ObjectHandle: &tpm2.NamedHandle{Handle: p.ObjectHandle, Name: p.Name}, PersistentHandle: 0x8100C0FE}).Execute(tr); err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.Open(t.Context(), m.Socket, tpm.Options{}); err == nil || !strings.Contains(err.Error(), "holds another key") {
		t.Fatalf("got %v", err)
	}
}

// TestHungTPM is a TPM that takes a command and never answers.
func TestHungTPM(t *testing.T) {
	hung := make(chan struct{})
	defer close(hung)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := tpm.New(ctx, sendFunc(func([]byte) ([]byte, error) { <-hung; return nil, os.ErrClosed }), tpm.Options{}); err == nil || ctx.Err() == nil {
		t.Fatalf("got %v", err)
	}
}

func TestOpenWhatIsNoTPM(t *testing.T) {
	p := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{p, p + "-missing"} {
		if _, err := tpm.Open(t.Context(), path, tpm.Options{}); err == nil {
			t.Errorf("opened %s", path)
		}
	}
}

// TestAnswersThatAreNone is a process behind the socket that is no TPM.
func TestAnswersThatAreNone(t *testing.T) {
	for name, answer := range map[string][]byte{
		"nothing":                       nil,
		"half a header":                 {0x80, 1, 0, 0},
		"less than it announces":        {0x80, 1, 0, 0, 0, 99, 0, 0, 0, 0},
		"a length shorter than itself":  {0x80, 1, 0, 0, 0, 9, 0, 0, 0, 0},
		"a length beyond any response":  {0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
		"success without what it means": {0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0},
		"an error code":                 {0x80, 1, 0, 0, 0, 10, 0, 0, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "tpm")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			l, err := net.Listen("unix", filepath.Join(dir, "s"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Read(make([]byte, 4096))
					_, _ = conn.Write(answer)
					_ = conn.Close()
				}
			}()
			if _, err := tpm.Open(t.Context(), filepath.Join(dir, "s"), tpm.Options{}); err == nil {
				t.Error("opened")
			}
		})
	}
}

type sendFunc func([]byte) ([]byte, error)

func (f sendFunc) Send(b []byte) ([]byte, error) { return f(b) }

func noLeaks(t *testing.T, m *machine) {
	t.Helper()
	for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 16}.Execute(m.raw(t))
		if err != nil {
			t.Fatal(err)
		}
		l, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range l.Handle {
			if uint32(h)>>24 == first>>24 {
				t.Errorf("handle %#x is still loaded", uint32(h))
			}
		}
	}
}

func issuedBy(c *x509.Certificate, caPEM []byte) bool {
	for rest := caPEM; len(rest) > 0; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return false
		}
		if ca, err := x509.ParseCertificate(b.Bytes); err == nil && c.CheckSignatureFrom(ca) == nil {
			return true
		}
	}
	return false
}
