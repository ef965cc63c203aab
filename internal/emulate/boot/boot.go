// Package boot plays what happens in a machine's TPM before the agent runs:
// firmware and boot loader measure, and on Azure the paravisor makes its
// attestation key and its report.
//
// It is simulated: the events are of nothing that ran. But the PCRs, the key and
// the index are a TPM's own, made by the commands with which the real ones are.
package boot

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/coffer-run/coffer/attest/vtpm"
)

// Firmware extends a TPM that was just reset with every event of a firmware log,
// and checks that it then holds what the log leads to. A log of a TPM started
// from another locality than 0 cannot be played.
func Firmware(tr transport.TPM, log []byte) error {
	l, err := vtpm.ParseTCGLog(log)
	if err != nil {
		return fmt.Errorf("play firmware: %w", err)
	}
	for i, e := range l.Events {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)}, //nolint:gosec // 0 to 23
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digest[:]}}},
		}.Execute(tr)
		if err != nil {
			return fmt.Errorf("play firmware: event %d: extend PCR %d: %w", i, e.PCR, err)
		}
	}
	// PCRs 17 to 22 reset to ones, and no firmware extends them.
	replayed := l.Replay()
	for i, want := range replayed[:16] {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(uint(i))}, //nolint:gosec // 0 to 15
		}}}.Execute(tr)
		if err != nil {
			return fmt.Errorf("play firmware: read PCR %d: %w", i, err)
		}
		if d := rsp.PCRValues.Digests; len(d) != 1 || len(d[0].Buffer) != sha256.Size || [sha256.Size]byte(d[0].Buffer) != want {
			return fmt.Errorf("play firmware: PCR %d is not %x: the TPM was not reset, or was started from another locality", i, want)
		}
	}
	return nil
}

// Where Azure's paravisor keeps its attestation key and its report.
const (
	paravisorAK     tpm2.TPMHandle = 0x81000003
	paravisorReport tpm2.TPMHandle = 0x01400001
)

// nvChunk is what every TPM takes in one write.
const nvChunk = 512

// Paravisor makes an RSA attestation key in the TPM, has report made for it, and
// leaves both where Azure's paravisor does. report gets the key and returns the
// paravisor's report.
func Paravisor(ctx context.Context, tr transport.TPM, report func(context.Context, *rsa.PublicKey) ([]byte, error)) error {
	key, err := restrictedRSA(tr)
	if err != nil {
		return fmt.Errorf("play paravisor: attestation key: %w", err)
	}
	b, err := report(ctx, key)
	if err != nil {
		return fmt.Errorf("play paravisor: report: %w", err)
	}
	if err := store(tr, b); err != nil {
		return fmt.Errorf("play paravisor: NV index %#x: %w", uint32(paravisorReport), err)
	}
	return nil
}

func restrictedRSA(tr transport.TPM) (*rsa.PublicKey, error) {
	created, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHEndorsement,
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{
				FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
			},
			Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
				KeyBits: 2048,
				Scheme: tpm2.TPMTRSAScheme{
					Scheme:  tpm2.TPMAlgRSASSA,
					Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
				},
			}),
		}),
	}.Execute(tr)
	if err != nil {
		return nil, err
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     &tpm2.NamedHandle{Handle: created.ObjectHandle, Name: created.Name},
		PersistentHandle: paravisorAK,
	}.Execute(tr)
	_, flushed := tpm2.FlushContext{FlushHandle: created.ObjectHandle}.Execute(tr)
	if err := errors.Join(err, flushed); err != nil {
		return nil, err
	}
	public, err := created.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	modulus, err := public.Unique.RSA()
	if err != nil {
		return nil, err
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(modulus.Buffer), E: 65537}, nil
}

func store(tr transport.TPM, b []byte) error {
	if len(b) > 0xffff {
		return fmt.Errorf("%d bytes", len(b))
	}
	public := tpm2.TPMSNVPublic{
		NVIndex: paravisorReport, NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NoDA: true},
		DataSize:   uint16(len(b)), //nolint:gosec // checked above
	}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(public)}).Execute(tr); err != nil {
		return err
	}
	for at := 0; at < len(b); at += nvChunk {
		// The index's name changes with the first write.
		read, err := tpm2.NVReadPublic{NVIndex: paravisorReport}.Execute(tr)
		if err != nil {
			return err
		}
		_, err = tpm2.NVWrite{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: paravisorReport, Name: read.NVName},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: b[at:min(at+nvChunk, len(b))]},
			Offset:     uint16(at), //nolint:gosec // below len(b)
		}.Execute(tr)
		if err != nil {
			return err
		}
	}
	return nil
}
