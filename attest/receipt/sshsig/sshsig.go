// Package sshsig makes and checks SSHSIG signatures, the format of
// `ssh-keygen -Y sign`, so that people sign with the keys that they have:
// files, ssh-agent, PKCS#11 tokens and FIDO security keys.
//
// Trusted: the list of keys that the caller allows. Checked: the format and its
// bounds, the namespace, the hash, that the key is one of the allowed ones and of
// an allowed kind, the signature, and, for security keys, that somebody touched
// them. Not checked: who holds a key, and since when; SSHSIG has no time.
//
// Source: PROTOCOL.sshsig of OpenSSH.
package sshsig

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

const (
	// MaxSize bounds an armored signature, in bytes: RSA with 16384 bits fits.
	MaxSize = 16 << 10
	// MaxKeys bounds the keys of one list, and MaxKeyList its size in bytes.
	MaxKeys    = 64
	MaxKeyList = 64 << 10
	// minRSA is the least number of bits of an RSA key.
	minRSA = 3072

	armor   = "SSH SIGNATURE"
	magic   = "SSHSIG"
	version = 1
)

// envelope is the signature that travels (PROTOCOL.sshsig, "Blob format").
type envelope struct {
	Version   uint32
	PublicKey []byte
	Namespace string
	Reserved  string
	Hash      string
	Signature []byte
}

// signed is what the key signs, after the magic ("Signed Data, of which the
// signature goes into the blob above").
type signed struct {
	Namespace string
	Reserved  string
	Hash      string
	Digest    []byte
}

// formats returns the signature algorithms that a kind of key may use. SHA-1
// (ssh-rsa), DSA and certificates are in no list.
func formats(keyType string) []string {
	switch keyType {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256:
		return []string{keyType}
	case ssh.KeyAlgoRSA:
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return nil
}

// CheckKey refuses a key that no signature of this package is accepted from.
func CheckKey(k ssh.PublicKey) error {
	if k == nil || len(formats(k.Type())) == 0 {
		return errors.New("ssh key: want ed25519, ecdsa, sk-ed25519, sk-ecdsa or rsa")
	}
	if k.Type() != ssh.KeyAlgoRSA {
		return nil
	}
	c, ok := k.(ssh.CryptoPublicKey)
	if !ok {
		return errors.New("ssh key: not an RSA key")
	}
	if r, ok := c.CryptoPublicKey().(*rsa.PublicKey); !ok || r.N.BitLen() < minRSA {
		return fmt.Errorf("ssh key: an RSA key has at least %d bits", minRSA)
	}
	return nil
}

// Same reports whether two keys are one.
func Same(a, b ssh.PublicKey) bool {
	return a != nil && b != nil && bytes.Equal(a.Marshal(), b.Marshal())
}

// ParseKeys reads lines of an authorized_keys file. Options, kinds of keys that
// sign nothing here, the same key twice, and an empty list are errors.
func ParseKeys(text []byte) ([]ssh.PublicKey, error) {
	if len(text) > MaxKeyList {
		return nil, fmt.Errorf("ssh keys: %d bytes, at most %d are allowed", len(text), MaxKeyList)
	}
	var out []ssh.PublicKey
	// Line by line: ssh.ParseAuthorizedKey passes over what it cannot read.
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		k, _, options, _, err := ssh.ParseAuthorizedKey(line)
		switch {
		case err != nil:
			return nil, fmt.Errorf("ssh keys: %.60q: %w", line, err)
		case len(options) > 0:
			return nil, errors.New("ssh keys: a key with options: they would mean nothing here")
		case len(out) == MaxKeys:
			return nil, fmt.Errorf("ssh keys: more than %d", MaxKeys)
		}
		if err := CheckKey(k); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(o ssh.PublicKey) bool { return Same(o, k) }) {
			return nil, fmt.Errorf("ssh keys: %s stands there twice", ssh.FingerprintSHA256(k))
		}
		out = append(out, k)
	}
	if len(out) == 0 {
		return nil, errors.New("ssh keys: none")
	}
	return out, nil
}

// Sign signs message for namespace and returns the armored signature.
func Sign(signer ssh.Signer, namespace string, message []byte) ([]byte, error) {
	if namespace == "" {
		return nil, errors.New("ssh signature: no namespace")
	}
	key := signer.PublicKey()
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	digest := sha512.Sum512(message)
	data := append([]byte(magic), ssh.Marshal(signed{namespace, "", "sha512", digest[:]})...)
	var sig *ssh.Signature
	var err error
	if as, ok := signer.(ssh.AlgorithmSigner); ok {
		sig, err = as.SignWithAlgorithm(rand.Reader, data, formats(key.Type())[0])
	} else {
		sig, err = signer.Sign(rand.Reader, data)
	}
	if err != nil {
		return nil, fmt.Errorf("ssh signature: %w", err)
	}
	blob := append([]byte(magic), ssh.Marshal(envelope{version, key.Marshal(), namespace, "", "sha512", ssh.Marshal(sig)})...)
	out := pem.EncodeToMemory(&pem.Block{Type: armor, Bytes: blob})
	// What a signer returns is held to the rules of those who read it.
	if _, err := Verify(out, message, namespace, []ssh.PublicKey{key}); err != nil {
		return nil, err
	}
	return out, nil
}

// Verify checks an armored signature over message in namespace by one of the
// allowed keys, and returns that key. Every failure is an error; without allowed
// keys there is nothing else.
func Verify(armored, message []byte, namespace string, allowed []ssh.PublicKey) (ssh.PublicKey, error) {
	e, err := parse(armored)
	if err != nil {
		return nil, fmt.Errorf("ssh signature: %w", err)
	}
	if namespace == "" || e.Namespace != namespace {
		return nil, fmt.Errorf("ssh signature: namespace %.80q, want %q: sign with `ssh-keygen -Y sign -n %s`", e.Namespace, namespace, namespace)
	}
	var key ssh.PublicKey
	for _, k := range allowed {
		if k != nil && bytes.Equal(k.Marshal(), e.PublicKey) {
			key = k
		}
	}
	if key == nil {
		return nil, errors.New("ssh signature: by a key that is not one of the allowed ones")
	}
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	var digest []byte
	switch e.Hash {
	case "sha512":
		d := sha512.Sum512(message)
		digest = d[:]
	case "sha256":
		d := sha256.Sum256(message)
		digest = d[:]
	default:
		return nil, fmt.Errorf("ssh signature: hash %.40q, want sha512 or sha256", e.Hash)
	}
	var sig ssh.Signature
	if err := ssh.Unmarshal(e.Signature, &sig); err != nil {
		return nil, fmt.Errorf("ssh signature: %w", err)
	}
	if !slices.Contains(formats(key.Type()), sig.Format) {
		return nil, fmt.Errorf("ssh signature: algorithm %.40q for a key of type %s", sig.Format, key.Type())
	}
	// Only security keys add something: flags and a counter, which they sign.
	if !strings.HasPrefix(sig.Format, "sk-") && len(sig.Rest) > 0 {
		return nil, errors.New("ssh signature: bytes after its end")
	}
	data := append([]byte(magic), ssh.Marshal(signed{e.Namespace, e.Reserved, e.Hash, digest})...)
	if err := key.Verify(data, &sig); err != nil {
		return nil, fmt.Errorf("ssh signature: does not verify over this message: %w", err)
	}
	return key, nil
}

// Key returns the key that an armored signature names as its own. That the
// signature holds, and whose key it is, is for Verify and its caller.
func Key(armored []byte) (ssh.PublicKey, error) {
	e, err := parse(armored)
	if err != nil {
		return nil, fmt.Errorf("ssh signature: %w", err)
	}
	k, err := ssh.ParsePublicKey(e.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("ssh signature: %w", err)
	}
	return k, CheckKey(k)
}

func parse(armored []byte) (envelope, error) {
	var e envelope
	if len(armored) > MaxSize {
		return e, fmt.Errorf("%d bytes, at most %d are allowed", len(armored), MaxSize)
	}
	block, rest := pem.Decode(armored)
	if block == nil || block.Type != armor || len(block.Headers) > 0 || len(bytes.TrimSpace(rest)) > 0 || !bytes.HasPrefix(armored, []byte("-----BEGIN")) {
		return e, fmt.Errorf("want one block BEGIN %s and nothing else", armor)
	}
	blob, ok := bytes.CutPrefix(block.Bytes, []byte(magic))
	if !ok {
		return e, errors.New("no " + magic + " in it")
	}
	if err := ssh.Unmarshal(blob, &e); err != nil {
		return e, err
	}
	if e.Version != version {
		return e, fmt.Errorf("version %d, want %d", e.Version, version)
	}
	// Clients that do not know what is reserved ignore it; here nobody does.
	if e.Reserved != "" {
		return e, errors.New("something stands in the reserved field")
	}
	return e, nil
}
