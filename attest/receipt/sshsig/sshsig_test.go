package sshsig_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/pem"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/receipt/sshsig"
)

const namespace = "test@coffer.run"

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func signer(t testing.TB, key any) ssh.Signer {
	t.Helper()
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newSigner(t testing.TB) ssh.Signer {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer(t, k)
}

// The signatures in testdata are ssh-keygen's own, of OpenSSH 9.2.
func TestSignaturesOfOpenSSH(t *testing.T) {
	message := read(t, "message")
	for sig, pub := range map[string]string{"ed25519.sig": "ed25519.pub", "ed25519-sha256.sig": "ed25519.pub", "ecdsa.sig": "ecdsa.pub", "rsa.sig": "rsa.pub"} {
		keys, err := sshsig.ParseKeys(read(t, pub))
		if err != nil {
			t.Fatal(err)
		}
		if k, err := sshsig.Verify(read(t, sig), message, namespace, keys); err != nil || !sshsig.Same(k, keys[0]) {
			t.Errorf("%s: %v", sig, err)
		}
		if k, err := sshsig.Key(read(t, sig)); err != nil || !sshsig.Same(k, keys[0]) {
			t.Errorf("%s: the key that it names: %v", sig, err)
		}
		if k, err := sshsig.Key(append(read(t, sig), 'x')); err == nil {
			t.Errorf("%s: a key %v of something else", sig, k)
		}
		if _, err := sshsig.Verify(read(t, sig), append(message, 'x'), namespace, keys); err == nil {
			t.Errorf("%s passes over another message", sig)
		}
	}
}

func TestSignAndVerify(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]ssh.Signer{"ed25519": newSigner(t), "ecdsa": signer(t, p384)} {
		armored, err := sshsig.Sign(s, namespace, []byte("m"))
		if err != nil {
			t.Fatal(name, err)
		}
		other := newSigner(t).PublicKey()
		if k, err := sshsig.Verify(armored, []byte("m"), namespace, []ssh.PublicKey{other, s.PublicKey()}); err != nil || !sshsig.Same(k, s.PublicKey()) {
			t.Errorf("%s: %v", name, err)
		}
		for what, verify := range map[string]func() (ssh.PublicKey, error){
			"no allowed key": func() (ssh.PublicKey, error) { return sshsig.Verify(armored, []byte("m"), namespace, nil) },
			"another key alone": func() (ssh.PublicKey, error) {
				return sshsig.Verify(armored, []byte("m"), namespace, []ssh.PublicKey{other})
			},
			"another message": func() (ssh.PublicKey, error) {
				return sshsig.Verify(armored, []byte("n"), namespace, []ssh.PublicKey{s.PublicKey()})
			},
			"another namespace": func() (ssh.PublicKey, error) {
				return sshsig.Verify(armored, []byte("m"), "other@coffer.run", []ssh.PublicKey{s.PublicKey()})
			},
			"no namespace": func() (ssh.PublicKey, error) {
				return sshsig.Verify(armored, []byte("m"), "", []ssh.PublicKey{s.PublicKey()})
			},
			"text before": func() (ssh.PublicKey, error) {
				return sshsig.Verify(append([]byte("x\n"), armored...), []byte("m"), namespace, []ssh.PublicKey{s.PublicKey()})
			},
			"another block after": func() (ssh.PublicKey, error) {
				return sshsig.Verify(append(bytes.Clone(armored), armored...), []byte("m"), namespace, []ssh.PublicKey{s.PublicKey()})
			},
		} {
			if k, err := verify(); err == nil || k != nil {
				t.Errorf("%s, %s: accepted", name, what)
			}
		}
	}
	if _, err := sshsig.Sign(newSigner(t), "", []byte("m")); err == nil {
		t.Error("signed without a namespace")
	}
}

// part is one field of the format, forged at will.
type part struct {
	version                   uint32
	namespace, reserved, hash string
	signedNamespace           string
	rest                      []byte
}

// forge signs what part says, by rules that only this test breaks.
func forge(t *testing.T, s ssh.Signer, p part, message []byte, alg string) []byte {
	t.Helper()
	d := sha512.Sum512(message)
	digest := d[:]
	if p.hash == "sha256" {
		d := sha256.Sum256(message)
		digest = d[:]
	}
	data := append([]byte("SSHSIG"), ssh.Marshal(struct {
		N, R, H string
		D       []byte
	}{p.signedNamespace, p.reserved, p.hash, digest})...)
	var sig *ssh.Signature
	var err error
	if alg != "" {
		sig, err = s.(ssh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, data, alg)
	} else {
		sig, err = s.Sign(rand.Reader, data)
	}
	if err != nil {
		t.Fatal(err)
	}
	sig.Rest = p.rest
	blob := append([]byte("SSHSIG"), ssh.Marshal(struct {
		V       uint32
		K       []byte
		N, R, H string
		S       []byte
	}{p.version, s.PublicKey().Marshal(), p.namespace, p.reserved, p.hash, ssh.Marshal(sig)})...)
	return pem.EncodeToMemory(&pem.Block{Type: "SSH SIGNATURE", Bytes: blob})
}

// Each row differs from the control in one thing that only one check sees.
func TestForgeries(t *testing.T) {
	s := newSigner(t)
	good := part{version: 1, namespace: namespace, hash: "sha512", signedNamespace: namespace}
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	strong, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		signer ssh.Signer
		change func(*part)
		alg    string
		want   string
	}{
		{"control", s, func(*part) {}, "", ""},
		{"control, sha256", s, func(p *part) { p.hash = "sha256" }, "", ""},
		{"control, rsa", signer(t, strong), func(*part) {}, ssh.KeyAlgoRSASHA512, ""},
		{"version 2", s, func(p *part) { p.version = 2 }, "", "version 2"},
		{"reserved field", s, func(p *part) { p.reserved = "x" }, "", "reserved"},
		{"hash of another name", s, func(p *part) { p.hash = "sha1" }, "", "hash"},
		{"namespace of the envelope alone", s, func(p *part) { p.signedNamespace = "other" }, "", "does not verify"},
		{"bytes after the signature", s, func(p *part) { p.rest = []byte{1} }, "", "after its end"},
		{"rsa with sha-1", signer(t, strong), func(*part) {}, ssh.KeyAlgoRSA, "algorithm"},
		{"rsa of 2048 bits", signer(t, weak), func(*part) {}, ssh.KeyAlgoRSASHA512, "3072"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := good
			tc.change(&p)
			_, err := sshsig.Verify(forge(t, tc.signer, p, []byte("m"), tc.alg), []byte("m"), namespace, []ssh.PublicKey{tc.signer.PublicKey()})
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestEveryByteCounts(t *testing.T) {
	s := newSigner(t)
	armored, err := sshsig.Sign(s, namespace, []byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(armored)
	keys := []ssh.PublicKey{s.PublicKey()}
	for i := range block.Bytes {
		b := bytes.Clone(block.Bytes)
		b[i] ^= 1
		if _, err := sshsig.Verify(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: b}), []byte("m"), namespace, keys); err == nil {
			t.Errorf("byte %d does not count", i)
		}
		if _, err := sshsig.Verify(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: b[:i]}), []byte("m"), namespace, keys); err == nil {
			t.Errorf("passes with %d bytes", i)
		}
	}
}

func TestParseKeys(t *testing.T) {
	a, b := newSigner(t).PublicKey(), newSigner(t).PublicKey()
	line := func(k ssh.PublicKey) string { return string(ssh.MarshalAuthorizedKey(k)) }
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ssh.NewPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, text string
		want       int
	}{
		{"two, a comment and an empty line", "# people\n" + line(a) + "\n" + line(b), 2},
		{"two kinds", line(a) + line(c), 2},
		{"none", "", 0},
		{"a comment alone", "# nobody\n", 0},
		{"one twice", line(a) + line(a), 0},
		{"options", `command="x" ` + line(a), 0},
		{"a line that is no key", line(a) + "ssh-ed25519 AAAA\n", 0},
		{"too many bytes", strings.Repeat("# x\n", sshsig.MaxKeyList/4) + line(a), 0},
	} {
		got, err := sshsig.ParseKeys([]byte(tc.text))
		if len(got) != tc.want || (err == nil) != (tc.want > 0) {
			t.Errorf("%s: %d keys, %v", tc.name, len(got), err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	keys, err := sshsig.ParseKeys(read(f, "ed25519.pub"))
	if err != nil {
		f.Fatal(err)
	}
	message := read(f, "message")
	f.Add(read(f, "ed25519.sig"), "m")
	f.Add(read(f, "rsa.sig"), "m")
	f.Fuzz(func(t *testing.T, armored []byte, text string) {
		if text == string(message) {
			return
		}
		if _, err := sshsig.Verify(armored, []byte(text), namespace, keys); err == nil {
			t.Error("a forgery passes")
		}
	})
}

// securityKey signs as a FIDO security key does (OpenSSH's PROTOCOL.u2f): over the
// application, its flags and a counter besides.
type securityKey struct {
	public  ssh.PublicKey
	ed25519 ed25519.PrivateKey
	ecdsa   *ecdsa.PrivateKey
	flags   byte
}

const application = "ssh:"

func newSecurityKey(t testing.TB, kind string, flags byte) *securityKey {
	t.Helper()
	k := &securityKey{flags: flags}
	var blob []byte
	switch kind {
	case ssh.KeyAlgoSKED25519:
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		k.ed25519, blob = private, ssh.Marshal(struct {
			Kind, Key, Application string
		}{kind, string(public), application})
	case ssh.KeyAlgoSKECDSA256:
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		point, err := private.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		k.ecdsa, blob = private, ssh.Marshal(struct {
			Kind, Curve, Key, Application string
		}{kind, "nistp256", string(point), application})
	}
	var err error
	if k.public, err = ssh.ParsePublicKey(blob); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *securityKey) PublicKey() ssh.PublicKey { return k.public }

func (k *securityKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	app, message := sha256.Sum256([]byte(application)), sha256.Sum256(data)
	rest := []byte{k.flags, 0, 0, 0, 7}
	said := slices.Concat(app[:], rest, message[:])
	sig := &ssh.Signature{Format: k.public.Type(), Rest: rest}
	if k.ed25519 != nil {
		sig.Blob = ed25519.Sign(k.ed25519, said)
		return sig, nil
	}
	sum := sha256.Sum256(said)
	r, s, err := ecdsa.Sign(rand.Reader, k.ecdsa, sum[:])
	sig.Blob = ssh.Marshal(struct{ R, S *big.Int }{r, s})
	return sig, err
}

// TestSecurityKeyIsTouched: whatever runs on a person's machine can have a security
// key sign in silence, and the flags say so.
func TestSecurityKeyIsTouched(t *testing.T) {
	const present, verified = 1, 4
	for _, kind := range []string{ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256} {
		for flags, touched := range map[byte]bool{0: false, verified: false, present: true, present | verified: true} {
			k := newSecurityKey(t, kind, flags)
			// What is signed is verified before it is handed out.
			sig, err := sshsig.Sign(k, namespace, []byte("approve"))
			if (err == nil) != touched {
				t.Errorf("%s with flags %d: %v", kind, flags, err)
			}
			if err != nil {
				continue
			}
			if _, err := sshsig.Verify(sig, []byte("approve"), namespace, []ssh.PublicKey{k.public}); err != nil {
				t.Errorf("%s: %v", kind, err)
			}
			if _, err := sshsig.Verify(sig, []byte("deny"), namespace, []ssh.PublicKey{k.public}); err == nil {
				t.Errorf("%s signed something else", kind)
			}
		}
	}
}
