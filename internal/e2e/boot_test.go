package e2e

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/internal/emulate/boot"
)

// The quote of the honest job is of a machine that booted by the emulated
// firmware's log, and the verifier says how.
func TestMeasuredBoot(t *testing.T) {
	n := need(t)
	b, err := bundle.Parse(n.honest(t).bundle)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(b.Parts[bundle.Result]), ".")
	if len(parts) != 3 {
		t.Fatal("the bundle has no result")
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var r receipt.Result
	if err := json.Unmarshal(body, &r); err != nil {
		t.Fatal(err)
	}
	tpm := r.Submods["tpm0"]
	if tpm.Claims["tpm.secure-boot"] != true || tpm.Claims["tpm.kernel-command-line"] != boot.CommandLine {
		t.Errorf("claims %v", tpm.Claims)
	}
	for _, c := range tpm.Checks {
		if c.ID == "tpm.tcg-log" && c.Outcome != check.Pass {
			t.Errorf("%+v", c)
		}
	}
	log, err := vtpm.ParseTCGLog(boot.Log())
	if err != nil {
		t.Fatal(err)
	}
	replayed := log.Replay()
	pcrs, _ := tpm.Claims["tpm.pcrs"].(map[string]any)
	for index, pcr := range map[string]int{"0": 0, "4": 4, "7": 7, "8": 8, "9": 9, "11": 11} {
		if got, want := pcrs[index], vtpm.Digest(replayed[pcr]).String(); got != want {
			t.Errorf("PCR %s is %v, the log leads to %s", index, got, want)
		}
	}
}
