package report

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
)

// MaxControls bounds a file of controls, in bytes.
const MaxControls = 256 << 10

//go:embed controls/*.yaml
var shipped embed.FS

// Framework is a catalogue of controls, or the part of it that a job's evidence can
// speak to.
type Framework struct {
	Name string `yaml:"name"`
	// Source is where the catalogue is published.
	Source string `yaml:"source"`
	// Note says what no job's evidence can show.
	Note     string    `yaml:"note"`
	Controls []Control `yaml:"controls"`
}

// Control is one control and the checks that speak to it.
type Control struct {
	ID string `yaml:"id"`
	// Title is what the control asks for, in our words.
	Title string `yaml:"title"`
	// Shows is what the checks show of it, and what they leave open.
	Shows string `yaml:"shows"`
	// Checks are ids of checks, "snp.signature", or "snp.*" for all that begin so.
	// All of them must have been made and have held.
	Checks []string `yaml:"checks"`
}

// Standing is how a control stands for one job. The zero value is not a pass.
type Standing string

// The standings. A control that nothing speaks to, or that a check speaks to which
// was not made, is not covered.
const (
	Met        Standing = "pass"
	NotMet     Standing = "fail"
	NotCovered Standing = "not covered"
)

// Judged is a control with its standing and the checks behind it.
type Judged struct {
	Control

	Standing Standing
	Checks   check.List
	// Missing are the entries of Control.Checks that no passed check stands for.
	Missing []string
}

// Catalogue is a framework, judged.
type Catalogue struct {
	Framework

	Judged []Judged
	// Met, NotMet and NotCovered count.
	Met, NotMet, NotCovered int
}

// Shipped returns the frameworks that come with coffer.
func Shipped() ([]Framework, error) {
	names, err := fs.Glob(shipped, "controls/*.yaml")
	if err != nil {
		return nil, err
	}
	var out []Framework
	for _, name := range names {
		b, err := shipped.ReadFile(name)
		if err != nil {
			return nil, err
		}
		f, err := ParseControls(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path.Base(name), err)
		}
		out = append(out, f)
	}
	return out, nil
}

// ParseControls reads a framework from YAML.
func ParseControls(b []byte) (Framework, error) {
	if len(b) > MaxControls {
		return Framework{}, fmt.Errorf("controls: %d bytes, at most %d are allowed", len(b), MaxControls)
	}
	var f Framework
	if err := yaml.NewDecoder(bytes.NewReader(b), yaml.Strict()).Decode(&f); err != nil {
		return Framework{}, fmt.Errorf("controls: %w", err)
	}
	if f.Name == "" || len(f.Controls) == 0 {
		return Framework{}, errors.New("controls: want a name and at least one control")
	}
	seen := map[string]bool{}
	for i, c := range f.Controls {
		switch {
		case c.ID == "" || c.Title == "" || c.Shows == "":
			return Framework{}, fmt.Errorf("controls: control %d, %.40q: want id, title and shows", i+1, c.ID)
		case seen[c.ID]:
			return Framework{}, fmt.Errorf("controls: %.40q is there twice", c.ID)
		}
		seen[c.ID] = true
		for _, id := range c.Checks {
			if strings.TrimSuffix(id, ".*") == "" || strings.Contains(strings.TrimSuffix(id, ".*"), "*") {
				return Framework{}, fmt.Errorf("controls: %s: %.60q: want the id of a check, or its beginning and .*", c.ID, id)
			}
		}
	}
	return f, nil
}

// Judge holds a framework against a report. A report whose verdict is not verified
// meets no control: what a record says that is not true, or of which nobody can
// tell, is no evidence.
func Judge(f Framework, r verify.Report) Catalogue {
	out := Catalogue{Framework: f}
	all := r.Checks()
	for _, c := range f.Controls {
		j := Judged{Control: c, Standing: Met}
		for _, want := range c.Checks {
			found := matching(all, want)
			j.Checks = append(j.Checks, found...)
			if !slices.ContainsFunc(found, func(c check.Check) bool { return c.Outcome == check.Pass }) ||
				slices.ContainsFunc(found, func(c check.Check) bool { return c.Outcome != check.Pass }) {
				j.Missing = append(j.Missing, want)
			}
		}
		switch {
		case len(j.Checks.Failed()) > 0 || r.Verdict == verify.Failed:
			j.Standing = NotMet
		case len(c.Checks) == 0 || len(j.Missing) > 0 || r.Verdict != verify.Verified:
			j.Standing = NotCovered
		}
		switch j.Standing {
		case Met:
			out.Met++
		case NotMet:
			out.NotMet++
		case NotCovered:
			out.NotCovered++
		}
		out.Judged = append(out.Judged, j)
	}
	return out
}

func matching(all check.List, want string) check.List {
	prefix, many := strings.CutSuffix(want, "*")
	var out check.List
	for _, c := range all {
		if c.ID == want || many && strings.HasPrefix(c.ID, prefix) {
			out = append(out, c)
		}
	}
	return out
}
