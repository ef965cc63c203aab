package runner

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/sandbox"
	"github.com/coffer-run/coffer/runner/source"
)

// create is stage 3: Job -> container created, not started; holder running.
func (a *Agent) create(ctx context.Context, j *Job) (created, string, error) {
	if err := a.beginGPUs(ctx, j); err != nil {
		return created{}, "", err
	}
	if err := os.MkdirAll(j.runDir, 0o700); err != nil {
		return created{}, "", fmt.Errorf("make run directory: %w", err)
	}
	cgroup, err := sandbox.CreateCgroup(sandbox.JobCgroup(a.Cgroup, j.id), j.plan.Resources)
	if err != nil {
		return created{}, "", err
	}
	h, settle, err := a.startHolder(ctx, j, cgroup, holder.Config{
		Path: a.Holder, RunDir: j.runDir, JobID: j.id, UID: sandbox.UID, GID: sandbox.GID, LogBytes: j.plan.Output.LogBytes, LogRate: j.plan.Output.LogRate(), Metrics: j.plan.Output.Metrics,
		RegionBytes: regionBytes(j.plan.Resources), CPUMillis: j.plan.Resources.CPUMillis, NearNode: j.nearNode(), WatchOpen: a.Rules.Opens(), Join: cgroup.Add, Procs: cgroup.Procs,
	})
	if err != nil {
		return created{}, "", err
	}
	j.holder = h
	if j.plan.Reseal != nil {
		return a.createReseal(ctx, j, h)
	}
	binds, err := a.handInputs(ctx, j, h)
	if err != nil {
		return created{}, "", err
	}
	if err := settle(ctx); err != nil {
		return created{}, "", err
	}
	if j.plan.Checkpoints != nil {
		sink, err := a.handSink(ctx, j, h)
		if err != nil {
			return created{}, "", err
		}
		binds = append(binds, sink)
	}
	network, err := a.openEgress(ctx, j)
	if err != nil {
		return created{}, "", err
	}
	box, err := a.createSandbox(ctx, sandbox.Request{
		JobID: j.id, Plan: j.plan, Image: j.image, ImageSignature: digestOfPart(j.signature), ImageSBOM: digestOfPart(j.sbom), GPUs: j.place.got, Env: j.env, Binds: binds, RunDir: j.runDir,
		TraceSocket: filepath.Join(j.runDir, holdapi.TraceName),
		Stdout:      filepath.Join(j.runDir, holdapi.StdoutName), Stderr: filepath.Join(j.runDir, holdapi.StderrName),
		Network: network,
	})
	if err != nil {
		return created{}, "", err
	}
	box.ReadBinaries() // beside the job's attestation
	j.sandbox, j.record.Sandbox, j.record.ImageSignature, j.record.ImageSBOM = box, box.Description(), j.signature, j.sbom
	if err := a.Journal.Leave(ctx, j.id, string(bundle.StageSandbox), j.record); err != nil {
		return created{}, "", err
	}
	return created{box, h}, a.Node.Profile().Runtime, nil
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

// handInputs hands the sealed inputs over, and returns where the container has them:
// a folder for each, all of them as regions, and all secrets in one place.
func (a *Agent) handInputs(ctx context.Context, j *Job, h *holder.Holder) ([]sandbox.Bind, error) {
	var binds []sandbox.Bind
	sealed, secrets := j.spec.Sealed(), false
	for i, in := range j.plan.Inputs {
		if err := a.handInput(ctx, j.id, h, sealed[i].URI, in); err != nil {
			return nil, err
		}
		if in.Secret {
			secrets = true
			continue
		}
		binds = append(binds, sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.InputsName, in.Name), Target: in.Mount})
	}
	if len(binds) > 0 {
		binds = append(binds, sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.RegionsDir), Target: sandbox.RegionsMount})
	}
	if secrets {
		binds = append(binds, sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.InputsName, holdapi.SecretsName), Target: plan.SecretsMount})
	}
	return binds, nil
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

// handSink hands over where checkpoints are sealed to, and returns where the container
// writes them.
func (a *Agent) handSink(ctx context.Context, j *Job, h *holder.Holder) (sandbox.Bind, error) {
	c := j.plan.Checkpoints
	dir, err := a.createSink(ctx, j)
	if err != nil {
		return sandbox.Bind{}, err
	}
	if err := h.Sink(ctx, holdapi.Sink{Asset: c.Asset, Plan: j.digest, MaxBytes: j.plan.Resources.MemoryBytes / 2}, dir); err != nil {
		return sandbox.Bind{}, fmt.Errorf("hand over checkpoint sink: %w", err)
	}
	return sandbox.Bind{Source: filepath.Join(j.runDir, holdapi.CheckpointsName), Target: c.Mount, Writable: true}, nil
}
