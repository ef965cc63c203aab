package e2e

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/enclave/seal"
)

// Damage in the middle of an input that is opened while the container starts ends
// the job, whatever the job makes of it, and its record says so.
func TestLargeInputIsDamaged(t *testing.T) {
	n := need(t)
	secret, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(secret)
	plain := make([]byte, 130<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(plain[:1<<20])
	file, sealed := filepath.Join(secret, "model.safetensors"), filepath.Join(t.TempDir(), "sealed")
	if err := os.WriteFile(file, plain, 0o600); err != nil {
		t.Fatal(err)
	}
	n.must(t, "seal", file, "--asset", "large", "--kind", "weights", "--out", sealed)
	f, err := os.OpenFile(filepath.Join(sealed, seal.SealedName("000000")), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	bit := []byte{0}
	at := int64(seal.PayloadOffset + 100<<20)
	if _, err := f.ReadAt(bit, at); err != nil {
		t.Fatal(err)
	}
	bit[0] ^= 1
	if _, err := f.WriteAt(bit, at); err != nil {
		t.Fatal(err)
	}
	// It takes whatever it is given for good.
	const shrugs = `["/usr/bin/python3", "-c", "import time\ntry: print(len(open('/inputs/model/model.safetensors', 'rb').read()))\nexcept OSError as e: print('EIO' if e.errno == 5 else e)"]`
	job := n.jobFile(t, "large-damaged", func(s string) string {
		return strings.NewReplacer(trains, shrugs, "asset: model\n", "asset: large\n", "file://"+n.model+"\n", "file://"+sealed+"\n").Replace(s)
	})
	n.must(t, "grant", "create", "--plan", n.planDigest(t, job), "--asset", "data", "--asset", "large", "--asset", "ckpt", "--allow-simulated")
	id := n.submit(t, job)
	s := n.wait(t, id, "its end", ended)
	if s.State != "failed" || s.Stage != "run" || s.Reason != "inputs-failed" || !strings.Contains(s.Message, "input model: file 000000: ") || !strings.Contains(s.Message, "does not authenticate") {
		t.Errorf("%+v", s)
	}
	if log := n.must(t, "logs", id); strings.TrimSpace(log) != "EIO" && strings.TrimSpace(log) != "" {
		t.Errorf("the job read %q", log)
	}
	b, body := n.bundleOf(t, id)
	if !bytes.Contains(b.Parts["trace"], []byte("inputs-failed")) {
		t.Error("the record does not say why")
	}
	if out, err := n.verify(t, body, true); err != nil || !strings.Contains(out, "trace.inputs") {
		t.Errorf("%v\n%s", err, out)
	}
}
