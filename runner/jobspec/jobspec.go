// Package jobspec reads job files: YAML in, a checked Spec out, with the line
// and the field named when something is wrong.
package jobspec

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/source"
)

const (
	// APIVersion is the only job file version there is.
	APIVersion = "coffer.run/v1"
	// MaxSize bounds a job file, in bytes.
	MaxSize = 64 << 10

	// DefaultPids, DefaultMaxDuration and DefaultLogBytes stand where a job
	// file is silent.
	DefaultPids        = 256
	DefaultMaxDuration = 24 * time.Hour
	DefaultLogBytes    = 16 << 20

	// MaxLogBytes bounds what a job file may ask for: the holder keeps it in memory.
	MaxLogBytes = 256 << 20
	// MaxInputs bounds the inputs of one job.
	MaxInputs = 32
)

// Spec is a job as its author wrote it, checked.
type Spec struct {
	APIVersion        string            `yaml:"apiVersion"`
	Name              string            `yaml:"name"`
	Image             string            `yaml:"image"`
	Command           []string          `yaml:"command"`
	Env               map[string]string `yaml:"env,omitempty"`
	Inputs            []Input           `yaml:"inputs"`
	Checkpoints       *Checkpoints      `yaml:"checkpoints,omitempty"`
	Resources         Resources         `yaml:"resources"`
	MaxDuration       Duration          `yaml:"maxDuration,omitempty"`
	Output            Output            `yaml:"output,omitempty"`
	AttestationPolicy string            `yaml:"attestationPolicy"`
}

// Input is a sealed asset and where the job sees it opened.
type Input struct {
	Name  string `yaml:"name"`
	Asset string `yaml:"asset"`
	// URI is where the sealed folder lies: "file:///absolute/path", or a bucket that
	// the node's configuration lists, "s3://bucket/prefix".
	URI   string `yaml:"uri"`
	Mount string `yaml:"mount"`
}

// Checkpoints is where the job writes and where the sealed result goes.
type Checkpoints struct {
	Asset string `yaml:"asset"`
	URI   string `yaml:"uri"`
	Mount string `yaml:"mount"`
}

// Resources are limits.
type Resources struct {
	CPU    CPU   `yaml:"cpu"`
	Memory Bytes `yaml:"memory"`
	Pids   int64 `yaml:"pids,omitempty"`
	GPUs   int   `yaml:"gpus"`
}

// Output bounds what the job may print.
type Output struct {
	LogBytes Bytes `yaml:"logBytes,omitempty"`
}

// CPU is in thousandths of a core: "2" or "1500m".
type CPU int64

// Bytes is a size: a number with an optional Ki, Mi, Gi or Ti.
type Bytes int64

// Duration is a Go duration, such as "30m".
type Duration time.Duration

// UnmarshalYAML reads "2" or "1500m".
func (c *CPU) UnmarshalYAML(node ast.Node) error {
	s, line := scalar(node)
	whole, unit := s, int64(1000)
	if t, ok := strings.CutSuffix(s, "m"); ok {
		s, unit = t, 1
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n <= 0 {
		return &Error{Line: line, Problem: fmt.Sprintf("%.40q is not a number of cores: write 2 or 1500m", whole)}
	}
	*c = CPU(n * unit)
	return nil
}

// UnmarshalYAML reads "4Gi".
func (v *Bytes) UnmarshalYAML(node ast.Node) error {
	s, line := scalar(node)
	whole, unit := s, int64(1)
	for i, suffix := range []string{"Ki", "Mi", "Gi", "Ti"} {
		if t, ok := strings.CutSuffix(s, suffix); ok {
			s, unit = t, int64(1)<<(10*(i+1))
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > (1<<50)/unit {
		return &Error{Line: line, Problem: fmt.Sprintf("%.40q is not a size: write 512Mi or 4Gi", whole)}
	}
	*v = Bytes(n * unit)
	return nil
}

// UnmarshalYAML reads "30m".
func (d *Duration) UnmarshalYAML(node ast.Node) error {
	s, line := scalar(node)
	t, err := time.ParseDuration(s)
	if err != nil || t < time.Second {
		return &Error{Line: line, Problem: fmt.Sprintf("%.40q is not a duration of at least a second: write 30m or 12h", s)}
	}
	*d = Duration(t)
	return nil
}

// scalar returns a node's text and line.
func scalar(node ast.Node) (string, int) {
	return node.GetToken().Value, node.GetToken().Position.Line
}

// Error says where a job file is wrong. Line is 0 where no line is to blame.
type Error struct {
	Line    int
	Field   string
	Problem string
}

// Error names line, field and problem.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("job file")
	if e.Line > 0 {
		fmt.Fprintf(&b, ", line %d", e.Line)
	}
	if e.Field != "" {
		fmt.Fprintf(&b, ", %s", e.Field)
	}
	return b.String() + ": " + e.Problem
}

// Parse reads and checks a job file. Every problem is an *Error.
func Parse(b []byte) (Spec, error) {
	if len(b) > MaxSize {
		return Spec{}, &Error{Problem: fmt.Sprintf("%d bytes, at most %d are allowed", len(b), MaxSize)}
	}
	file, err := parser.ParseBytes(b, 0)
	if err != nil {
		return Spec{}, syntax(err)
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return Spec{}, &Error{Problem: "want exactly one YAML document"}
	}
	if err := noAliases(file); err != nil {
		return Spec{}, err
	}
	var s Spec
	if err := yaml.UnmarshalWithOptions(b, &s, yaml.Strict()); err != nil {
		return Spec{}, syntax(err)
	}
	c := checker{file: file}
	c.check(&s)
	if c.err != nil {
		return Spec{}, c.err
	}
	return s, nil
}

// noAliases refuses anchors and aliases: a few lines of them can stand for
// gigabytes, and a reviewer should see what is asked for where it is asked.
func noAliases(file *ast.File) error {
	v := &aliasFinder{}
	ast.Walk(v, file.Docs[0].Body)
	if v.line > 0 {
		return &Error{Line: v.line, Problem: "anchors and aliases are not allowed"}
	}
	return nil
}

type aliasFinder struct{ line int }

func (v *aliasFinder) Visit(n ast.Node) ast.Visitor {
	switch n.Type() {
	case ast.AnchorType, ast.AliasType, ast.MergeKeyType:
		v.line = n.GetToken().Position.Line
	default:
	}
	return v
}

func syntax(err error) error {
	var ours *Error
	if errors.As(err, &ours) {
		return ours
	}
	var unknown *yaml.UnknownFieldError
	if errors.As(err, &unknown) {
		field := unknown.Token.Value
		return &Error{Line: unknown.Token.Position.Line, Field: field, Problem: "unknown field" + suggest(field)}
	}
	var located yaml.Error
	if errors.As(err, &located) && located.GetToken() != nil {
		return &Error{Line: located.GetToken().Position.Line, Problem: located.GetMessage()}
	}
	return &Error{Problem: err.Error()}
}

// suggest names the nearest known field, or all of them if none is near.
func suggest(field string) string {
	known := map[string]bool{}
	fieldNames(reflect.TypeFor[Spec](), known)
	names := slices.Sorted(maps.Keys(known))
	best, distance := "", 4
	for _, n := range names {
		if d := levenshtein(strings.ToLower(field), strings.ToLower(n)); d < distance {
			best, distance = n, d
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return "; known fields: " + strings.Join(names, ", ")
}

func fieldNames(t reflect.Type, into map[string]bool) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return
	}
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		into[name] = true
		fieldNames(t.Field(i).Type, into)
	}
}

func levenshtein(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			prev, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, prev+cost)
		}
	}
	return row[len(b)]
}

type checker struct {
	file *ast.File
	err  error
}

// require records the first requirement that does not hold.
func (c *checker) require(ok bool, field, format string, args ...any) {
	if ok || c.err != nil {
		return
	}
	e := &Error{Field: field, Problem: fmt.Sprintf(format, args...)}
	// The field itself, or the nearest parent that is there.
	for p := field; p != ""; {
		if yp, err := yaml.PathString("$." + p); err == nil {
			if n, err := yp.FilterFile(c.file); err == nil && n != nil {
				e.Line = n.GetToken().Position.Line
				break
			}
		}
		i := strings.LastIndexAny(p, ".[")
		if i < 0 {
			break
		}
		p = p[:i]
	}
	c.err = e
}

var (
	nameForm  = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	envForm   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)
	imageForm = regexp.MustCompile(`^[a-z0-9][a-z0-9./:_-]{0,200}(@sha256:[0-9a-f]{64})?$`)
)

const nameRule = "want lower-case letters, digits, '-' and '.', at most 63, starting and ending with a letter or digit"

func (c *checker) check(s *Spec) {
	c.require(s.APIVersion == APIVersion, "apiVersion", "%.40q is not supported: want %s", s.APIVersion, APIVersion)
	c.require(nameForm.MatchString(s.Name), "name", "%.80q: %s", s.Name, nameRule)
	c.require(imageForm.MatchString(s.Image), "image", "%.120q: want a name, or name@sha256:<digest>", s.Image)
	c.require(len(s.Command) > 0, "command", "want the program and its arguments as a list")
	c.require(len(s.Command) == 0 || strings.HasPrefix(s.Command[0], "/"), "command", "want an absolute path as the program, such as /usr/bin/python3")
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		c.require(envForm.MatchString(k), "env", "%.80q is not the name of a variable", k)
		c.require(!strings.ContainsRune(s.Env[k], 0), "env."+k, "a value may not hold a zero byte")
	}
	c.require(len(s.Inputs) <= MaxInputs, "inputs", "%d inputs, at most %d are allowed", len(s.Inputs), MaxInputs)
	mounts, names := map[string]bool{}, map[string]bool{}
	for i := range s.Inputs {
		in, at := &s.Inputs[i], fmt.Sprintf("inputs[%d].", i)
		c.require(nameForm.MatchString(in.Name), at+"name", "%.80q: %s", in.Name, nameRule)
		c.require(!names[in.Name], at+"name", "%q is used twice", in.Name)
		names[in.Name] = true
		c.require(nameForm.MatchString(in.Asset), at+"asset", "%.80q: %s", in.Asset, nameRule)
		if _, err := source.Parse(in.URI); err != nil {
			c.folder(in.URI, at+"uri", ", s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix")
		}
		c.mount(in.Mount, at+"mount", mounts)
	}
	if p := s.Checkpoints; p != nil {
		c.require(nameForm.MatchString(p.Asset), "checkpoints.asset", "%.80q: %s", p.Asset, nameRule)
		c.folder(p.URI, "checkpoints.uri", "")
		c.mount(p.Mount, "checkpoints.mount", mounts)
	}
	c.require(s.Resources.CPU > 0, "resources.cpu", "want a number of cores, such as 2 or 1500m")
	c.require(s.Resources.Memory >= 64<<20, "resources.memory", "want at least 64Mi")
	c.require(s.Resources.GPUs >= 0 && s.Resources.GPUs <= 16, "resources.gpus", "want 0 to 16")
	c.require(s.Resources.Pids >= 0 && s.Resources.Pids <= 32768, "resources.pids", "want 1 to 32768")
	if s.Resources.Pids == 0 {
		s.Resources.Pids = DefaultPids
	}
	if s.MaxDuration == 0 {
		s.MaxDuration = Duration(DefaultMaxDuration)
	}
	if s.Output.LogBytes == 0 {
		s.Output.LogBytes = DefaultLogBytes
	}
	c.require(s.Output.LogBytes <= MaxLogBytes, "output.logBytes", "want at most 256Mi")
	c.require(s.AttestationPolicy != "", "attestationPolicy", "want the name of an attestation policy, such as production")
}

// folder wants a folder of the node; or names what else is allowed.
func (c *checker) folder(uri, field, or string) {
	u, err := url.Parse(uri)
	c.require(err == nil && u.Scheme == "file" && u.Host == "" && path.IsAbs(u.Path) && path.Clean(u.Path) == u.Path,
		field, "%.200q: want file:///absolute/path%s", uri, or)
}

// reserved are the container paths that belong to the sandbox.
var reserved = []string{"/proc", "/sys", "/dev", "/tmp", "/usr", "/bin", "/lib", "/lib64", "/sbin", "/etc", "/app", "/run/coffer"}

func (c *checker) mount(m, field string, seen map[string]bool) {
	c.require(path.IsAbs(m) && path.Clean(m) == m && m != "/", field, "%.200q: want an absolute path", m)
	for _, r := range reserved {
		c.require(m != r && !strings.HasPrefix(m, r+"/"), field, "%q lies under %s, which belongs to the sandbox", m, r)
	}
	for other := range seen {
		c.require(m != other && !strings.HasPrefix(m, other+"/") && !strings.HasPrefix(other, m+"/"), field, "%q overlaps %q", m, other)
	}
	seen[m] = true
}

// Resolved is what a plan needs beyond the job file.
type Resolved struct {
	// Image is the manifest digest, "sha256:<hex>".
	Image string
	// Digests are the sealed manifests' digests by asset name.
	Digests map[string]plan.Digest
	Policy  plan.Policy
	Profile plan.Digest
}

// Plan resolves the spec to the canonical job.
func (s Spec) Plan(r Resolved) (plan.Plan, error) {
	p := plan.Plan{
		Version: plan.Version, Name: s.Name, Image: r.Image, Command: s.Command, Policy: r.Policy, SandboxProfile: r.Profile,
		Inputs: []plan.Input{},
		Output: plan.Output{LogBytes: int64(s.Output.LogBytes)},
		Resources: plan.Resources{
			CPUMillis: int64(s.Resources.CPU), MemoryBytes: int64(s.Resources.Memory), Pids: s.Resources.Pids, GPUs: s.Resources.GPUs,
			MaxSeconds: int64(time.Duration(s.MaxDuration) / time.Second),
		},
	}
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		p.Env = append(p.Env, plan.Env{Name: k, ValueDigest: plan.Sum([]byte(s.Env[k]))})
	}
	for _, in := range s.Inputs {
		d, ok := r.Digests[in.Asset]
		if !ok {
			return plan.Plan{}, fmt.Errorf("no digest is known for asset %q", in.Asset)
		}
		p.Inputs = append(p.Inputs, plan.Input{Name: in.Name, Asset: in.Asset, Digest: d, Mount: in.Mount})
	}
	if c := s.Checkpoints; c != nil {
		p.Checkpoints = &plan.Checkpoints{Asset: c.Asset, Mount: c.Mount}
	}
	if _, err := p.Canonical(); err != nil {
		return plan.Plan{}, err
	}
	return p, nil
}

// Redacted returns the job file with every environment value replaced by its
// digest, for journals and evidence.
func (s Spec) Redacted() ([]byte, error) {
	env := make(map[string]string, len(s.Env))
	for k, v := range s.Env {
		env[k] = string(plan.Sum([]byte(v)))
	}
	s.Env = env
	return yaml.Marshal(s)
}

// MarshalText writes thousandths of a core.
func (c CPU) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%dm", int64(c)), nil }

// MarshalText writes bytes.
func (v Bytes) MarshalText() ([]byte, error) { return strconv.AppendInt(nil, int64(v), 10), nil }

// MarshalText writes a Go duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }
