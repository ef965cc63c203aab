// Package check names what was examined and how it came out, so that a refusal
// lists every failed check and nothing unexamined passes for examined.
package check

import (
	"fmt"
	"strings"
)

// Outcome is how one check came out. The zero value is not a pass.
type Outcome string

const (
	// Pass means that the check was made and held.
	Pass Outcome = "pass"
	// Fail means that the check was made and did not hold, or that what it
	// needs is missing.
	Fail Outcome = "fail"
	// NotChecked means that nobody made the check. A policy that needs it
	// treats it as Fail.
	NotChecked Outcome = "not checked"
)

// Check is one examined property of evidence, of a result or of a bundle.
type Check struct {
	// ID is stable, lower case and dotted: "snp.signature", "gpu0.nonce".
	ID      string  `json:"id"`
	Outcome Outcome `json:"outcome"`
	// Expected and Found are short and printable; never secret.
	Expected string `json:"expected,omitempty"`
	Found    string `json:"found,omitempty"`
	// Hint says what to do about a failure.
	Hint string `json:"hint,omitempty"`
}

// List collects checks in the order in which they were made.
type List []Check

// Pass records a check that held.
func (l *List) Pass(id, found string) {
	*l = append(*l, Check{ID: id, Outcome: Pass, Found: found})
}

// Fail records a check that did not hold.
func (l *List) Fail(id, expected, found, hint string) {
	*l = append(*l, Check{ID: id, Outcome: Fail, Expected: expected, Found: found, Hint: hint})
}

// Skip records a check that nobody made, and why.
func (l *List) Skip(id, why string) {
	*l = append(*l, Check{ID: id, Outcome: NotChecked, Found: why})
}

// Equal records whether found equals expected, both in printable form.
func (l *List) Equal(id, expected, found, hint string) bool {
	if expected != found {
		l.Fail(id, expected, found, hint)
		return false
	}
	l.Pass(id, found)
	return true
}

// Failed returns the checks that did not hold.
func (l List) Failed() List {
	var out List
	for _, c := range l {
		if c.Outcome != Pass && c.Outcome != NotChecked {
			out = append(out, c)
		}
	}
	return out
}

// Refusal is the error of every gate that says no. It is final: asking again
// with the same input gets the same answer.
type Refusal struct {
	// Stage is the gate: "verify", "release", "admit", ...
	Stage  string
	Checks List
}

// Refuse returns a Refusal at stage for the failed checks among checks. It
// refuses with a check of its own if none failed: a gate that says no says why.
func Refuse(stage string, checks List) *Refusal {
	failed := checks.Failed()
	if len(failed) == 0 {
		failed.Fail(stage+".refused", "a reason", "none given", "report this as a defect")
	}
	return &Refusal{Stage: stage, Checks: failed}
}

// Error lists every failed check in one sentence.
func (r *Refusal) Error() string {
	parts := make([]string, 0, len(r.Checks))
	for _, c := range r.Checks {
		p := c.ID
		switch {
		case c.Expected != "" && c.Found != "":
			p = fmt.Sprintf("%s: expected %s, found %s", c.ID, c.Expected, c.Found)
		case c.Found != "":
			p = fmt.Sprintf("%s: %s", c.ID, c.Found)
		case c.Expected != "":
			p = fmt.Sprintf("%s: expected %s", c.ID, c.Expected)
		}
		parts = append(parts, p)
	}
	return "refused at " + r.Stage + ": " + strings.Join(parts, "; ")
}
