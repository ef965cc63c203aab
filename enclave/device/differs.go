package device

import "fmt"

// Differs says how GPUs that a job uses stand otherwise than when it began: in driver,
// in mode, in being ready, in which they are, or in the critical errors they had. Empty is that they do not. Whether the
// difference is harmless is for evidence to show.
func Differs(began, now State) string {
	switch {
	case now.Mode != began.Mode:
		return fmt.Sprintf("gpu: confidential computing is %.40q, was %q", now.Mode, began.Mode)
	case now.Driver != began.Driver:
		return fmt.Sprintf("gpu: the driver is %.40q, was %.40q", now.Driver, began.Driver)
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
		if g.Faults != began.GPUs[i].Faults {
			return fmt.Sprintf("gpu: critical error (XID) %d of %.80s, %d so far", g.LastFault, g.UUID, g.Faults-began.GPUs[i].Faults)
		}
	}
	return ""
}
