package runner

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/device"
)

// beginGPUs takes a job's GPUs, cleared and prepared, before its evidence is
// collected.
func (a *Agent) beginGPUs(ctx context.Context, j *Job) error {
	if j.plan.Resources.GPUs == 0 {
		return nil
	}
	use, err := a.machine.Begin(ctx, j.place.got)
	if err != nil {
		return err
	}
	j.gpus = use
	if j.plan.Resources.CC != "" && use.Path() != device.Staged {
		return refuseCC("not on")
	}
	return nil
}

// offersCC refuses a plan that asks for confidential computing of GPUs whose driver
// does not say that it is on.
func (a *Agent) offersCC(ctx context.Context, p plan.Plan) error {
	if p.Resources.CC == "" {
		return nil
	}
	st, err := a.GPUs.State(ctx, a.uuids)
	if err != nil {
		return fmt.Errorf("ask for the mode of the GPUs: %w", err)
	}
	if st.Mode != device.On {
		return refuseCC(string(st.Mode))
	}
	return nil
}

func refuseCC(found string) error {
	var l check.List
	l.Fail("gpu.cc", "confidential computing on, as resources.cc asks", fmt.Sprintf("the driver says %.40q", found), "submit it to a node whose GPUs are in confidential mode")
	return check.Refuse("admit", l)
}

// resumeGPUs takes the GPUs of a job that runs already.
func (a *Agent) resumeGPUs(ctx context.Context, j *Job) error {
	if j.plan.Resources.GPUs == 0 {
		return nil
	}
	v, err := a.Verifier.Recheck(j.record.Result, receipt.Expect{Audience: a.Broker.ID(), JobID: j.id, Plan: j.digest, AllowSimulated: true})
	if err != nil {
		return err
	}
	if j.gpus, err = a.machine.Resume(j.place.got); err != nil {
		return err
	}
	return a.readyGPUs(ctx, j, v)
}

// readyGPUs tells the driver that a job may use its GPUs.
func (a *Agent) readyGPUs(ctx context.Context, j *Job, v receipt.Verified) error {
	if j.gpus == nil {
		return nil
	}
	if err := j.gpus.Ready(ctx, v); err != nil {
		return err
	}
	if j.plan.Resources.CC != "" && j.gpus.Launch.Mode != device.On {
		return refuseCC(string(j.gpus.Launch.Mode))
	}
	return nil
}

// finishGPUs takes a job's GPUs back, after its container is gone.
func (a *Agent) finishGPUs(ctx context.Context, j *Job) {
	if j.gpus == nil {
		return
	}
	if err := j.gpus.Finish(ctx); err != nil {
		a.log.ErrorContext(ctx, "end of GPU use", slog.String("job", j.id), slog.Any("error", err))
	}
}

// nearNode is where a job's inputs should lie: 1 more than the number of a memory
// node, or 0.
func (j *Job) nearNode() int {
	if j.gpus == nil {
		return 0
	}
	return j.gpus.NearNode()
}

// devices is what the bundle says of a job's GPUs.
func (j *Job) devices() *bundle.Devices {
	if j.gpus == nil {
		return nil
	}
	return &bundle.Devices{Launch: deviceState(j.gpus.Launch), End: deviceState(j.gpus.End), Cleared: j.gpus.Cleared}
}

func deviceState(s *device.State) *bundle.DeviceState {
	if s == nil {
		return nil
	}
	out := &bundle.DeviceState{CCMode: string(s.Mode), Ready: s.Ready, AttackerAdvantage: s.AttackerAdvantage, GPUs: []bundle.DeviceUsage{}}
	for _, g := range s.GPUs {
		out.GPUs = append(out.GPUs, bundle.DeviceUsage{
			UUID: g.UUID, UsedBytes: g.UsedBytes, ProtectedBytes: g.ProtectedBytes, UnprotectedBytes: g.UnprotectedBytes, Processes: g.Processes,
		})
	}
	return out
}

// regionBytes is how much of a job's memory its inputs may lie in: the job's own
// programs need the rest. What is beyond it is decrypted when it is read.
func regionBytes(r plan.Resources) int64 { return r.MemoryBytes / 4 * 3 }
