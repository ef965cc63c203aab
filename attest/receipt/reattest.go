package receipt

import (
	"slices"
	"strings"
	"time"
)

// maxRefusedFor bounds the text of RefusedFor, in bytes.
const maxRefusedFor = 300

// RefusedFor names what keeps a result from affirming: the failed checks and the
// devices that are less than affirming. It is empty for a result that affirms.
// Signature and times are not looked at.
func RefusedFor(r Result) string {
	var out []string
	for _, c := range r.AllChecks().Failed() {
		out = append(out, c.ID)
	}
	for name, s := range r.Submods {
		if s.Status != Affirming {
			out = append(out, name+" "+string(s.Status))
		}
	}
	if len(r.Submods) == 0 {
		out = append(out, "no device")
	}
	slices.Sort(out)
	text := strings.Join(slices.Compact(out), ", ")
	if len(text) > maxRefusedFor {
		text = text[:maxRefusedFor] + "..."
	}
	return text
}

// RefusedReason is why a job stops whose newest result does not affirm, for Lease.
func RefusedReason(r Result) string { return "reattest-refused: " + RefusedFor(r) }

// LateReason is why a job stops whose newest result is older than maxAge seconds,
// for Lease.
func LateReason(issued, maxAge int64) string {
	return "reattest-late: no attestation result since " + time.Unix(issued, 0).UTC().Format(time.RFC3339) + ", and none may be older than " + (time.Duration(maxAge) * time.Second).String()
}
