package verify_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func listed(t testing.TB, l *bundletest.Lab) verify.Trust {
	t.Helper()
	trust := pinned(t, l)
	var err error
	if trust.Approvers, err = verify.ParseApprovers(l.Listed()); err != nil {
		t.Fatal(err)
	}
	return trust
}

// TestApprovals has a broker and an agent that agree on releases under approvals
// that should not have counted: the reader, who names the approvers, finds each.
func TestApprovals(t *testing.T) {
	l := newLab(t)
	// Each case changes the grant before keys are released under it, so that
	// receipts and log say the same.
	approve := func(n int, name, key string, change func(*receipt.Approval)) func(*testing.T, *bundletest.Job, *bundle.Approved) {
		return func(t *testing.T, j *bundletest.Job, a *bundle.Approved) {
			s, err := j.Approve(j.Terms(), name, key, change)
			if err != nil {
				t.Fatal(err)
			}
			a.Approvals = append(a.Approvals[:n], s)
		}
	}
	reterm := func(change func(*receipt.GrantTerms)) func(*testing.T, *bundletest.Job, *bundle.Approved) {
		return func(t *testing.T, j *bundletest.Job, a *bundle.Approved) {
			terms := j.Terms()
			change(&terms)
			var err error
			if a.Terms, err = terms.Canonical(); err != nil {
				t.Fatal(err)
			}
			for i, name := range []string{"alice", "bob"} {
				if a.Approvals[i], err = j.Approve(terms, name, name, nil); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	another := string(plan.Sum([]byte("another")))
	for _, c := range []struct {
		name   string
		failed []string
		change func(*testing.T, *bundletest.Job, *bundle.Approved)
	}{
		{"two of three", nil, func(*testing.T, *bundletest.Job, *bundle.Approved) {}},
		{"a third one too", nil, approve(2, "carol", "carol", nil)},
		{"one of two", []string{"approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Approvals = a.Approvals[:1] }},
		{"none", []string{"approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Approvals = nil }},
		{"no rule", []string{"approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Rules = nil }},
		{"a rule that asks for none", []string{"approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Rules[0].Count = 0 }},
		{"a rule of another asset", []string{"approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Rules[0].Asset = "other" }},
		{"another group", []string{"approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Rules[0].Group = "owners" }},
		{"a stranger's key", []string{"approvals.keys", "approvals.threshold"}, approve(1, "bob", "mallory", nil)},
		{"a stranger", []string{"approvals.keys", "approvals.threshold"}, approve(1, "mallory", "mallory", nil)},
		{"another approver's key", []string{"approvals.keys", "approvals.threshold"}, approve(1, "bob", "carol", nil)},
		{"one approver twice", []string{"approval.distinct", "approvals.threshold"}, approve(1, "alice", "alice", func(a *receipt.Approval) { a.Reason = "again" })},
		{"one approval twice", []string{"approval.distinct", "approvals.threshold"}, approve(1, "alice", "alice", nil)},
		{"expired before the release", []string{"approval.time", "approvals.threshold"}, approve(1, "bob", "bob", func(a *receipt.Approval) { a.Expires = clock.Unix() })},
		{"made after the release", []string{"approval.time", "approvals.threshold"}, approve(1, "bob", "bob", func(a *receipt.Approval) { a.Time = clock.Unix() + 60 })},
		{"for another plan", []string{"approval.plan", "approvals.threshold"}, approve(1, "bob", "bob", func(a *receipt.Approval) { a.Plan = plan.Digest(another) })},
		{"for another grant", []string{"approval.grant", "approvals.threshold"}, approve(1, "bob", "bob", func(a *receipt.Approval) { a.Grant = "grant-2" })},
		{"for another broker", []string{"approval.broker", "approvals.threshold"}, approve(1, "bob", "bob", func(a *receipt.Approval) { a.Broker = "another" })},
		{"for fewer assets", []string{"approval.assets", "approvals.threshold"}, approve(1, "bob", "bob", func(a *receipt.Approval) { a.Assets = a.Assets[:1] })},
		{"for other terms", []string{"approval.terms", "approvals.threshold"}, approve(1, "bob", "bob", func(a *receipt.Approval) { a.Terms = plan.Digest(another) })},
		{"own request", []string{"approval.own", "approvals.threshold"}, reterm(func(g *receipt.GrantTerms) { g.Requester = "owner/alice" })},
		{"the requester's key under another name", []string{"approval.own", "approvals.threshold"}, func(t *testing.T, j *bundletest.Job, a *bundle.Approved) {
			reterm(func(g *receipt.GrantTerms) { g.Requester = "engineer/carol" })(t, j, a)
			terms := j.Terms()
			terms.Requester = "engineer/carol"
			s, err := j.Approve(terms, "bob", "carol", nil)
			if err != nil {
				t.Fatal(err)
			}
			a.Approvals[1] = s
		}},
		{"signature of something else", []string{"approval.signature", "approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) {
			a.Approvals[1].Signature = a.Approvals[0].Signature
		}},
		{"no signature", []string{"approval.signature", "approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Approvals[1].Signature = nil }},
		{"not an approval", []string{"approval.form", "approvals.threshold"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Approvals[1].Document = []byte("{}") }},
		{"terms of another plan", []string{"approval.plan", "approvals.plan", "approvals.threshold"}, reterm(func(g *receipt.GrantTerms) { g.Plan = plan.Digest(another) })},
		{"terms of another broker", []string{"approvals.broker"}, reterm(func(g *receipt.GrantTerms) { g.Broker = "another" })},
		{"terms of another grant", []string{"approvals.complete", "approvals.grant"}, reterm(func(g *receipt.GrantTerms) { g.Grant = "grant-2" })},
		{"terms without the asset", []string{"approvals.terms"}, reterm(func(g *receipt.GrantTerms) { g.Assets = []string{"checkpoints", "weights"} })},
		{"terms that end at another time", []string{"approvals.terms"}, reterm(func(g *receipt.GrantTerms) { g.NotAfter++ })},
		{"terms that begin later", []string{"approvals.terms"}, reterm(func(g *receipt.GrantTerms) { g.NotBefore = clock.Unix() + 60 })},
		{"terms without simulation", []string{"approvals.terms"}, reterm(func(g *receipt.GrantTerms) { g.AllowSimulated = false })},
		{"no terms", []string{"approvals.complete", "approvals.form"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Terms = []byte("{}") }},
		{"terms in another encoding", []string{"approvals.complete", "approvals.form"}, func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Terms = append(a.Terms, ' ') }},
	} {
		t.Run(c.name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			a, err := j.Approved()
			if err != nil {
				t.Fatal(err)
			}
			c.change(t, j, &a)
			if err := j.ReleaseUnder(a); err != nil {
				t.Fatal(err)
			}
			r := verify.Verify(build(t, j), listed(t, l))
			if got := failedIDs(r); !slices.Equal(got, c.failed) {
				dump(t, r)
				t.Errorf("failed %v, want %v", got, c.failed)
			}
		})
	}
}

// TestApprovalsOfAnAgent has an agent that hands over other approvals than those
// that the broker's receipts name.
func TestApprovalsOfAnAgent(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		name, failed string
		change       func(*[]bundle.Approved)
	}{
		{"one left out", "approvals.complete", func(a *[]bundle.Approved) { (*a)[0].Approvals = (*a)[0].Approvals[:1] }},
		{"all left out", "approvals.complete", func(a *[]bundle.Approved) { (*a)[0].Approvals = nil }},
		{"one twice", "approvals.complete", func(a *[]bundle.Approved) { (*a)[0].Approvals[1] = (*a)[0].Approvals[0] }},
		{"the grant left out", "approvals.complete", func(a *[]bundle.Approved) { *a = nil }},
		{"the grant twice", "approvals.grant", func(a *[]bundle.Approved) { *a = append(*a, (*a)[0]) }},
		{"more asked for than there are", "approvals.threshold", func(a *[]bundle.Approved) { (*a)[0].Rules[0].Count = 3 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			edit(bundle.Approvals, c.change)(t, j)
			// Nobody needs to know the approvers to see this.
			r := verify.Verify(build(t, j), pinned(t, l))
			if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), c.failed) {
				t.Errorf("verdict %s, failed %v, want %s", r.Verdict, failedIDs(r), c.failed)
			}
		})
	}
}

func TestApprovalsNotChecked(t *testing.T) {
	l := newLab(t)
	j := newJob(t, l, bundletest.Options{})
	t.Run("approvers that nobody names", func(t *testing.T) {
		r := verify.Verify(build(t, j), pinned(t, l))
		if r.Verdict != verify.Verified {
			t.Fatal(r.Summary)
		}
		for _, id := range []string{"approvals.keys", "approvals.threshold"} {
			if got := outcomes(r, id); len(got) == 0 || slices.Contains(got, check.Pass) {
				t.Errorf("%s: %v", id, got)
			}
		}
	})
	for name, by := range map[string][2]string{"two names with one key": {"bob", "alice"}, "one name with two keys": {"alice", "mallory"}} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			a, err := j.Approved()
			if err != nil {
				t.Fatal(err)
			}
			if a.Approvals[1], err = j.Approve(j.Terms(), by[0], by[1], func(d *receipt.Approval) { d.Reason = "again" }); err != nil {
				t.Fatal(err)
			}
			if err := j.ReleaseUnder(a); err != nil {
				t.Fatal(err)
			}
			if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Contains(failedIDs(r), "approval.distinct") {
				t.Errorf("failed %v", failedIDs(r))
			}
		})
	}
	t.Run("own request, approvers that nobody names", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		a, err := j.Approved()
		if err != nil {
			t.Fatal(err)
		}
		terms := j.Terms()
		terms.Requester = "owner/alice"
		if a.Terms, err = terms.Canonical(); err != nil {
			t.Fatal(err)
		}
		for i, name := range []string{"alice", "bob"} {
			if a.Approvals[i], err = j.Approve(terms, name, name, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.ReleaseUnder(a); err != nil {
			t.Fatal(err)
		}
		if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Contains(failedIDs(r), "approval.own") {
			t.Errorf("failed %v", failedIDs(r))
		}
	})
	t.Run("approvals that the bundle does not carry", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		delete(j.Parts, bundle.Approvals)
		file := build(t, j)
		if r := verify.Verify(file, pinned(t, l)); r.Verdict != verify.Verified || slices.Contains(outcomes(r, "approvals.complete"), check.Pass) {
			t.Errorf("verdict %s", r.Verdict)
		}
		if r := verify.Verify(file, listed(t, l)); r.Verdict != verify.Unknown {
			t.Errorf("for a reader who names approvers: verdict %s", r.Verdict)
		}
	})
	t.Run("a grant by consent alone", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		a, err := j.Approved()
		if err != nil {
			t.Fatal(err)
		}
		a.Rules, a.Approvals = nil, nil
		if err := j.ReleaseUnder(a); err != nil {
			t.Fatal(err)
		}
		file := build(t, j)
		if r := verify.Verify(file, listed(t, l)); r.Verdict != verify.Unknown {
			t.Errorf("for a reader who names approvers: verdict %s", r.Verdict)
		}
		r := verify.Verify(file, pinned(t, l))
		if r.Verdict != verify.Verified || !slices.Equal(outcomes(r, "approvals.consent"), []check.Outcome{check.NotChecked}) || len(outcomes(r, "approvals.threshold")) > 0 {
			t.Errorf("verdict %s, consent %v", r.Verdict, outcomes(r, "approvals.consent"))
		}
	})
}

func TestParseApprovers(t *testing.T) {
	l := newLab(t)
	lines := strings.Split(strings.TrimSpace(string(l.Listed())), "\n")
	key := strings.SplitN(lines[1], " ", 3)[2]
	for _, c := range []struct {
		name, text string
		ok         bool
	}{
		{"three", string(l.Listed()), true},
		{"comments and empty lines", "# who\n\n" + lines[0] + "\n", true},
		{"a second key", lines[0] + "\nalice " + bundletest.Group + " " + key, true},
		{"a second key with other groups", lines[0] + "\nalice owners " + key, false},
		{"one key of two", lines[0] + "\nbob" + strings.TrimPrefix(lines[0], "alice"), false},
		{"empty", "", false},
		{"no groups", "alice " + key, false},
		{"an empty group", "alice a,,b " + key, false},
		{"no key", "alice " + bundletest.Group, false},
		{"options", "alice g restrict " + key, false},
		{"too large", strings.Repeat("#", verify.MaxApprovers+1), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := verify.ParseApprovers([]byte(c.text))
			if (err == nil) != c.ok || (got != nil) != c.ok {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}

func FuzzApprovers(f *testing.F) {
	l := newLab(f)
	f.Add(l.Listed())
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := verify.ParseApprovers(text)
		if err != nil {
			return
		}
		for name, a := range got {
			if len(a.Keys) == 0 || len(a.Groups) == 0 || !bytes.Contains(text, []byte(name)) {
				t.Errorf("%q: %v", name, a)
			}
		}
	})
}
