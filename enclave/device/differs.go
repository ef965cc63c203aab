package device

import "fmt"

// Differs says how GPUs that a job uses stand otherwise than when it began: in mode,
// in being ready, or in which they are. Empty is that they do not. Whether the
// difference is harmless is for evidence to show.
func Differs(began, now State) string {
	switch {
	case now.Mode != began.Mode:
		return fmt.Sprintf("gpu: confidential computing is %.40q, was %q", now.Mode, began.Mode)
	case began.Ready && !now.Ready:
		return "gpu: not ready, as after a reset or a reload of the driver"
	case len(now.GPUs) != len(began.GPUs):
		return fmt.Sprintf("gpu: %d of the job's, there were %d", len(now.GPUs), len(began.GPUs))
	case now.AttackerAdvantage != began.AttackerAdvantage:
		return fmt.Sprintf("gpu: the driver changes keys at 2^%d, it did at 2^%d", now.AttackerAdvantage, began.AttackerAdvantage)
	}
	for i, g := range now.GPUs {
		if g.UUID != began.GPUs[i].UUID {
			return fmt.Sprintf("gpu: %.80q in the place of %q", g.UUID, began.GPUs[i].UUID)
		}
	}
	return ""
}
