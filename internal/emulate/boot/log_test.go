package boot_test

import (
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/emulate/boot"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
)

// The emulated machine's log says how it booted to whoever appraises a quote: the
// PCRs of every stage, Secure Boot, and the kernel's command line.
func TestLogTellsHowTheMachineBooted(t *testing.T) {
	log, err := vtpm.ParseTCGLog(boot.Log())
	if err != nil {
		t.Fatal(err)
	}
	replayed := log.Replay()
	for _, pcr := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11} {
		if replayed[pcr] == ([32]byte{}) {
			t.Errorf("PCR %d has no event", pcr)
		}
	}
	if replayed[vtpm.AgentPCR] != ([32]byte{}) {
		t.Error("the boot measures into the agent's PCR")
	}
	now := time.Now()
	tpm, err := vtpmtest.New(now)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range log.Events {
		tpm.ExtendDigest(e.PCR, e.Digest)
	}
	index := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13}
	quote, signature, err := tpm.Quote([]byte("named"), nil, index...)
	if err != nil {
		t.Fatal(err)
	}
	r := vtpm.Appraise(vtpm.Evidence{AKPublic: tpm.AKPublic, Quote: quote, Signature: signature, PCRs: tpm.PCRs(index...), TCGLog: boot.Log()},
		vtpm.Want{Alone: []byte("named"), Anchors: anchor.Vendor()}, now)
	if f := r.Checks.Failed(); len(f) != 1 || f[0].ID != "tpm.ak-credential" {
		t.Fatalf("failed %+v", f)
	}
	if r.Claims["tpm.secure-boot"] != true || r.Claims["tpm.kernel-command-line"] != boot.CommandLine {
		t.Errorf("claims %v", r.Claims)
	}
}

// A real TPM takes the boot once: a second one is not what the log says.
func TestFirmwareIsPlayedOnce(t *testing.T) {
	m := emulatetest.NewTPM(t)
	tr, err := linuxudstpm.Open(m.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.Close() }()
	if err := boot.Firmware(tr, boot.Log()); err != nil {
		t.Fatal(err)
	}
	if err := boot.Firmware(tr, boot.Log()); err == nil {
		t.Error("played twice")
	}
}
