// Package rules says what in a job's trace deserves attention, by rules that are
// data: record it, alert somebody, or stop the job.
//
// Trusted: the rules, whose digest is part of every plan, and the trace, which the
// job's holder receives from the sandbox. Checked: every event against every rule.
// Not checked: what the trace does not show. A rule sees what gVisor reports, and a
// job that wants to be quiet has other ways; rules find mistakes and clumsy theft,
// the sandbox and the sealing stand against the rest.
package rules

import (
	_ "embed"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// Version is the only version of rule files there is.
const Version = "coffer.run/rules/v1"

// MaxSize bounds a rule file, in bytes, and MaxRules its rules.
const MaxSize, MaxRules = 64 << 10, 100

// Default is the set that ships: what no training job should do.
//
//go:embed default.yaml
var Default []byte

// Kind is what happened.
type Kind string

// The kinds of events that rules look at.
const (
	// Exec is a program that starts: Path, Digest, Process.
	Exec Kind = "exec"
	// OperatorExec is a program that somebody put into the sandbox from outside.
	OperatorExec Kind = "operator-exec"
	// Open is a file that is opened: Path, Process.
	Open Kind = "open"
	// Connect is a socket that is connected: Address, Process.
	Connect Kind = "connect"
	// Ptrace is one process looking into another.
	Ptrace Kind = "ptrace"
	// Sent is what left by the gateway: Address and Bytes.
	Sent Kind = "sent"
	// Output is what the job printed: Bytes.
	Output Kind = "output"
	// OutputCut is output beyond the plan's bounds, MetricsCut numbers beyond them: Bytes
	// is how much, or how many, were cut so far. Both come when it begins and each time
	// it has doubled.
	OutputCut  Kind = "output-cut"
	MetricsCut Kind = "metrics-cut"
	// EgressCut is a destination that got no more of the job, because what the plan allows
	// to be sent to it, or altogether, is used up: Address.
	EgressCut Kind = "egress-cut"
	// TraceLost is the end of the trace before the end of the job.
	TraceLost Kind = "trace-lost"
)

var kinds = []Kind{Exec, OperatorExec, Open, Connect, Ptrace, Sent, Output, OutputCut, MetricsCut, EgressCut, TraceLost}

// Action is what a rule asks for. They are ordered: later is stronger.
type Action string

// The actions. Record puts the event into the job's record, Alert tells people,
// Stop ends the job as well.
const (
	Record Action = "record"
	Alert  Action = "alert"
	Stop   Action = "stop"
)

var actions = []Action{Record, Alert, Stop}

// Severity is OCSF's, in words.
type Severity string

var severities = []Severity{"informational", "low", "medium", "high", "critical"}

// Set is a rule file, read and checked.
type Set struct {
	rules  []rule
	digest plan.Digest
}

// Rule is one rule of a file.
type Rule struct {
	// ID names the rule in alerts: lower-case letters, digits, '-'.
	ID string `yaml:"id"`
	// Says is one sentence for people who get the alert.
	Says string `yaml:"says"`
	When Kind   `yaml:"when"`
	// Match narrows the events; absent, every one of the kind matches.
	Match    Match    `yaml:"match,omitempty"`
	Action   Action   `yaml:"action"`
	Severity Severity `yaml:"severity"`
}

// Match is conditions that must all hold.
type Match struct {
	// NotInImage holds for a program whose digest no file of the image has, and for
	// one without a digest.
	NotInImage bool `yaml:"notInImage,omitempty"`
	// Paths are patterns of whole paths: * stands for anything but '/', a trailing
	// /** for everything below.
	Paths []string `yaml:"paths,omitempty"`
	// NotPaths except what Paths would match.
	NotPaths []string `yaml:"notPaths,omitempty"`
	// NotAllowed holds for an address that is neither this host's, a unix socket,
	// nor the job's way out.
	NotAllowed bool `yaml:"notAllowed,omitempty"`
	// BytesOver holds once more than so many bytes came within Window.
	BytesOver int64    `yaml:"bytesOver,omitempty"`
	Window    Duration `yaml:"window,omitempty"`
}

// Duration is a Go duration in a rule file.
type Duration time.Duration

// UnmarshalText reads "10s".
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%.40q is not a duration such as 10s", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes a Go duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

type rule struct {
	Rule

	paths, notPaths []*regexp.Regexp
}

type file struct {
	Version string `yaml:"version"`
	Rules   []Rule `yaml:"rules"`
}

var idForm = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// Parse reads a rule file. Unknown fields, names used twice and conditions that fit
// no event of the rule's kind are errors: a rule that can never match is a mistake.
func Parse(b []byte) (*Set, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("rules: %d bytes, at most %d are allowed", len(b), MaxSize)
	}
	var f file
	if err := yaml.UnmarshalWithOptions(b, &f, yaml.Strict()); err != nil {
		return nil, fmt.Errorf("rules: %w", err)
	}
	if f.Version != Version {
		return nil, fmt.Errorf("rules: version %.40q: want %s", f.Version, Version)
	}
	if len(f.Rules) == 0 || len(f.Rules) > MaxRules {
		return nil, fmt.Errorf("rules: %d rules: want 1 to %d", len(f.Rules), MaxRules)
	}
	s := &Set{digest: plan.Sum(b)}
	seen := map[string]bool{}
	for i, r := range f.Rules {
		compiled, err := compile(r)
		if err == nil && seen[r.ID] {
			err = fmt.Errorf("the id is used twice")
		}
		if err != nil {
			return nil, fmt.Errorf("rules: rule %d, %.60q: %w", i+1, r.ID, err)
		}
		seen[r.ID] = true
		s.rules = append(s.rules, compiled)
	}
	return s, nil
}

func compile(r Rule) (rule, error) {
	c := rule{Rule: r}
	m := r.Match
	switch {
	case !idForm.MatchString(r.ID):
		return c, fmt.Errorf("id: want lower-case letters, digits and '-'")
	case strings.TrimSpace(r.Says) == "":
		return c, fmt.Errorf("says: want a sentence for whoever gets the alert")
	case !slices.Contains(kinds, r.When):
		return c, fmt.Errorf("when: %.40q is not one of %v", r.When, kinds)
	case !slices.Contains(actions, r.Action):
		return c, fmt.Errorf("action: %.40q is not one of %v", r.Action, actions)
	case !slices.Contains(severities, r.Severity):
		return c, fmt.Errorf("severity: %.40q is not one of %v", r.Severity, severities)
	case m.NotInImage && r.When != Exec:
		return c, fmt.Errorf("match.notInImage: goes with when: %s", Exec)
	case len(m.Paths)+len(m.NotPaths) > 0 && r.When != Exec && r.When != Open:
		return c, fmt.Errorf("match.paths: goes with when: %s or %s", Exec, Open)
	case m.NotAllowed && r.When != Connect:
		return c, fmt.Errorf("match.notAllowed: goes with when: %s", Connect)
	case (m.BytesOver != 0 || m.Window != 0) && r.When != Sent && r.When != Output:
		return c, fmt.Errorf("match.bytesOver: goes with when: %s or %s", Sent, Output)
	case (m.BytesOver > 0) != (m.Window > 0) || m.BytesOver < 0 || m.Window < 0:
		return c, fmt.Errorf("match.bytesOver and match.window come together, and are positive")
	case len(m.NotPaths) > 0 && len(m.Paths) == 0:
		return c, fmt.Errorf("match.notPaths: excepts from paths, which are missing")
	}
	var err error
	if c.paths, err = patterns(m.Paths); err != nil {
		return c, fmt.Errorf("match.paths: %w", err)
	}
	if c.notPaths, err = patterns(m.NotPaths); err != nil {
		return c, fmt.Errorf("match.notPaths: %w", err)
	}
	return c, nil
}

func patterns(globs []string) ([]*regexp.Regexp, error) {
	var out []*regexp.Regexp
	for _, g := range globs {
		compiled, err := holdapi.PathPattern(g)
		if err != nil {
			return nil, err
		}
		out = append(out, compiled)
	}
	return out, nil
}

// Digest is the SHA-384 of the rule file.
func (s *Set) Digest() plan.Digest { return s.digest }

// Needs says whether a rule looks at events of a kind.
func (s *Set) Needs(k Kind) bool {
	return slices.ContainsFunc(s.rules, func(r rule) bool { return r.When == k })
}

// Opens lists the patterns of the files whose opening a rule looks at.
func (s *Set) Opens() []string {
	var out []string
	for _, r := range s.rules {
		switch {
		case r.When != Open:
		case len(r.Match.Paths) == 0:
			out = append(out, "/**")
		default:
			out = append(out, r.Match.Paths...)
		}
	}
	return out
}

// Stops says whether a rule ends a job for every event of a kind.
func (s *Set) Stops(k Kind) bool {
	return slices.ContainsFunc(s.rules, func(r rule) bool { return r.When == k && r.Action == Stop })
}
