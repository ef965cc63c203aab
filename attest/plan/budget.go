package plan

import "fmt"

// What a plan can ask of confidential computing on its GPUs.
const (
	// CCOn: the node gives the job no GPUs but those whose driver says that
	// confidential computing is on.
	CCOn = "on"
	// CCRequired is CCOn, and a record of the job that succeeded is false unless it
	// has the driver's word.
	CCRequired = "required"
)

// maxSeconds bounds budgets and retention: ten years.
const maxSeconds = 10 * 365 * 24 * 3600

// Budget is what all attempts of a job may use together. An attempt uses time from
// when the node gives it room until it ends; it is told to end when the budget is
// spent.
type Budget struct {
	// Seconds of time. 0 is no bound.
	Seconds int64 `json:"seconds,omitempty"`
	// GPUSeconds are seconds times GPUs. 0 is no bound.
	GPUSeconds int64 `json:"gpuSeconds,omitempty"`
}

// BudgetSeconds is for how many seconds the attempts of the plan may run together,
// and false if the plan does not bound it.
func (p Plan) BudgetSeconds() (int64, bool) {
	b := p.Budget
	switch {
	case b == nil:
		return 0, false
	case b.GPUSeconds == 0:
		return b.Seconds, true
	}
	s := b.GPUSeconds / int64(p.Resources.GPUs)
	if b.Seconds != 0 {
		s = min(s, b.Seconds)
	}
	return s, true
}

func (p Plan) validateBudget() error {
	switch cc := p.Resources.CC; {
	case cc != "" && cc != CCOn && cc != CCRequired:
		return fmt.Errorf("plan confidential computing %.40q: want %s or %s", cc, CCOn, CCRequired)
	case cc != "" && p.Resources.GPUs == 0:
		return fmt.Errorf("plan asks for confidential computing and for no GPUs")
	}
	b := p.Budget
	switch {
	case b == nil:
		return nil
	case b.Seconds < 0 || b.GPUSeconds < 0 || b.Seconds > maxSeconds || b.GPUSeconds > maxSeconds || b.Seconds == 0 && b.GPUSeconds == 0:
		return fmt.Errorf("plan budget of %d s and %d GPU seconds: want one of them, at most %d", b.Seconds, b.GPUSeconds, maxSeconds)
	case b.GPUSeconds > 0 && (p.Resources.GPUs == 0 || b.GPUSeconds < int64(p.Resources.GPUs)):
		return fmt.Errorf("plan budget of %d GPU seconds for %d GPUs: want GPUs, and a second for each", b.GPUSeconds, p.Resources.GPUs)
	}
	return nil
}
