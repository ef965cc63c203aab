package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"coffer-verify": main})
}

func TestScripts(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	simulation := filepath.Join(t.TempDir(), "simulation")
	if err := simulate.Mint(simulation, simulate.Options{Now: now}); err != nil {
		t.Fatal(err)
	}
	chip, gpus, err := simulate.LoadDevices(simulation)
	if err != nil {
		t.Fatal(err)
	}
	anchors, err := simulate.LoadRoots(simulation)
	if err != nil {
		t.Fatal(err)
	}
	lab, err := bundletest.On(chip, gpus, anchors, now)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for name, o := range map[string]bundletest.Options{
		"good.bundle": {}, "sourced.bundle": {ID: "job-5", Policy: bundletest.SourcedPolicy}, "refused.bundle": {ID: "job-2", FlipGPU: true}, "early.bundle": {ID: "job-3", RefuseAdmit: true},
	} {
		j, err := lab.Job(o)
		if err != nil {
			t.Fatal(err)
		}
		if files[name], err = j.Bundle(); err != nil {
			t.Fatal(err)
		}
	}
	if files["tampered.bundle"], err = tampered(files["good.bundle"]); err != nil {
		t.Fatal(err)
	}
	hostile, err := lab.Job(bundletest.Options{ID: "job-4"})
	if err != nil {
		t.Fatal(err)
	}
	hostile.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: "\x1b]0;owned\a\x1b[2J"}
	if files["hostile.bundle"], err = hostile.Bundle(); err != nil {
		t.Fatal(err)
	}
	if files["verifier.jwks"], err = lab.Verifier.JWKS(); err != nil {
		t.Fatal(err)
	}
	if files["broker.jwks"], err = lab.Broker.JWKS(); err != nil {
		t.Fatal(err)
	}
	files["approvers"] = lab.Listed()
	first, _, _ := bytes.Cut(files["approvers"], []byte("\n"))
	files["alice"] = append(first, '\n')
	sourced := lab.Policy(bundletest.SourcedPolicy)
	if files["sourced.json"], err = json.Marshal(sourced); err != nil {
		t.Fatal(err)
	}
	for name, text := range sourced.Rules {
		files[filepath.Join("sourced", name)] = []byte(text)
	}
	sourced.Rules = nil
	document, err := json.Marshal(sourced)
	if err != nil {
		t.Fatal(err)
	}
	files["sourced/policy.json"] = bytes.Replace(document, []byte(`"rules":null,`), nil, 1)
	for name, mode := range map[string]string{"values.jwt": "SPT", "other.jwt": "MPT"} {
		token, err := lab.References(mode)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = []byte(token + "\n")
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			for name, b := range files {
				path := filepath.Join(e.WorkDir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					return err
				}
				if err := os.WriteFile(path, b, 0o600); err != nil {
					return err
				}
			}
			return os.CopyFS(filepath.Join(e.WorkDir, "given", "roots"), os.DirFS(filepath.Join(simulation, "roots")))
		},
	})
}

func tampered(file []byte) ([]byte, error) {
	b, err := bundle.Parse(file)
	if err != nil {
		return nil, err
	}
	b.Parts[bundle.Trace][10] ^= 1
	return plan.Canonical(b)
}

// The judge cannot import the holder's types; here both can be seen to mean the
// same JSON.
func TestHolderTypes(t *testing.T) {
	c := holdapi.Checkpoint{Sequence: 1, Name: "n", Digest: plan.Sum(nil), Parent: plan.Sum(nil), Bytes: 2, Nanos: 3, Record: []byte("r"), Signature: []byte("s")}
	same[bundle.Checkpoint](t, c)
	same[bundle.Event](t, holdapi.Event{Sequence: 1, UnixNano: 2, Kind: "k", Detail: "d", Process: "p", Digest: "x", Checkpoint: &c})
}

func same[T any](t *testing.T, v any) {
	t.Helper()
	in, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := bundle.Decode[T](in)
	if err != nil {
		t.Fatalf("%T: %v", v, err)
	}
	out, err := json.Marshal(parsed)
	if err != nil {
		t.Fatal(err)
	}
	if string(in) != string(out) {
		t.Errorf("%T is\n%s, %T\n%s", v, in, parsed, out)
	}
}
