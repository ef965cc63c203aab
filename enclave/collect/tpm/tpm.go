// Package tpm drives a TPM 2.0: it makes the attestation key, proves that the
// key sits beside the endorsement key, measures the agent's files and quotes.
//
// Trusted: the TPM, the kernel's resource manager in front of it, and the
// firmware's event log as the kernel keeps it. Checked: that PCR 14 holds what
// the event logs say before it is quoted. Not checked: the endorsement
// certificate, the quote and the other PCRs, which are for the verifier.
//
// One command sequence runs at a time; every session and transient handle it
// opens is flushed before the next begins, on errors too.
package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/enclave/collect"
)

// akHandle is where the attestation key persists, in the owner's range of
// persistent handles (TCG Registry of Reserved TPM 2.0 Handles, section 2.3.1).
// The key is derived from the endorsement seed by a fixed template, so a cleared
// TPM gets the same key back and no state file is needed.
const akHandle tpm2.TPMHandle = 0x8100C0FE

// quoteTries bounds how often a quote is repeated because somebody else
// extended a PCR between reading and quoting.
const quoteTries = 3

// quotedPCRs returns the selection of every quote: firmware and boot loader (0 to
// 7), what the loader started (8, 9, and 11 to 13 by systemd's allocation), and
// what the agent measures. Without a measured boot all but the last are zero.
func quotedPCRs() []uint { return []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, vtpm.AgentPCR} }

// Options say how a machine's TPM is. The zero value is one whose attestation
// key is coffer's own, on a machine without a firmware log.
type Options struct {
	// FirmwareLog is where the kernel keeps the log of firmware and boot loader,
	// /sys/kernel/security/tpm0/binary_bios_measurements. It is read once.
	FirmwareLog string
	// Paravisor is true on Azure, where what runs below the guest keeps the TPM:
	// its attestation key and its report are used, which only it can make.
	Paravisor bool
}

// TPM is an open TPM with its attestation key.
type TPM struct {
	// slot holds the transport while no sequence runs. Taking it is the lock,
	// which unlike a mutex can be waited for with a context.
	slot chan transport.TPM
	// close ends the transport that Open opened.
	close func() error

	ak       tpm2.TPM2BPublic
	akHandle tpm2.TPMHandle
	akPublic []byte
	akName   tpm2.TPM2BName

	// firmware is the firmware's event log, nil without one; start is where it
	// leaves PCR 14.
	firmware []byte
	start    [32]byte

	// mu guards log.
	mu sync.Mutex
	// log is the encoded event log that explains PCR 14; nil before Measure.
	log []byte
}

// Open opens the TPM at path, a device (/dev/tpmrm0) or the unix socket of a
// software TPM, and creates or loads its attestation key.
func Open(ctx context.Context, path string, o Options) (*TPM, error) {
	tr, shared, err := dial(path)
	if err != nil {
		return nil, err
	}
	// Behind the kernel's resource manager every client has handles of its own.
	// A socket has none in front of it, and whoever held it before may have been
	// killed between load and flush.
	if !shared {
		if err := flushAll(tr); err != nil {
			return nil, fmt.Errorf("open TPM: %w", errors.Join(err, tr.Close()))
		}
	}
	t, err := New(ctx, tr, o)
	if err != nil {
		return nil, errors.Join(err, tr.Close())
	}
	t.close = tr.Close
	return t, nil
}

// New takes over an open transport and creates or loads the attestation key. A
// firmware log that is named and cannot be read is an error.
func New(ctx context.Context, tr transport.TPM, o Options) (*TPM, error) {
	t := &TPM{slot: make(chan transport.TPM, 1), akHandle: akHandle}
	t.slot <- tr
	if o.FirmwareLog != "" {
		var err error
		if t.firmware, t.start, err = firmwareLog(o.FirmwareLog); err != nil {
			return nil, fmt.Errorf("firmware log: %w", err)
		}
	}
	find := attestationKey
	if o.Paravisor {
		t.akHandle, find = paravisorAK, paravisorKey
	}
	type key struct {
		public tpm2.TPM2BPublic
		name   tpm2.TPM2BName
	}
	k, err := do(ctx, t, func(tr transport.TPM) (key, error) {
		public, name, err := find(tr)
		return key{public, name}, err
	})
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	t.ak, t.akName, t.akPublic = k.public, k.name, k.public.Bytes()
	return t, nil
}

// Close waits for the running sequence and closes the transport.
func (t *TPM) Close() error {
	<-t.slot
	if t.close == nil {
		return nil
	}
	return t.close()
}

// do runs fn alone on the transport. When ctx ends first the caller goes on,
// and the TPM stays taken until fn has left it in order.
func do[T any](ctx context.Context, t *TPM, fn func(transport.TPM) (T, error)) (T, error) {
	var none T
	var tr transport.TPM
	select {
	case <-ctx.Done():
		return none, fmt.Errorf("wait for TPM: %w", ctx.Err())
	case tr = <-t.slot:
	}
	type result struct {
		v   T
		err error
	}
	ch := make(chan result, 1)
	go func() {
		defer func() { t.slot <- tr }()
		v, err := fn(tr)
		ch <- result{v, err}
	}()
	select {
	case <-ctx.Done():
		return none, fmt.Errorf("wait for TPM: %w", ctx.Err())
	case r := <-ch:
		return r.v, r.err
	}
}

// akTemplate is an ECC P-256 restricted signing key: restricted, so that it
// signs only what the TPM itself says.
func akTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
		// The label sets this key apart from any other made of the same seed.
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: []byte("coffer attestation key")},
		}),
	}
}

func attestationKey(tr transport.TPM) (tpm2.TPM2BPublic, tpm2.TPM2BName, error) {
	read, err := tpm2.ReadPublic{ObjectHandle: akHandle}.Execute(tr)
	if err == nil {
		if err := fromTemplate(read.OutPublic, akTemplate()); err != nil {
			return tpm2.TPM2BPublic{}, tpm2.TPM2BName{}, fmt.Errorf("persistent handle %#x holds another key: %w", uint32(akHandle), err)
		}
		return read.OutPublic, read.Name, nil
	}
	if !errors.Is(err, tpm2.TPMRCHandle) {
		return tpm2.TPM2BPublic{}, tpm2.TPM2BName{}, fmt.Errorf("read: %w", err)
	}
	created, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHEndorsement,
		InPublic:      tpm2.New2B(akTemplate()),
	}.Execute(tr)
	if err != nil {
		return tpm2.TPM2BPublic{}, tpm2.TPM2BName{}, fmt.Errorf("create: %w", err)
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     &tpm2.NamedHandle{Handle: created.ObjectHandle, Name: created.Name},
		PersistentHandle: akHandle,
	}.Execute(tr)
	if err = errors.Join(err, flush(tr, created.ObjectHandle)); err != nil {
		return tpm2.TPM2BPublic{}, tpm2.TPM2BName{}, fmt.Errorf("make persistent: %w", err)
	}
	return created.OutPublic, created.Name, nil
}

// fromTemplate says whether a key has the template's type, attributes and
// parameters; its public point is its own.
func fromTemplate(got tpm2.TPM2BPublic, want tpm2.TPMTPublic) error {
	p, err := got.Contents()
	if err != nil {
		return err
	}
	g := *p
	g.Unique = want.Unique
	if !bytes.Equal(tpm2.Marshal(g), tpm2.Marshal(want)) {
		return errors.New("its attributes are not those of the template")
	}
	return nil
}

// AKPublic returns the attestation key as TPMT_PUBLIC.
func (t *TPM) AKPublic() []byte { return bytes.Clone(t.akPublic) }

// Quote quotes the measured PCRs over extraData. It refuses where PCR 14 does
// not hold what the event log says: nothing was measured yet, the TPM was reset
// under the agent, or somebody else extended it.
func (t *TPM) Quote(ctx context.Context, extraData [32]byte) (*collect.Quote, error) {
	t.mu.Lock()
	log := t.log
	t.mu.Unlock()
	if log == nil {
		return nil, errors.New("quote: nothing was measured in this boot")
	}
	events, err := vtpm.ParseLog(log)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	replayed := vtpm.Replay(t.start, events)
	q, err := do(ctx, t, func(tr transport.TPM) (*collect.Quote, error) {
		for range quoteTries {
			q, err := t.quoteOnce(tr, extraData)
			if err != nil {
				return nil, err
			}
			if q != nil {
				return q, nil
			}
		}
		return nil, fmt.Errorf("PCRs changed during %d attempts", quoteTries)
	})
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	if got := q.PCRs[vtpm.AgentPCR]; !bytes.Equal(got, replayed[:]) {
		return nil, fmt.Errorf("quote: PCR %d is %x, the agent's event log replays to %x: %s", vtpm.AgentPCR, got, replayed, t.pcrState(got))
	}
	q.EventLog, q.FirmwareLog = log, t.firmware
	return q, nil
}

// quoteOnce returns nil without an error if the PCRs that were read are not
// those that were quoted.
func (t *TPM) quoteOnce(tr transport.TPM, extraData [32]byte) (*collect.Quote, error) {
	pcrs, err := readPCRs(tr, quotedPCRs()...)
	if err != nil {
		return nil, err
	}
	rsp, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: t.akHandle, Name: t.akName, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: extraData[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      selection(quotedPCRs()...),
	}.Execute(tr)
	if err != nil {
		return nil, err
	}
	attest, err := rsp.Quoted.Contents()
	if err != nil {
		return nil, err
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return nil, err
	}
	q := &collect.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature), PCRs: map[int][]byte{}}
	h := sha256.New()
	for _, i := range quotedPCRs() {
		v := pcrs[int(i)] //nolint:gosec // 0 to 23
		h.Write(v[:])
		q.PCRs[int(i)] = bytes.Clone(v[:]) //nolint:gosec // 0 to 23
	}
	if !bytes.Equal(h.Sum(nil), info.PCRDigest.Buffer) {
		return nil, nil
	}
	return q, nil
}

func (t *TPM) pcrState(v []byte) string {
	if bytes.Equal(v, t.start[:]) || len(bytes.Trim(v, "\x00")) == 0 {
		return "the TPM was reset since the agent measured itself; restart the agent"
	}
	return "something else extended it in this boot; restart the machine"
}

func selection(pcrs ...uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...),
	}}}
}

// readPCRs asks again for what the TPM left out: one answer holds at most eight
// PCRs (TPM 2.0 Part 3, section 22.4).
func readPCRs(tr transport.TPM, pcrs ...uint) (map[int][32]byte, error) {
	out := map[int][32]byte{}
	for len(pcrs) > 0 {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection(pcrs...)}.Execute(tr)
		if err != nil {
			return nil, fmt.Errorf("read PCRs: %w", err)
		}
		n := len(rsp.PCRValues.Digests)
		if n == 0 || n > len(pcrs) || !slices.EqualFunc(rsp.PCRSelectionOut.PCRSelections, selection(pcrs[:n]...).PCRSelections,
			func(a, b tpm2.TPMSPCRSelection) bool {
				return a.Hash == b.Hash && bytes.Equal(a.PCRSelect, b.PCRSelect)
			}) {
			return nil, fmt.Errorf("read PCRs: the TPM has no SHA-256 bank, or left out PCR %d", pcrs[0])
		}
		for i, d := range rsp.PCRValues.Digests {
			if len(d.Buffer) != sha256.Size {
				return nil, fmt.Errorf("read PCR %d: %d bytes, want %d", pcrs[i], len(d.Buffer), sha256.Size)
			}
			out[int(pcrs[i])] = [32]byte(d.Buffer) //nolint:gosec // 0 to 23
		}
		pcrs = pcrs[n:]
	}
	return out, nil
}

func flush(tr transport.TPM, h tpm2.TPMHandle) error {
	_, err := tpm2.FlushContext{FlushHandle: h}.Execute(tr)
	if err != nil {
		return fmt.Errorf("flush %#x: %w", uint32(h), err)
	}
	return nil
}

// flushAll flushes every transient object and loaded session. The first handle
// of each kind is given by TPM 2.0 Part 2, section 7.2.
func flushAll(tr transport.TPM) error {
	for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} {
		hs, err := handles(tr, first)
		if err != nil {
			return err
		}
		for _, h := range hs {
			if err := flush(tr, h); err != nil {
				return err
			}
		}
	}
	return nil
}

// handles lists handles from first on that are of first's kind.
func handles(tr transport.TPM, first uint32) ([]tpm2.TPMHandle, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(tr)
	if err != nil {
		return nil, fmt.Errorf("list handles from %#x: %w", first, err)
	}
	l, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, fmt.Errorf("list handles from %#x: %w", first, err)
	}
	var out []tpm2.TPMHandle
	for _, h := range l.Handle {
		if uint32(h)>>24 == first>>24 {
			out = append(out, h)
		}
	}
	return out, nil
}
