package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/simulate"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/source/sink"
)

// soakKind is one sort of job: what it does, and how it ends where nothing fails.
type soakKind struct {
	name, script string
	// more takes the place of the job file's line of inputs.
	more          string
	state, reason string
	lines         int
	alerts        []string
	// checkpoints and connections are how many it makes.
	checkpoints, connections int
	// keys are the assets that it needs.
	keys []string
	// members are how many of it make a gang; 0 is none.
	members int
	// files has its job file, and where it is a gang one for each that may run at once: jobs
	// of two gangs must not have one gang's name.
	files chan []byte
}

const (
	soakInput  = "inputs: [{name: in, asset: soak-in, uri: 'file://%s', mount: /inputs/in}]\n"
	soakSink   = "checkpoints: {asset: soak-ckpt, uri: 'file://%s', mount: /checkpoints}\n"
	soakEgress = "inputs: []\negress: [{host: metrics.example.com, port: 443, maxBytes: 64Ki, bytesPerSecond: 64Ki}]\nenv:\n  METRICS_CA: %q\n"
	// soakReads says that the job has read its input, whole and true.
	soakReads = `
import hashlib, os, time
body = open("/inputs/in/body.bin", "rb").read()
print("line", 0 if hashlib.sha256(body).hexdigest() == "%s" else "of another input", flush=True)
`
)

// kinds are the sorts of jobs of a soak. input is a sealed folder whose one file has the
// digest want, ca the certificate of the world that jobs connect to.
func soakKinds(input, want, sink, ca string) []*soakKind {
	in := fmt.Sprintf(soakInput, input)
	return []*soakKind{
		{name: "prints", state: "succeeded", lines: 200, script: `
import time
for i in range(200):
    print("line", i, flush=True)
    time.sleep(0.005)
`},
		{name: "fails", state: "failed", reason: "exit-code", lines: 1, script: "import sys; print('line 0'); sys.exit(3)"},
		{name: "is-found", state: "succeeded", lines: 1, alerts: []string{"key-material", "ptrace"}, script: `
import ctypes, os, time
try: open("/etc/shadow")
except OSError: pass
time.sleep(1)
ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
print("line 0")
`},
		{name: "trains", state: "succeeded", lines: 3, checkpoints: 2, keys: []string{"soak-in", "soak-ckpt"}, more: in + fmt.Sprintf(soakSink, sink), script: fmt.Sprintf(soakReads, want) + `
for i in range(1, 3):
    at = "/checkpoints/c%d" % i
    os.mkdir(at + ".tmp")
    with open(at + ".tmp/w", "wb") as f: f.write(body)
    os.rename(at + ".tmp", at)
    print("line", i, flush=True)
`},
		{name: "sends", state: "succeeded", lines: 3, connections: 3, more: fmt.Sprintf(soakEgress, ca), script: `
import os, ssl, time, urllib.request
tls = ssl.create_default_context(cadata=os.environ["METRICS_CA"])
for i in range(3):
    with urllib.request.urlopen(urllib.request.Request("https://metrics.example.com/", b"x"), timeout=30, context=tls) as r:
        print("line", i if r.status == 200 else r.status, flush=True)
    time.sleep(0.1)
`},
		{name: "together", state: "succeeded", lines: 1, members: 2, keys: []string{"soak-in"}, more: in, script: fmt.Sprintf(soakReads, want) + "time.sleep(0.3)\n"},
	}
}

// prepare seals what jobs read, makes the world that they connect to, and has the keys
// granted to them.
func (s *soak) prepare() {
	t := s.t
	s.world, s.trust = s.withUplink(t), s.trusts()
	secret, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(secret)
	body := make([]byte, 4<<20)
	seed := [32]byte{}
	for i := range seed {
		seed[i] = byte(rand.Uint32()) //nolint:gosec // chance, no secret
	}
	_, _ = rand.NewChaCha8(seed).Read(body)
	digest := sha256.Sum256(body)
	plain, sealed := filepath.Join(secret, "body.bin"), filepath.Join(t.TempDir(), "sealed")
	if err := os.WriteFile(plain, body, 0o600); err != nil {
		t.Fatal(err)
	}
	s.must(t, "seal", plain, "--asset", "soak-in", "--kind", "weights", "--out", sealed)
	s.must(t, "assets", "create", "soak-ckpt", "--kind", "checkpoints")
	s.kinds = soakKinds(sealed, hex.EncodeToString(digest[:]), s.sink, string(s.world.CA))
	for _, k := range s.kinds {
		gangs := 1
		if k.members > 0 {
			gangs = max(1, s.atOnce/4)
		}
		k.files = make(chan []byte, gangs)
		for g := range gangs {
			k.files <- s.jobFileOf(k, g)
		}
	}
}

// jobFileOf writes a kind's job file and has its plan granted.
func (s *soak) jobFileOf(k *soakKind, gang int) []byte {
	t, more := s.t, ""
	if k.members > 0 {
		more = fmt.Sprintf("gang: {name: soak-%d, size: %d}\n", gang, k.members)
	}
	path := s.small(t, "soak-"+k.name, k.script, more)
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if k.more != "" {
		file = bytes.Replace(file, []byte("inputs: []\n"), []byte(k.more), 1)
	}
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	if len(k.keys) == 0 {
		return file
	}
	args := []string{"grant", "create", "--plan", s.planDigest(t, path), "--allow-simulated", "--releases", strconv.Itoa(soakReleases)}
	for _, asset := range k.keys {
		args = append(args, "--asset", asset)
	}
	s.must(t, args...)
	return file
}

// unit runs one job, or a gang, and returns how many jobs that were.
func (s *soak) unit(k *soakKind, i int) {
	file := <-k.files
	if k.members == 0 {
		k.files <- file
		s.job(k, file, fmt.Sprintf("%d", i))
		return
	}
	var all sync.WaitGroup
	ends := make([]*soakEnd, k.members)
	for m := range ends {
		all.Go(func() { ends[m] = s.job(k, file, fmt.Sprintf("%d-%d", i, m)) })
	}
	all.Wait()
	k.files <- file
	s.gang(ends)
}

// soakEnd is how a job ended.
type soakEnd struct {
	job *agentv1.Job
	// ready is when it had its keys and inputs, started when its container did.
	ready, started int64
}

// gang holds the ends of a gang's jobs against each other.
func (s *soak) gang(ends []*soakEnd) {
	whole := true
	for _, e := range ends {
		if e == nil {
			return // reported already
		}
		whole = whole && e.job.GetState() == "succeeded"
	}
	for _, e := range ends {
		for _, o := range ends {
			if whole && (e.ready == 0 || e.ready > o.started) {
				s.t.Errorf("job %s of a gang started at %d, job %s was ready at %d", o.job.GetId(), o.started, e.job.GetId(), e.ready)
			}
		}
		if e.job.GetReason() == "gang-failed" && !slices.ContainsFunc(ends, func(o *soakEnd) bool {
			return o != e && o.job.GetState() != "succeeded" && o.job.GetReason() != "gang-failed"
		}) {
			s.t.Errorf("job %s ended with its gang, of which no job failed: %s", e.job.GetId(), e.job.GetMessage())
		}
	}
	s.count("gangs")
}

// work holds what a job's record says of its checkpoints and connections against what it
// did, and what lies in its sink.
func (s *soak) work(id string, k *soakKind, b *bundle.Bundle) {
	if k.checkpoints > 0 {
		c, err := bundle.Decode[[]bundle.Checkpoint](b.Parts[bundle.Checkpoints])
		if err != nil || len(c) != k.checkpoints {
			s.t.Errorf("job %s: %v, the record has %d checkpoints, want %d", id, err, len(c), k.checkpoints)
		}
		entries := names(filepath.Join(s.sink, id))
		for _, e := range entries {
			if _, ok := sink.Sequence(e); !ok {
				s.t.Errorf("job %s: its sink has %s", id, e)
			}
		}
		if len(entries) != k.checkpoints {
			s.t.Errorf("job %s: its sink has %v, want %d checkpoints", id, entries, k.checkpoints)
		}
		for _, one := range c {
			if one.Anchor == "" {
				s.t.Errorf("job %s: checkpoint %d has no countersignature", id, one.Sequence)
			}
		}
	}
	if k.connections > 0 {
		e, err := bundle.Decode[bundle.Egress](b.Parts[bundle.EgressPart])
		if err != nil || len(e.Connections) != k.connections || e.Lost || len(e.Denials) > 0 {
			s.t.Errorf("job %s: %v, the record has %d connections, want %d: %+v", id, err, len(e.Connections), k.connections, e)
		}
	}
}

// trusts is what a stranger needs who verifies bundles of the stack.
func (s *soak) trusts() verify.Trust {
	anchors, err := simulate.LoadRoots(filepath.Join(s.dir, "simulation"))
	if err != nil {
		s.t.Fatal(err)
	}
	out := verify.Trust{Anchors: anchors}
	for who, keys := range map[string]*[]byte{"verifier": &out.VerifierKeys, "broker": &out.BrokerKeys} {
		if *keys, err = os.ReadFile(filepath.Join(s.dir, who, "jwks.json")); err != nil {
			s.t.Fatal(err)
		}
	}
	return out
}

// holds verifies a job's bundle. One of a job that a killed neighbour ended may lack what
// that one had; nothing in it is untrue. Verification fails where the log has a release of
// which the agent had not heard when it was killed, or for which it had not asked who approved.
func (s *soak) holds(id string, file []byte, j *agentv1.Job, asMeant bool) {
	r := verify.Verify(file, s.trust)
	failed := r.Checks().Failed()
	unheard := j.GetReason() == "agent-restarted" && j.GetStage() == string(bundle.StageRelease) &&
		!slices.ContainsFunc(failed, func(c check.Check) bool { return c.ID != "log.releases" && c.ID != "approvals.rules" })
	switch {
	case r.Verdict == verify.Verified:
	case !asMeant && r.Verdict == verify.Unknown:
		s.count("records: verification cannot tell")
	case !asMeant && unheard:
		s.count("records: without a release that the log has")
	default:
		s.t.Errorf("the bundle of job %s: %s: %+v", id, r.Verdict, failed)
	}
}

// stepsOf finds in a bundle when a job was ready to start and when it started.
func stepsOf(st bundle.Statement) (ready, started int64) {
	for _, step := range st.Timeline {
		switch step.Stage {
		case bundle.StageDecrypt:
			ready = step.StartUnixNano + step.Nanos
		case bundle.StageStart:
			started = step.StartUnixNano
		default:
		}
	}
	return ready, started
}

// reached is what jobs did to the world that nobody allowed.
func (s *soak) reached() {
	for _, at := range s.world.Reached() {
		if at != "tcp 44.1.0.2:443" {
			s.t.Errorf("a job reached %s", at)
		}
	}
	if strange := s.world.Strange(); len(strange) > 0 {
		s.t.Errorf("packets from %s left the node", strings.Join(strange, ", "))
	}
}
