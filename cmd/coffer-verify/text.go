package main

import (
	"bufio"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/printable"
)

const (
	green  = "\x1b[32m"
	red    = "\x1b[1;31m"
	yellow = "\x1b[33m"
	bold   = "\x1b[1m"
	plain  = "\x1b[0m"
)

// width is the column at which a line of text is broken.
const width = 100

type text struct {
	w     *bufio.Writer
	color bool
}

func writeText(w io.Writer, r verify.Report, simulation, color bool) error {
	t := &text{w: bufio.NewWriter(w), color: color}
	t.head(r, simulation)
	for _, g := range r.Groups {
		t.group(g)
	}
	if len(r.NotProven) > 0 {
		t.line("\n%s", t.paint(bold, "What this bundle does not prove"))
		for _, s := range r.NotProven {
			t.wrapped("  - ", "    ", s)
		}
	}
	pass, fail, notChecked := r.Count()
	t.line("\n%s, %s, %s", t.paint(green, fmt.Sprintf("%d passed", pass)), t.count(red, fail, "failed"), t.count(yellow, notChecked, "not checked"))
	color2 := green
	if r.Verdict != verify.Verified {
		color2 = red
	}
	t.wrapped(t.paint(color2, strings.ToUpper(string(r.Verdict)))+": ", "  ", r.Summary)
	return t.w.Flush()
}

func (t *text) head(r verify.Report, simulation bool) {
	if r.JobID != "" {
		t.field("job", clean(strings.TrimSpace(r.JobID+"  "+r.Name)))
		t.field("plan", clean(string(r.Plan)))
		t.field("outcome", clean(strings.TrimSpace(fmt.Sprintf("%s at %s  %s", r.Outcome.State, r.Outcome.Stage, r.Outcome.Reason))))
	}
	if !r.At.IsZero() {
		t.field("clock", r.At.Format(time.RFC3339))
	}
	switch {
	case simulation && r.Simulated:
		t.field("devices", t.paint(yellow, "simulated: they prove nothing about hardware"))
	case simulation:
		t.field("roots", t.paint(yellow, "a simulation's, by your choice"))
	default:
		t.field("roots", "the vendors'")
	}
}

func (t *text) field(name, value string) {
	t.line("%-9s %s", name, value)
}

func (t *text) group(g verify.Group) {
	if len(g.Checks) == 0 {
		return
	}
	t.line("\n%s", t.paint(bold, clean(g.Title)))
	ids := 0
	for _, c := range g.Checks {
		ids = max(ids, len(c.ID))
	}
	for _, c := range g.Checks {
		t.check(c, ids)
	}
}

func (t *text) check(c check.Check, ids int) {
	word, color := "FAIL", red
	switch c.Outcome {
	case check.Pass:
		word, color = "pass", green
	case check.NotChecked:
		word, color = "not checked", yellow
	case check.Fail:
	}
	indent := strings.Repeat(" ", 2+11+2+ids+2)
	first := fmt.Sprintf("  %s  %-*s  ", t.paint(color, fmt.Sprintf("%-11s", word)), ids, clean(c.ID))
	if word != "FAIL" {
		t.wrapped(first, indent, shorten(c.Found))
		return
	}
	t.wrapped(first, indent, "expected "+c.Expected)
	t.wrapped(indent, indent, "found    "+c.Found)
	if c.Hint != "" {
		t.wrapped(indent, indent, "hint     "+c.Hint)
	}
}

func (t *text) count(color string, n int, what string) string {
	s := fmt.Sprintf("%d %s", n, what)
	if n == 0 {
		return s
	}
	return t.paint(color, s)
}

func (t *text) paint(color, s string) string {
	if !t.color {
		return s
	}
	return color + s + plain
}

func (t *text) line(format string, args ...any) {
	// A failed write is reported by Flush.
	_, _ = fmt.Fprintf(t.w, format+"\n", args...)
}

// wrapped writes first and then s, broken at spaces, later lines indented.
func (t *text) wrapped(first, indent, s string) {
	at := first
	n := len(indent)
	empty := true
	for _, word := range strings.Fields(clean(s)) {
		if !empty && n+1+len(word) > width {
			t.line("%s", at)
			at, n, empty = indent, len(indent), true
		}
		if !empty {
			at += " "
			n++
		}
		at += word
		n += len(word)
		empty = false
	}
	t.line("%s", strings.TrimRight(at, " "))
}

var long = regexp.MustCompile(`\b[0-9a-f]{40,}\b`)

// shorten keeps the first digits of what has to be equal anyway.
func shorten(s string) string {
	return long.ReplaceAllStringFunc(s, func(d string) string { return d[:16] + "..." })
}

// clean makes a bundle's words, which are foreign, fit for one line.
func clean(s string) string { return printable.Line(s) }
