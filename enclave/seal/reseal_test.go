package seal

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/keys"
)

// resealed is a source and what comes of it.
type resealed struct {
	files    map[string][]byte
	dir      string
	digest   plan.Digest
	sink     string
	from, to *keys.DataKey
	session  *keys.Session
	r        Reseal
	signed   []SignedReseal
}

func resealTest(t *testing.T) *resealed {
	t.Helper()
	w := &resealed{files: map[string][]byte{"a": pattern(2*testChunk + 7), "b/c": pattern(0), "d": pattern(testChunk)}, from: testKey(t, 1), to: testKey(t, 2), sink: t.TempDir()}
	var s Sealed
	w.dir, s = sealTest(t, w.from, "old", w.files)
	w.digest = s.Digest
	w.begin(t)
	return w
}

// begin is another job of the same plan.
func (w *resealed) begin(t *testing.T) {
	t.Helper()
	var err error
	w.session, err = keys.GenerateSession()
	must(t, err)
	f, err := ReadFolder(openRoot(t, w.dir), "old", w.digest)
	must(t, err)
	w.signed = nil
	w.r = Reseal{
		JobID: "job", Plan: plan.Sum([]byte("p")), From: f, FromKey: w.from, To: "new", ToKey: w.to, Name: "model", Use: func() error { return nil },
		Each: func(s SignedReseal) { w.signed = append(w.signed, s) },
	}
}

func (w *resealed) run(t *testing.T) (receipt.ResealRecord, error) {
	t.Helper()
	w.signed = nil
	last, err := ResealFolder(t.Context(), w.r, w.session, openRoot(t, w.sink), Options{})
	if err != nil {
		return receipt.ResealRecord{}, err
	}
	pub, err := x509.ParsePKIXPublicKey(w.session.Public())
	must(t, err)
	key, _ := pub.(*ecdsa.PublicKey)
	var records [][]byte
	for _, s := range w.signed {
		must(t, receipt.VerifyReseal(key, s.Record, s.Signature))
		records = append(records, s.Record)
	}
	must(t, receipt.VerifyReseal(key, last.Record, last.Signature))
	r, err := receipt.ParseResealRecord(last.Record)
	must(t, err)
	if r.Records != receipt.ResealRecords(records) || r.Files != len(w.files) || r.JobID != w.r.JobID {
		t.Errorf("the last record is %+v", r)
	}
	return r, nil
}

// by are the jobs that sealed the files, by the records.
func (w *resealed) by(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, s := range w.signed {
		r, err := receipt.ParseResealFile(s.Record)
		must(t, err)
		out = append(out, r.SealedBy)
	}
	return out
}

// whole wants the new folder to be good, and to hold what the old one holds.
func (w *resealed) whole(t *testing.T, digest plan.Digest) {
	t.Helper()
	dir := filepath.Join(w.sink, "model")
	must(t, Check(t.Context(), openRoot(t, dir), "new", digest))
	got, err := openAll(t, w.to, "new", dir, digest)
	must(t, err)
	if !maps.EqualFunc(got, w.files, bytes.Equal) {
		t.Error("the plaintext is another one")
	}
	if _, err := openAll(t, w.from, "new", dir, digest); !errors.Is(err, ErrKey) {
		t.Errorf("under the old key: %v", err)
	}
}

func TestResealFolder(t *testing.T) {
	w := resealTest(t)
	r, err := w.run(t)
	must(t, err)
	w.whole(t, r.Digest)
	if got := w.by(t); !slices.Equal(got, []string{"job", "job", "job"}) {
		t.Errorf("sealed by %v", got)
	}
	for _, s := range w.signed {
		for _, b := range w.files {
			if root, err := plainRootOf(b); err == nil && bytes.Contains(s.Record, []byte(root)) {
				t.Error("a record says the digest of the plaintext")
			}
		}
	}
	// Another job of the plan that finds it done says so by its own key.
	w.begin(t)
	w.r.JobID = "job-2"
	again, err := w.run(t)
	must(t, err)
	if again.Digest != r.Digest || !slices.Equal(w.by(t), []string{"job", "job", "job"}) {
		t.Errorf("again: %+v by %v", again, w.by(t))
	}
}

func plainRootOf(b []byte) (string, error) {
	l, err := layoutOf(int64(len(b)), testChunk)
	if err != nil {
		return "", err
	}
	leaves := make([]leaf, l.chunks)
	h := newLeafHasher()
	for i := range leaves {
		h.sum(b[i*testChunk:min(len(b), (i+1)*testChunk)], &leaves[i])
	}
	return string(merkleRoot(leaves)), nil
}

// Whatever an earlier run left, a run ends with a good folder or with an error,
// and keeps only what was sealed by a job of the same plan under the same key.
func TestResealKeepsWhatHolds(t *testing.T) {
	flip := func(name string, at int64) func(t *testing.T, w *resealed) {
		return func(t *testing.T, w *resealed) {
			f, err := os.OpenFile(filepath.Join(w.sink, name), os.O_RDWR, 0)
			must(t, err)
			defer f.Close()
			b := make([]byte, 1)
			_, err = f.ReadAt(b, at)
			must(t, err)
			b[0] ^= 1
			_, err = f.WriteAt(b, at)
			must(t, err)
		}
	}
	// back takes the folder back to one that was not finished.
	back := func(t *testing.T, w *resealed) {
		must(t, os.Rename(filepath.Join(w.sink, "model"), filepath.Join(w.sink, "model.tmp")))
	}
	const old, anew = "job", "job-2"
	for name, tc := range map[string]struct {
		change func(t *testing.T, w *resealed)
		by     []string // nil: refused
	}{
		"all of it":                   {func(*testing.T, *resealed) {}, []string{old, old, old}},
		"a bit of a file":             {flip("model.tmp/000000.sealed", PayloadOffset+9), []string{anew, old, old}},
		"a bit of a header's padding": {flip("model.tmp/000000.sealed", 200), []string{anew, old, old}},
		"a bit of a record":           {flip("model.records/000001.json", 50), []string{old, anew, old}},
		"a file without its record": {func(t *testing.T, w *resealed) {
			must(t, os.Remove(filepath.Join(w.sink, "model.records/000002.json")))
		}, []string{old, old, anew}},
		"a record without its file": {func(t *testing.T, w *resealed) { must(t, os.Remove(filepath.Join(w.sink, "model.tmp/000002.sealed"))) }, []string{old, old, anew}},
		"a cut file": {func(t *testing.T, w *resealed) {
			must(t, os.Truncate(filepath.Join(w.sink, "model.tmp/000000.sealed"), PayloadOffset+100))
		}, []string{anew, old, old}},
		"another job's plan": {func(_ *testing.T, w *resealed) { w.r.Plan = plan.Sum([]byte("q")) }, []string{anew, anew, anew}},
		"another new key":    {func(t *testing.T, w *resealed) { w.to = testKey(t, 3); w.r.ToKey = w.to }, []string{anew, anew, anew}},
		"another target":     {func(_ *testing.T, w *resealed) { w.r.To = "newer" }, []string{anew, anew, anew}},
		"a file and its record in a new place": {func(t *testing.T, w *resealed) {
			for _, n := range []string{"model.tmp/%s.sealed", "model.records/%s.json"} {
				must(t, os.Rename(filepath.Join(w.sink, fmt.Sprintf(n, "000000")), filepath.Join(w.sink, fmt.Sprintf(n, "000002"))))
			}
		}, []string{anew, old, anew}},
		"something else in the folder": {func(t *testing.T, w *resealed) {
			must(t, os.WriteFile(filepath.Join(w.sink, "model.tmp", "x"), nil, 0o600))
		}, nil},
		"a link in place of the folder": {func(t *testing.T, w *resealed) {
			must(t, os.Rename(filepath.Join(w.sink, "model.tmp"), filepath.Join(w.sink, "elsewhere")))
			must(t, os.Symlink("elsewhere", filepath.Join(w.sink, "model.tmp")))
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w := resealTest(t)
			_, err := w.run(t)
			must(t, err)
			back(t, w)
			w.begin(t)
			w.r.JobID = anew
			tc.change(t, w)
			r, err := w.run(t)
			if tc.by == nil {
				if err == nil {
					t.Fatal("went through")
				}
				return
			}
			must(t, err)
			if got := w.by(t); !slices.Equal(got, tc.by) {
				t.Errorf("sealed by %v, want %v", got, tc.by)
			}
			if w.r.To == "new" {
				w.whole(t, r.Digest)
			}
		})
	}
}

// A finished folder is never touched again: what is wrong with it is an error.
func TestResealLeavesFinishedFolders(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, w *resealed){
		"a bit of a file": func(t *testing.T, w *resealed) {
			p := filepath.Join(w.sink, "model/000000.sealed")
			b, err := os.ReadFile(p)
			must(t, err)
			b[len(b)-1] ^= 1
			must(t, os.WriteFile(p, b, 0o600))
		},
		"the manifest of another sealing": func(t *testing.T, w *resealed) {
			dir, _ := sealTest(t, w.to, "new", w.files)
			b, err := os.ReadFile(filepath.Join(dir, ManifestName))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(w.sink, "model", ManifestName), b, 0o600))
		},
		"a missing record": func(t *testing.T, w *resealed) {
			must(t, os.Remove(filepath.Join(w.sink, "model.records/000000.json")))
		},
		"another new key": func(t *testing.T, w *resealed) { w.r.ToKey = testKey(t, 3) },
	} {
		t.Run(name, func(t *testing.T) {
			w := resealTest(t)
			_, err := w.run(t)
			must(t, err)
			w.begin(t)
			change(t, w)
			if _, err := w.run(t); err == nil {
				t.Error("a folder that is not what its records say is signed for")
			}
		})
	}
}

func TestResealRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(t *testing.T, w *resealed)
		want   error
	}{
		"the wrong old key":  {func(t *testing.T, w *resealed) { w.r.FromKey = testKey(t, 9) }, ErrKey},
		"the same key twice": {func(_ *testing.T, w *resealed) { w.r.ToKey = w.r.FromKey }, nil},
		"no new key": {func(t *testing.T, w *resealed) {
			w.r.ToKey = keys.GenerateDataKey()
			w.r.ToKey.Destroy()
		}, nil},
		"a bit of the source": {func(t *testing.T, w *resealed) {
			p := filepath.Join(w.dir, "000000.sealed")
			b, err := os.ReadFile(p)
			must(t, err)
			b[PayloadOffset+testChunk+20] ^= 4
			must(t, os.WriteFile(p, b, 0o600))
		}, ErrDamaged},
		"a source whose digest of plaintext is another": {func(t *testing.T, w *resealed) {
			// Whoever has the old key can make this; nobody else can.
			m, _, err := ParseManifest(mustRead(t, filepath.Join(w.dir, ManifestName)))
			must(t, err)
			es, err := m.Open(w.from)
			must(t, err)
			var p privatePart
			for _, e := range es {
				p.Files = append(p.Files, privateEntry{Name: e.Name, Size: e.Size, Root: es[2].PlainRoot, Salt: e.salt})
			}
			b, err := sealManifest(w.from, m, p, nil)
			must(t, err)
			must(t, os.WriteFile(filepath.Join(w.dir, ManifestName), b, 0o600))
			w.digest = plan.Sum(b)
			w.begin(t)
		}, ErrDamaged},
		"a lease that ends in between": {func(_ *testing.T, w *resealed) {
			var left atomic.Int64
			left.Store(3)
			w.r.Use = func() error {
				if left.Add(-1) < 0 {
					return context.DeadlineExceeded
				}
				return nil
			}
		}, context.DeadlineExceeded},
		"the same asset":              {func(_ *testing.T, w *resealed) { w.r.To = "old" }, nil},
		"a name that leaves the sink": {func(_ *testing.T, w *resealed) { w.r.Name = "../x" }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w := resealTest(t)
			tc.change(t, w)
			_, err := w.run(t)
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if _, err := os.Stat(filepath.Join(w.sink, "model")); err == nil {
				t.Error("the folder is there")
			}
		})
	}
}

// Checkpoints have no digests of plaintext: their ciphertext must be the manifest's.
func TestResealOfACheckpoint(t *testing.T) {
	w := resealTest(t)
	dir := t.TempDir()
	c, err := commitFor(t, dir, 1, "", Options{})
	must(t, err)
	source := filepath.Join(dir, "000001-c")
	w.files = map[string][]byte{"a": pattern(2 * testChunk), "b": pattern(10)}
	w.r.From, err = ReadFolder(openRoot(t, source), "ckpt", c.Record.Digest)
	must(t, err)

	// The first chunk of a is sealed again under its key and nonce: its tag holds.
	p := filepath.Join(source, SealedName("000000"))
	good := mustRead(t, p)
	_, aead, err := parseHeader(w.from, good[:PayloadOffset])
	must(t, err)
	var nonce [12]byte
	setNonce(&nonce, 0, false)
	forged := append(slices.Clone(good[:PayloadOffset]), aead.Seal(nil, nonce[:], make([]byte, testChunk), good[:PayloadOffset])...)
	must(t, os.WriteFile(p, append(forged, good[len(forged):]...), 0o600))
	if _, err := w.run(t); !errors.Is(err, ErrDamaged) {
		t.Errorf("ciphertext that is not the manifest's: %v", err)
	}
	must(t, os.WriteFile(p, good, 0o600))

	r, err := w.run(t)
	must(t, err)
	w.whole(t, r.Digest)
	// What was sealed anew is kept by whoever begins again, and can be sealed anew.
	again, err := w.run(t)
	if err != nil || again.Digest != r.Digest {
		t.Errorf("%+v %v", again, err)
	}
	w.r.From, err = ReadFolder(openRoot(t, filepath.Join(w.sink, "model")), "new", r.Digest)
	must(t, err)
	w.r.FromKey, w.r.ToKey, w.r.To, w.r.Name = w.to, testKey(t, 3), "newer", "second"
	if _, err := w.run(t); err != nil {
		t.Error(err)
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

// TestResealHelper is the process that TestResealKilledAtEachStep kills.
func TestResealHelper(t *testing.T) {
	dir := os.Getenv(crashDir)
	if dir == "" {
		return // there is nothing to do but as the child of TestResealKilledAtEachStep
	}
	left, err := strconv.Atoi(os.Getenv(crashStep))
	must(t, err)
	session, err := keys.GenerateSession()
	must(t, err)
	digest, err := plan.ParseDigest(string(mustRead(t, filepath.Join(dir, "digest"))))
	must(t, err)
	f, err := ReadFolder(openRoot(t, filepath.Join(dir, "old")), "old", digest)
	must(t, err)
	r := Reseal{JobID: "killed", Plan: plan.Sum([]byte("p")), From: f, FromKey: testKey(t, 1), To: "new", ToKey: testKey(t, 2), Name: "model",
		Use: func() error { return nil }, Each: func(SignedReseal) {}}
	_, err = ResealFolder(t.Context(), r, session, openRoot(t, filepath.Join(dir, "sink")), Options{step: func() {
		if left--; left == 0 {
			must(t, syscall.Kill(os.Getpid(), syscall.SIGKILL))
			select {}
		}
	}})
	must(t, err)
}

// TestResealKilledAtEachStep kills a process between any two changes that a
// re-sealing makes on disk. The next job goes on and keeps what was finished.
func TestResealKilledAtEachStep(t *testing.T) {
	most := 0
	for step := 1; ; step++ {
		w := resealTest(t)
		dir := t.TempDir()
		must(t, os.CopyFS(filepath.Join(dir, "old"), os.DirFS(w.dir)))
		must(t, os.WriteFile(filepath.Join(dir, "digest"), []byte(w.digest), 0o600))
		w.sink = filepath.Join(dir, "sink")
		must(t, os.Mkdir(w.sink, 0o700))
		c := exec.Command(os.Args[0], "-test.run=^TestResealHelper$")
		c.Env = append(os.Environ(), crashDir+"="+dir, crashStep+"="+strconv.Itoa(step))
		out, err := c.CombinedOutput()
		r, rerr := w.run(t)
		must(t, rerr)
		w.whole(t, r.Digest)
		kept := 0
		for _, by := range w.by(t) {
			if by == "killed" {
				kept++
			}
		}
		if kept < most {
			t.Errorf("step %d: %d files are kept, after an earlier step %d", step, kept, most)
		}
		most = kept
		if err == nil {
			t.Logf("killed at %d steps", step-1)
			if step < 20 || most != 3 {
				t.Errorf("steps are missing: %d, %d files kept", step, most)
			}
			return
		}
		var ee *exec.ExitError
		if !errors.As(err, &ee) || ee.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("step %d: %v: %s", step, err, strings.TrimSpace(string(out)))
		}
	}
}
