package plan

import (
	"encoding/json"
	"strings"
	"testing"
)

func resealPlan(t *testing.T) Plan {
	t.Helper()
	none, err := NoContainer().Digest()
	if err != nil {
		t.Fatal(err)
	}
	d := Sum([]byte("manifest"))
	return Plan{
		Version: Version, Name: "reseal", Inputs: []Input{}, Reseal: &Reseal{Asset: "old", Digest: d, To: "new"}, Output: Output{LogBytes: 1},
		Resources: Resources{CPUMillis: 1000, MemoryBytes: 1 << 28, Pids: 16, MaxSeconds: 60}, Policy: Policy{Name: "p", Digest: d}, SandboxProfile: none,
	}
}

func TestResealPlan(t *testing.T) {
	b, err := resealPlan(t).Canonical()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "image") || strings.Contains(string(b), "command") {
		t.Errorf("the plan speaks of a container: %s", b)
	}
	if _, err := Parse(b); err != nil {
		t.Error(err)
	}
	d := Sum([]byte("x"))
	for name, change := range map[string]func(*Plan){
		"an image":                   func(p *Plan) { p.Image = "sha256:" + strings.Repeat("0", 64) },
		"a command":                  func(p *Plan) { p.Command = []string{"/bin/true"} },
		"a variable":                 func(p *Plan) { p.Env = []Env{{Name: "A", ValueDigest: d}} },
		"an input":                   func(p *Plan) { p.Inputs = []Input{{Name: "i", Asset: "a", Digest: d, Mount: "/i"}} },
		"checkpoints":                func(p *Plan) { p.Checkpoints = &Checkpoints{Asset: "c", Mount: "/c"} },
		"a GPU":                      func(p *Plan) { p.Resources.GPUs = 1 },
		"a sandbox with a container": func(p *Plan) { p.SandboxProfile = d },
		"no source":                  func(p *Plan) { p.Reseal.Asset = "" },
		"a source without a digest":  func(p *Plan) { p.Reseal.Digest = "" },
		"no target":                  func(p *Plan) { p.Reseal.To = "" },
		"its source as its target":   func(p *Plan) { p.Reseal.To = p.Reseal.Asset },
		"an empty reseal":            func(p *Plan) { p.Reseal = &Reseal{} },
		"a container without a sandbox": func(p *Plan) {
			p.Reseal, p.Image, p.Command = nil, "sha256:"+strings.Repeat("0", 64), []string{"/bin/true"}
		},
	} {
		p := resealPlan(t)
		change(&p)
		if _, err := p.Canonical(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestNoSandbox(t *testing.T) {
	b, err := NoSandbox("j").Canonical()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseSandbox(b); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Sandbox){
		"an image":        func(s *Sandbox) { s.Image = "sha256:" + strings.Repeat("0", 64) },
		"a specification": func(s *Sandbox) { s.Spec = json.RawMessage(`{}`) },
		"a wrapper":       func(s *Sandbox) { s.Wrapper = []string{"runsc"} },
		"points to trace": func(s *Sandbox) { s.Trace = json.RawMessage(`{}`) },
	} {
		s := NoSandbox("j")
		change(&s)
		if b, err = s.Canonical(); err != nil {
			t.Fatal(err)
		}
		if _, err := ParseSandbox(b); err == nil {
			t.Errorf("%s in a sandbox without a container: accepted", name)
		}
	}
	p := NoContainer()
	p.Runtime = "runsc"
	if _, err := p.Digest(); err == nil {
		t.Error("a profile that is half none has a digest")
	}
}
