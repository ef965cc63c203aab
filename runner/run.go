// Package runner orders the stages of a job's way, and is the one place that
// knows their sequence. It holds no key and judges no evidence: the holder has
// the keys, the verifier judges, the broker releases.
//
// Trusted: the parts measured at the agent's start. Checked: every signed value
// that a stage hands on. Not checked: leases, which the holder checks, and what the
// broker says of grants before a release, which decides. Read run first; it is the table of
// docs/ARCHITECTURE.md in code.
package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/sandbox"
	"github.com/coffer-run/coffer/runner/source"
)

// run takes an admitted job from its sandbox to its end. Each stage takes as its
// argument what the stage before returns; the values that decide, a Verified and
// a Grant, only a checked signature can make.
func (a *Agent) run(ctx context.Context, j *Job) (err error) {
	box, err := stage(ctx, a, j, bundle.StageSandbox, a.create)
	if err != nil {
		return err
	}
	verified, err := a.attest(ctx, j, box)
	if err != nil {
		return err
	}
	grants, err := stage(ctx, a, j, bundle.StageRelease, func(ctx context.Context, j *Job) ([]receipt.Grant, string, error) {
		return a.release(ctx, j, box, verified)
	})
	if err != nil {
		return err
	}
	if j.plan.Reseal != nil {
		return a.reseal(ctx, j, box.holder)
	}
	filled, err := stage(ctx, a, j, bundle.StageDecrypt, func(ctx context.Context, j *Job) (opened, string, error) {
		return a.decrypt(ctx, j, box, grants)
	})
	if err != nil {
		return err
	}
	if err := a.together(ctx, j); err != nil {
		return err
	}
	started, err := stage(ctx, a, j, bundle.StageStart, func(ctx context.Context, j *Job) (running, string, error) {
		return a.start(ctx, j, filled)
	})
	if err != nil {
		return err
	}
	return a.watch(ctx, j, started)
}

// attest collects evidence and has it judged. A nonce is used once, so when the
// verifier goes away in between, the job collects anew.
func (a *Agent) attest(ctx context.Context, j *Job, box *created) (receipt.Verified, error) {
	for try := 1; ; try++ {
		ev, err := stage(ctx, a, j, bundle.StageCollect, func(ctx context.Context, j *Job) ([]byte, string, error) {
			return a.collect(ctx, j, box)
		})
		if err != nil {
			return receipt.Verified{}, err
		}
		v, err := stage(ctx, a, j, bundle.StageVerify, func(ctx context.Context, j *Job) (receipt.Verified, string, error) {
			return a.verify(ctx, j, ev)
		})
		var away *remote.Unavailable
		if !errors.As(err, &away) || try == attestTries || ctx.Err() != nil {
			return v, err
		}
		a.log.WarnContext(ctx, "attesting again", "job", j.id, "error", err)
		select {
		case <-ctx.Done():
			return v, err
		case <-time.After(time.Duration(try) * time.Second):
		}
	}
}

// attestTries bounds how often one job attests while the verifier comes and goes.
const attestTries = 5

// created is a sandbox that exists and has not started, with its holder. A job
// that reseals has no sandbox.
type created struct {
	sandbox *sandbox.Sandbox
	holder  *holder.Holder
}

// create is stage 3: Job -> container created, not started; holder running.
func (a *Agent) create(ctx context.Context, j *Job) (*created, string, error) {
	if err := a.beginGPUs(ctx, j); err != nil {
		return nil, "", err
	}
	if err := os.MkdirAll(j.runDir, 0o700); err != nil {
		return nil, "", fmt.Errorf("make run directory: %w", err)
	}
	cgroup, err := sandbox.CreateCgroup(sandbox.JobCgroup(a.Cgroup, j.id), j.plan.Resources)
	if err != nil {
		return nil, "", err
	}
	h, settle, err := a.startHolder(ctx, j, cgroup, holder.Config{
		Path: a.Holder, RunDir: j.runDir, JobID: j.id, UID: sandbox.UID, GID: sandbox.GID, LogBytes: j.plan.Output.LogBytes, LogRate: j.plan.Output.LogRate(), Metrics: j.plan.Output.Metrics,
		RegionBytes: regionBytes(j.plan.Resources), CPUMillis: j.plan.Resources.CPUMillis, NearNode: j.nearNode(), WatchOpen: a.Rules.Opens(), Join: cgroup.Add, Procs: cgroup.Procs,
	})
	if err != nil {
		return nil, "", err
	}
	j.holder = h
	if j.plan.Reseal != nil {
		return a.createReseal(ctx, j, h)
	}
	var binds []sandbox.Bind
	sealed, secrets := j.spec.Sealed(), 0
	for i, in := range j.plan.Inputs {
		if err := a.handInput(ctx, j.id, h, sealed[i].URI, in); err != nil {
			return nil, "", err
		}
		if in.Secret {
			secrets++
			continue
		}
		binds = append(binds, sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.InputsName, in.Name), Target: in.Mount})
	}
	if len(binds) > 0 {
		binds = append(binds, sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.RegionsDir), Target: sandbox.RegionsMount})
	}
	if err := settle(ctx); err != nil {
		return nil, "", err
	}
	if secrets > 0 {
		binds = append(binds, sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.InputsName, holdapi.SecretsName), Target: plan.SecretsMount})
	}
	if c := j.plan.Checkpoints; c != nil {
		dir, err := a.createSink(ctx, j)
		if err != nil {
			return nil, "", err
		}
		if err := h.Sink(ctx, holdapi.Sink{Asset: c.Asset, Plan: j.digest, MaxBytes: j.plan.Resources.MemoryBytes / 2}, dir); err != nil {
			return nil, "", fmt.Errorf("hand over checkpoint sink: %w", err)
		}
		binds = append(binds, sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.CheckpointsName), Target: c.Mount, Writable: true})
	}
	network, err := a.openEgress(ctx, j)
	if err != nil {
		return nil, "", err
	}
	box, err := a.createSandbox(ctx, sandbox.Request{
		JobID: j.id, Plan: j.plan, Image: j.image, ImageSignature: digestOfPart(j.signature), ImageSBOM: digestOfPart(j.sbom), GPUs: j.place.got, Env: j.env, Binds: binds, RunDir: j.runDir,
		TraceSocket: filepath.Join(j.runDir, holdapi.TraceName),
		Stdout:      filepath.Join(j.runDir, holdapi.StdoutName), Stderr: filepath.Join(j.runDir, holdapi.StderrName),
		Network: network,
	})
	if err != nil {
		return nil, "", err
	}
	box.ReadBinaries() // beside the job's attestation
	j.sandbox, j.record.Sandbox, j.record.ImageSignature, j.record.ImageSBOM = box, box.Description(), j.signature, j.sbom
	if err := a.Journal.Leave(ctx, j.id, string(bundle.StageSandbox), j.record); err != nil {
		return nil, "", err
	}
	return &created{sandbox: box, holder: h}, a.Node.Profile().Runtime, nil
}

// createTries bounds how often one job creates its sandbox while containerd comes
// and goes. Nothing has run, and what a try made is gone, when the next begins.
const createTries = 5

func (a *Agent) createSandbox(ctx context.Context, r sandbox.Request) (*sandbox.Sandbox, error) {
	away := false
	for try := 1; ; try++ {
		box, err := a.Node.Create(ctx, r)
		// What was cut off can be in the way of the next try for a moment.
		away = away || errdefs.IsUnavailable(err)
		if err == nil || !away || try == createTries || ctx.Err() != nil {
			return box, err
		}
		a.log.WarnContext(ctx, "creating the sandbox again", "job", r.JobID, "error", err)
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Duration(try) * 100 * time.Millisecond):
		}
	}
}

func (a *Agent) handInput(ctx context.Context, job string, h *holder.Holder, uri string, in plan.Input) error {
	dir, err := a.inputFolder(ctx, job, uri, in.Digest)
	if err != nil {
		return fmt.Errorf("input %s: %w", in.Name, err)
	}
	if err := h.Input(ctx, holdapi.Input{Name: in.Name, Asset: in.Asset, Digest: in.Digest, Secret: in.Secret}, dir); err != nil {
		return fmt.Errorf("hand over input %s: %w", in.Name, err)
	}
	return nil
}

// inputFolder is where an input lies, fetched from its object store if it has one.
func (a *Agent) inputFolder(ctx context.Context, job, uri string, digest plan.Digest) (string, error) {
	at, err := source.Parse(uri)
	if err != nil {
		return source.Folder(uri)
	}
	if a.Cache == nil {
		return "", fmt.Errorf("fetch %s: this node has no cache for object stores: its configuration has no sources", at)
	}
	return a.Cache.Hold(ctx, job, at, digest)
}

// collect is stage 4: the binding of plan, job, sandbox, nonce and keys -> evidence.
func (a *Agent) collect(ctx context.Context, j *Job, box *created) ([]byte, string, error) {
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
func (a *Agent) release(ctx context.Context, j *Job, box *created, v receipt.Verified) ([]receipt.Grant, string, error) {
	known, err := a.Broker.Grants(ctx, j.digest)
	if err != nil {
		return nil, "", err
	}
	var out []receipt.Grant
	for _, asset := range j.assets() {
		i := slices.IndexFunc(known, func(g *grantInfo) bool {
			return slices.Contains(g.GetAssets(), asset) && g.GetState() == grantActive && a.mayUse(g, j)
		})
		if i < 0 {
			i = slices.IndexFunc(known, func(g *grantInfo) bool { return slices.Contains(g.GetAssets(), asset) })
		}
		if i < 0 {
			var l check.List
			l.Fail("grant.missing", "a grant on asset "+asset+" for plan "+string(j.digest), "none",
				fmt.Sprintf("its owner may run: coffer grant create --plan %s --asset %s", j.digest, asset))
			return nil, "", check.Refuse("release", l)
		}
		g, err := a.Broker.Release(ctx, v, remote.Ask{Grant: known[i].GetId(), Asset: asset, Attempt: 1, Submitter: j.submitter, Plan: j.canonical}, box.holder.SignRelease)
		if err != nil {
			return nil, "", err
		}
		// The broker says which sealed object the key opens; the plan says which
		// one was approved. Checkpoints have none yet.
		if want := j.assetDigest(asset); g.Release().AssetDigest != want {
			var l check.List
			l.Fail("grant.asset-digest", string(want), string(g.Release().AssetDigest), "the asset "+asset+" is not the one in the plan")
			return nil, "", check.Refuse("release", l)
		}
		j.record.Releases = append(j.record.Releases, g.Token())
		// The last one has what is strictest of all.
		j.record.ResultSeconds, j.record.LeaseSeconds = g.Release().ResultSeconds, g.Release().LeaseSeconds
		// The log has it. An agent that comes after this one must know of it, whatever else
		// is still to come.
		if err := a.Journal.Keep(ctx, j.id, string(bundle.StageRelease), j.record); err != nil {
			return nil, "", err
		}
		info, err := receipt.WrapInfo(g.Release().Grant, j.digest, asset, v.Result().ID, g.Release().LeaseTerms())
		if err != nil {
			return nil, "", err
		}
		enc, ciphertext := g.Wrapped()
		if err := box.holder.Deliver(ctx, holdapi.Deliver{Asset: asset, Info: info, Enc: enc, Ciphertext: ciphertext, LeaseKeys: a.Broker.JWKS()}); err != nil {
			return nil, "", fmt.Errorf("deliver key of %s: %w", asset, err)
		}
		j.lease.hold()
		out = append(out, g)
	}
	a.noteApprovals(ctx, j, out)
	return out, fmt.Sprintf("%d keys, wrapped to the job", len(out)), a.Journal.Keep(ctx, j.id, string(bundle.StageRelease), j.record)
}

// opened is a sandbox whose inputs lie in memory, or will: who opens one waits.
type opened struct{ box *created }

// decrypt is stage 7: keys in the holder + ciphertext -> regions. Large inputs are
// still on their way there when it is over.
func (a *Agent) decrypt(ctx context.Context, j *Job, box *created, grants []receipt.Grant) (opened, string, error) {
	if len(grants) != len(j.assets()) {
		return opened{}, "", fmt.Errorf("decrypt: %d keys for %d assets", len(grants), len(j.assets()))
	}
	resumed, err := a.resume(ctx, j, box)
	if err != nil {
		return opened{}, "", err
	}
	if j.record.Resume != nil {
		if err := a.Journal.Keep(ctx, j.id, string(bundle.StageRelease), j.record); err != nil {
			return opened{}, "", err
		}
	}
	j.opening.Store(box.holder)
	d, err := box.holder.Decrypt(ctx)
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
	return opened{box}, detail, nil
}

// running is a container that started and whose trace says so.
type running struct{ box *created }

// startTimeout bounds how long the trace may be silent about a start.
const startTimeout = 20 * time.Second

// start is stage 8: the sandbox is compared with what was attested once more,
// the container starts, and the trace must show it.
func (a *Agent) start(ctx context.Context, j *Job, o opened) (running, string, error) {
	if err := o.box.sandbox.RecheckContent(ctx, j.image); err != nil {
		return running{}, "", err
	}
	if err := o.box.sandbox.Recheck(ctx, j.plan); err != nil {
		return running{}, "", err
	}
	if err := j.recheckEgress(); err != nil {
		return running{}, "", err
	}
	if err := o.box.sandbox.Start(ctx); err != nil {
		if st, herr := o.box.holder.Status(ctx); herr != nil || !st.Started {
			return running{}, "", err
		}
		a.log.WarnContext(ctx, "the container started, and its runtime says otherwise", "job", j.id, "error", err)
	}
	deadline := time.Now().Add(startTimeout)
	for {
		st, err := o.box.holder.Status(ctx)
		if err != nil {
			return running{}, "", fmt.Errorf("ask holder whether the trace has begun: %w", err)
		}
		if st.Started {
			break
		}
		if time.Now().After(deadline) {
			var l check.List
			l.Fail("start.trace", "container/start in the trace within "+startTimeout.String(), "silence", "the runtime does not know the trace points; pin its version")
			return running{}, "", check.Refuse("start", l)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return running(o), "", a.Journal.Leave(ctx, j.id, string(bundle.StageStart), j.record)
}
