package bundletest

import (
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// resealPlan makes the documents those of a job that seals "weights" anew as
// "weights-2", without a container.
func (j *Job) resealPlan(export bool) error {
	none, err := plan.NoContainer().Digest()
	if err != nil {
		return err
	}
	j.plan = plan.Plan{
		Version: plan.Version, Name: "reseal", Inputs: []plan.Input{}, Reseal: &plan.Reseal{Asset: "weights", Digest: plan.Sum([]byte("weights")), Checkpoint: export, To: "weights-2"},
		Output: plan.Output{LogBytes: 1 << 20}, Resources: plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, Pids: 100, MaxSeconds: 60},
		Policy: j.plan.Policy, SandboxProfile: none,
	}
	if j.Parts[bundle.Plan], err = j.plan.Canonical(); err != nil {
		return err
	}
	j.Plan = plan.Sum(j.Parts[bundle.Plan])
	delete(j.Parts, bundle.ImageSignaturePart)
	delete(j.Parts, bundle.ImageSBOMPart)
	if j.Parts[bundle.Sandbox], err = plan.NoSandbox(j.ID).Canonical(); err != nil {
		return err
	}
	return j.json(bundle.AgentPart, bundle.Agent{Node: "node-1", Agent: "test", Containerd: "2.4.2", Submitter: "engineer/engineer"})
}

// reseal is the way of such a job from the release on.
func (j *Job) reseal() error {
	var tokens []string
	for i, asset := range []string{"weights", "weights-2"} {
		digest := j.plan.Reseal.Digest
		if asset == j.plan.Reseal.To || j.plan.Reseal.Checkpoint {
			digest = ""
		}
		token, err := j.Release(receipt.Release{
			Issuer: BrokerID, ID: fmt.Sprintf("release %d of %s", i, j.ID), IssuedAt: j.lab.Now.Unix() + 1, Grant: "grant-1", Attempt: 1, JobID: j.ID,
			Plan: j.Plan, Asset: asset, AssetDigest: digest, ResultID: j.result.ID, WrappedDigest: plan.Sum([]byte(asset)), NotAfter: j.lab.Now.Add(time.Hour).Unix(), Simulated: true,
		})
		if err != nil {
			return err
		}
		tokens = append(tokens, token)
	}
	if err := j.json(bundle.Releases, tokens); err != nil {
		return err
	}
	for name, v := range map[bundle.Part]any{bundle.HolderStatus: bundle.Status{Scrubbed: true}, bundle.Trace: []bundle.Event{}} {
		if err := j.json(name, v); err != nil {
			return err
		}
	}
	if err := j.log(); err != nil {
		return err
	}
	p, err := j.Resealed(nil, nil)
	if err != nil {
		return err
	}
	j.end(bundle.StageReseal, bundle.Outcome{State: bundle.Succeeded, Stage: bundle.StageReseal})
	return j.json(bundle.ResealPart, p)
}

// Resealed makes and logs what such a job sealed. The records are changed before
// they are signed.
func (j *Job) Resealed(file func(i int, r *receipt.ResealFile), record func(*receipt.ResealRecord)) (bundle.Reseal, error) {
	about := receipt.Resealing{JobID: j.ID, Plan: j.Plan, From: "weights", FromDigest: plan.Sum([]byte("weights")), To: "weights-2"}
	var p bundle.Reseal
	var records [][]byte
	root := func(c byte) string { return fmt.Sprintf("sha256:%064x", []byte{c}) }
	for i := range 2 {
		f := receipt.ResealFile{
			Version: receipt.ResealFileVersion, Resealing: about, SealedBy: j.ID, ID: fmt.Sprintf("%06d", i+1), FromRoot: root(byte(i)), ToRoot: root(byte(16 + i)), Bytes: 100,
		}
		if file != nil {
			file(i, &f)
		}
		b, err := f.Canonical()
		if err != nil {
			return p, err
		}
		s, err := j.sign(receipt.ResealLabel, b)
		if err != nil {
			return p, err
		}
		records, p.Files = append(records, b), append(p.Files, bundle.ResealedFile{Record: b, Signature: s})
	}
	r := receipt.ResealRecord{Version: receipt.ResealVersion, Resealing: about, Digest: plan.Sum([]byte("weights-2")), Files: 2, Bytes: 200, Records: receipt.ResealRecords(records)}
	if record != nil {
		record(&r)
	}
	var err error
	if p.Record, err = r.Canonical(); err != nil {
		return p, err
	}
	if p.Signature, err = j.sign(receipt.ResealLabel, p.Record); err != nil {
		return p, err
	}
	p.Receipt, err = j.CommitReseal(p.Record, nil)
	return p, err
}

// CommitReseal logs a record and signs the broker's word on it, changed before it
// is signed.
func (j *Job) CommitReseal(record []byte, change func(*receipt.Resealed)) (string, error) {
	r, err := receipt.ParseResealRecord(record)
	if err != nil {
		return "", err
	}
	w := receipt.Resealed{Issuer: BrokerID, IssuedAt: j.lab.Now.Unix(), JobID: r.JobID, Plan: r.Plan, Asset: r.To, Digest: r.Digest, Record: plan.Sum(record)}
	e, err := j.Logged(translog.Body{Kind: translog.KindReseal, Reseal: &translog.Reseal{Plan: r.Plan, From: r.From, FromDigest: r.FromDigest, Asset: r.To, Digest: r.Digest, Record: w.Record}})
	if err != nil {
		return "", err
	}
	w.LogIndex, w.LogHash = e.Index, e.Hash
	if change != nil {
		change(&w)
	}
	return j.lab.Broker.Sign(receipt.TypeResealed, w)
}
