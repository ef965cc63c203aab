package local

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Sealed is a file key sealed under a TPM's storage root key: that key's name,
// what TPM2_Create gave, and the SHA-256 PCRs whose values at that time must be
// there again.
type Sealed struct {
	Root    []byte `json:"root"`
	Public  []byte `json:"public"`
	Private []byte `json:"private"`
	PCRs    []uint `json:"pcrs,omitempty"`
}

const (
	maxPCR    = 23
	maxSealed = 1024
	// sessionNonce is the size of a session's nonces, in bytes.
	sessionNonce = 16
)

// TPM locks a file with a TPM, which it uses only while a file is made or opened.
// The file key crosses to and from the TPM encrypted. Whoever plays the TPM while
// a file is made learns its key; later, the storage root key must be the same.
type TPM struct {
	// Dial opens the TPM; what it returns is closed again.
	Dial func() (transport.TPMCloser, error)
	// PCRs are those to seal a new file to; none is allowed.
	PCRs []uint
}

// Make seals a random file key.
func (l TPM) Make() (_ Params, _ []byte, err error) {
	if err := checkPCRs(l.PCRs); err != nil {
		return Params{}, nil, err
	}
	t, srk, done, err := l.begin()
	if err != nil {
		return Params{}, nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	attributes := tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, UserWithAuth: len(l.PCRs) == 0}
	var policy tpm2.TPM2BDigest
	if len(l.PCRs) > 0 {
		if policy, err = trial(t, l.PCRs); err != nil {
			return Params{}, nil, fmt.Errorf("TPM: policy over PCRs %v: %w", l.PCRs, err)
		}
	}
	key := make([]byte, kekSize)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	made, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: srk.handle, Name: srk.name, Auth: tpm2.PasswordAuth(nil)},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: key}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: attributes, AuthPolicy: policy,
		}),
	}.Execute(t, srk.session(tpm2.AESEncryption(128, tpm2.EncryptIn)))
	if err != nil {
		clear(key)
		return Params{}, nil, fmt.Errorf("TPM: seal the file key: %w", err)
	}
	return Params{TPM: &Sealed{Root: srk.name.Buffer, Public: made.OutPublic.Bytes(), Private: made.OutPrivate.Buffer, PCRs: slices.Clone(l.PCRs)}}, key, nil
}

// Open asks the TPM for the file key.
func (l TPM) Open(p Params) (_ []byte, err error) {
	if p.TPM == nil || p.Argon2id != nil {
		return nil, errors.New("the file is not locked with a TPM")
	}
	if err := checkPCRs(p.TPM.PCRs); err != nil {
		return nil, err
	}
	if len(p.TPM.Public) > maxSealed || len(p.TPM.Private) > maxSealed {
		return nil, errors.New("the file's sealed key is too long")
	}
	t, srk, done, err := l.begin()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	if !bytes.Equal(srk.name.Buffer, p.TPM.Root) {
		return nil, errors.New("TPM: it is not the one that the file key was sealed by: its storage root key is another")
	}
	object, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: srk.handle, Name: srk.name, Auth: tpm2.PasswordAuth(nil)},
		InPrivate:    tpm2.TPM2BPrivate{Buffer: p.TPM.Private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](p.TPM.Public),
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM: load the sealed file key: %w", err)
	}
	defer func() { err = errors.Join(err, flush(t, object.ObjectHandle)) }()
	session := srk.session(tpm2.AESEncryption(128, tpm2.EncryptOut))
	if len(p.TPM.PCRs) > 0 {
		s, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, sessionNonce, srk.options(tpm2.AESEncryption(128, tpm2.EncryptOut))...)
		if err != nil {
			return nil, fmt.Errorf("TPM: %w", err)
		}
		defer end() //nolint:errcheck // the TPM forgets it with the connection
		if _, err := (tpm2.PolicyPCR{PolicySession: s.Handle(), Pcrs: selection(p.TPM.PCRs)}).Execute(t); err != nil {
			return nil, fmt.Errorf("TPM: policy over PCRs %v: %w", p.TPM.PCRs, err)
		}
		session = s
	}
	out, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: session}}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM: unseal the file key: are the PCRs %v as when it was sealed? %w", p.TPM.PCRs, err)
	}
	if len(out.OutData.Buffer) != kekSize {
		return nil, fmt.Errorf("TPM: the file key has %d bytes: want %d", len(out.OutData.Buffer), kekSize)
	}
	return out.OutData.Buffer, nil
}

// root is the storage root key by the TCG's ECC template, made anew each time:
// it comes out the same as long as the TPM's owner seed stays.
type root struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// options encrypt a session's first parameter for the TPM that has the key.
func (r root) options(encryption tpm2.AuthOption) []tpm2.AuthOption {
	return []tpm2.AuthOption{encryption, tpm2.Salted(r.handle, r.public)}
}

func (r root) session(encryption tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, sessionNonce, r.options(encryption)...)
}

func (l TPM) begin() (transport.TPM, root, func() error, error) {
	if l.Dial == nil {
		return nil, root{}, nil, errors.New("TPM: none is configured")
	}
	t, err := l.Dial()
	if err != nil {
		return nil, root{}, nil, fmt.Errorf("TPM: %w", err)
	}
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
	if err != nil {
		return nil, root{}, nil, errors.Join(fmt.Errorf("TPM: storage root key: %w", err), t.Close())
	}
	done := func() error { return errors.Join(flush(t, made.ObjectHandle), t.Close()) }
	public, err := made.OutPublic.Contents()
	if err != nil {
		return nil, root{}, nil, errors.Join(fmt.Errorf("TPM: storage root key: %w", err), done())
	}
	// The name is the digest of what the sessions are encrypted to, not what the TPM calls it.
	name, err := tpm2.ObjectName(public)
	if err != nil {
		return nil, root{}, nil, errors.Join(fmt.Errorf("TPM: storage root key: %w", err), done())
	}
	return t, root{handle: made.ObjectHandle, name: *name, public: *public}, done, nil
}

func flush(t transport.TPM, h tpm2.TPMHandle) error {
	_, err := tpm2.FlushContext{FlushHandle: h}.Execute(t)
	return err
}

func checkPCRs(pcrs []uint) error {
	for i, p := range pcrs {
		if p > maxPCR || slices.Contains(pcrs[:i], p) {
			return fmt.Errorf("PCRs %v: want different numbers up to %d", pcrs, maxPCR)
		}
	}
	return nil
}

func selection(pcrs []uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...),
	}}}
}

// trial returns the digest of the policy that the PCRs are as they are.
func trial(t transport.TPM, pcrs []uint) (tpm2.TPM2BDigest, error) {
	s, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, sessionNonce, tpm2.Trial())
	if err != nil {
		return tpm2.TPM2BDigest{}, err
	}
	defer end() //nolint:errcheck // the TPM forgets it with the connection
	if _, err := (tpm2.PolicyPCR{PolicySession: s.Handle(), Pcrs: selection(pcrs)}).Execute(t); err != nil {
		return tpm2.TPM2BDigest{}, err
	}
	d, err := tpm2.PolicyGetDigest{PolicySession: s.Handle()}.Execute(t)
	if err != nil {
		return tpm2.TPM2BDigest{}, err
	}
	return d.PolicyDigest, nil
}
