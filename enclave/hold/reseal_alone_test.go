package hold_test

import (
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

// Who approves a re-sealing approves that nobody sees what is sealed: the holder that
// took its source shows it to nobody, in whichever order it is asked.
func TestWhatResealsHandsNothingOut(t *testing.T) {
	key := keys.GenerateDataKey()
	defer key.Destroy()
	dir, digest := sealed(t, key, "weights", map[string][]byte{"model": pattern(10)})
	h := start(t)
	must(t, h.c.ResealSource(t.Context(), holdapi.ResealSource{Asset: "weights", Digest: digest}, dir))
	if err := h.c.Input(t.Context(), holdapi.Input{Name: "data", Asset: "weights", Digest: digest}, dir); code(err) != holdapi.CodeState {
		t.Errorf("the source as an input: %v", err)
	}
	if err := h.c.Sink(t.Context(), holdapi.Sink{Asset: "weights", Plan: plan.Sum(nil), MaxBytes: 1}, t.TempDir()); code(err) != holdapi.CodeState {
		t.Errorf("a sink for checkpoints: %v", err)
	}
}
