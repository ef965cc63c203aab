package facts_test

import (
	"bytes"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/facts"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/simulate"
)

var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

var lab = sync.OnceValues(func() (*bundletest.Lab, error) {
	v, err := simulate.New(simulate.Options{Now: clock, Fast: true})
	if err != nil {
		return nil, err
	}
	return bundletest.On(v.Chip(), v.GPUs(), v.Anchors(), clock)
})

func record(t *testing.T, o bundletest.Options, change func(*bundletest.Job)) *bundle.Bundle {
	t.Helper()
	l, err := lab()
	if err != nil {
		t.Fatal(err)
	}
	j, err := l.Job(o)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(j)
	}
	file, err := j.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func of(t *testing.T, b *bundle.Bundle) []facts.Section {
	t.Helper()
	s, err := facts.Of(b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOf(t *testing.T) {
	got := of(t, record(t, bundletest.Options{Reattest: &plan.Reattest{EverySeconds: 60, WithinSeconds: 30, OnFailure: plan.ReattestStop}}, nil))
	var said []string
	for _, s := range got {
		if len(s.Facts) == 0 {
			t.Errorf("section %s has no facts", s.Name)
		}
		for _, f := range s.Facts {
			said = append(said, s.Name+" "+f.Name+" "+f.Value)
		}
	}
	for _, want := range []string{
		"outcome state succeeded", "plan command python3 /app/train.py job-1", "plan egress." + bundletest.EgressHost + ".maxBytes 10000", "plan resources.memoryBytes 1073741824", "machine node node-1",
		"materials bill of materials 2 components, signed by key releases", "materials deb python3 3.11.2-1", "materials library numpy 1.24.2",
		"devices gpu0.gpu.feature-flag SPT",
		"approvals alice approve checkpoints, dataset, weights: reviewed", "releases dataset sha384:", "egress metrics.example.com:443 1 connections, 4000 bytes sent, 9000 received",
		"outputs checkpoint 2 epoch-2, 1000 bytes, sha384:", "outputs metric loss 0.3125 at last, 0.25 to 2.5, 20 values", "reattestations not affirmed 0 times", "timeline run done, ", "reattestations attestation 2 timer, affirmed", "parts plan ",
	} {
		if !slices.ContainsFunc(said, func(s string) bool { return strings.HasPrefix(s, want) }) {
			t.Errorf("nothing says %q", want)
		}
	}
}

func TestOfARefusal(t *testing.T) {
	for _, o := range []bundletest.Options{{FlipGPU: true}, {RefuseAdmit: true}} {
		got := of(t, record(t, o, nil))
		if f := got[0].Facts; got[0].Name != "outcome" || f[1].Value != "refused" {
			t.Errorf("%+v: %+v", o, got[0])
		}
	}
}

func TestDiff(t *testing.T) {
	before := of(t, record(t, bundletest.Options{}, nil))
	edit := func(change func(*bundletest.Job)) []facts.Change {
		t.Helper()
		return facts.Diff(before, of(t, record(t, bundletest.Options{}, change)))
	}
	names := func(l []facts.Change) []string {
		out := []string{}
		for _, c := range l {
			out = append(out, c.Section+" "+c.Name)
		}
		return out
	}
	canonical := func(j *bundletest.Job, p bundle.Part, v any) {
		var err error
		if j.Parts[p], err = plan.Canonical(v); err != nil {
			t.Fatal(err)
		}
	}
	if got := edit(nil); len(got) != 0 {
		t.Errorf("two runs of one plan differ in %v", names(got))
	}
	for name, try := range map[string]struct {
		change func(*bundletest.Job)
		want   []string
	}{
		"how it ended": {func(j *bundletest.Job) {
			j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: "exit", ExitCode: 3}
		}, []string{"outcome state", "outcome exit code", "outcome reason"}},
		"another node": {func(j *bundletest.Job) {
			canonical(j, bundle.AgentPart, bundle.Agent{Node: "node-2", Agent: "test", Containerd: "2.4.2", Runtime: "runsc test", Shim: "io.containerd.runc.v2", Submitter: "engineer/engineer"})
		}, []string{"machine node"}},
		"one approval less": {func(j *bundletest.Job) {
			a, err := j.Approved()
			if err != nil {
				t.Fatal(err)
			}
			a.Approvals = a.Approvals[:1]
			canonical(j, bundle.Approvals, []bundle.Approved{a})
		}, []string{"approvals bob approve"}},
		"no egress": {func(j *bundletest.Job) { delete(j.Parts, bundle.EgressPart) }, []string{"egress metrics.example.com:443", "egress refused job-1.example.com:443, not-listed"}},
		"another loss": {func(j *bundletest.Job) {
			s, err := bundle.Decode[bundle.Status](j.Parts[bundle.HolderStatus])
			if err != nil {
				t.Fatal(err)
			}
			s.Metrics.Values[1].Last = 0.5
			canonical(j, bundle.HolderStatus, s)
		}, []string{"outputs metric loss"}},
		"another package in the image": {func(j *bundletest.Job) {
			image := "sha256:" + strings.Repeat("00", 32)
			canonical(j, bundle.ImageSBOMPart, bundle.ImageSBOM{Document: bytes.Replace(bundletest.SBOM(image), []byte("1.24.2"), []byte("1.24.3"), 1)})
		}, []string{"materials bill of materials", "materials library numpy"}},
		"other words printed": {func(j *bundletest.Job) {
			canonical(j, bundle.LogsDigest, bundle.Logs{Stdout: bundle.Stream{Bytes: 1}})
		}, []string{"outputs standard output", "outputs standard error"}},
	} {
		if got := names(edit(try.change)); !slices.Equal(got, try.want) {
			t.Errorf("%s: differs in %q, want %q", name, got, try.want)
		}
	}
	// Another plan, and back.
	other := of(t, record(t, bundletest.Options{ID: "job-2", Policy: bundletest.OwnPolicy}, nil))
	there, back := facts.Diff(before, other), facts.Diff(other, before)
	for _, want := range []string{"plan plan digest", "plan command", "plan policy.name", "plan policy.digest"} {
		if !slices.Contains(names(there), want) {
			t.Errorf("%q is not among %q", want, names(there))
		}
	}
	if len(there) != len(back) {
		t.Errorf("%d changes one way, %d the other", len(there), len(back))
	}
}

// Names that a record's writer chooses cannot make two facts into one, and so hide that
// one of them is another.
func TestDiffIsNotDeceivedByNames(t *testing.T) {
	section := func(f ...facts.Fact) []facts.Section { return []facts.Section{{Name: "s", Facts: f}} }
	before := section(facts.Fact{Name: "x", Value: "1"}, facts.Fact{Name: "x", Value: "3"}, facts.Fact{Name: "x (2)", Value: "3"})
	after := section(facts.Fact{Name: "x", Value: "1"}, facts.Fact{Name: "x", Value: "evil"}, facts.Fact{Name: "x (2)", Value: "3"})
	if got := facts.Diff(before, after); len(got) != 1 || got[0].Before != "3" || got[0].After != "evil" {
		t.Errorf("one value differs, and the difference is %+v", got)
	}
	none, empty := section(), section(facts.Fact{Name: "x"})
	if there, back := facts.Diff(none, empty), facts.Diff(empty, none); len(there) != 1 || len(back) != 1 {
		t.Errorf("a fact without a value came and went: %+v, %+v", there, back)
	}
}

// Lists that differ are two texts, however their words are cut.
func TestListsThatReadAlike(t *testing.T) {
	seen := map[string][]string{}
	for _, command := range [][]string{
		{"sh", "-c", "rm a b"}, {"sh", "-c", "rm", "a", "b"}, {"sh", "-c rm a b"}, {"sh", "-c", `"rm a b"`}, {"sh", "-c", "rm a b", ""}, {"sh", "-c", "rm\u00a0a b"}, {"sh", "-c", "rm\ta b"},
	} {
		b := record(t, bundletest.Options{}, nil)
		var p map[string]any
		if err := plan.Decode(b.Parts[bundle.Plan], bundle.MaxPart, &p); err != nil {
			t.Fatal(err)
		}
		p["command"] = command
		var err error
		if b.Parts[bundle.Plan], err = plan.Canonical(p); err != nil {
			t.Fatal(err)
		}
		for _, s := range of(t, b) {
			for _, f := range s.Facts {
				if s.Name != "plan" || f.Name != "command" {
					continue
				}
				if other, ok := seen[f.Value]; ok {
					t.Errorf("%q and %q both read %s", other, command, f.Value)
				}
				seen[f.Value] = command
			}
		}
	}
	if len(seen) < 7 {
		t.Errorf("%d commands were read", len(seen))
	}
}

func TestNothingIsLeftOutUnseen(t *testing.T) {
	for _, p := range []bundle.Part{
		bundle.Plan, bundle.AgentPart, bundle.Result, bundle.Approvals, bundle.Releases, bundle.EgressPart, bundle.Checkpoints, bundle.LogsDigest, bundle.HolderStatus, bundle.AlertsPart, bundle.ImageSBOMPart,
	} {
		b := record(t, bundletest.Options{}, nil)
		b.Parts[p] = []byte(`{"x":`)
		if _, err := facts.Of(b); err == nil || !strings.Contains(err.Error(), string(p)) && p != bundle.Result {
			t.Errorf("part %s does not parse, and the error is %v", p, err)
		}
	}
	b := record(t, bundletest.Options{}, nil)
	b.Statement = []byte("{}")
	if _, err := facts.Of(b); err == nil {
		t.Error("a statement that is none was read")
	}
}
