package e2e

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
)

// resealFile has coffer write the job that seals an asset of the node's anew, and
// returns its path and the folder that it makes.
func (n *node) resealFile(t *testing.T, from, uri, to string) (job, out string) {
	t.Helper()
	out = filepath.Join(n.dir, to)
	job = filepath.Join(t.TempDir(), "reseal.yaml")
	n.must(t, "assets", "reseal", from, to, "--uri", "file://"+uri, "--to", "file://"+out, "--attestation-policy", "simulation", "--job", job)
	b, err := os.ReadFile(job)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(job, bytes.Replace(b, []byte("limit: 3"), []byte("limit: 3, backoff: 1s"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	return job, out
}

func (n *node) grantReseal(t *testing.T, job, from, to string, releases string) {
	t.Helper()
	n.must(t, "grant", "create", "--job", job, "--asset", from, "--asset", to, "--allow-simulated", "--releases", releases)
}

// asset is what the broker says of an asset.
func (n *node) asset(t *testing.T, name string) (digest string) {
	t.Helper()
	var a struct {
		Digest string `json:"digest"`
	}
	if err := json.Unmarshal([]byte(n.must(t, "assets", "show", name, "--output", "json")), &a); err != nil {
		t.Fatal(err)
	}
	return a.Digest
}

// TestReseal seals the model under another key in a job without a container, with
// the agent killed at its beginning and the holder of the first attempt killed too.
// A job then runs on the new asset, and the old one is revoked.
func TestReseal(t *testing.T) {
	n := need(t)
	// An asset of this test's own: it is revoked in the end.
	secret, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(secret)
	// Large enough to be killed in the middle.
	big := bytes.Repeat([]byte("a line of plaintext that is nowhere on the disk\n"), 24<<20/48)
	for name, b := range map[string][]byte{"model.safetensors": n.weights, "big-1": big, "big-2": big, "big-3": append(big[7:], "end"...)} {
		if err := os.WriteFile(filepath.Join(secret, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	old := filepath.Join(n.dir, "reseal-old")
	n.must(t, "seal", secret, "--asset", "reseal-old", "--kind", "weights", "--out", old)
	if err := os.RemoveAll(secret); err != nil {
		t.Fatal(err)
	}
	job, out := n.resealFile(t, "reseal-old", old, "reseal-new")
	// No job has the open asset as its input.
	early := n.jobFile(t, "too-early", func(s string) string { return strings.Replace(s, "asset: model\n", "asset: reseal-new\n", 1) })
	if said, err := n.coffer("plan", early); exitCode(err) == 0 {
		t.Errorf("an open asset is planned with: %s", said)
	}
	n.grantReseal(t, job, "reseal-old", "reseal-new", "4")

	id := n.submit(t, job)
	records := out + ".records"
	kill(t, n.sealing(t, id, records, 1))
	done := wholeRecords(records)
	if done == 0 || done == 4 {
		t.Fatalf("%d of 4 files were sealed when the holder was killed", done)
	}
	first := n.wait(t, id, "ended", ended)
	if first.State != "failed" || first.Reason != "holder-lost" {
		t.Fatalf("its holder was killed: %+v", first)
	}
	id = n.job(t, id).GetRetriedAs()
	if id == "" {
		t.Fatal("no second attempt")
	}
	holder := n.sealing(t, id, records, done+1)
	if err := syscall.Kill(holder, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	kill(t, n.pid(t, "cofferd"))
	if err := syscall.Kill(holder, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	n.must(t, "restart")
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v", s)
	}
	n.verified(t, id)
	body, err := os.ReadFile(n.evidence(t, id))
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Parse(body)
	if err != nil {
		t.Fatal(err)
	}
	var r bundle.Reseal
	if err := json.Unmarshal(b.Parts[bundle.ResealPart], &r); err != nil || len(r.Files) != 4 {
		t.Fatalf("the bundle has %d files, %v", len(r.Files), err)
	}
	digest := n.asset(t, "reseal-new")
	if digest == "" || digest == n.asset(t, "reseal-old") || !bytes.Contains(r.Record, []byte(digest)) {
		t.Errorf("the new asset has digest %q", digest)
	}
	kept := 0
	for _, f := range r.Files {
		if bytes.Contains(f.Record, []byte(`"sealedBy":"`+first.ID+`"`)) {
			kept++
		}
	}
	if kept != done {
		t.Errorf("%d of %d files that were sealed are kept", kept, done)
	}
	t.Logf("%d of 4 files are of the attempt whose holder was killed", kept)
	n.nowhere(t, big[:48], n.weights[:64])

	// What was sealed is what a job reads, and the old asset is of no more use.
	uses := n.jobFile(t, "on-the-new", func(s string) string {
		s = strings.Replace(s, "asset: model\n", "asset: reseal-new\n", 1)
		return strings.Replace(s, "file://"+n.model+"\n", "file://"+out+"\n", 1)
	})
	n.must(t, "grant", "create", "--job", uses, "--asset", "data", "--asset", "reseal-new", "--asset", "ckpt", "--allow-simulated")
	n.must(t, "revoke", "--asset", "reseal-old", "--reason", "sealed anew")
	run := n.submit(t, uses)
	if s := n.wait(t, run, "ended", ended); s.State != "succeeded" {
		t.Errorf("on the new asset: %+v\n%s", s, n.must(t, "logs", run))
	}
	n.verified(t, run)
	third, _ := n.resealFile(t, "reseal-old", old, "reseal-third")
	n.grantReseal(t, third, "reseal-old", "reseal-third", "1")
	if s := n.wait(t, n.submit(t, third), "ended", ended); s.State != "refused" || s.Stage != "release" {
		t.Errorf("the old asset was sealed anew once it was revoked: %+v", s)
	}
}

// sealing waits until a re-sealing has so many records, and returns its holder.
func (n *node) sealing(t *testing.T, id, records string, at int) (pid int) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if pid == 0 {
			if _, err := os.Stat(filepath.Join(n.layout.Jobs(), id, "holder.sock")); err == nil {
				pid = n.holderPid(t, id)
			}
			continue
		}
		if wholeRecords(records) >= at {
			return pid
		}
	}
	t.Fatalf("job %s has made no %d records: %+v", id, at, n.status(t, id))
	return 0
}

// wholeRecords counts the records that were written to their end: a holder that is killed
// can leave one that is not, and the next seals that file again.
func wholeRecords(dir string) int {
	names, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	whole := 0
	for _, e := range names {
		if b, err := os.ReadFile(filepath.Join(dir, e.Name())); err == nil && json.Valid(b) {
			whole++
		}
	}
	return whole
}

// nowhere looks for plaintexts under the stack's folder.
func (n *node) nowhere(t *testing.T, plaintexts ...[]byte) {
	t.Helper()
	began := time.Now()
	err := filepath.WalkDir(n.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Ext(path) == ".tar" {
			return nil //nolint:nilerr // what is gone meanwhile holds nothing
		}
		if i, err := d.Info(); err != nil || i.Size() > 64<<20 {
			return nil //nolint:nilerr // as above
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		for _, p := range plaintexts {
			if bytes.Contains(b, p) {
				t.Errorf("plaintext in %s", path)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("looked through %s in %s", n.dir, time.Since(began).Round(time.Millisecond))
}
