// Package runner orders the stages of a job's way, and is the one place that
// knows their sequence. It holds no key and judges no evidence: the holder has
// the keys, the verifier judges, the broker releases.
//
// Trusted: the parts measured at the agent's start. Checked: every signed value
// that a stage hands on. Not checked: leases, which the holder checks, and what the
// broker says of grants before a release, which decides.
//
// Read this file first: it is the table of docs/ARCHITECTURE.md in code. Around it:
// agent.go has the agent, and launch, which gives a job its goroutine and concludes it
// however it ended; job.go has the job; takeup.go what an agent does with the jobs of one
// that died.
package runner

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// What the stages return, each what the next takes. Only the named stage makes one, or
// adopt, of a job that had come that far.
type (
	// created is a sandbox that exists and has not started, with its holder. A job
	// that reseals has no sandbox.
	created struct {
		sandbox *sandbox.Sandbox
		holder  *holder.Holder
	}
	// attested is one that the verifier accepted.
	attested struct {
		created
		verified receipt.Verified
	}
	// released is one whose holder has the keys, one grant for each asset of the plan.
	released struct {
		created
		grants []receipt.Grant
	}
	// opened is one whose inputs lie in memory, or will: who opens one waits.
	opened struct{ created }
	// running is a container that started and whose trace says so.
	running struct{ created }
)

// begin takes a job that was admitted (stages 1 and 2: Submit) to its end. A job that
// an earlier agent left before any key was released begins here again.
func (a *Agent) begin(ctx context.Context, j *Job) error {
	if err := a.waits(ctx, j); err != nil {
		return err
	}
	if err := a.keepSpent(j, time.Now()); err != nil {
		return err
	}
	return j.spending(ctx, func(ctx context.Context) error { return a.run(ctx, j) })
}

// run takes a job that has its approvals and its room from its sandbox to its end:
// stages 3 to 9. Each stage takes what the one before returns; the values that decide,
// a Verified and a Grant, only a checked signature can make. Stage 10, the record, comes
// after it however it ends: conclude.
func (a *Agent) run(ctx context.Context, j *Job) error {
	box, err := stage(ctx, a, j, bundle.StageSandbox, a.create)
	if err != nil {
		return errors.Join(err, room(j.runDir))
	}
	accepted, err := a.attest(ctx, j, box)
	if err != nil {
		return err
	}
	keyed, err := stage(ctx, a, j, bundle.StageRelease, with(accepted, a.release))
	if err != nil {
		return err
	}
	if j.plan.Reseal != nil {
		return a.reseal(ctx, j, keyed.holder)
	}
	filled, err := stage(ctx, a, j, bundle.StageDecrypt, with(keyed, a.decrypt))
	if err != nil {
		return err
	}
	if err := a.together(ctx, j); err != nil {
		return err
	}
	started, err := stage(ctx, a, j, bundle.StageStart, with(filled, a.start))
	if err != nil {
		return err
	}
	return a.watch(ctx, j, started)
}

// attest is stages 4 and 5, again where the verifier goes away in between: a nonce is
// used once.
func (a *Agent) attest(ctx context.Context, j *Job, box created) (attested, error) {
	for try := 1; ; try++ {
		ev, err := stage(ctx, a, j, bundle.StageCollect, with(box, a.collect))
		if err != nil {
			return attested{}, err
		}
		v, err := stage(ctx, a, j, bundle.StageVerify, with(ev, a.verify))
		if err == nil {
			return attested{box, v}, nil
		}
		var away *remote.Unavailable
		if !errors.As(err, &away) || try == attestTries || ctx.Err() != nil {
			return attested{}, err
		}
		a.log.WarnContext(ctx, "attesting again", "job", j.id, "error", err)
		select {
		case <-ctx.Done():
			return attested{}, err
		case <-time.After(time.Duration(try) * time.Second):
		}
	}
}

// attestTries bounds how often one job attests while the verifier comes and goes.
const attestTries = 5

// collect is stage 4: the binding of plan, job, sandbox, nonce and keys -> evidence.
func (a *Agent) collect(ctx context.Context, j *Job, box created) ([]byte, string, error) {
	env, err := a.gatherEvidence(ctx, j, box.holder)
	if err != nil {
		return nil, "", err
	}
	b, err := plan.Canonical(env)
	if err != nil {
		return nil, "", fmt.Errorf("encode evidence: %w", err)
	}
	j.record.Evidence = b
	detail := fmt.Sprintf("%d bytes", len(b))
	for _, f := range env.Failures {
		detail += fmt.Sprintf("; %s failed: %s", f.Source, f.Message)
	}
	return b, detail, a.Journal.Leave(ctx, j.id, string(bundle.StageCollect), j.record)
}

// verify is stage 5: evidence -> signed result -> receipt.Verified.
func (a *Agent) verify(ctx context.Context, j *Job, env []byte) (receipt.Verified, string, error) {
	v, token, err := a.Verifier.Appraise(ctx, env, receipt.Expect{
		Audience: a.Broker.ID(), JobID: j.id, Plan: j.digest,
		// Whether simulated evidence is good enough is for the plan's policy,
		// which the verifier applied, and for the grant, which the broker applies.
		AllowSimulated: true,
	})
	// A refusal is signed too and belongs into the bundle.
	j.record.Result = token
	if err != nil {
		return receipt.Verified{}, "", err
	}
	a.attestedBy(v)
	if err := a.readyGPUs(ctx, j, v); err != nil {
		return receipt.Verified{}, "", err
	}
	detail := "affirming under policy " + v.Result().Policy.Name
	if v.Result().Simulated {
		detail += ", simulated"
	}
	return v, detail, a.Journal.Leave(ctx, j.id, string(bundle.StageVerify), j.record)
}

// release is stage 6: receipt.Verified + grants -> receipt.Grant per asset; the
// wrapped keys go to the holder, which alone can open them.
func (a *Agent) release(ctx context.Context, j *Job, in attested) (released, string, error) {
	known, err := a.Broker.Grants(ctx, j.digest)
	if err != nil {
		return released{}, "", err
	}
	grants, err := a.grantsFor(j, known)
	if err != nil {
		return released{}, "", err
	}
	out := released{created: in.created}
	for i, asset := range j.assets() {
		g, err := a.releaseOne(ctx, j, in, asset, grants[i])
		if err != nil {
			return released{}, "", err
		}
		out.grants = append(out.grants, g)
	}
	a.noteApprovals(ctx, j, out.grants)
	return out, fmt.Sprintf("%d keys, wrapped to the job", len(out.grants)), a.Journal.Keep(ctx, j.id, string(bundle.StageRelease), j.record)
}

// releaseOne asks for the key of one asset and hands it to the holder, still wrapped.
func (a *Agent) releaseOne(ctx context.Context, j *Job, in attested, asset, grant string) (receipt.Grant, error) {
	g, err := a.Broker.Release(ctx, in.verified, remote.Ask{Grant: grant, Asset: asset, Attempt: 1, Submitter: j.submitter, Plan: j.canonical}, in.holder.SignRelease)
	if err != nil {
		return receipt.Grant{}, err
	}
	// The broker says which sealed object the key opens; the plan says which
	// one was approved. Checkpoints have none yet.
	if want := j.assetDigest(asset); g.Release().AssetDigest != want {
		var l check.List
		l.Fail("grant.asset-digest", string(want), string(g.Release().AssetDigest), "the asset "+asset+" is not the one in the plan")
		return receipt.Grant{}, check.Refuse("release", l)
	}
	j.record.Releases = append(j.record.Releases, g.Token())
	// The last one has what is strictest of all.
	j.record.ResultSeconds, j.record.LeaseSeconds = g.Release().ResultSeconds, g.Release().LeaseSeconds
	// The log has it. An agent that comes after this one must know of it, whatever else
	// is still to come.
	if err := a.Journal.Keep(ctx, j.id, string(bundle.StageRelease), j.record); err != nil {
		return receipt.Grant{}, err
	}
	info, err := receipt.WrapInfo(g.Release().Grant, j.digest, asset, in.verified.Result().ID, g.Release().LeaseTerms())
	if err != nil {
		return receipt.Grant{}, err
	}
	enc, ciphertext := g.Wrapped()
	if err := in.holder.Deliver(ctx, holdapi.Deliver{Asset: asset, Info: info, Enc: enc, Ciphertext: ciphertext, LeaseKeys: a.Broker.JWKS()}); err != nil {
		return receipt.Grant{}, fmt.Errorf("deliver key of %s: %w", asset, err)
	}
	j.lease.hold()
	return g, nil
}

// decrypt is stage 7: keys in the holder + ciphertext -> regions. Large inputs are
// still on their way there when it is over.
func (a *Agent) decrypt(ctx context.Context, j *Job, in released) (opened, string, error) {
	if len(in.grants) != len(j.assets()) {
		return opened{}, "", fmt.Errorf("decrypt: %d keys for %d assets", len(in.grants), len(j.assets()))
	}
	resumed, err := a.resume(ctx, j, in.holder)
	if err != nil {
		return opened{}, "", err
	}
	if j.record.Resume != nil {
		if err := a.Journal.Keep(ctx, j.id, string(bundle.StageRelease), j.record); err != nil {
			return opened{}, "", err
		}
	}
	j.opening.Store(in.holder)
	d, err := in.holder.Decrypt(ctx)
	if err != nil {
		return opened{}, "", fmt.Errorf("decrypt inputs: %w", err)
	}
	detail := fmt.Sprintf("%d files, %.1f MB", d.Files, float64(d.Bytes)/1e6)
	if d.Opening {
		detail += ", opened while the container starts"
	} else {
		detail += fmt.Sprintf(" at %.2f GB/s", float64(d.Bytes)/float64(max(d.Nanos, 1)))
	}
	if resumed != "" {
		detail += "; resumed " + resumed
	}
	return opened{in.created}, detail, nil
}

// startTimeout bounds how long the trace may be silent about a start.
const startTimeout = 20 * time.Second

// start is stage 8: the sandbox is compared with what was attested once more,
// the container starts, and the trace must show it.
func (a *Agent) start(ctx context.Context, j *Job, in opened) (running, string, error) {
	if err := in.sandbox.RecheckContent(ctx, j.image); err != nil {
		return running{}, "", err
	}
	if err := in.sandbox.Recheck(ctx, j.plan); err != nil {
		return running{}, "", err
	}
	if err := j.recheckEgress(); err != nil {
		return running{}, "", err
	}
	if err := in.sandbox.Start(ctx); err != nil {
		if st, herr := in.holder.Status(ctx); herr != nil || !st.Started {
			return running{}, "", err
		}
		a.log.WarnContext(ctx, "the container started, and its runtime says otherwise", "job", j.id, "error", err)
	}
	if err := traced(ctx, in.holder); err != nil {
		return running{}, "", err
	}
	return running(in), "", a.Journal.Leave(ctx, j.id, string(bundle.StageStart), j.record)
}

// traced waits until the trace has shown the container's start. A runtime that does not
// know the trace points says nothing, and runs the job unseen.
func traced(ctx context.Context, h *holder.Holder) error {
	deadline := time.Now().Add(startTimeout)
	for {
		st, err := h.Status(ctx)
		if err != nil {
			return fmt.Errorf("ask holder whether the trace has begun: %w", err)
		}
		if st.Started {
			return nil
		}
		if time.Now().After(deadline) {
			var l check.List
			l.Fail("start.trace", "container/start in the trace within "+startTimeout.String(), "silence", "the runtime does not know the trace points; pin its version")
			return check.Refuse("start", l)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
