package jobspec

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func withResources(lines string) (Spec, error) {
	return Parse([]byte(`apiVersion: coffer.run/v1
name: n
image: i
command: [/bin/true]
inputs: []
resources: {cpu: 1, memory: 64Mi, gpus: 0` + lines + `}
attestationPolicy: simulation
`))
}

func TestLimits(t *testing.T) {
	s, err := withResources(", shm: 32Mi, io: {readBytesPerSecond: 200Mi, writeBytesPerSecond: 1Mi, readsPerSecond: 7, writesPerSecond: 8}")
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Plan(Resolved{Image: "sha256:" + strings.Repeat("0", 64), Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, Profile: plan.Sum(nil)})
	if err != nil {
		t.Fatal(err)
	}
	if r := p.Resources; r.ShmBytes != 32<<20 || r.IO != (plan.IO{ReadBytesPerSecond: 200 << 20, WriteBytesPerSecond: 1 << 20, ReadsPerSecond: 7, WritesPerSecond: 8}) {
		t.Errorf("the plan has %+v", r)
	}
	for name, row := range map[string]struct{ lines, want string }{
		"more shared memory than memory": {", shm: 65Mi", "resources.shm"},
		"too little shared memory":       {", shm: 1Ki", "resources.shm"},
		"no bound":                       {", io: {}", "resources.io"},
		"a rate that stops it":           {", io: {readBytesPerSecond: 100}", "resources.io.readBytesPerSecond"},
		"a rate that stops its writing":  {", io: {writeBytesPerSecond: 1Ki}", "resources.io.writeBytesPerSecond"},
		"no reads":                       {", io: {readsPerSecond: 0}", "resources.io.readsPerSecond"},
		"negative writes":                {", io: {writesPerSecond: -1}", "resources.io.writesPerSecond"},
	} {
		if _, err := withResources(row.lines); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v, want a problem of %s", name, err, row.want)
		}
	}
}
