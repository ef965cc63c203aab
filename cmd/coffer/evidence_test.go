package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/facts"
	"github.com/coffer-run/coffer/attest/simulate"
)

// records are bundles of a simulated machine, and what their reader trusts.
type records struct {
	dir string
	lab *bundletest.Lab
}

func newRecords(t *testing.T) records {
	t.Helper()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	r := records{dir: t.TempDir()}
	if err := simulate.Mint(filepath.Join(r.dir, "simulation"), simulate.Options{Now: now, Fast: true}); err != nil {
		t.Fatal(err)
	}
	chip, gpus, err := simulate.LoadDevices(filepath.Join(r.dir, "simulation"))
	if err != nil {
		t.Fatal(err)
	}
	anchors, err := simulate.LoadRoots(filepath.Join(r.dir, "simulation"))
	if err != nil {
		t.Fatal(err)
	}
	if r.lab, err = bundletest.On(chip, gpus, anchors, now); err != nil {
		t.Fatal(err)
	}
	for name, jwks := range map[string]func() ([]byte, error){"verifier.jwks": r.lab.Verifier.JWKS, "broker.jwks": r.lab.Broker.JWKS} {
		b, err := jwks()
		if err != nil {
			t.Fatal(err)
		}
		r.write(t, name, b)
	}
	return r
}

func (r records) write(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (r records) job(t *testing.T, name string, o bundletest.Options, change func(*bundletest.Job)) string {
	t.Helper()
	j, err := r.lab.Job(o)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(j)
	}
	b, err := j.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	return r.write(t, name, b)
}

// coffer runs the command where there is no stack.
func (r records) coffer(t *testing.T, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	err := run(t.Context(), append([]string{"--dir", filepath.Join(r.dir, "none")}, args...), strings.NewReader(""), &out, &errs)
	res := result{stdout: out.String(), stderr: errs.String(), err: err}
	var coded *exitError
	if errors.As(err, &coded) {
		res.code = coded.code
	}
	return res
}

// trust are the flags of a reader who knows the lab's keys.
func (r records) trust(args ...string) []string {
	return append(args, "--", "--simulation-roots", filepath.Join(r.dir, "simulation"), "--verifier-keys", filepath.Join(r.dir, "verifier.jwks"), "--broker-keys", filepath.Join(r.dir, "broker.jwks"))
}

func TestEvidenceShowAndDiff(t *testing.T) {
	r := newRecords(t)
	first := r.job(t, "first.json", bundletest.Options{}, nil)
	again := r.job(t, "again.json", bundletest.Options{}, nil)
	other := r.job(t, "other.json", bundletest.Options{ID: "job-2"}, func(j *bundletest.Job) {
		j.Outcome.Reason = "\x1b[2Jwiped"
	})
	r.coffer(t, "evidence", "show", first).want(t, 0, "How it ended", "succeeded", "alice approve", "metrics.example.com:443", "epoch-2", "coffer evidence verify")
	var sections []facts.Section
	if err := json.Unmarshal([]byte(r.coffer(t, "evidence", "show", first, "-o", "json").stdout), &sections); err != nil || len(sections) < 5 {
		t.Errorf("%d sections as JSON, %v", len(sections), err)
	}
	if got := r.coffer(t, "evidence", "show", other); strings.Contains(got.stdout, "\x1b") || !strings.Contains(got.stdout, "\\u001b[2Jwiped") {
		t.Errorf("the record steers the terminal: %q", got.stdout)
	}
	r.coffer(t, "evidence", "diff", first, again).want(t, 0, "no difference but")
	r.coffer(t, "evidence", "diff", first, again, "-o", "json").want(t, 0, "[]")
	r.coffer(t, "evidence", "diff", first, other).want(t, 0, "plan\n", "- python3 /app/train.py job-1", "+ python3 /app/train.py job-2", "outcome\n")

	r.coffer(t, "evidence", "show", r.write(t, "bad.json", []byte("{}"))).want(t, exitFailed, "parse bundle")
	r.coffer(t, "evidence", "show", filepath.Join(r.dir, "missing.json")).want(t, exitUsage, "no such file")
	r.coffer(t, "evidence", "show", "01JD3V8Q").want(t, exitFailed, "no stack in")
	r.coffer(t, "evidence", "diff", first).want(t, exitUsage, "another job id or file is missing")
}

func TestEvidenceVerify(t *testing.T) {
	if os.Getenv(binVariable) == "" {
		if os.Getenv("CI") == "true" {
			t.Fatal(binVariable + " is not set")
		}
		t.Skip(binVariable + " is not set")
	}
	r := newRecords(t)
	good := r.job(t, "good.json", bundletest.Options{}, nil)
	bad := r.job(t, "bad.json", bundletest.Options{}, func(j *bundletest.Job) { j.Parts[bundle.Trace] = []byte("[]") })
	page := func(name string) string { return filepath.Join(r.dir, name) }

	r.coffer(t, r.trust("evidence", "verify", good)...).want(t, 0, "VERIFIED: job job-1 succeeded", "What this bundle does not prove")
	r.coffer(t, r.trust("evidence", "verify", good, "--output", "json")...).want(t, 0, `"verdict": "verified"`)
	r.coffer(t, r.trust("evidence", "verify", bad)...).want(t, exitFailed, "FAILED")
	r.coffer(t, "evidence", "verify", good, "--", "--simulation-roots", page("simulation")).want(t, exitUnknown, "COULD NOT TELL")
	r.coffer(t, "evidence", "verify", good).want(t, exitFailed, "FAIL         snp.chain")
	r.coffer(t, "evidence", "verify", good, "--", "--bogus").want(t, exitUsage, "bogus")

	r.coffer(t, r.trust("evidence", "report", good, "-o", page("good.html"))...).want(t, 0, "good.html: verified: job job-1 succeeded")
	r.coffer(t, r.trust("evidence", "report", bad, "-o", page("bad.html"), "--output", "json")...).want(t, exitFailed, `"verdict": "failed"`, "bad.html")
	for name, want := range map[string]string{"good.html": "Verdict: verified", "bad.html": "Verdict: failed"} {
		if b, err := os.ReadFile(page(name)); err != nil || !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s does not say %q, %v", name, want, err)
		}
	}
	own := r.write(t, "own.yaml", []byte("name: ours\ncontrols:\n  - {id: A-1, title: all is well, shows: that it is, checks: [plan.digest]}\n"))
	r.coffer(t, r.trust("evidence", "report", good, "-o", page("own.html"), "--controls", own)...).want(t, 0)
	if b, err := os.ReadFile(page("own.html")); err != nil || !bytes.Contains(b, []byte("A-1")) || bytes.Contains(b, []byte("SOC 2")) {
		t.Errorf("own controls do not replace those that ship, %v", err)
	}
	r.coffer(t, r.trust("evidence", "report", good, "-o", page("good.html"))...).want(t, exitUsage, "exists")
	r.coffer(t, r.trust("evidence", "report", good)...).want(t, exitUsage, "-o FILE")

	// What other tools read, signed by whoever exports it.
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	key := r.write(t, "key", pem.EncodeToMemory(block))
	r.coffer(t, r.trust("evidence", "export", good, "--format", "vsa", "-o", page("vsa.json"), "--key", key)...).want(t, 0, "vsa.json: verified")
	r.coffer(t, r.trust("evidence", "export", good, "--format", "cyclonedx", "-o", page("bom.json"))...).want(t, 0, "bom.json: verified")
	r.coffer(t, r.trust("evidence", "export", bad, "--format", "vsa", "-o", page("bad-vsa.json"))...).want(t, exitFailed, "bad-vsa.json: failed")
	r.coffer(t, r.trust("evidence", "export", bad, "--format", "slsa", "-o", page("bad-slsa.json"))...).want(t, exitFailed, "failed: the record is not what it says")
	for name, want := range map[string]string{"vsa.json": `"payloadType":"application/vnd.in-toto+json"`, "bom.json": `"coffer:checked:plan"`, "bad-vsa.json": `"verificationResult":"FAILED"`} {
		if b, err := os.ReadFile(page(name)); err != nil || !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s does not say %s, %v: %.200s", name, want, err, b)
		}
	}
	if _, err := os.Stat(page("bad-slsa.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("provenance of what does not verify: %v", err)
	}
	r.coffer(t, "evidence", "export", good, "--format", "spdx", "-o", page("x")).want(t, exitUsage, "want vsa")
	r.coffer(t, "evidence", "export", good, "--format", "cyclonedx", "-o", page("x"), "--key", key).want(t, exitUsage, "is none")
	r.coffer(t, "evidence", "export", good, "--format", "vsa", "-o", page("x"), "--key", good).want(t, exitUsage, "no key found")
	if left, err := filepath.Glob(page(".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}

	t.Setenv(binVariable, r.dir)
	r.coffer(t, r.trust("evidence", "verify", good)...).want(t, exitUnknown, "coffer-verify is missing")
}
