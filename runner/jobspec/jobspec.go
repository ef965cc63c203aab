// Package jobspec reads job files: YAML in, a checked Spec out, with the line
// and the field named when something is wrong.
package jobspec

import (
	"fmt"
	"maps"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

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
	APIVersion  string       `yaml:"apiVersion"`
	Name        string       `yaml:"name"`
	Image       string       `yaml:"image,omitempty"`
	Command     []string     `yaml:"command,omitempty"`
	Env         Env          `yaml:"env,omitempty"`
	Inputs      []Input      `yaml:"inputs"`
	Secrets     []Secret     `yaml:"secrets,omitempty"`
	Checkpoints *Checkpoints `yaml:"checkpoints,omitempty"`
	// Reseal stands in the place of Image, Command and all that a container sees.
	Reseal      *Reseal   `yaml:"reseal,omitempty"`
	Egress      []Egress  `yaml:"egress,omitempty"`
	Resources   Resources `yaml:"resources"`
	MaxDuration Duration  `yaml:"maxDuration,omitempty"`
	Output      Output    `yaml:"output,omitempty"`
	// Priority orders the jobs that wait for room: higher ones first.
	Priority int    `yaml:"priority,omitempty"`
	Retry    *Retry `yaml:"retry,omitempty"`
	// Reattest is how often the job attests again.
	Reattest *Reattest `yaml:"reattest,omitempty"`
	// Queue is the queue of the node in which the job waits; DefaultQueue if empty.
	Queue string `yaml:"queue,omitempty"`
	// Gang has the job begin together with others.
	Gang *Gang `yaml:"gang,omitempty"`
	// StopGrace is how long the job may take to end when it is told to, for a last
	// checkpoint.
	StopGrace Duration `yaml:"stopGrace,omitempty"`
	// MaxWait is how long the job may wait for approvals and for room.
	MaxWait  Duration  `yaml:"maxWait,omitempty"`
	Budget   *Budget   `yaml:"budget,omitempty"`
	Evidence *Evidence `yaml:"evidence,omitempty"`
	// Approvals are the groups whose approval the submitter expects. The broker's
	// rules alone say who must approve.
	Approvals         []string `yaml:"approvals,omitempty"`
	AttestationPolicy string   `yaml:"attestationPolicy"`
}

// Env is variables by name. Values are what is written: 010 is not 8.
type Env map[string]string

// UnmarshalYAML reads a mapping of names to scalars.
func (e *Env) UnmarshalYAML(node ast.Node) error {
	*e = Env{}
	var values []*ast.MappingValueNode
	switch n := node.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	}
	for _, v := range values {
		text := v.Value.GetToken().Value
		switch n := v.Value.(type) {
		case *ast.StringNode:
			text = n.Value
		case *ast.LiteralNode:
			text = n.Value.Value
		}
		(*e)[v.Key.GetToken().Value] = text
	}
	return nil
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
	// URI is the folder of the node where sealed checkpoints go, each job's into a
	// folder of its own.
	URI   string `yaml:"uri"`
	Mount string `yaml:"mount"`
	// Resume is "none" (the default), "latest", or the digest of a checkpoint. What
	// the job goes on from lies in resume/ below Mount.
	Resume string `yaml:"resume,omitempty"`
	Keep   *Keep  `yaml:"keep,omitempty"`
}

// Resources are limits.
type Resources struct {
	CPU    CPU   `yaml:"cpu"`
	Memory Bytes `yaml:"memory"`
	Pids   int64 `yaml:"pids,omitempty"`
	GPUs   int   `yaml:"gpus"`
	// CC is what the job asks of confidential computing on its GPUs: "off" for
	// nothing besides the policy, "on" or "required".
	CC string `yaml:"cc,omitempty"`
	// Nodes is 1: a job runs on one node.
	Nodes int `yaml:"nodes,omitempty"`
	// Shm is the size of /dev/shm.
	Shm Bytes `yaml:"shm,omitempty"`
	IO  *IO   `yaml:"io,omitempty"`
}

// Output bounds what the job may print.
type Output struct {
	LogBytes Bytes `yaml:"logBytes,omitempty"`
	// What the job may send to all destinations of Egress together, how fast, and
	// how many different refusals are told by name.
	EgressBytes          Bytes `yaml:"egressBytes,omitempty"`
	EgressBytesPerSecond Bytes `yaml:"egressBytesPerSecond,omitempty"`
	EgressEvents         int64 `yaml:"egressEvents,omitempty"`
	// LogBytesPerSecond bounds the rate.
	LogBytesPerSecond Bytes `yaml:"logBytesPerSecond,omitempty"`
	// LogKey is a public key to which the kept log is sealed: "x25519:" and base64.
	LogKey string `yaml:"logKey,omitempty"`
	// LogReaders is who may read the log: "submitter", and besides "owners" or
	// "engineers".
	LogReaders string   `yaml:"logReaders,omitempty"`
	Metrics    *Metrics `yaml:"metrics,omitempty"`
	// ExitCodes is "any" or "pass-fail".
	ExitCodes string `yaml:"exitCodes,omitempty"`
}

// CPU is in thousandths of a core: "2" or "1500m".
type CPU int64

// Bytes is a size: a number with an optional Ki, Mi, Gi or Ti.
type Bytes int64

// Duration is a Go duration, such as "30m".
type Duration time.Duration

// UnmarshalYAML reads "2" or "1500m".
func (c *CPU) UnmarshalYAML(node ast.Node) (err error) {
	*c, err = parseCPU(node.GetToken().Value)
	return at(node, err)
}

func parseCPU(s string) (CPU, error) {
	whole, unit := s, int64(1000)
	if t, ok := strings.CutSuffix(s, "m"); ok {
		s, unit = t, 1
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("%.40q is not a number of cores: write 2 or 1500m", whole)
	}
	return CPU(n * unit), nil
}

// UnmarshalYAML reads "4Gi".
func (v *Bytes) UnmarshalYAML(node ast.Node) (err error) {
	*v, err = parseBytes(node.GetToken().Value)
	return at(node, err)
}

func parseBytes(s string) (Bytes, error) {
	whole, unit := s, int64(1)
	for i, suffix := range []string{"Ki", "Mi", "Gi", "Ti"} {
		if t, ok := strings.CutSuffix(s, suffix); ok {
			s, unit = t, int64(1)<<(10*(i+1))
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > (1<<50)/unit {
		return 0, fmt.Errorf("%.40q is not a size: write 512Mi or 4Gi", whole)
	}
	return Bytes(n * unit), nil
}

// UnmarshalYAML reads "30m".
func (d *Duration) UnmarshalYAML(node ast.Node) (err error) {
	*d, err = parseDuration(node.GetToken().Value)
	return at(node, err)
}

func parseDuration(s string) (Duration, error) {
	t, err := time.ParseDuration(s)
	if err != nil || t < time.Second {
		return 0, fmt.Errorf("%.40q is not a duration of at least a second: write 30m or 12h", s)
	}
	return Duration(t), nil
}

// at says where a value stands that is wrong.
func at(node ast.Node, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Line: node.GetToken().Position.Line, Problem: err.Error()}
}

// check makes the checks that the schema does not: those of several fields together,
// and of values that have a form of their own. It fills in what the file leaves out.
func (c *checker) check(s *Spec) {
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		c.require(!strings.ContainsRune(s.Env[k], 0), "env."+k, "a value may not hold a zero byte")
	}
	mounts, names := map[string]bool{}, map[string]bool{}
	for i := range s.Inputs {
		in, at := &s.Inputs[i], fmt.Sprintf("inputs[%d].", i)
		c.require(!names[in.Name], at+"name", "%q is used twice", in.Name)
		names[in.Name] = true
		if _, err := source.Parse(in.URI); err != nil {
			c.folder(in.URI, at+"uri", ", s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix")
		}
		c.mount(in.Mount, at+"mount", mounts)
	}
	c.secrets(s.Secrets, names)
	c.checkpoints(s.Checkpoints, mounts)
	c.require(s.Resources.Memory >= 64<<20, "resources.memory", "want at least 64Mi")
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
	c.limits(s.Resources)
	c.output(s)
	c.retry(s)
	c.reattest(s.Reattest)
	c.gang(s)
	c.egress(s)
	c.reseal(s)
	c.keeping(s)
}

// folder wants a folder of the node; or names what else is allowed.
func (c *checker) folder(uri, field, or string) {
	u, err := url.Parse(uri)
	c.require(err == nil && u.Scheme == "file" && u.Host == "" && path.IsAbs(u.Path) && path.Clean(u.Path) == u.Path,
		field, "%.200q: want file:///absolute/path%s", uri, or)
}

// reserved are the container paths that belong to the sandbox.
var reserved = []string{"/proc", "/sys", "/dev", "/tmp", "/usr", "/bin", "/lib", "/lib64", "/sbin", "/etc", "/app", "/run/coffer", plan.SecretsMount}

func (c *checker) mount(m, field string, seen map[string]bool) {
	if m == "" {
		return // the schema has said so
	}
	c.require(path.IsAbs(m) && path.Clean(m) == m && m != "/", field, "%.200q: want an absolute path", m)
	for _, r := range reserved {
		c.require(m != r && !strings.HasPrefix(m, r+"/"), field, "%q lies under %s, which belongs to the sandbox", m, r)
		c.require(!strings.HasPrefix(r, m+"/"), field, "%q would cover %s, which belongs to the sandbox", m, r)
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
		Output: plan.Output{LogBytes: int64(s.Output.LogBytes), LogBytesPerSecond: int64(s.Output.LogBytesPerSecond)},
		Retry:  s.Retry.plan(), Reattest: s.Reattest.plan(), Gang: s.Gang.plan(),
		Resources: plan.Resources{
			CPUMillis: int64(s.Resources.CPU), MemoryBytes: int64(s.Resources.Memory), Pids: s.Resources.Pids, GPUs: s.Resources.GPUs,
			MaxSeconds: int64(time.Duration(s.MaxDuration) / time.Second), StopSeconds: int64(time.Duration(s.StopGrace) / time.Second),
			ShmBytes: int64(s.Resources.Shm), IO: s.Resources.IO.plan(),
		},
	}
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		p.Env = append(p.Env, plan.Env{Name: k, ValueDigest: plan.Sum([]byte(s.Env[k]))})
	}
	for _, in := range s.Sealed() {
		d, ok := r.Digests[in.Asset]
		if !ok {
			return plan.Plan{}, fmt.Errorf("no digest is known for asset %q", in.Asset)
		}
		p.Inputs = append(p.Inputs, plan.Input{Name: in.Name, Asset: in.Asset, Digest: d, Mount: in.Mount, Secret: in.Secret})
	}
	s.planEgress(&p)
	s.planKeeping(&p)
	s.Output.planMetrics(&p.Output)
	p.Checkpoints = s.Checkpoints.plan()
	p.Reseal = s.Reseal.plan(r.Digests)
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
