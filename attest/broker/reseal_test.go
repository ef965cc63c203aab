package broker_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// resealPlan is a plan that seals source, an asset of newWorld's, anew as to.
func resealPlan(t testing.TB, source, to string) []byte {
	t.Helper()
	none := must[plan.Digest](t)(plan.NoContainer().Digest())
	p := plan.Plan{
		Version: plan.Version, Name: "reseal", Inputs: []plan.Input{}, Policy: plan.Policy{Name: "production", Digest: plan.Sum([]byte("policy"))}, SandboxProfile: none,
		Output: plan.Output{LogBytes: 1}, Resources: plan.Resources{CPUMillis: 1000, MemoryBytes: 64 << 20, Pids: 16, MaxSeconds: 60},
		Reseal: &plan.Reseal{Asset: source, Digest: plan.Sum([]byte(source)), To: to},
	}
	return must[[]byte](t)(p.Canonical())
}

// resealJob is a job of that plan with a grant and the plan's bytes.
type resealJob struct {
	*job
	plan  []byte
	grant broker.Grant
}

// openAsset registers an asset that a job is to seal.
func (w *world) openAsset(t testing.TB, owner broker.Actor, name string, kind broker.Kind) broker.Asset {
	t.Helper()
	return must[broker.Asset](t)(w.CreateAsset(t.Context(), owner, broker.NewAsset{Name: name, Kind: kind}))
}

func (w *world) resealJob(t testing.TB, name, source, to string) resealJob {
	t.Helper()
	return w.resealJobOf(t, name, resealPlan(t, source, to))
}

// resealJobOf is a job of the plan that doc is.
func (w *world) resealJobOf(t testing.TB, name string, doc []byte) resealJob {
	t.Helper()
	p := must[plan.Plan](t)(plan.Parse(doc))
	g := w.grant(t, func(n *broker.NewGrant) {
		n.Assets, n.Plan, n.MaxReleases = []string{p.Reseal.Asset, p.Reseal.To}, plan.Sum(doc), 9
	})
	return resealJob{newJob(t, w, func(r *receipt.Result) { r.JobID, r.PlanDigest = name, plan.Sum(doc) }), doc, g}
}

func (j resealJob) ask(t testing.TB, b *broker.Broker, asset string, document []byte) (broker.Answer, error) {
	t.Helper()
	req, sig := sign(t, j.session, j.request(j.grant, asset))
	return b.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: document})
}

// keys releases both keys to the job and returns them, the source's first.
func (j resealJob) keys(t testing.TB, w *world, source, to string) (from, into []byte) {
	t.Helper()
	var out [][]byte
	for _, asset := range []string{source, to} {
		a := must[broker.Answer](t)(j.ask(t, w.Broker, asset, j.plan))
		out = append(out, must[[]byte](t)(j.open(a, j.grant, asset)))
	}
	return out[0], out[1]
}

// sealed is a record of the job's, signed by key.
func (j resealJob) sealed(t testing.TB, key *ecdsa.PrivateKey, change func(*receipt.ResealRecord)) (record, signature []byte) {
	t.Helper()
	p := must[plan.Plan](t)(plan.Parse(j.plan))
	r := receipt.ResealRecord{
		Version:   receipt.ResealVersion,
		Resealing: receipt.Resealing{JobID: j.result.JobID, Plan: j.result.PlanDigest, From: p.Reseal.Asset, FromDigest: p.Reseal.Digest, To: p.Reseal.To},
		Digest:    plan.Sum([]byte("sealed anew")), Files: 1, Bytes: 10, Records: plan.Sum([]byte("records")),
	}
	if change != nil {
		change(&r)
	}
	record = must[[]byte](t)(r.Canonical())
	sum := sha256.Sum256(append([]byte(receipt.ResealLabel+"\x00"), record...))
	return record, must[[]byte](t)(ecdsa.SignASN1(rand.Reader, key, sum[:]))
}

func TestCommitReseal(t *testing.T) {
	w := newWorld(t, false)
	before := w.openAsset(t, alice, "weights-2", broker.KindWeights)
	j := w.resealJob(t, "job-r", "weights", "weights-2")
	_, key := j.keys(t, w, "weights", "weights-2")
	record, signature := j.sealed(t, j.session, nil)
	commit := func() (string, error) {
		return w.CommitReseal(t.Context(), node, "job-r", j.plan, record, signature)
	}
	token := must[string](t)(commit())
	r := must[receipt.ResealRecord](t)(receipt.ParseResealRecord(record))
	word := must[receipt.Resealed](t)(receipt.VerifyResealed(w.brokerKeys, token, record, r))
	a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "weights-2"))
	if a.Digest != r.Digest || bytes.Equal(a.Wrapped, before.Wrapped) {
		t.Errorf("the asset has digest %s after the commit, or its old wrapped key", a.Digest)
	}
	bodies := must[[]translog.Body](t)(translog.VerifyJob(brokerID, "job-r", must[[]translog.Entry](t)(w.Entries(t.Context(), node, "job-r"))))
	if last := bodies[len(bodies)-1]; last.Kind != translog.KindReseal || last.Index != word.LogIndex || last.Reseal.Digest != r.Digest || last.Reseal.Record != plan.Sum(record) || last.Reseal.From != "weights" {
		t.Errorf("the log says %+v", last)
	}
	w.advance(time.Minute)
	if again, err := commit(); err != nil {
		t.Errorf("asked again: %v", err)
	} else if second := must[receipt.Resealed](t)(receipt.VerifyResealed(w.brokerKeys, again, record, r)); second.LogIndex != word.LogIndex || second.IssuedAt != word.IssuedAt {
		t.Errorf("asked again, the broker says %+v after %+v", second, word)
	}
	// Under the digest it is the same key, for jobs that name it.
	g := w.grant(t, func(n *broker.NewGrant) { n.Assets = []string{"weights-2"} })
	user := newJob(t, w, func(r *receipt.Result) { r.JobID = "job-u" })
	got := must[[]byte](t)(user.open(must[broker.Answer](t)(user.release(t, w.Broker, g, "weights-2")), g, "weights-2"))
	if !bytes.Equal(got, key) {
		t.Error("the key changed with the digest")
	}
	// The digest is set: no plan seals under the key again, and no other record is taken.
	late := w.resealJob(t, "job-late", "data", "weights-2")
	_, err := late.ask(t, w.Broker, "weights-2", late.plan)
	wantRefused(t, broker.Answer{}, err, "asset.sealed")
	other, osig := j.sealed(t, j.session, func(r *receipt.ResealRecord) { r.Digest = plan.Sum([]byte("another")) })
	if _, err := w.CommitReseal(t.Context(), node, "job-r", j.plan, other, osig); !refusedWith(err, "reseal.digest") {
		t.Errorf("a second digest: %v", err)
	}
	must[translog.Head](t)(w.CheckLog(t.Context()))
}

// An export seals one checkpoint anew, as weights or a data set of the same owner.
func TestCommitExport(t *testing.T) {
	w := newWorld(t, false)
	checkpoint := plan.Sum([]byte("a checkpoint"))
	export := func(t *testing.T, name, source, to string, change func(*plan.Reseal)) resealJob {
		p := must[plan.Plan](t)(plan.Parse(resealPlan(t, source, to)))
		p.Reseal.Digest, p.Reseal.Checkpoint = checkpoint, true
		if change != nil {
			change(p.Reseal)
		}
		doc := must[[]byte](t)(p.Canonical())
		g := w.grant(t, func(n *broker.NewGrant) { n.Assets, n.Plan, n.MaxReleases = []string{source, to}, plan.Sum(doc), 9 })
		return resealJob{newJob(t, w, func(r *receipt.Result) { r.JobID, r.PlanDigest = name, plan.Sum(doc) }), doc, g}
	}
	commit := func(t *testing.T, j resealJob, source, to string) error {
		j.keys(t, w, source, to)
		record, signature := j.sealed(t, j.session, nil)
		_, err := w.CommitReseal(t.Context(), node, j.result.JobID, j.plan, record, signature)
		return err
	}
	w.asset(t, alice, "ckpt", broker.KindCheckpoints)
	w.openAsset(t, alice, "exported", broker.KindWeights)
	j := export(t, "job-e", "ckpt", "exported", nil)
	if err := commit(t, j, "ckpt", "exported"); err != nil {
		t.Errorf("an export: %v", err)
	}
	if a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "exported")); a.Digest != plan.Sum([]byte("sealed anew")) {
		t.Errorf("the new asset has digest %q", a.Digest)
	}
	w.openAsset(t, alice, "exported-2", broker.KindWeights)
	if err := commit(t, export(t, "job-w", "weights", "exported-2", nil), "weights", "exported-2"); !refusedWith(err, "reseal.source") {
		t.Errorf("weights as a checkpoint: %v", err)
	}
	if err := commit(t, export(t, "job-c", "ckpt", "exported-2", func(r *plan.Reseal) { r.Checkpoint = false }), "ckpt", "exported-2"); err == nil || !strings.Contains(err.Error(), "reseal.source: ") {
		t.Errorf("checkpoints without saying so: %v", err)
	}
}

// The key of an open asset is for the plan that seals it, and for no other.
func TestOpenAssetIsReleasedToItsResealing(t *testing.T) {
	w := newWorld(t, false)
	w.openAsset(t, alice, "weights-2", broker.KindWeights)
	j := w.resealJob(t, "job-r", "weights", "weights-2")
	a, err := j.ask(t, w.Broker, "weights-2", nil)
	wantRefused(t, a, err, "asset.open")
	// A plan that reseals to another asset, though a grant names this one.
	w.openAsset(t, alice, "weights-3", broker.KindWeights)
	doc := resealPlan(t, "weights", "weights-3")
	g := w.grant(t, func(n *broker.NewGrant) { n.Assets, n.Plan = []string{"weights-2"}, plan.Sum(doc) })
	k := resealJob{newJob(t, w, func(r *receipt.Result) { r.JobID, r.PlanDigest = "job-k", plan.Sum(doc) }), doc, g}
	a, err = k.ask(t, w.Broker, "weights-2", doc)
	wantRefused(t, a, err, "asset.open")
	if _, err := j.ask(t, w.Broker, "weights-2", j.plan); err != nil {
		t.Errorf("to its re-sealing: %v", err)
	}
}

func TestCreateOpenAsset(t *testing.T) {
	w := newWorld(t, false)
	enc, ct := w.wrap(t, "weights-2", make([]byte, broker.DataKeySize))
	for name, n := range map[string]broker.NewAsset{
		"with a key and no digest":          {Name: "weights-2", Kind: broker.KindWeights, Enc: enc, Ciphertext: ct},
		"with a digest and no key":          {Name: "weights-2", Kind: broker.KindWeights, Digest: plan.Sum(nil)},
		"with half a key":                   {Name: "weights-2", Kind: broker.KindWeights, Enc: enc},
		"of no kind, with neither of these": {Name: "weights-2"},
	} {
		if _, err := w.CreateAsset(t.Context(), alice, n); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestNoKeyOfAnotherOwner: a plan may name whose asset it likes to seal to, and that
// owner may grant it.
func TestNoKeyOfAnotherOwner(t *testing.T) {
	w := newWorld(t, false)
	w.openAsset(t, bob, "bobs", broker.KindWeights)
	for _, source := range []string{"weights", "nobodys"} {
		doc := resealPlan(t, source, "bobs")
		g := must[broker.Grant](t)(w.CreateGrant(t.Context(), bob, broker.NewGrant{Assets: []string{"bobs"}, Plan: plan.Sum(doc), NotAfter: w.clock().Add(time.Hour), MaxReleases: 1}))
		j := resealJob{newJob(t, w, func(r *receipt.Result) { r.PlanDigest = plan.Sum(doc) }), doc, g}
		a, err := j.ask(t, w.Broker, "bobs", doc)
		wantRefused(t, a, err, map[string]string{"weights": "reseal.owner", "nobodys": "reseal.from"}[source])
	}
}

// Each refusal of a commit alone: all else holds.
func TestCommitResealRefuses(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, bob, "theirs", broker.KindWeights)
	for _, name := range []string{"weights-2", "weights-3"} {
		w.openAsset(t, alice, name, broker.KindWeights)
	}
	w.openAsset(t, alice, "data-2", broker.KindDataset)
	w.openAsset(t, alice, "bobs", broker.KindWeights)
	w.openAsset(t, alice, "told", broker.KindWeights)
	j := w.resealJob(t, "job-r", "weights", "weights-2")
	j.keys(t, w, "weights", "weights-2")
	another := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))

	// Of these jobs each has the keys, and one thing about its assets is wrong.
	kind := w.resealJob(t, "job-kind", "weights", "data-2")
	kind.keys(t, w, "weights", "data-2")
	half := w.resealJob(t, "job-half", "weights", "weights-3")
	must[broker.Answer](t)(half.ask(t, w.Broker, "weights-3", half.plan))
	told := w.resealJob(t, "job-told", "weights", "told")
	told.keys(t, w, "weights", "told")
	// People approved a plan that names other bytes under the source's name.
	bytesOf := must[plan.Plan](t)(plan.Parse(resealPlan(t, "weights", "weights-3")))
	bytesOf.Reseal.Digest = plan.Sum([]byte("other bytes"))
	source := w.resealJobOf(t, "job-source", must[[]byte](t)(bytesOf.Canonical()))
	source.keys(t, w, "weights", "weights-3")
	ended := w.resealJob(t, "job-ended", "weights", "weights-3")
	ended.keys(t, w, "weights", "weights-3")
	if err := w.ReportStopped(t.Context(), node, "job-ended", broker.Stopped{Gone: w.clock()}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.RevokeTarget(t.Context(), alice, broker.Target{Kind: broker.RevokeAsset, Value: "told"}, "why not"); err != nil {
		t.Fatal(err)
	}
	// An asset that has another owner by now, which only the database can say.
	owners := w.resealJob(t, "job-owner", "weights", "bobs")
	owners.keys(t, w, "weights", "bobs")
	db := must[*sql.DB](t)(sql.Open("sqlite", w.path))
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), `UPDATE assets SET owner = 'bob' WHERE name = 'bobs'`); err != nil {
		t.Fatal(err)
	}

	for name, tc := range map[string]struct {
		j      resealJob
		agent  broker.Actor
		plan   []byte
		change func(*receipt.ResealRecord)
		key    *ecdsa.PrivateKey
		want   []string
	}{
		"by another agent":         {j: j, agent: stranger, want: []string{"reseal.lease"}},
		"by an engineer":           {j: j, agent: erin, want: []string{"role"}},
		"after the job's end":      {j: ended, want: []string{"reseal.lease"}},
		"by a job that must stop":  {j: told, want: []string{"reseal.stopped"}},
		"signed by another key":    {j: j, key: another, want: []string{"reseal.session-key"}},
		"under another plan":       {j: j, plan: kind.plan, change: func(r *receipt.ResealRecord) { r.To = "data-2" }, want: []string{"reseal.plan", "reseal.asset"}},
		"record of another job":    {j: j, change: func(r *receipt.ResealRecord) { r.JobID = "job-x" }, want: []string{"reseal.job"}},
		"record of another plan":   {j: j, change: func(r *receipt.ResealRecord) { r.Plan = plan.Sum(nil) }, want: []string{"reseal.record-plan"}},
		"record of another source": {j: j, change: func(r *receipt.ResealRecord) { r.From = "data" }, want: []string{"reseal.from"}},
		"record of another digest": {j: j, change: func(r *receipt.ResealRecord) { r.FromDigest = plan.Sum(nil) }, want: []string{"reseal.from-digest"}},
		"record of another target": {j: j, change: func(r *receipt.ResealRecord) { r.To = "weights-3" }, want: []string{"reseal.to"}},
		"without the source's key": {j: half, want: []string{"reseal.asset"}},
		"source of other bytes":    {j: source, want: []string{"reseal.source"}},
		"assets of two owners":     {j: owners, want: []string{"reseal.owner"}},
		"assets of two kinds":      {j: kind, want: []string{"reseal.kind"}},
	} {
		agent, doc, key := tc.agent, tc.plan, tc.key
		if agent.Role == "" {
			agent = node
		}
		if doc == nil {
			doc = tc.j.plan
		}
		if key == nil {
			key = tc.j.session
		}
		record, signature := tc.j.sealed(t, key, tc.change)
		token, err := w.CommitReseal(t.Context(), agent, tc.j.result.JobID, doc, record, signature)
		if !refusedWith(err, tc.want...) || token != "" {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	for _, name := range []string{"weights-2", "weights-3", "data-2", "told"} {
		if a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, name)); a.Digest != "" {
			t.Errorf("%s has a digest after refusals", name)
		}
	}
	record, signature := j.sealed(t, j.session, nil)
	for name, tc := range map[string]struct {
		job          string
		plan, record []byte
	}{
		"no plan":               {"job-r", nil, record},
		"no record":             {"job-r", j.plan, nil},
		"a record that is long": {"job-r", j.plan, make([]byte, receipt.MaxResealRecord+1)},
		"no job":                {"../r", j.plan, record},
	} {
		if _, err := w.CommitReseal(t.Context(), node, tc.job, tc.plan, tc.record, signature); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := w.CommitReseal(t.Context(), node, "job-r", j.plan, record, signature); err != nil {
		t.Errorf("after all refusals, the true record: %v", err)
	}
}

// A pass of rewrapping between the two looks must not be undone.
func TestCommitResealMeetsRewrap(t *testing.T) {
	w := newWorld(t, false)
	w.openAsset(t, alice, "weights-2", broker.KindWeights)
	j := w.resealJob(t, "job-r", "weights", "weights-2")
	j.keys(t, w, "weights", "weights-2")
	record, signature := j.sealed(t, j.session, nil)
	cfg := w.cfg
	cfg.Keys = meddling{cfg.Keys, func() {
		if err := w.store.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
			a, err := tx.Asset(ctx, "weights-2")
			if err != nil {
				return err
			}
			a.Wrapped = append(slices.Clone(a.Wrapped), 0)
			return tx.SetAssetKey(ctx, a)
		}); err != nil {
			t.Error(err)
		}
	}}
	b := must[*broker.Broker](t)(broker.New(cfg))
	if _, err := b.CommitReseal(t.Context(), node, "job-r", j.plan, record, signature); !errors.Is(err, broker.ErrUnavailable) {
		t.Errorf("the key was wrapped anew meanwhile: %v", err)
	}
	if a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "weights-2")); a.Digest != "" {
		t.Error("the digest was set over another key")
	}
}

// meddling calls then once a key was wrapped.
type meddling struct {
	broker.KeyStore
	then func()
}

func (m meddling) Wrap(ctx context.Context, key *broker.DataKey, ad []byte) ([]byte, error) {
	out, err := m.KeyStore.Wrap(ctx, key, ad)
	m.then()
	return out, err
}
