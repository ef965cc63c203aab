package boot_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/emulate/boot"
)

// stages are the PCRs of what boots: loader, its configuration, kernel and initrd,
// unified kernel, and what that is handed from outside.
var stages = []int{4, 8, 9, 11, 12, 13}

// booted is a quote of a machine with a log, and of an agent on it.
func booted(t *testing.T, now time.Time, log []byte, extra string) (*vtpmtest.TPM, *evidence.TPM) {
	t.Helper()
	tpm, err := vtpmtest.New(now)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := vtpm.ParseTCGLog(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range parsed.Events {
		tpm.ExtendDigest(e.PCR, e.Digest)
	}
	tpm.Extend(vtpm.Event{PCR: vtpm.AgentPCR, Name: "agent", Digest: vtpm.Digest{1}, MeasuredBy: vtpm.MeasuredBySelf})
	agent, err := vtpm.EncodeLog(tpm.Events)
	if err != nil {
		t.Fatal(err)
	}
	index := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, vtpm.AgentPCR}
	quote, signature, err := tpm.Quote([]byte(extra), nil, index...)
	if err != nil {
		t.Fatal(err)
	}
	return tpm, &evidence.TPM{AKPublic: tpm.AKPublic, Quote: quote, Signature: signature, PCRs: tpm.PCRs(index...), EventLog: agent, TCGLog: log}
}

func signer(t *testing.T, name string) *receipt.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(name, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A policy like simulation's, with signed values of the emulated boot, accepts that
// boot and no other.
func TestListedBoot(t *testing.T) {
	now := time.Now()
	vendor, err := simulate.New(simulate.Options{Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	source := signer(t, "images.test")
	keys, err := source.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	p.Sources = []policy.Source{{Issuer: source.Issuer(), Keys: keys}}
	parsed, err := vtpm.ParseTCGLog(boot.Log())
	if err != nil {
		t.Fatal(err)
	}
	replayed := parsed.Replay()
	values := policy.Values{IssuedAt: now.Unix(), Expires: now.Add(time.Hour).Unix(), TPM: &policy.TPMValues{PCRs: map[string][]string{}}}
	for _, pcr := range stages {
		p.TPM.RequirePCRs = append(p.TPM.RequirePCRs, strconv.Itoa(pcr))
		values.TPM.PCRs[strconv.Itoa(pcr)] = []string{hex.EncodeToString(replayed[pcr][:])}
	}
	listed, err := policy.SignValues(source, values)
	if err != nil {
		t.Fatal(err)
	}

	other := func(measured, by string) []byte {
		was, is := sha256.Sum256([]byte(measured)), sha256.Sum256([]byte(by))
		log := bytes.Replace(boot.Log(), was[:], is[:], 1)
		if bytes.Equal(log, boot.Log()) {
			t.Fatalf("%q is not measured", measured)
		}
		return log
	}
	for situation, row := range map[string]struct {
		log []byte
		// told is the log that is sent; nil is the one of the boot.
		told []byte
		by   []string
	}{
		"the emulated boot":                         {log: boot.Log()},
		"another boot loader":                       {log: other("coffer simulated boot loader", "loader"), by: []string{"policy.tpm.pcr4"}},
		"another command line":                      {log: other(boot.CommandLine, "init=/bin/sh"), by: []string{"policy.tpm.pcr8"}},
		"another kernel":                            {log: other("coffer simulated kernel", "kernel"), by: []string{"policy.tpm.pcr9"}},
		"another initrd":                            {log: other("coffer simulated initrd", "initrd"), by: []string{"policy.tpm.pcr9"}},
		"another unified kernel":                    {log: other("enter-initrd", "enter-other"), by: []string{"policy.tpm.pcr11"}},
		"another kernel, under the log of this one": {log: other("coffer simulated kernel", "kernel"), told: boot.Log(), by: []string{"policy.tpm.pcr9", "tpm.tcg-log"}},
	} {
		tpm, ev := booted(t, now, row.log, "named by a party")
		if row.told != nil {
			ev.TCGLog = row.told
		}
		name := sha256.Sum256(tpm.AKPublic)
		anchors, err := vendor.Anchors().WithAKs(anchor.Software, "000b"+hex.EncodeToString(name[:]))
		if err != nil {
			t.Fatal(err)
		}
		v, err := verifier.New(verifier.Options{
			ID: "verifier.test", Anchors: anchors, Policies: []policy.Policy{p}, References: []string{listed}, Signer: signer(t, "verifier.test"),
			NonceKeys: [][]byte{make([]byte, verifier.NonceKeySize)}, Clock: func() time.Time { return now }, Build: "test",
		})
		if err != nil {
			t.Fatal(err)
		}
		_, r, err := v.CheckDevices(t.Context(), verifier.Devices{TPM: ev, Named: composite.Alone{TPMExtraData: []byte("named by a party")}, Policy: p.Name}, "party.test")
		if err != nil {
			t.Fatal(err)
		}
		var failed []string
		for _, c := range (receipt.Result{Submods: r.Submods, Checks: r.Checks}).AllChecks().Failed() {
			failed = append(failed, c.ID)
		}
		slices.Sort(failed)
		if !slices.Equal(failed, row.by) || (r.Submods["tpm0"].Status == receipt.Affirming) != (len(row.by) == 0) {
			t.Errorf("%s: %s, failed %v, want %v", situation, r.Submods["tpm0"].Status, failed, row.by)
		}
	}
}
