// Package report writes one page about one job for people who were not there: what
// was checked, who allowed it, what left the machine, and what the record does not
// show.
//
// Trusted: the verification (attest/bundle/verify) that it is given. Checked:
// nothing; the page says what came of the checks. What it repeats of the record
// beyond that, such as who submitted the job, stands there as the record's word.
package report

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/printable"
	"github.com/coffer-run/coffer/attest/receipt"
)

//go:embed page.html
var pageHTML string

//go:embed page.css
var pageCSS string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"words": words, "bytes": humanBytes, "short": short, "badge": badge, "time": stamp,
	"cores": cores, "seconds": func(s int64) string { return plain(time.Duration(s) * time.Second) },
	"nanos": func(n int64) string { return plain(time.Duration(n).Round(time.Millisecond)) },
	"unix":  func(s int64) string { return stamp(time.Unix(s, 0)) },
	"nano":  func(n int64) string { return stamp(time.Unix(0, n)) },
}).Parse(pageHTML))

// view is what the page shows.
type view struct {
	Report verify.Report
	CSS    template.CSS
	Counts counts
	Ending string
	// Standing colours the verdict. A true record of a job that did not succeed is no
	// good news.
	Standing string
	Plan     *plan.Plan
	PlanJSON string
	// Budget is what the plan's attempts may use together, "" for no bound.
	Budget     string
	Agent      *bundle.Agent
	Way        []way
	WayHeight  int
	WayTotal   string
	Marks      []mark
	Again      *again
	Metrics    *bundle.Metrics
	People     []person
	Releases   []receipt.Release
	Egress     *bundle.Egress
	HasEgress  bool
	Points     []point
	Resumed    *receipt.CheckpointRecord
	Alerts     *bundle.Alerts
	Signer     string
	Materials  *materials
	Resealed   *receipt.ResealRecord
	Logs       *bundle.Logs
	Groups     []group
	Catalogues []Catalogue
	Parts      []part

	began, span int64 // of the picture
}

type counts struct{ Pass, Fail, NotChecked int }

// way is one stage as a bar of the picture, in the units of its view box.
type way struct {
	Stage           string
	Outcome         string
	Failed          bool
	Began, Took     string
	X, Y, Width     float64
	LabelX, LabelY  float64
	LabelAtTheStart bool
}

// person is one signature under a grant.
type person struct {
	Name, Did, Reason, Ticket, Assets, Grant string
	At, Until                                string
}

type point struct {
	receipt.CheckpointRecord

	Anchored bool
}

type group struct {
	verify.Group

	Standing string
	Pass     int
	Fail     int
	Not      int
}

type part struct {
	Name   string
	Digest plan.Digest
	Bytes  int
}

// Write writes the page about a bundle as a self-contained HTML document: no script,
// no font, no picture and no link that is fetched.
func Write(w io.Writer, r verify.Report, file []byte, frameworks []Framework) error {
	v := view{Report: r, CSS: template.CSS(pageCSS)} //nolint:gosec // it is this package's own file
	v.Counts.Pass, v.Counts.Fail, v.Counts.NotChecked = r.Count()
	v.Ending, v.Standing = ending(r), badge(r.Verdict)
	if r.Verdict == verify.Verified && r.Outcome.State != bundle.Succeeded {
		v.Standing = badge("")
	}
	for _, g := range r.Groups {
		v.Groups = append(v.Groups, standing(g))
	}
	for _, f := range frameworks {
		v.Catalogues = append(v.Catalogues, Judge(f, r))
	}
	v.timeline(r.Timeline)
	if b, err := bundle.Parse(file); err == nil {
		v.documents(b)
	}
	var out bytes.Buffer
	if err := page.Execute(&out, v); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	// What cannot be seen is an escape on the page, as everywhere else: the template has
	// nothing of the kind.
	_, err := io.WriteString(w, printable.Text(out.String()))
	return err
}

// documents repeats what the record says. A part that does not parse is left out
// here: the checks above it say so.
func (v *view) documents(b *bundle.Bundle) {
	for _, name := range bundle.Parts() {
		if p, ok := b.Parts[name]; ok {
			v.Parts = append(v.Parts, part{Name: string(name), Digest: plan.Sum(p), Bytes: len(p)})
		}
	}
	if p, err := plan.Parse(b.Parts[bundle.Plan]); err == nil {
		v.Plan = &p
		if s, bounded := p.BudgetSeconds(); bounded {
			v.Budget = plain(time.Duration(s) * time.Second)
		}
		var indented bytes.Buffer
		if json.Indent(&indented, b.Parts[bundle.Plan], "", "  ") == nil {
			v.PlanJSON = indented.String()
		}
	}
	if a, err := bundle.Decode[bundle.Agent](b.Parts[bundle.AgentPart]); err == nil {
		v.Agent = &a
	}
	if l, err := bundle.Decode[bundle.Logs](b.Parts[bundle.LogsDigest]); err == nil {
		v.Logs = &l
	}
	if p, ok := b.Parts[bundle.EgressPart]; ok {
		if e, err := bundle.Decode[bundle.Egress](p); err == nil {
			v.Egress = &e
		}
	}
	if a, err := bundle.Decode[bundle.Alerts](b.Parts[bundle.AlertsPart]); err == nil {
		v.Alerts = &a
	}
	if s, err := bundle.Decode[bundle.ImageSignature](b.Parts[bundle.ImageSignaturePart]); err == nil {
		v.Signer = s.Signer
	}
	if s, err := bundle.Decode[bundle.ImageSBOM](b.Parts[bundle.ImageSBOMPart]); err == nil {
		v.Materials = materialsOf(s, plan.Sum(b.Parts[bundle.ImageSBOMPart]))
	}
	if s, err := bundle.Decode[bundle.Status](b.Parts[bundle.HolderStatus]); err == nil {
		v.Metrics = s.Metrics
	}
	if r, err := bundle.Decode[bundle.Reattestations](b.Parts[bundle.ReattestPart]); err == nil {
		v.reattested(r)
	}
	if r, err := bundle.Decode[bundle.Resume](b.Parts[bundle.ResumePart]); err == nil {
		if rec, err := receipt.DecodeCheckpointRecord(r.Record); err == nil {
			v.Resumed = &rec
		}
	}
	if r, err := bundle.Decode[bundle.Reseal](b.Parts[bundle.ResealPart]); err == nil {
		if rec, err := bundle.Decode[receipt.ResealRecord](r.Record); err == nil {
			v.Resealed = &rec
		}
	}
	v.HasEgress = v.Plan != nil && len(v.Plan.Egress) > 0
	v.people(b.Parts[bundle.Approvals])
	if tokens, err := bundle.Decode[[]string](b.Parts[bundle.Releases]); err == nil {
		for _, t := range tokens {
			if r, ok := payload(t); ok {
				v.Releases = append(v.Releases, r)
			}
		}
	}
	if list, err := bundle.Decode[[]bundle.Checkpoint](b.Parts[bundle.Checkpoints]); err == nil {
		for _, c := range list {
			if r, err := receipt.DecodeCheckpointRecord(c.Record); err == nil {
				v.Points = append(v.Points, point{CheckpointRecord: r, Anchored: c.Anchor != ""})
			}
		}
	}
}

// payload reads a release receipt for display. Its signature was checked, or was
// not, by the verification.
func payload(token string) (receipt.Release, bool) {
	var r receipt.Release
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return r, false
	}
	b, err := decodeSegment(parts[1])
	if err != nil {
		return r, false
	}
	return r, json.Unmarshal(b, &r) == nil
}

func (v *view) people(b []byte) {
	list, err := bundle.Decode[[]bundle.Approved](b)
	if err != nil {
		return
	}
	for _, grant := range list {
		for _, s := range grant.Approvals {
			var a receipt.Approval
			if plan.Decode(s.Document, bundle.MaxPart, &a) != nil {
				continue
			}
			v.People = append(v.People, person{
				Name: a.Approver, Did: decision(a.Decision), Reason: a.Reason, Ticket: a.Ticket, Assets: strings.Join(a.Assets, ", "),
				Grant: a.Grant, At: stamp(time.Unix(a.Time, 0)), Until: stamp(time.Unix(a.Expires, 0)),
			})
		}
	}
}

func decision(s string) string {
	switch s {
	case receipt.DecisionApprove:
		return "approved"
	case receipt.DecisionConsent:
		return "consented, as the owner"
	case receipt.DecisionDeny:
		return "denied"
	default:
		return s
	}
}

func standing(g verify.Group) group {
	out := group{Group: g}
	for _, c := range g.Checks {
		switch c.Outcome {
		case check.Pass:
			out.Pass++
		case check.NotChecked:
			out.Not++
		case check.Fail:
			out.Fail++
		default:
			out.Fail++
		}
	}
	switch {
	case out.Fail > 0:
		out.Standing = string(check.Fail)
	case out.Pass > 0:
		out.Standing = string(check.Pass)
	default:
		out.Standing = string(check.NotChecked)
	}
	return out
}

// Sizes of the picture, in units of its view box.
const (
	barHeight, barGap, labelWidth, pictureWidth = 18.0, 8.0, 96.0, 720.0
)

// timeline places one bar a stage, on one scale from the first stage's begin to the
// last one's end.
func (v *view) timeline(steps []bundle.Step) {
	if len(steps) == 0 {
		return
	}
	first, last := steps[0].StartUnixNano, steps[0].StartUnixNano
	for _, s := range steps {
		first, last = min(first, s.StartUnixNano), max(last, s.StartUnixNano+s.Nanos)
	}
	v.began, v.span = first, max(last-first, 1)
	span := float64(v.span)
	for i, s := range steps {
		b := way{
			Stage: string(s.Stage), Outcome: s.Outcome, Failed: s.Outcome != bundle.StepDone,
			Began: "+" + duration(s.StartUnixNano-first), Took: duration(s.Nanos),
			X: v.at(s.StartUnixNano), Y: float64(i) * (barHeight + barGap),
			Width: max(float64(s.Nanos)/span*(pictureWidth-labelWidth), 2),
		}
		b.X = min(b.X, pictureWidth-b.Width)
		b.LabelX, b.LabelY = b.X+b.Width+4, b.Y+barHeight*0.72
		// Near the right edge the time stands left of its bar.
		if b.LabelX > pictureWidth-70 {
			b.LabelX, b.LabelAtTheStart = b.X-4, true
		}
		v.Way = append(v.Way, b)
	}
	v.WayHeight = int(float64(len(steps)) * (barHeight + barGap))
	v.WayTotal = duration(last - first)
}

// at is where in the picture a time is.
func (v *view) at(unixNano int64) float64 {
	return labelWidth + float64(unixNano-v.began)/float64(max(v.span, 1))*(pictureWidth-labelWidth)
}

func ending(r verify.Report) string {
	o := r.Outcome
	switch o.State {
	case bundle.Succeeded:
		return "The job ran to its end and succeeded."
	case bundle.Failed:
		return fmt.Sprintf("The job failed in stage %s (%s, exit code %d).", o.Stage, o.Reason, o.ExitCode)
	case bundle.Refused:
		return fmt.Sprintf("The job was refused in stage %s (%s). No key was used after that.", o.Stage, o.Reason)
	case bundle.Cancelled:
		return fmt.Sprintf("The job was cancelled in stage %s.", o.Stage)
	default:
		return "How the job ended is not known."
	}
}

func duration(nanos int64) string {
	d := time.Duration(nanos)
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(10 * time.Millisecond).String()
	default:
		return d.Round(time.Second).String()
	}
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// cores says how much of a CPU a plan takes.
func cores(millis int64) string {
	if millis == 1000 {
		return "1 core"
	}
	return strconv.FormatFloat(float64(millis)/1000, 'f', -1, 64) + " cores"
}

// plain writes a time without the units that are zero: "30m" and not "30m0s".
func plain(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func humanBytes(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n), 0
	for f >= unit && i < 5 {
		f, i = f/unit, i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, " KMGTP"[i])
}

// short is the beginning of a digest; the whole stands one click away.
func short(d any) string {
	s := fmt.Sprint(d)
	name, hex, ok := strings.Cut(s, ":")
	if !ok || len(hex) <= 16 {
		return s
	}
	return name + ":" + hex[:16] + "…"
}

// badge is the class of a standing's colour.
func badge(s any) string {
	switch fmt.Sprint(s) {
	case string(check.Pass), string(verify.Verified), bundle.StepDone:
		return "pass"
	case string(check.Fail):
		return "fail"
	default:
		return "open"
	}
}
