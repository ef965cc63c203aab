package verify

import (
	"fmt"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// drivers looks at what the driver said of the job's GPUs. Only the agent's word
// stands behind it: it can refute a record, and proves nothing.
func (v *verification) drivers(g *check.List, d *bundle.Devices) {
	if v.pl != nil && v.pl.Resources.CC == plan.CCRequired && (d == nil || d.Launch == nil) {
		v.strict(g, "devices.required", false, "the driver's word that confidential computing is on, as the plan requires", "the record has none")
	}
	if d == nil {
		return
	}
	if at := d.Launch; at != nil {
		ok := at.Ready && at.CCMode == "on"
		v.strict(g, "devices.launch", ok, "confidential computing on, and ready", fmt.Sprintf("the agent says: confidential computing %.40q, ready: %t, keys change at 2^%d", at.CCMode, at.Ready, at.AttackerAdvantage))
	}
	v.strict(g, "devices.cleared", d.Cleared && d.End != nil, "GPUs cleared after the job", said(d.Cleared && d.End != nil, "the agent says that the GPUs were cleared", "GPUs not cleared"))
}
