package hold

import (
	"context"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// checkSecret wants one small file. sizes are those in the sealed manifest.
func checkSecret(name string, sizes []int64) error {
	if len(sizes) != 1 || sizes[0] <= 0 || sizes[0] > plan.MaxSecretBytes {
		return fail(holdapi.CodeRefused, "secret %s: want one file of 1 to %d bytes", name, plan.MaxSecretBytes)
	}
	return nil
}

// addSecret makes the folder that all secrets share, behind the gate of the inputs.
// No input can have its name.
func (t *inputTree) addSecret(ctx context.Context, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.dirs[holdapi.SecretsName]
	if d == nil {
		d = t.newDir(ctx, t.root, holdapi.SecretsName, true)
		t.dirs[holdapi.SecretsName] = d
	}
	t.dirs[name] = d
}

// addSecretFile puts a secret into that folder. The job's user alone reads it.
func (t *inputTree) addSecretFile(ctx context.Context, name string, c content) {
	t.put(ctx, name, name, &inputFile{t: t, c: c, mode: 0o400})
}
