package verify_test

import (
	"slices"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
)

// withOwner is a reader who lists the approvers and the owner.
func withOwner(t testing.TB, l *bundletest.Lab) verify.Trust {
	t.Helper()
	trust := pinned(t, l)
	var err error
	line := append([]byte("owner - "), ssh.MarshalAuthorizedKey(l.Approvers["owner"].PublicKey())...)
	if trust.Approvers, err = verify.ParseApprovers(append(l.Listed(), line...)); err != nil {
		t.Fatal(err)
	}
	return trust
}

// ownedBy is the job's grant with approvals, the owner's consent, and the owner's
// policies of the three assets.
func ownedBy(t testing.TB, j *bundletest.Job) bundle.Approved {
	t.Helper()
	a, err := j.Approved()
	if err != nil {
		t.Fatal(err)
	}
	a.Approvals = append(a.Approvals, consent(t, j, "owner", "owner", nil))
	for _, asset := range []string{"dataset", "weights", "checkpoints"} {
		a.Policies = append(a.Policies, policyOf(t, j, asset, "owner", nil))
	}
	return a
}

func consent(t testing.TB, j *bundletest.Job, name, key string, change func(*receipt.Approval)) bundle.SignedApproval {
	t.Helper()
	s, err := j.Approve(j.Terms(), name, key, func(a *receipt.Approval) {
		a.Decision = receipt.DecisionConsent
		if change != nil {
			change(a)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func policyOf(t testing.TB, j *bundletest.Job, asset, key string, change func(*receipt.PolicyStatement)) bundle.SignedApproval {
	t.Helper()
	s, err := j.Policy(asset, key, change)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSignedByTheOwner has a broker and an agent that agree on policies and a consent
// that the owner did not sign: the reader, who lists the owner, finds each.
func TestSignedByTheOwner(t *testing.T) {
	l := newLab(t)
	type change func(*testing.T, *bundletest.Job, *bundle.Approved)
	weights := func(key string, f func(*receipt.PolicyStatement)) change {
		return func(t *testing.T, j *bundletest.Job, a *bundle.Approved) {
			a.Policies[1] = policyOf(t, j, "weights", key, f)
		}
	}
	consented := func(name, key string, f func(*receipt.Approval)) change {
		return func(t *testing.T, j *bundletest.Job, a *bundle.Approved) {
			a.Approvals[2] = consent(t, j, name, key, f)
		}
	}
	for name, tc := range map[string]struct {
		change  change
		failed  []string
		verdict verify.Verdict
	}{
		"all signed":                  {change: func(*testing.T, *bundletest.Job, *bundle.Approved) {}, verdict: verify.Verified},
		"no consent":                  {change: func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Approvals = a.Approvals[:2] }, verdict: verify.Unknown},
		"no policy signed":            {change: func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Policies = nil }, verdict: verify.Unknown},
		"a consent of mallory's":      {change: consented("owner", "mallory", nil), failed: []string{"approvals.keys"}},
		"a consent of an approver's":  {change: consented("carol", "carol", nil), failed: []string{"approval.owner"}},
		"a consent to other terms":    {change: consented("owner", "owner", func(a *receipt.Approval) { a.Grant = "grant-2" }), failed: []string{"approval.grant"}},
		"a denial":                    {change: consented("owner", "owner", func(a *receipt.Approval) { a.Decision = receipt.DecisionDeny }), failed: []string{"approval.decision"}},
		"a policy of mallory's":       {change: weights("mallory", nil), failed: []string{"approvals.rules", "policy.signature"}},
		"a policy of another broker":  {change: weights("owner", func(p *receipt.PolicyStatement) { p.Broker = "other" }), failed: []string{"approvals.rules", "policy.broker"}},
		"a policy of another owner":   {change: weights("owner", func(p *receipt.PolicyStatement) { p.Owner = "eve" }), failed: []string{"approvals.rules", "policy.owner"}},
		"a policy of another asset":   {change: weights("owner", func(p *receipt.PolicyStatement) { p.Asset = "checkpoints" }), failed: []string{"approvals.rules"}},
		"three approvals were wanted": {change: weights("owner", func(p *receipt.PolicyStatement) { p.Policy.Approvals[0].Count = 3 }), failed: []string{"approvals.rules"}},
		"rules that nobody told":      {change: func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Rules[0].Count = 1 }, failed: []string{"approvals.rules"}},
		"no signature": {change: func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Policies[1].Signature = nil },
			failed: []string{"approvals.rules", "policy.signature"}},
		"no policy at all": {change: func(_ *testing.T, _ *bundletest.Job, a *bundle.Approved) { a.Policies[1].Document = []byte("{}") },
			failed: []string{"approvals.rules", "policy.form"}},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			a := ownedBy(t, j)
			tc.change(t, j, &a)
			if err := j.ReleaseUnder(a); err != nil {
				t.Fatal(err)
			}
			r := verify.Verify(build(t, j), withOwner(t, l))
			got := slices.Compact(slices.Sorted(slices.Values(failedIDs(r))))
			want := tc.verdict
			if tc.failed != nil {
				want = verify.Failed
			}
			if !slices.Equal(got, tc.failed) || r.Verdict != want {
				dump(t, r)
				t.Errorf("%s, failed %v, want %v", r.Verdict, got, tc.failed)
			}
		})
	}
}

// TestPolicyLeftOut is an agent that leaves out what the receipts name.
func TestPolicyLeftOut(t *testing.T) {
	l := newLab(t)
	for name, change := range map[string]func(*[]bundle.Approved){
		"one policy":   func(a *[]bundle.Approved) { (*a)[0].Policies = (*a)[0].Policies[1:] },
		"all policies": func(a *[]bundle.Approved) { (*a)[0].Policies = nil },
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			if err := j.ReleaseUnder(ownedBy(t, j)); err != nil {
				t.Fatal(err)
			}
			edit(bundle.Approvals, change)(t, j)
			// Nobody needs to know the owner to see this.
			if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Contains(failedIDs(r), "approvals.rules") {
				t.Errorf("failed %v", failedIDs(r))
			}
		})
	}
}

// TestOwnerNobodyNames is a reader without the owner's key: signed, and not known by
// whom.
func TestOwnerNobodyNames(t *testing.T) {
	l := newLab(t)
	j := newJob(t, l, bundletest.Options{})
	if err := j.ReleaseUnder(ownedBy(t, j)); err != nil {
		t.Fatal(err)
	}
	for name, trust := range map[string]verify.Trust{"nobody": pinned(t, l), "approvers alone": listed(t, l)} {
		r := verify.Verify(build(t, j), trust)
		if r.Verdict != verify.Verified {
			t.Errorf("%s: %s", name, r.Summary)
		}
		for _, id := range []string{"approvals.rules", "approvals.consent"} {
			if got := outcomes(r, id); len(got) == 0 || slices.Contains(got, check.Pass) {
				t.Errorf("%s: %s: %v", name, id, got)
			}
		}
	}
}
