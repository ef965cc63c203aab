package plan

import (
	"strings"
	"testing"
)

func egressPlan(e ...Egress) Plan {
	return Plan{
		Version: Version, Name: "n", Image: "sha256:" + strings.Repeat("0", 64), Command: []string{"/bin/true"}, Inputs: []Input{}, Egress: e,
		Output:    Output{LogBytes: 1, EgressBytes: 1, EgressBytesPerSecond: 1, EgressEvents: 1},
		Resources: Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1},
		Policy:    Policy{Name: "p", Digest: Sum(nil)}, SandboxProfile: Sum(nil),
	}
}

func TestEgressOfAPlan(t *testing.T) {
	good := Egress{Host: "metrics.example.com", Port: 443, MaxBytes: 1, BytesPerSecond: 1}
	with := func(f func(*Egress)) Plan {
		e := good
		f(&e)
		return egressPlan(e)
	}
	unbounded := func(f func(*Output)) Plan {
		p := egressPlan(good)
		f(&p.Output)
		return p
	}
	for name, tt := range map[string]struct {
		p    Plan
		want string
	}{
		"one destination":               {egressPlan(good), ""},
		"an address":                    {with(func(e *Egress) { e.Host = "44.1.0.2" }), "DNS name"},
		"an IPv6 address":               {with(func(e *Egress) { e.Host = "::1" }), "DNS name"},
		"an address in hex":             {with(func(e *Egress) { e.Host = "0x7f.1" }), "DNS name"},
		"a wildcard":                    {with(func(e *Egress) { e.Host = "*.example.com" }), "DNS name"},
		"one label":                     {with(func(e *Egress) { e.Host = "localhost" }), "DNS name"},
		"a final dot":                   {with(func(e *Egress) { e.Host = "example.com." }), "DNS name"},
		"upper case":                    {with(func(e *Egress) { e.Host = "Example.com" }), "DNS name"},
		"a line break":                  {with(func(e *Egress) { e.Host = "example.com\n" }), "DNS name"},
		"too long":                      {with(func(e *Egress) { e.Host = strings.Repeat("a.", 126) + "com" }), "DNS name"},
		"port 0":                        {with(func(e *Egress) { e.Port = 0 }), "port"},
		"port 65536":                    {with(func(e *Egress) { e.Port = 65536 }), "port"},
		"no bytes":                      {with(func(e *Egress) { e.MaxBytes = 0 }), "positive"},
		"no rate":                       {with(func(e *Egress) { e.BytesPerSecond = 0 }), "positive"},
		"twice":                         {egressPlan(good, good), "twice"},
		"no bound of all":               {unbounded(func(o *Output) { o.EgressBytes = 0 }), "bound"},
		"no rate of all":                {unbounded(func(o *Output) { o.EgressBytesPerSecond = 0 }), "bound"},
		"no bound of what is told":      {unbounded(func(o *Output) { o.EgressEvents = 0 }), "bound"},
		"bounds without a destination":  {egressPlan(), "allows none"},
		"more destinations than anyone": {egressPlan(make([]Egress, MaxEgress+1)...), "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := tt.p.Canonical()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestDestinationsAreInTheDigest(t *testing.T) {
	a := egressPlan(Egress{Host: "metrics.example.com", Port: 443, MaxBytes: 1, BytesPerSecond: 1})
	b := egressPlan(Egress{Host: "metrics.example.com", Port: 443, MaxBytes: 2, BytesPerSecond: 1})
	da, err := a.Digest()
	if err != nil {
		t.Fatal(err)
	}
	db, err := b.Digest()
	if err != nil || da == db {
		t.Errorf("one more byte leaves the digest %s as it is: %v", da, err)
	}
	if !a.Allows("metrics.example.com", 443) || a.Allows("metrics.example.com", 80) || a.Allows("example.com", 443) {
		t.Error("Allows is not the list")
	}
}

func TestNetworkOfASandbox(t *testing.T) {
	e := egressPlan(Egress{Host: "metrics.example.com", Port: 443, MaxBytes: 1, BytesPerSecond: 1})
	offered := &EgressProfile{Gateway: Sum(nil), Filter: Sum(nil), Flag: "--network=sandbox"}
	for name, tt := range map[string]struct {
		p       Plan
		profile *EgressProfile
		wrapper []string
		equal   bool
	}{
		"none, as planned":              {egressPlan(), nil, []string{"runsc", "--network=none"}, true},
		"one, as planned":               {e, offered, []string{"runsc", "--network=sandbox"}, true},
		"one that was not planned":      {egressPlan(), offered, []string{"runsc", "--network=sandbox"}, false},
		"the host's":                    {e, offered, []string{"runsc", "--network=host"}, false},
		"the runtime's default":         {egressPlan(), nil, []string{"runsc"}, false},
		"the last flag is another":      {egressPlan(), nil, []string{"runsc", "--network=none", "--network=host"}, false},
		"another way to write the flag": {egressPlan(), nil, []string{"runsc", "--network=none", "-network", "host"}, false},
		"a profile that offers none":    {e, nil, []string{"runsc", "--network=sandbox"}, false},
		"a profile with another flag":   {e, &EgressProfile{Flag: "--platform=ptrace"}, []string{"runsc", "--platform=ptrace"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			want, got := Sandbox{Profile: Profile{Egress: tt.profile}, Wrapper: tt.wrapper}.Network(tt.p)
			if (want == got) != tt.equal {
				t.Errorf("want %q, got %q", want, got)
			}
		})
	}
}
