package hold_test

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

func TestSecrets(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	key := keys.GenerateDataKey()
	token, long := []byte("the token"), pattern(plan.MaxSecretBytes)
	for name, files := range map[string]map[string][]byte{
		"too-large": {"f": pattern(plan.MaxSecretBytes + 1)}, "empty": {"f": nil}, "two-files": {"f": token, "g": token},
	} {
		dir, digest := sealed(t, key, "a", files)
		if err := h.c.Input(ctx, holdapi.Input{Name: name, Asset: "a", Digest: digest, Secret: true}, dir); code(err) != holdapi.CodeRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{"token": token, "long": long} {
		// What the file was called when it was sealed does not matter.
		dir, digest := sealed(t, key, "a", map[string][]byte{"some/name": b})
		must(t, h.c.Input(ctx, holdapi.Input{Name: name, Asset: "a", Digest: digest, Secret: true}, dir))
	}
	dir, digest := sealed(t, key, "a", map[string][]byte{"x": token})
	must(t, h.c.Input(ctx, holdapi.Input{Name: "data", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	_, err := h.c.Decrypt(ctx)
	must(t, err)
	if _, err := os.Stat(h.path("inputs", holdapi.SecretsName)); err != nil {
		t.Errorf("the runtime cannot mount the folder before the start: %v", err)
	}
	h.trace().start()
	h.waitStarted()
	at := func(name string) string { return h.path("inputs", holdapi.SecretsName, name) }
	for name, want := range map[string][]byte{"token": token, "long": long} {
		if got, err := os.ReadFile(at(name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		st, err := os.Stat(at(name))
		must(t, err)
		if sys, ok := st.Sys().(*syscall.Stat_t); !ok || st.Mode() != 0o400 || sys.Uid != 65532 || sys.Gid != 65532 {
			t.Errorf("%s is %s of %v", name, st.Mode(), st.Sys())
		}
		if err := os.WriteFile(at(name), nil, 0o600); err == nil {
			t.Errorf("%s was written to", name)
		}
	}
	for dir, want := range map[string]int{holdapi.SecretsName: 2, "data": 1} {
		if es, err := os.ReadDir(h.path("inputs", dir)); err != nil || len(es) != want {
			t.Errorf("%s has %v, %v", dir, es, err)
		}
	}
}
