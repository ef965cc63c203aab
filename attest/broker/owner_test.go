package broker_test

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/attest/translog"
)

// decision is who's signed decision on a grant, and nil for whom the directory
// does not know.
func (w *world) decision(t testing.TB, p *people, who broker.Actor, id, decision, reason string) *broker.Signed {
	t.Helper()
	known, ok := p.known[who.Name]
	if !ok {
		return nil
	}
	doc := w.approval(t, alice, id, func(a *receipt.Approval) { a.Approver, a.Decision, a.Reason = who.Name, decision, reason })
	return &broker.Signed{Document: doc, Signature: signed(t, known.keys[0], doc)}
}

// statement is the owner's signature over an asset as it would be.
func statement(t testing.TB, key ssh.Signer, a broker.Asset) *broker.Signed {
	t.Helper()
	doc := must[[]byte](t)(receipt.PolicyStatement{
		Version: receipt.PolicyVersion, Broker: brokerID, Asset: a.Name, Owner: a.Owner, Revision: a.Revision,
		Policy: receipt.AssetPolicy(a.Policy), Labels: receipt.AssetLabels(a.Labels),
	}.Canonical())
	return &broker.Signed{Document: doc, Signature: must[[]byte](t)(sshsig.Sign(key, receipt.PolicyNamespace, doc))}
}

// withSigningOwner is a world with approvers in which alice has a key too, and has
// signed what her assets ask for: "weights" two approvals, "data" none.
func withSigningOwner(t testing.TB) (*world, *people) {
	t.Helper()
	w, p := withApprovers(t)
	p.known["alice"] = &person{[]ssh.Signer{newEd25519(t)}, nil}
	for _, name := range []string{"weights", "data"} {
		a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, name))
		a.Revision++
		if name == "data" {
			a.Policy.Approvals = nil
		}
		must[broker.Asset](t)(w.UpdateAssetPolicy(t.Context(), alice, name, a.Policy, a.Labels, a.Revision-1, statement(t, p.known["alice"].keys[0], a)))
	}
	return w, p
}

// write changes the broker's database behind its back.
func (w *world) write(t testing.TB, query string, args ...any) {
	t.Helper()
	db := must[*sql.DB](t)(sql.Open("sqlite", w.path))
	defer db.Close() //nolint:errcheck // a test's
	n, err := must[sql.Result](t)(db.ExecContext(t.Context(), query, args...)).RowsAffected()
	if err != nil || n == 0 {
		t.Fatalf("%s: %d rows, %v", query, n, err)
	}
}

// ready has a grant over both assets with two approvals and the owner's consent.
func ready(t testing.TB, w *world, p *people) broker.Grant {
	t.Helper()
	g := w.requested(t, func(n *broker.NewGrant) { n.MaxReleases = 9 })
	w.approve(t, p, ann, g.ID)
	w.approve(t, p, ben, g.ID)
	v := must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, g.ID, w.decision(t, p, alice, g.ID, receipt.DecisionConsent, "yes")))
	if v.State != broker.StateActive {
		t.Fatalf("%s, lacks %v", v.State, v.Missing)
	}
	return g
}

// TestSignedByTheOwner is a release under policies and a consent that their owner
// signed: the receipt names both.
func TestSignedByTheOwner(t *testing.T) {
	w, p := withSigningOwner(t)
	g := ready(t, w, p)
	j := newJob(t, w, nil)
	a := must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	var r receipt.Release
	if err := w.brokerKeys.Open(receipt.TypeRelease, a.Receipt, &r); err != nil {
		t.Fatal(err)
	}
	weights := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "weights"))
	if r.Policy != plan.Sum(weights.Statement.Document) || len(r.Approvals) != 3 {
		t.Errorf("receipt names policy %s and %d approvals", r.Policy, len(r.Approvals))
	}
	if r.Held == nil || r.Held.Store != "broker" || r.Held.Key == "" || r.Held.Attested != "" {
		t.Errorf("receipt says that the key was held by %+v", r.Held)
	}
	var consents int
	if err := w.store.View(t.Context(), func(ctx context.Context, rd broker.Reader) error {
		l, err := rd.Entries(ctx, "", 0, 1000)
		for _, e := range l {
			if b, err := e.Open(); err == nil && b.Kind == translog.KindApproval && b.Approval.Approver == "alice" && b.Approval.Key == ssh.FingerprintSHA256(p.known["alice"].keys[0].PublicKey()) {
				consents++
			}
		}
		return err
	}); err != nil || consents != 1 {
		t.Errorf("the log has %d signed consents, %v", consents, err)
	}
}

// TestDatabaseWriter is somebody who can write the broker's database and has no
// key of the owner's. In each row the named signature alone stands between the
// change and the key.
func TestDatabaseWriter(t *testing.T) {
	plain := `{"leaseSeconds":60,"graceSeconds":10}`
	for name, tc := range map[string]struct {
		asset string
		// approved is how far the grant got before the change.
		approved bool
		write    func(t *testing.T, w *world, p *people, g broker.Grant)
		want     []string
	}{
		"drops the approval rules, and consents for the owner": {
			asset: "weights",
			write: func(t *testing.T, w *world, p *people, g broker.Grant) {
				w.write(t, `UPDATE assets SET policy = ? WHERE name = 'weights'`, plain)
				must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, g.ID, w.decision(t, p, alice, g.ID, receipt.DecisionConsent, "for data")))
			},
			want: []string{"asset.policy-signature"},
		},
		"drops the rules and the owner's signature": {
			asset: "weights",
			write: func(t *testing.T, w *world, p *people, g broker.Grant) {
				w.write(t, `UPDATE assets SET policy = ?, statement = x'', statement_sig = x'' WHERE name = 'weights'`, plain)
				must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, g.ID, w.decision(t, p, alice, g.ID, receipt.DecisionConsent, "for data")))
			},
			want: []string{"asset.policy-signature"},
		},
		"puts the signed policy of another asset in its place": {
			asset: "weights",
			write: func(t *testing.T, w *world, p *people, g broker.Grant) {
				w.write(t, `UPDATE assets SET (policy, statement, statement_sig) = (SELECT policy, statement, statement_sig FROM assets WHERE name = 'data') WHERE name = 'weights'`)
				must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, g.ID, w.decision(t, p, alice, g.ID, receipt.DecisionConsent, "for data")))
			},
			want: []string{"asset.policy-signature"},
		},
		"lengthens the lease": {
			asset: "weights", approved: true,
			write: func(t *testing.T, w *world, _ *people, _ broker.Grant) {
				w.write(t, `UPDATE assets SET policy = replace(policy, '"leaseSeconds":60', '"leaseSeconds":3600')`)
			},
			want: []string{"asset.policy-signature"},
		},
		"another label": {
			asset: "data", approved: true,
			write: func(t *testing.T, w *world, _ *people, _ broker.Grant) {
				w.write(t, `UPDATE assets SET labels = '{"region":"elsewhere"}' WHERE name = 'weights'`)
			},
			want: []string{"asset.policy-signature"},
		},
		"marks the grant as consented": {
			asset: "data",
			write: func(t *testing.T, w *world, p *people, g broker.Grant) {
				w.approve(t, p, ann, g.ID)
				w.approve(t, p, ben, g.ID)
				w.write(t, `UPDATE grants SET consented = 1`)
			},
			want: []string{"grant.approvals"},
		},
		"passes an approval of the owner's off as the consent": {
			asset: "data",
			write: func(t *testing.T, w *world, p *people, g broker.Grant) {
				w.approve(t, p, ann, g.ID)
				w.approve(t, p, ben, g.ID)
				s := w.decision(t, p, alice, g.ID, receipt.DecisionApprove, "an approval")
				w.write(t, `INSERT INTO approvals (grant_id, approver, document, signature, digest) VALUES (?, 'alice', ?, ?, ?)`, g.ID, s.Document, s.Signature, string(plan.Sum(s.Document)))
			},
			want: []string{"grant.approvals"},
		},
		"passes a consent of an approver's off as an approval": {
			asset: "weights",
			write: func(t *testing.T, w *world, p *people, g broker.Grant) {
				w.approve(t, p, ann, g.ID)
				must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, g.ID, w.decision(t, p, alice, g.ID, receipt.DecisionConsent, "yes")))
				s := w.decision(t, p, ben, g.ID, receipt.DecisionConsent, "a consent")
				w.write(t, `INSERT INTO approvals (grant_id, approver, document, signature, digest) VALUES (?, 'ben', ?, ?, ?)`, g.ID, s.Document, s.Signature, string(plan.Sum(s.Document)))
			},
			want: []string{"grant.approvals"},
		},
		"moves a consent to another grant": {
			asset: "data",
			write: func(t *testing.T, w *world, p *people, g broker.Grant) {
				other := w.requested(t, nil)
				must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, other.ID, w.decision(t, p, alice, other.ID, receipt.DecisionConsent, "yes")))
				w.approve(t, p, ann, g.ID)
				w.approve(t, p, ben, g.ID)
				w.write(t, `INSERT INTO approvals SELECT ?, approver, document, signature, digest FROM approvals WHERE grant_id = ?`, g.ID, other.ID)
			},
			want: []string{"grant.approvals"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, p := withSigningOwner(t)
			var g broker.Grant
			if tc.approved {
				g = ready(t, w, p)
			} else {
				g = w.requested(t, nil)
			}
			tc.write(t, w, p, g)
			a, err := newJob(t, w, nil).release(t, w.Broker, g, tc.asset)
			wantRefused(t, a, err, tc.want...)
		})
	}
}

// TestUnsignedByTheOwner is an owner whose key the directory knows and who does not
// sign, or signs something else.
func TestUnsignedByTheOwner(t *testing.T) {
	w, p := withSigningOwner(t)
	key := p.known["alice"].keys[0]
	a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "data"))
	next := a
	next.Revision++
	later, other, renamed := next, next, next
	later.Revision++
	other.Policy.LeaseSeconds = 30
	renamed.Name = "weights"
	approval := &broker.Signed{Document: statement(t, key, next).Document, Signature: signed(t, key, statement(t, key, next).Document)}
	for name, s := range map[string]*broker.Signed{
		"nothing":                       nil,
		"a revision after the next":     statement(t, key, later),
		"the revision before":           statement(t, key, a),
		"another policy":                statement(t, key, other),
		"the policy of another asset":   statement(t, key, renamed),
		"by a key of somebody else":     statement(t, p.known["ann"].keys[0], next),
		"by a key that nobody knows":    statement(t, newEd25519(t), next),
		"for approvals, not for policy": approval,
		"no signature":                  {Document: statement(t, key, next).Document},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := w.UpdateAssetPolicy(t.Context(), alice, "data", next.Policy, next.Labels, a.Revision, s); !refusedWith(err, "asset.policy-signature") {
				t.Error(err)
			}
		})
	}
	if got := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "data")); got.Revision != a.Revision {
		t.Errorf("revision %d after refusals, want %d", got.Revision, a.Revision)
	}
	if _, err := w.CreateAsset(t.Context(), alice, broker.NewAsset{Name: "more", Kind: broker.KindCheckpoints}); !refusedWith(err, "asset.policy-signature") {
		t.Errorf("made an asset: %v", err)
	}
	first := broker.Asset{Name: "more", Owner: "alice", Revision: 1, Policy: broker.DefaultPolicy(), Labels: broker.Labels{Project: "x"}}
	made, err := w.CreateAsset(t.Context(), alice, broker.NewAsset{Name: "more", Kind: broker.KindCheckpoints, Signed: statement(t, key, first)})
	if err != nil || made.Labels.Project != "x" {
		t.Errorf("%+v, %v", made, err)
	}

	g := w.requested(t, nil)
	if _, err := w.ConsentGrant(t.Context(), alice, g.ID, nil); !refusedWith(err, "approval.signature") {
		t.Errorf("consented: %v", err)
	}
	if _, err := w.ConsentGrant(t.Context(), alice, g.ID, w.decision(t, p, alice, g.ID, receipt.DecisionApprove, "no consent")); !refusedWith(err, "approval.decision") {
		t.Errorf("consented by an approval: %v", err)
	}
	if _, err := w.DenyGrant(t.Context(), ann, g.ID, "no", nil); !refusedWith(err, "approval.signature") {
		t.Errorf("denied: %v", err)
	}
	if _, err := w.DenyGrant(t.Context(), ann, g.ID, "", w.decision(t, p, ann, g.ID, receipt.DecisionConsent, "no")); !refusedWith(err, "approval.decision") {
		t.Errorf("denied by a consent: %v", err)
	}
	// What the owner makes waits for the signature too.
	v := must[broker.GrantView](t)(w.GrantAsIs(t.Context(), w.grant(t, nil).ID))
	if v.State != broker.StateRequested || !slices.ContainsFunc(v.Missing, func(s string) bool { return strings.HasPrefix(s, "the consent of alice") }) {
		t.Errorf("%s, lacks %v", v.State, v.Missing)
	}
}

// TestOwnerKeyGone is an owner whose key the maintainers take out of the set, or
// replace: what the old key signed stands no longer.
func TestOwnerKeyGone(t *testing.T) {
	w, p := withSigningOwner(t)
	g := ready(t, w, p)
	p.known["alice"].keys = []ssh.Signer{newEd25519(t)}
	a, err := newJob(t, w, nil).release(t, w.Broker, g, "weights")
	wantRefused(t, a, err, "asset.policy-signature", "grant.approvals")
}

// TestConsentExpires is a consent that was given for less than the grant lasts.
func TestConsentExpires(t *testing.T) {
	w, p := withSigningOwner(t)
	g := w.requested(t, func(n *broker.NewGrant) { n.MaxReleases, n.Assets = 9, []string{"data"} })
	must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, g.ID, w.decision(t, p, alice, g.ID, receipt.DecisionConsent, "for half an hour")))
	must[broker.Answer](t)(newJob(t, w, nil).release(t, w.Broker, g, "data"))
	w.advance(31 * time.Minute)
	a, err := newJob(t, w, func(r *receipt.Result) { r.JobID = "job-2" }).release(t, w.Broker, g, "data")
	wantRefused(t, a, err, "grant.approvals")
}

// TestReleasesByThePlan is a grant that says no number of releases.
func TestReleasesByThePlan(t *testing.T) {
	w := newWorld(t, false)
	p := plan.Plan{
		Version: plan.Version, Name: "job", Image: "sha256:" + strings.Repeat("ab", 32), Command: []string{"/bin/true"}, Inputs: []plan.Input{}, Output: plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1}, Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
	}
	once := must[[]byte](t)(p.Canonical())
	p.Retry = &plan.Retry{Limit: 3}
	retried := must[[]byte](t)(p.Canonical())
	for name, tc := range map[string]struct {
		plan     plan.Digest
		document []byte
		asked    int
		want     int
	}{
		"a plan that nobody showed":  {plan: plan.Sum(retried), want: 1},
		"a plan without retries":     {plan: plan.Sum(once), document: once, want: 1},
		"a plan with three retries":  {plan: plan.Sum(retried), document: retried, want: 4},
		"a number of its own":        {plan: plan.Sum(retried), document: retried, asked: 2, want: 2},
		"the plan of another digest": {plan: plan.Sum(once), document: retried},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := w.RequestGrant(t.Context(), erin, broker.NewGrant{Assets: []string{"data"}, Plan: tc.plan, Document: tc.document, NotAfter: w.clock().Add(time.Hour), MaxReleases: tc.asked})
			if tc.want == 0 {
				if !errors.Is(err, broker.ErrInvalid) {
					t.Error(err)
				}
				return
			}
			if err != nil || g.MaxReleases != tc.want {
				t.Errorf("%d releases, want %d: %v", g.MaxReleases, tc.want, err)
			}
		})
	}
}
