package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"database/sql"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/attest/translog"
)

// person is somebody with SSH keys and groups.
type person struct {
	keys   []ssh.Signer
	groups []string
}

// people is a Directory that tests change as they go.
type people struct {
	known map[string]*person
	down  bool
}

func (p *people) Approver(_ context.Context, name string) ([]ssh.PublicKey, []string, error) {
	if p.down {
		return nil, nil, errInjected
	}
	q, ok := p.known[name]
	if !ok {
		return nil, nil, broker.ErrNotFound
	}
	var keys []ssh.PublicKey
	for _, k := range q.keys {
		keys = append(keys, k.PublicKey())
	}
	return keys, q.groups, nil
}

func sshKey(t testing.TB, key any) ssh.Signer {
	t.Helper()
	return must[ssh.Signer](t)(ssh.NewSignerFromKey(key))
}

func newEd25519(t testing.TB) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return sshKey(t, priv)
}

var (
	erin  = broker.Actor{Role: "engineer", Name: "erin"}
	ann   = broker.Actor{Role: "approver", Name: "ann"}
	ben   = broker.Actor{Role: "approver", Name: "ben"}
	cleo  = broker.Actor{Role: "approver", Name: "cleo"}
	dan   = broker.Actor{Role: "approver", Name: "dan"}
	oscar = broker.Actor{Role: "operator", Name: "oscar"}
)

// withApprovers is a world in which "weights" and "data" ask for two of the three
// members of group weights-approvers.
func withApprovers(t testing.TB) (*world, *people) {
	t.Helper()
	w := newWorld(t, false)
	p := &people{known: map[string]*person{
		"ann":  {[]ssh.Signer{newEd25519(t)}, []string{"weights-approvers"}},
		"ben":  {[]ssh.Signer{sshKey(t, must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))}, []string{"weights-approvers", "others"}},
		"cleo": {[]ssh.Signer{newEd25519(t)}, []string{"weights-approvers"}},
		"dan":  {[]ssh.Signer{newEd25519(t)}, []string{"others"}},
		"erin": {[]ssh.Signer{newEd25519(t)}, []string{"weights-approvers"}},
	}}
	w.cfg.Directory = p
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	for _, asset := range []string{"weights", "data"} {
		w.policy(t, asset, func(p *broker.Policy) { p.Approvals = []broker.Rule{{Group: "weights-approvers", Count: 2}} })
	}
	return w, p
}

// policy changes an asset's policy as alice does.
func (w *world) policy(t testing.TB, asset string, change func(*broker.Policy)) {
	t.Helper()
	a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, asset))
	change(&a.Policy)
	must[broker.Asset](t)(w.UpdateAssetPolicy(t.Context(), alice, asset, a.Policy, a.Labels, a.Revision, nil))
}

func (w *world) requested(t testing.TB, change func(*broker.NewGrant)) broker.Grant {
	t.Helper()
	n := broker.NewGrant{Assets: []string{"weights", "data"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour)}
	if change != nil {
		change(&n)
	}
	return must[broker.Grant](t)(w.RequestGrant(t.Context(), erin, n))
}

// approval is what who would sign for g.
func (w *world) approval(t testing.TB, who broker.Actor, id string, change func(*receipt.Approval)) []byte {
	t.Helper()
	v := must[broker.GrantView](t)(w.Grant(t.Context(), who, id))
	a := receipt.Approval{
		Version: receipt.ApprovalVersion, Broker: brokerID, Grant: v.ID, Plan: v.Plan, Assets: v.Assets, Terms: plan.Sum(v.Terms), Approver: who.Name,
		Decision: receipt.DecisionApprove, Reason: "reviewed", Ticket: "T-1", Time: w.clock().Unix(), Expires: w.clock().Add(30 * time.Minute).Unix(),
	}
	if change != nil {
		change(&a)
	}
	return must[[]byte](t)(plan.Canonical(a))
}

func signed(t testing.TB, key ssh.Signer, document []byte) []byte {
	t.Helper()
	return must[[]byte](t)(sshsig.Sign(key, receipt.ApprovalNamespace, document))
}

func (w *world) approve(t testing.TB, p *people, who broker.Actor, id string) broker.GrantView {
	t.Helper()
	doc := w.approval(t, who, id, nil)
	return must[broker.GrantView](t)(w.ApproveGrant(t.Context(), who, id, doc, signed(t, p.known[who.Name].keys[0], doc)))
}

func refusedWith(err error, ids ...string) bool {
	var r *check.Refusal
	if !errors.As(err, &r) {
		return false
	}
	var got []string
	for _, c := range r.Checks {
		got = append(got, c.ID)
	}
	return slices.Equal(got, ids)
}

// TestTwoOfThree is the way of a grant over assets that ask for approvals.
func TestTwoOfThree(t *testing.T) {
	w, p := withApprovers(t)
	g := w.requested(t, nil)
	j := newJob(t, w, nil)

	v := must[broker.GrantView](t)(w.Grant(t.Context(), erin, g.ID))
	if v.State != broker.StateRequested || !slices.Equal(v.Missing, []string{"2 of 2 approvals of group weights-approvers"}) {
		t.Errorf("%s, lacks %v", v.State, v.Missing)
	}
	a, err := j.release(t, w.Broker, g, "weights")
	wantRefused(t, a, err, "grant.approvals")
	a, err = j.release(t, w.Broker, g, "data")
	wantRefused(t, a, err, "grant.approvals")

	v = w.approve(t, p, ann, g.ID)
	if v.State != broker.StateRequested || !slices.Equal(v.Missing, []string{"1 of 2 approvals of group weights-approvers (approved: ann)"}) {
		t.Errorf("%s, lacks %v", v.State, v.Missing)
	}
	w.approve(t, p, ann, g.ID)
	a, err = j.release(t, w.Broker, g, "weights")
	wantRefused(t, a, err, "grant.approvals")

	v = w.approve(t, p, ben, g.ID)
	if v.State != broker.StateActive || len(v.Missing) != 0 || len(v.Approvals) != 2 {
		t.Errorf("%s, lacks %v, %d approvals", v.State, v.Missing, len(v.Approvals))
	}
	a = must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	if _, err := j.open(a, g, "weights"); err != nil {
		t.Error(err)
	}
	var r receipt.Release
	if err := w.brokerKeys.Open(receipt.TypeRelease, a.Receipt, &r); err != nil || len(r.Approvals) != 2 || r.LeaseSeconds != 60 {
		t.Errorf("%+v, %v", r, err)
	}
	for _, s := range v.Approvals {
		if !slices.Contains(r.Approvals, s.Digest) {
			t.Errorf("the receipt does not name the approval of %s", s.Approver)
		}
	}
	entries := must[[]translog.Entry](t)(w.Entries(t.Context(), alice, "job-1"))
	if b := must[translog.Body](t)(entries[0].Open()); !slices.Equal(b.Release.Approvals, r.Approvals) {
		t.Errorf("the log names %v", b.Release.Approvals)
	}
	if _, err := w.CheckLog(t.Context()); err != nil {
		t.Error(err)
	}
	// An owner's own grant waits for the same approvals.
	own := w.grant(t, nil)
	a, err = newJob(t, w, func(r *receipt.Result) { r.JobID = "job-2" }).release(t, w.Broker, own, "weights")
	wantRefused(t, a, err, "grant.approvals")
}

// TestApprovalRefused: everything about each of these is right but one thing.
func TestApprovalRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		who    broker.Actor
		change func(*receipt.Approval)
		// sign signs; ann's key if it is nil.
		sign func(t *testing.T, p *people, doc []byte) []byte
		want string // check id, or "" for ErrInvalid
	}{
		"another broker":    {change: func(a *receipt.Approval) { a.Broker = "other" }, want: "approval.broker"},
		"another grant":     {change: func(a *receipt.Approval) { a.Grant = "grant-x" }, want: "approval.grant"},
		"another plan":      {change: func(a *receipt.Approval) { a.Plan = plan.Sum([]byte("plan B")) }, want: "approval.plan"},
		"fewer assets":      {change: func(a *receipt.Approval) { a.Assets = a.Assets[:1] }, want: "approval.assets"},
		"other terms":       {change: func(a *receipt.Approval) { a.Terms = plan.Sum(nil) }, want: "approval.terms"},
		"in another's name": {change: func(a *receipt.Approval) { a.Approver = "ben" }, sign: by("ben"), want: "approval.approver"},
		"by another's key":  {sign: by("ben"), want: "approval.signature"},
		"by nobody's key":   {sign: func(t *testing.T, _ *people, doc []byte) []byte { return signed(t, newEd25519(t), doc) }, want: "approval.signature"},
		"of other bytes": {sign: func(t *testing.T, p *people, doc []byte) []byte {
			return signed(t, p.known["ann"].keys[0], append(doc, ' '))
		}, want: "approval.signature"},
		"without a signature": {sign: func(*testing.T, *people, []byte) []byte { return nil }, want: "approval.signature"},
		"signed for another purpose": {sign: func(t *testing.T, p *people, doc []byte) []byte {
			return must[[]byte](t)(sshsig.Sign(p.known["ann"].keys[0], "file", doc))
		}, want: "approval.signature"},
		"expired":                 {change: func(a *receipt.Approval) { a.Time -= 3600; a.Time += 3596; a.Expires = a.Time + 1 }, want: "approval.expiry"},
		"made before the request": {change: func(a *receipt.Approval) { a.Time -= 60 }, want: "approval.time"},
		"made in the future":      {change: func(a *receipt.Approval) { a.Time += 60 }, want: "approval.time"},
		"own request":             {who: broker.Actor{Role: "approver", Name: "erin"}, sign: by("erin"), want: "approval.own"},
		"a key that is the requester's": {sign: func(t *testing.T, p *people, doc []byte) []byte {
			p.known["ann"].keys = p.known["erin"].keys
			return signed(t, p.known["ann"].keys[0], doc)
		}, want: "approval.own"},
		"approver in no such group": {who: dan, sign: by("dan"), want: "approval.group"},
		"approver nobody knows":     {who: broker.Actor{Role: "approver", Name: "zoe"}, want: "approval.signature"},
		"no approver by role":       {who: broker.Actor{Role: "engineer", Name: "ann"}, want: "role"},
		"no reason":                 {change: func(a *receipt.Approval) { a.Reason = "" }},
		"another decision":          {change: func(a *receipt.Approval) { a.Decision = receipt.DecisionDeny }, want: "approval.decision"},
		"no decision":               {change: func(a *receipt.Approval) { a.Decision = "perhaps" }},
		"another version":           {change: func(a *receipt.Approval) { a.Version = "coffer.run/approval/v2" }},
		"expiry before it was made": {change: func(a *receipt.Approval) { a.Expires = a.Time }},
	} {
		t.Run(name, func(t *testing.T) {
			w, p := withApprovers(t)
			g := w.requested(t, nil)
			who := ann
			if tc.who.Name != "" {
				who = tc.who
			}
			doc := w.approval(t, who, g.ID, tc.change)
			sign := tc.sign
			if sign == nil {
				sign = by("ann")
			}
			_, err := w.ApproveGrant(t.Context(), who, g.ID, doc, sign(t, p, doc))
			if tc.want == "" && !errors.Is(err, broker.ErrInvalid) || tc.want != "" && !refusedWith(err, tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			if v := must[broker.GrantView](t)(w.Grant(t.Context(), alice, g.ID)); len(v.Approvals) != 0 {
				t.Error("the approval was kept")
			}
		})
	}
}

func by(name string) func(*testing.T, *people, []byte) []byte {
	return func(t *testing.T, p *people, doc []byte) []byte { return signed(t, p.known[name].keys[0], doc) }
}

// revoked has who take a principal back.
func (w *world) revoked(t testing.TB, who broker.Actor, principal string) {
	t.Helper()
	if _, _, err := w.RevokeTarget(t.Context(), who, broker.Target{Kind: broker.RevokePrincipal, Value: principal}, "lost a laptop"); err != nil {
		t.Fatal(err)
	}
}

// TestApprovalsCountAtRelease changes the world after two people approved: only
// the count at the release stands between the job and the key.
func TestApprovalsCountAtRelease(t *testing.T) {
	for name, tc := range map[string]struct {
		later func(t *testing.T, w *world, p *people, g broker.Grant)
		want  string
	}{
		"nothing":                    {func(*testing.T, *world, *people, broker.Grant) {}, ""},
		"an approver left the group": {func(_ *testing.T, _ *world, p *people, _ broker.Grant) { p.known["ben"].groups = []string{"others"} }, "grant.approvals"},
		"an approver is gone":        {func(_ *testing.T, _ *world, p *people, _ broker.Grant) { delete(p.known, "ben") }, "grant.approvals"},
		"a key was removed": {func(t *testing.T, _ *world, p *people, _ broker.Grant) {
			p.known["ben"].keys = []ssh.Signer{newEd25519(t)}
		}, "grant.approvals"},
		"a key is the other's too":                 {func(_ *testing.T, _ *world, p *people, _ broker.Grant) { p.known["erin"].keys = p.known["ben"].keys }, "grant.approvals"},
		"an approver's certificate was revoked":    {func(t *testing.T, w *world, _ *people, _ broker.Grant) { w.revoked(t, oscar, "approver/ben") }, "grant.approvals"},
		"an approver's sign-in was revoked":        {func(t *testing.T, w *world, _ *people, _ broker.Grant) { w.revoked(t, oscar, "user/ben") }, "grant.approvals"},
		"the owner revoked an approver":            {func(t *testing.T, w *world, _ *people, _ broker.Grant) { w.revoked(t, alice, "user/ben") }, "grant.approvals"},
		"another owner revoked an approver":        {func(t *testing.T, w *world, _ *people, _ broker.Grant) { w.revoked(t, bob, "user/ben") }, ""},
		"somebody who did not approve was revoked": {func(t *testing.T, w *world, _ *people, _ broker.Grant) { w.revoked(t, oscar, "user/cleo") }, ""},
		"approvals expired":                        {func(_ *testing.T, w *world, _ *people, _ broker.Grant) { w.advance(31 * time.Minute) }, "grant.approvals"},
		"the policy asks for three": {func(t *testing.T, w *world, _ *people, _ broker.Grant) {
			w.policy(t, "weights", func(p *broker.Policy) { p.Approvals[0].Count = 3 })
		}, "grant.approvals"},
		"the other asset's policy asks for another group": {func(t *testing.T, w *world, _ *people, _ broker.Grant) {
			w.policy(t, "data", func(p *broker.Policy) { p.Approvals = []broker.Rule{{Group: "lawyers", Count: 1}} })
		}, "grant.approvals"},
		"the other asset's policy asks for a group that one is in": {func(t *testing.T, w *world, _ *people, _ broker.Grant) {
			w.policy(t, "data", func(p *broker.Policy) { p.Approvals = []broker.Rule{{Group: "others", Count: 1}} })
		}, ""},
		"a signature was edited in the database": {func(t *testing.T, w *world, _ *people, _ broker.Grant) {
			w.sql(t, `DROP TRIGGER approvals_update; UPDATE approvals SET signature = zeroblob(10) WHERE approver = 'ben'`)
		}, "grant.approvals"},
		"an approval was put under another name": {func(t *testing.T, w *world, _ *people, _ broker.Grant) {
			w.sql(t, `DROP TRIGGER approvals_update; UPDATE approvals SET approver = 'cleo' WHERE approver = 'ben'`)
		}, "grant.approvals"},
		"an approval was doubled under another name": {func(t *testing.T, w *world, p *people, _ broker.Grant) {
			p.known["ben"].groups = nil
			w.sql(t, `INSERT INTO approvals SELECT grant_id, 'cleo', document, signature, 'x' FROM approvals WHERE approver = 'ann'`)
		}, "grant.approvals"},
		"the terms were edited": {func(t *testing.T, w *world, _ *people, _ broker.Grant) {
			w.sql(t, `DROP TRIGGER grants_terms; UPDATE grants SET max_releases = 1000`)
		}, "grant.approvals"},
		"the plan was edited": {func(t *testing.T, w *world, _ *people, _ broker.Grant) {
			w.sql(t, `DROP TRIGGER grants_terms; UPDATE grants SET not_after = not_after + 999`)
		}, "grant.approvals"},
		"consent was edited in": {func(t *testing.T, w *world, p *people, _ broker.Grant) {
			delete(p.known, "ben")
			w.sql(t, `UPDATE grants SET consented = 1`)
		}, "grant.approvals"},
	} {
		t.Run(name, func(t *testing.T) {
			w, p := withApprovers(t)
			g := w.requested(t, nil)
			w.approve(t, p, ann, g.ID)
			w.approve(t, p, ben, g.ID)
			tc.later(t, w, p, g)
			a, err := newJob(t, w, nil).release(t, w.Broker, g, "weights")
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantRefused(t, a, err, tc.want)
		})
	}
	t.Run("one person under two names", func(t *testing.T) {
		w, p := withApprovers(t)
		p.known["cleo"].keys = p.known["ann"].keys
		g := w.requested(t, nil)
		w.approve(t, p, ann, g.ID)
		if v := w.approve(t, p, cleo, g.ID); v.State != broker.StateRequested {
			t.Errorf("%s with two approvals by one key", v.State)
		}
	})
	t.Run("the directory is down", func(t *testing.T) {
		w, p := withApprovers(t)
		g := w.requested(t, nil)
		w.approve(t, p, ann, g.ID)
		w.approve(t, p, ben, g.ID)
		p.down = true
		a, err := newJob(t, w, nil).release(t, w.Broker, g, "weights")
		if !errors.Is(err, broker.ErrUnavailable) || a.Ciphertext != nil {
			t.Error(err)
		}
		cfg := w.cfg
		cfg.Directory = nil
		a, err = newJob(t, w, nil).release(t, must[*broker.Broker](t)(broker.New(cfg)), g, "weights")
		wantRefused(t, a, err, "grant.approvals")
	})
}

// sql is someone with the database file.
func (w *world) sql(t testing.TB, q string) {
	t.Helper()
	db := must[*sql.DB](t)(sql.Open("sqlite", w.path))
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), q); err != nil {
		t.Fatal(err)
	}
}

func TestConsent(t *testing.T) {
	w := newWorld(t, false)
	g := w.requested(t, nil)
	j := newJob(t, w, nil)
	a, err := j.release(t, w.Broker, g, "weights")
	wantRefused(t, a, err, "grant.approvals")
	if _, err := w.ConsentGrant(t.Context(), bob, g.ID, nil); !refusedWith(err, "grant.owner") {
		t.Error(err)
	}
	if _, err := w.ConsentGrant(t.Context(), broker.Actor{Role: "engineer", Name: "alice"}, g.ID, nil); !refusedWith(err, "role") {
		t.Error(err)
	}
	if v := must[broker.GrantView](t)(w.ConsentGrant(t.Context(), alice, g.ID, nil)); v.State != broker.StateActive {
		t.Errorf("%s", v.State)
	}
	must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))

	// An engineer with the owner's name is not the owner.
	g = must[broker.Grant](t)(w.RequestGrant(t.Context(), broker.Actor{Role: "engineer", Name: "alice"}, broker.NewGrant{Assets: []string{"data"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour)}))
	a, err = j.release(t, w.Broker, g, "data")
	wantRefused(t, a, err, "grant.approvals")

	// Consent stands for no approval, and approvals that one asset's policy asks for
	// stand for no consent to another.
	ww, p := withApprovers(t)
	ww.policy(t, "data", func(p *broker.Policy) { p.Approvals = nil })
	both := ww.requested(t, nil)
	ww.approve(t, p, ann, both.ID)
	if v := ww.approve(t, p, ben, both.ID); v.State != broker.StateRequested || len(v.Missing) != 1 || !strings.Contains(v.Missing[0], "consent of alice") {
		t.Errorf("%s, lacks %q", v.State, v.Missing)
	}
	for _, asset := range both.Assets {
		a, err = newJob(t, ww, nil).release(t, ww.Broker, both, asset)
		wantRefused(t, a, err, "grant.approvals")
	}
	must[broker.GrantView](t)(ww.ConsentGrant(t.Context(), alice, both.ID, nil))
	must[broker.Answer](t)(newJob(t, ww, nil).release(t, ww.Broker, both, "data"))
	g = ww.requested(t, nil)
	ww.approve(t, p, ann, g.ID)
	must[broker.GrantView](t)(ww.ConsentGrant(t.Context(), alice, g.ID, nil))
	a, err = newJob(t, ww, nil).release(t, ww.Broker, g, "weights")
	wantRefused(t, a, err, "grant.approvals")
}

func TestDeny(t *testing.T) {
	w, p := withApprovers(t)
	for name, tc := range map[string]struct {
		who    broker.Actor
		reason string
		want   string
	}{
		"an approver":                {who: ann, reason: "no"},
		"the owner":                  {who: alice, reason: "no"},
		"another owner":              {who: bob, reason: "no", want: "grant.owner"},
		"an approver of others":      {who: dan, reason: "no", want: "grant.owner"},
		"the requester, no approver": {who: erin, reason: "no", want: "role"},
	} {
		t.Run(name, func(t *testing.T) {
			g := w.requested(t, nil)
			w.approve(t, p, ben, g.ID)
			v, err := w.DenyGrant(t.Context(), tc.who, g.ID, tc.reason, w.decision(t, p, tc.who, g.ID, receipt.DecisionDeny, tc.reason))
			if tc.want != "" {
				if !refusedWith(err, tc.want) {
					t.Error(err)
				}
				return
			}
			if err != nil || v.State != broker.StateDenied || v.EndedBy != tc.who.String() || v.Reason != "no" {
				t.Errorf("%+v, %v", v, err)
			}
			doc := w.approval(t, cleo, g.ID, nil)
			if _, err := w.ApproveGrant(t.Context(), cleo, g.ID, doc, by("cleo")(t, p, doc)); !refusedWith(err, "grant.state") {
				t.Errorf("approved after it was denied: %v", err)
			}
			a, err := newJob(t, w, nil).release(t, w.Broker, g, "weights")
			wantRefused(t, a, err, "grant.denied", "grant.approvals")
		})
	}
	g := w.requested(t, nil)
	w.approve(t, p, ann, g.ID)
	w.approve(t, p, ben, g.ID)
	if _, err := w.DenyGrant(t.Context(), cleo, g.ID, "late", nil); !refusedWith(err, "grant.state") {
		t.Errorf("denied an active grant: %v", err)
	}
	if _, err := w.DenyGrant(t.Context(), cleo, g.ID, "", nil); !errors.Is(err, broker.ErrInvalid) {
		t.Error(err)
	}
}

func TestRequestGrant(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, bob, "bobs", broker.KindDataset)
	n := broker.NewGrant{Assets: []string{"weights"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), Principals: []string{"agent/node-1", "engineer/erin"}, Purpose: "a run", Key: "k1"}
	g := must[broker.Grant](t)(w.RequestGrant(t.Context(), erin, n))
	if g.MaxReleases != 1 || g.Owner != "alice" || g.Requester != "engineer/erin" || g.Consented {
		t.Errorf("%+v", g)
	}
	w.advance(time.Minute)
	if again := must[broker.Grant](t)(w.RequestGrant(t.Context(), erin, n)); again.ID != g.ID {
		t.Error("the same key made another grant")
	}
	if other := must[broker.Grant](t)(w.RequestGrant(t.Context(), broker.Actor{Role: "engineer", Name: "eve"}, n)); other.ID == g.ID {
		t.Error("another requester's key found this one's grant")
	}
	later := n
	later.NotBefore = w.clock().Add(time.Second)
	if _, err := w.RequestGrant(t.Context(), erin, later); !errors.Is(err, broker.ErrExists) {
		t.Errorf("the same key for a later time: %v", err)
	}
	n.MaxReleases = 5
	if _, err := w.RequestGrant(t.Context(), erin, n); !errors.Is(err, broker.ErrExists) {
		t.Errorf("the same key with other terms: %v", err)
	}
	w.policy(t, "weights", func(p *broker.Policy) { p.MaxReleases, p.MaxDurationSeconds = 2, 1800 })
	for name, tc := range map[string]struct {
		change func(*broker.NewGrant)
		want   string
	}{
		"assets of two owners":   {func(n *broker.NewGrant) { n.Assets = []string{"data", "bobs"} }, "grant.owner"},
		"too many releases":      {func(n *broker.NewGrant) { n.MaxReleases = 3 }, "grant.max-releases"},
		"too long":               {func(n *broker.NewGrant) { n.NotAfter = w.clock().Add(31 * time.Minute) }, "grant.duration"},
		"principal of no form":   {func(n *broker.NewGrant) { n.Principals = []string{"erin"} }, ""},
		"principal with a space": {func(n *broker.NewGrant) { n.Principals = []string{"engineer/er in"} }, ""},
		"a principal twice":      {func(n *broker.NewGrant) { n.Principals = []string{"engineer/erin", "engineer/erin"} }, ""},
		"long purpose":           {func(n *broker.NewGrant) { n.Purpose = strings.Repeat("x", broker.MaxPurpose+1) }, ""},
		"long key":               {func(n *broker.NewGrant) { n.Key = strings.Repeat("x", broker.MaxKey+1) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := broker.NewGrant{Assets: []string{"weights"}, Plan: w.plan, NotAfter: w.clock().Add(time.Minute)}
			tc.change(&n)
			_, err := w.RequestGrant(t.Context(), erin, n)
			if tc.want == "" && !errors.Is(err, broker.ErrInvalid) || tc.want != "" && !refusedWith(err, tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

func TestListGrants(t *testing.T) {
	w := newWorld(t, false)
	var ids []string
	for range 5 {
		ids = append(ids, w.grant(t, nil).ID)
	}
	mine := w.requested(t, func(n *broker.NewGrant) { n.Principals = []string{"agent/node-7"} })
	other := w.grant(t, func(n *broker.NewGrant) { n.Plan = plan.Sum([]byte("plan B")) })
	list := func(f broker.Listing) (got []string) {
		for {
			l, next, err := w.ListGrants(t.Context(), alice, f)
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range l {
				got = append(got, v.ID)
			}
			if next == 0 {
				return got
			}
			f.After = next
		}
	}
	for name, tc := range map[string]struct {
		f    broker.Listing
		want []string
	}{
		"all":                      {broker.Listing{}, append(slices.Clone(ids), mine.ID, other.ID)},
		"pages of two":             {broker.Listing{Size: 2}, append(slices.Clone(ids), mine.ID, other.ID)},
		"of a plan, in pages":      {broker.Listing{Plan: w.plan, Size: 4}, append(slices.Clone(ids), mine.ID)},
		"of a state":               {broker.Listing{State: broker.StateRequested, Size: 2}, []string{mine.ID}},
		"of a principal":           {broker.Listing{Principal: "agent/node-7"}, []string{mine.ID}},
		"of a principal nobody is": {broker.Listing{Principal: "agent/node"}, nil},
	} {
		if got := list(tc.f); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	l, _, err := w.ListGrants(t.Context(), erin, broker.Listing{Mine: true})
	if err != nil || len(l) != 1 || l[0].ID != mine.ID {
		t.Errorf("erin's own: %v, %v", l, err)
	}
	if l, _, err := w.ListGrants(t.Context(), erin, broker.Listing{Mine: true, Plan: other.Plan}); err != nil || len(l) > 0 {
		t.Errorf("erin's own of another's plan: %v, %v", l, err)
	}
	// Who has the same name in another role is another.
	if l, _, err := w.ListGrants(t.Context(), broker.Actor{Role: "scheduler", Name: erin.Name}, broker.Listing{Mine: true}); err != nil || len(l) > 0 {
		t.Errorf("of another role: %v, %v", l, err)
	}
	if _, _, err := w.ListGrants(t.Context(), node, broker.Listing{Mine: true}); !refusedWith(err, "role") {
		t.Errorf("an agent asks for none: %v", err)
	}
	for _, who := range []broker.Actor{erin, node} {
		if _, _, err := w.ListGrants(t.Context(), who, broker.Listing{}); !refusedWith(err, "role") {
			t.Errorf("%s lists everything: %v", who, err)
		}
		if _, _, err := w.ListGrants(t.Context(), who, broker.Listing{Plan: w.plan}); err != nil {
			t.Errorf("%s: %v", who, err)
		}
	}
	if _, _, err := w.ListGrants(t.Context(), alice, broker.Listing{Size: broker.MaxPage + 1}); !errors.Is(err, broker.ErrInvalid) {
		t.Error(err)
	}
}

func TestPrincipals(t *testing.T) {
	for name, tc := range map[string]struct {
		principals []string
		submitter  string
		agent      broker.Actor
		want       string
	}{
		"none":                         {nil, "", node, ""},
		"this agent":                   {[]string{"agent/node-1"}, "", node, ""},
		"this agent by its SPIFFE ID":  {[]string{"spiffe://coffer.local/agent/node-1"}, "", broker.Actor{Role: "agent", Name: "node-1", ID: "spiffe://coffer.local/agent/node-1"}, ""},
		"another agent":                {[]string{"agent/node-2"}, "", node, "grant.principal"},
		"another trust domain's":       {[]string{"spiffe://other/agent/node-1"}, "", broker.Actor{Role: "agent", Name: "node-1", ID: "spiffe://coffer.local/agent/node-1"}, "grant.principal"},
		"this submitter":               {[]string{"engineer/erin"}, "engineer/erin", node, ""},
		"another submitter":            {[]string{"engineer/erin"}, "engineer/eve", node, "grant.submitter"},
		"a submitter who is not told":  {[]string{"engineer/erin"}, "", node, "grant.submitter"},
		"both":                         {[]string{"agent/node-1", "engineer/erin"}, "engineer/erin", node, ""},
		"the agent, another submitter": {[]string{"agent/node-1", "engineer/erin"}, "engineer/eve", node, "grant.submitter"},
		"the submitter, another agent": {[]string{"agent/node-2", "engineer/erin"}, "engineer/erin", node, "grant.principal"},
		"a submitter of no form":       {nil, "er in", node, "release.submitter"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			g := w.grant(t, func(n *broker.NewGrant) { n.Principals = tc.principals })
			j := newJob(t, w, nil)
			r := j.request(g, "weights")
			r.Submitter = tc.submitter
			req, sig := sign(t, j.session, r)
			a, err := w.Release(t.Context(), tc.agent, broker.Ask{Result: j.token, Request: req, Signature: sig})
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantRefused(t, a, err, tc.want)
		})
	}
}

// anything is an Authorizer whose policies permit everything to everyone.
type anything struct{}

func (anything) Authorize(context.Context, broker.Access) error { return nil }

// TestRolesBoundEveryPolicy has policies that permit everything: what a role may
// ever do still bounds it, whatever the call is that asks for it.
func TestRolesBoundEveryPolicy(t *testing.T) {
	w := newWorld(t, false)
	w.cfg.Access = anything{}
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	req, sig := sign(t, j.session, j.request(g, "weights"))
	target := broker.Target{Kind: broker.RevokeAsset, Value: "weights"}
	for name, call := range map[string]func() error{
		"another owner revokes": func() error { _, _, err := w.RevokeTarget(t.Context(), bob, target, "x"); return err },
		"an owner revokes a node for all": func() error {
			r, _, err := w.RevokeTarget(t.Context(), bob, broker.Target{Kind: broker.RevokeNode, Value: "node-1"}, "x")
			if err == nil && r.Scope == "bob" {
				return broker.Unauthorized("", "") // for his own assets alone
			}
			return err
		},
		"an owner lifts": func() error { return w.LiftRevocation(t.Context(), alice, target, "x") },
		"an agent grants": func() error {
			_, err := w.CreateGrant(t.Context(), node, broker.NewGrant{Assets: []string{"data"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), MaxReleases: 1})
			return err
		},
		"an agent consents": func() error { _, err := w.ConsentGrant(t.Context(), node, g.ID, nil); return err },
		"an owner approves": func() error { _, err := w.ApproveGrant(t.Context(), alice, g.ID, nil, nil); return err },
		"a person gets a key": func() error {
			_, err := w.Release(t.Context(), alice, broker.Ask{Result: j.token, Request: req, Signature: sig})
			return err
		},
		"a person renews": func() error {
			_, err := w.Renew(t.Context(), broker.Actor{Role: broker.RoleUser, Name: "alice"}, []broker.Renewal{{JobID: "job-1", Challenge: make([]byte, receipt.ChallengeSize)}})
			return err
		},
		"nobody's role creates": func() error {
			_, err := w.CreateAsset(t.Context(), broker.Actor{Name: "x"}, broker.NewAsset{Name: "x", Kind: broker.KindCheckpoints})
			return err
		},
		"an unknown role grants": func() error {
			_, err := w.CreateGrant(t.Context(), broker.Actor{Role: "root", Name: "alice"}, broker.NewGrant{Assets: []string{"data"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), MaxReleases: 1})
			return err
		},
	} {
		err := call()
		var r *check.Refusal
		if !errors.As(err, &r) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
}

// slowKeys is a KeyStore that waits in Unwrap until it is let go.
type slowKeys struct {
	broker.KeyStore
	asked, let chan struct{}
}

func (k slowKeys) Unwrap(ctx context.Context, wrapped, associated []byte) (*broker.DataKey, error) {
	close(k.asked)
	<-k.let
	return k.KeyStore.Unwrap(ctx, wrapped, associated)
}

// TestPolicySetBetweenTheLooks has a release look at the old set of policies after
// the new one was logged, and wait for its key store until that is in force.
func TestPolicySetBetweenTheLooks(t *testing.T) {
	w, p := withApprovers(t)
	slow := slowKeys{w.cfg.Keys, make(chan struct{}), make(chan struct{})}
	w.cfg.Keys = slow
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	g := w.requested(t, nil)
	w.approve(t, p, ann, g.ID)
	w.approve(t, p, ben, g.ID)
	j := newJob(t, w, nil)
	type answer struct {
		a   broker.Answer
		err error
	}
	answers := make(chan answer, 1)
	if err := w.LogPolicySet(t.Context(), oscar, 1, plan.Sum([]byte("1")), func() error {
		go func() {
			a, err := j.release(t, w.Broker, g, "weights")
			answers <- answer{a, err}
		}()
		<-slow.asked
		delete(p.known, "ben")
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	close(slow.let)
	got := <-answers
	wantRefused(t, got.a, got.err, "grant.approvals")
}
