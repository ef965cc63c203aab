package runner

import (
	"context"
	"errors"
	"testing"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/device"
)

// modeGPUs is a driver in a mode that a test sets.
type modeGPUs struct {
	GPUs
	mode device.Mode
	err  error
}

func (g *modeGPUs) State(_ context.Context, uuids []string) (device.State, error) {
	return device.State{Mode: g.mode, AttackerAdvantage: 50, GPUs: []device.GPU{{UUID: uuids[0], UnprotectedBytes: 1 << 40}}}, g.err
}
func (g *modeGPUs) Prepare(context.Context, []string, device.Settings) error { return nil }
func (g *modeGPUs) SetReady(context.Context, bool) error                     { return nil }
func (g *modeGPUs) Clear(context.Context, []string) error                    { return nil }

// What a job asks of confidential computing holds when it is taken, and when it gets
// its GPUs.
func TestConfidentialGPUs(t *testing.T) {
	for name, c := range map[string]struct {
		asks           string
		mode           device.Mode
		taken, started bool
	}{
		"on, and it is":             {plan.CCOn, device.On, true, true},
		"on, and it is off":         {plan.CCOn, device.Off, false, false},
		"on, and it is for testing": {plan.CCOn, "devtools", false, false},
		"required, and it is":       {plan.CCRequired, device.On, true, true},
		"required, and it is off":   {plan.CCRequired, device.Off, false, false},
		"nothing, and it is off":    {"", device.Off, true, true},
	} {
		gpus := &modeGPUs{mode: c.mode}
		a := &Agent{Deps: Deps{GPUs: gpus}, uuids: []string{"GPU-1"}, machine: device.New(gpus, []string{"GPU-1"}, device.Defaults)}
		j := newJob("j", "user/ada")
		j.plan.Resources = plan.Resources{GPUs: 1, CC: c.asks}
		j.place = &place{got: []string{"GPU-1"}}
		err := a.offersCC(t.Context(), j.plan)
		if (err == nil) != c.taken {
			t.Errorf("%s: taken: %v", name, err)
		}
		var refused *check.Refusal
		if err != nil && (!errors.As(err, &refused) || refused.Checks[0].ID != "gpu.cc") {
			t.Errorf("%s: %v", name, err)
		}
		if err := a.beginGPUs(t.Context(), j); (err == nil) != c.started {
			t.Errorf("%s: started: %v", name, err)
		}
	}
	a := &Agent{Deps: Deps{GPUs: &modeGPUs{mode: device.On, err: errors.New("no answer")}}, uuids: []string{"GPU-1"}}
	if err := a.offersCC(t.Context(), plan.Plan{Resources: plan.Resources{GPUs: 1, CC: plan.CCOn}}); err == nil {
		t.Error("a driver that does not answer is taken")
	}
}
