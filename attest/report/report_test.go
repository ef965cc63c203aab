package report

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"golang.org/x/net/html"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
)

var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// Minting roots takes long, so that all tests share one machine.
var machine = sync.OnceValues(func() (*simulate.Vendor, error) {
	return simulate.New(simulate.Options{Now: clock, Fast: true})
})

func lab(t *testing.T) (*bundletest.Lab, verify.Trust) {
	t.Helper()
	v, err := machine()
	if err != nil {
		t.Fatal(err)
	}
	l, err := bundletest.On(v.Chip(), v.GPUs(), v.Anchors(), clock)
	if err != nil {
		t.Fatal(err)
	}
	verifierKeys, err := l.Verifier.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	brokerKeys, err := l.Broker.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	return l, verify.Trust{Anchors: l.Anchors, VerifierKeys: verifierKeys, BrokerKeys: brokerKeys}
}

func job(t *testing.T, l *bundletest.Lab, o bundletest.Options, change func(*bundletest.Job)) []byte {
	t.Helper()
	j, err := l.Job(o)
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
	return b
}

func write(t *testing.T, r verify.Report, file []byte) string {
	t.Helper()
	frameworks, err := Shipped()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := Write(&b, r, file, frameworks); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// selfContained fails on anything that a browser would fetch or run.
func selfContained(t *testing.T, page string) {
	t.Helper()
	for z := html.NewTokenizer(strings.NewReader(page)); ; {
		switch z.Next() {
		case html.ErrorToken:
			return
		case html.StartTagToken, html.SelfClosingTagToken:
			tok := z.Token()
			if slices.Contains([]string{"script", "img", "iframe", "object", "embed", "form", "base"}, tok.Data) {
				t.Errorf("the page has a %s", tok)
			}
			for _, a := range tok.Attr {
				fetched := a.Key == "src" || a.Key == "href" && a.Val != "data:," && !(tok.Data == "a" && strings.HasPrefix(a.Val, "#"))
				if fetched || strings.HasPrefix(a.Key, "on") {
					t.Errorf("the page has %s", tok)
				}
			}
		default:
		}
	}
}

func TestPage(t *testing.T) {
	l, trust := lab(t)
	file := job(t, l, bundletest.Options{}, nil)
	r := verify.Verify(file, trust)
	if r.Verdict != verify.Verified {
		t.Fatalf("verdict %s: %v", r.Verdict, r.Checks().Failed())
	}
	page := write(t, r, file)
	selfContained(t, page)
	for _, c := range r.Checks() {
		if !strings.Contains(page, html.EscapeString(c.ID)) {
			t.Errorf("the page has no check %s", c.ID)
		}
	}
	for _, want := range []string{
		"Verdict: verified", "Simulated.", "alice", "approved", string(r.Plan), bundletest.EgressHost, `<svg class="way"`, "NIST SP 800-218A", "RAND", "SOC 2",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	for _, n := range r.NotProven {
		if !strings.Contains(page, html.EscapeString(n)) {
			t.Errorf("the page leaves out what is not proven: %s", n)
		}
	}
}

func TestPageOfARefusal(t *testing.T) {
	l, trust := lab(t)
	file := job(t, l, bundletest.Options{FlipGPU: true}, nil)
	page := write(t, verify.Verify(file, trust), file)
	selfContained(t, page)
	for _, want := range []string{"The job was refused in stage verify", "No key was released."} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}

func TestPageOfWhatIsNoBundle(t *testing.T) {
	for _, file := range [][]byte{nil, []byte("{}"), bytes.Repeat([]byte("x"), 1000)} {
		r := verify.Verify(file, verify.Trust{})
		page := write(t, r, file)
		selfContained(t, page)
		if !strings.Contains(page, "Verdict: "+string(r.Verdict)) || !strings.Contains(page, "class=\"verdict open\"") && !strings.Contains(page, "class=\"verdict fail\"") {
			t.Errorf("%.20q: the page shows no verdict that is no pass", file)
		}
	}
}

// TestWordsOfTheJobAreText puts markup into everything that a job, a person or a
// node may choose.
func TestWordsOfTheJobAreText(t *testing.T) {
	const evil = `</td><script>alert(1)</script><img src=x onerror=alert(1)>" onload="x`
	l, trust := lab(t)
	file := job(t, l, bundletest.Options{}, nil)
	r := verify.Verify(file, trust)
	r.Name, r.JobID, r.Summary, r.Outcome.Reason, r.Outcome.State = evil, evil, evil, evil, bundle.Refused
	r.NotProven = []string{evil}
	r.Groups = []verify.Group{{Name: evil, Title: evil, Checks: check.List{{ID: evil, Outcome: check.Fail, Expected: evil, Found: evil, Hint: evil}}}}
	for i := range r.Timeline {
		r.Timeline[i].Stage, r.Timeline[i].Outcome = bundle.Stage(evil), evil
	}
	f := Framework{Name: evil, Source: evil, Note: evil, Controls: []Control{{ID: evil, Title: evil, Shows: evil, Checks: []string{evil}}}}
	var b bytes.Buffer
	if err := Write(&b, r, file, []Framework{f}); err != nil {
		t.Fatal(err)
	}
	selfContained(t, b.String())
	people := view{Report: r, People: []person{{Name: evil, Did: evil, Reason: evil, Ticket: evil, Assets: evil}}, HasEgress: true, Plan: &plan.Plan{Command: []string{evil}, Inputs: []plan.Input{{Name: evil, Asset: evil, Mount: evil}}, Egress: []plan.Egress{{Host: evil}}},
		Egress:  &bundle.Egress{Connections: []bundle.Connection{{Host: evil, Address: evil, End: evil}}, Denials: []bundle.Denial{{Host: evil, Rule: evil, Process: evil}}},
		Agent:   &bundle.Agent{Node: evil, Submitter: evil, Runtime: evil, Containerd: evil},
		Alerts:  &bundle.Alerts{Findings: []bundle.Finding{{Rule: evil, Severity: evil, Action: evil, Kind: evil, Process: evil, Path: evil, Address: evil}}},
		Resumed: &receipt.CheckpointRecord{JobID: evil, Digest: evil},
		Again:   &again{Listed: []attested{{Cause: evil, Verdict: evil, Why: evil, Then: evil}}}, Metrics: &bundle.Metrics{Values: []bundle.Metric{{Name: evil}}},
		Signer: evil, Materials: &materials{Signer: evil, Digest: evil, Listed: []bundle.Component{{Name: evil, Version: evil, PURL: evil}}},
		Points:   []point{{CheckpointRecord: receipt.CheckpointRecord{Name: evil}}},
		Releases: []receipt.Release{{Asset: evil, Grant: evil}}, PlanJSON: evil,
	}
	b.Reset()
	if err := page.Execute(&b, people); err != nil {
		t.Fatal(err)
	}
	selfContained(t, b.String())
}

// What cannot be seen, turns directions round or writes over its neighbours is an escape
// on the page, in every place where somebody's words stand.
func TestWordsOfTheJobAreSeen(t *testing.T) {
	const evil = "user/\u202eecila\u2066 \u200b\u00ad\u3164\ufe0f\x1b[2J\u009b"
	l, trust := lab(t)
	file := job(t, l, bundletest.Options{}, func(j *bundletest.Job) {
		a, err := j.Approved()
		if err != nil {
			t.Fatal(err)
		}
		signed, err := j.Approve(j.Terms(), "alice", "alice", func(a *receipt.Approval) { a.Approver, a.Reason = evil, evil })
		if err != nil {
			t.Fatal(err)
		}
		a.Approvals = append(a.Approvals, signed)
		if j.Parts[bundle.Approvals], err = plan.Canonical([]bundle.Approved{a}); err != nil {
			t.Fatal(err)
		}
		if j.Parts[bundle.AgentPart], err = plan.Canonical(bundle.Agent{Node: evil, Submitter: evil, Runtime: evil, Containerd: evil}); err != nil {
			t.Fatal(err)
		}
	})
	r := verify.Verify(file, trust)
	r.Name, r.Summary, r.NotProven = evil, evil, []string{evil}
	r.Groups = append(r.Groups, verify.Group{Name: evil, Title: evil, Checks: check.List{{ID: evil, Outcome: check.Fail, Expected: evil, Found: evil, Hint: evil}}})
	var b bytes.Buffer
	if err := Write(&b, r, file, nil); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, c := range text {
		if c != '\n' && c != '\t' && (unicode.IsControl(c) || unicode.In(c, unicode.Cf, unicode.Variation_Selector, unicode.Other_Default_Ignorable_Code_Point)) {
			t.Fatalf("%U is on the page", c)
		}
	}
	if n := strings.Count(text, `user/\u202eecila\u2066 \u200b\u00ad\u3164\ufe0f\u001b[2J\u009b`); n < 12 {
		t.Errorf("the words are on the page %d times", n)
	}
	selfContained(t, text)
}

// TestControlsNameChecksThatThereAre looks for every id in a job that went well: a
// control that names no check could never be met.
func TestControlsNameChecksThatThereAre(t *testing.T) {
	l, trust := lab(t)
	file := job(t, l, bundletest.Options{}, nil)
	r := verify.Verify(file, trust)
	frameworks, err := Shipped()
	if err != nil {
		t.Fatal(err)
	}
	if len(frameworks) != 3 {
		t.Fatalf("%d frameworks, want 3", len(frameworks))
	}
	for _, f := range frameworks {
		for _, c := range f.Controls {
			if len(c.Checks) == 0 {
				t.Errorf("%s %s names no check", f.Name, c.ID)
			}
			for _, id := range c.Checks {
				if len(matching(r.Checks(), id)) == 0 {
					t.Errorf("%s %s: no check %s", f.Name, c.ID, id)
				}
			}
		}
	}
}

func TestJudge(t *testing.T) {
	checks := func(pairs ...string) check.List {
		var l check.List
		for i := 0; i < len(pairs); i += 2 {
			l = append(l, check.Check{ID: pairs[i], Outcome: check.Outcome(pairs[i+1])})
		}
		return l
	}
	const pass, fail, not = string(check.Pass), string(check.Fail), string(check.NotChecked)
	tests := []struct {
		name    string
		verdict verify.Verdict
		wants   []string
		checks  check.List
		want    Standing
	}{
		{"all held", verify.Verified, []string{"a", "b.*"}, checks("a", pass, "b.x", pass, "b.y", pass), Met},
		{"one failed", verify.Failed, []string{"a", "b.*"}, checks("a", pass, "b.x", fail), NotMet},
		{"one was not made", verify.Verified, []string{"a", "b.*"}, checks("a", pass, "b.x", pass, "b.y", not), NotCovered},
		{"one is not there", verify.Verified, []string{"a", "b.*"}, checks("a", pass), NotCovered},
		{"a longer name is another check", verify.Verified, []string{"a"}, checks("ab", pass), NotCovered},
		{"nothing speaks to it", verify.Verified, nil, checks("a", pass), NotCovered},
		{"something else failed", verify.Failed, []string{"a"}, checks("a", pass, "z", fail), NotMet},
		{"nobody can tell", verify.Unknown, []string{"a"}, checks("a", pass), NotCovered},
		{"no verdict", "", []string{"a"}, checks("a", pass), NotCovered},
		{"an outcome that is none", verify.Verified, []string{"a"}, checks("a", ""), NotMet},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := verify.Report{Verdict: tt.verdict, Groups: []verify.Group{{Checks: tt.checks}}}
			got := Judge(Framework{Controls: []Control{{ID: "x", Checks: tt.wants}}}, r)
			if got.Judged[0].Standing != tt.want || got.Met+got.NotMet+got.NotCovered != 1 {
				t.Errorf("standing %q, counts %d %d %d; want %q", got.Judged[0].Standing, got.Met, got.NotMet, got.NotCovered, tt.want)
			}
		})
	}
}

func TestParseControlsRefuses(t *testing.T) {
	const good = "name: x\ncontrols:\n  - {id: a, title: b, shows: c, checks: [d]}\n"
	if _, err := ParseControls([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for name, in := range map[string]string{
		"nothing":             "",
		"no name":             strings.Replace(good, "name: x", "name: ''", 1),
		"no controls":         "name: x\ncontrols: []\n",
		"an unknown field":    good + "extra: 1\n",
		"the same id twice":   good + "  - {id: a, title: b, shows: c, checks: [d]}\n",
		"no title":            strings.Replace(good, "title: b", "title: ''", 1),
		"a star in the midst": strings.Replace(good, "[d]", `["d*.e"]`, 1),
		"everything":          strings.Replace(good, "[d]", `[".*"]`, 1),
		"too much":            good + strings.Repeat("#", MaxControls),
	} {
		if _, err := ParseControls([]byte(in)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestPicture(t *testing.T) {
	var v view
	v.timeline([]bundle.Step{
		{Stage: bundle.StageSandbox, StartUnixNano: 1e18, Nanos: 1e9, Outcome: bundle.StepDone},
		{Stage: bundle.StageRun, StartUnixNano: 1e18 + 1e9, Nanos: 9e9, Outcome: bundle.StepFailed},
		{Stage: bundle.StageEvidence, StartUnixNano: 1e18 + 1e10, Nanos: 1, Outcome: bundle.StepDone},
	})
	for i, b := range v.Way {
		if b.X < labelWidth || b.X+b.Width > pictureWidth+1e-6 || b.Width < 2 {
			t.Errorf("bar %d from %f, %f wide, leaves the picture", i, b.X, b.Width)
		}
	}
	if v.WayTotal != "10s" || !v.Way[1].Failed || v.Way[1].Began != "+1s" {
		t.Errorf("total %s, second bar %+v", v.WayTotal, v.Way[1])
	}
	var one view
	one.timeline([]bundle.Step{{Stage: bundle.StageJobspec}})
	if fmt.Sprint(one.Way[0].X, one.Way[0].Width) == "NaN NaN" {
		t.Error("a job of no time has no picture")
	}
}
