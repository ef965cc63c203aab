package jobspec

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func withSecrets(lines string) (Spec, error) {
	return Parse([]byte(`apiVersion: coffer.run/v1
name: n
image: i
command: [/bin/true]
inputs: [{name: data, asset: d, uri: "file:///d", mount: /inputs/data}]
resources: {cpu: 1, memory: 64Mi, gpus: 0}
attestationPolicy: simulation
` + lines))
}

func TestSecrets(t *testing.T) {
	s, err := withSecrets(`secrets: [{name: token, asset: t, uri: "file:///t"}]`)
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Plan(Resolved{
		Image: "sha256:" + strings.Repeat("0", 64), Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, Profile: plan.Sum(nil),
		Digests: map[string]plan.Digest{"d": plan.Sum([]byte("d")), "t": plan.Sum([]byte("t"))},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := plan.Input{Name: "token", Asset: "t", Digest: plan.Sum([]byte("t")), Mount: "/run/secrets/token", Secret: true}
	if len(p.Inputs) != 2 || p.Inputs[1] != want || p.Inputs[0].Secret {
		t.Errorf("the plan has %+v", p.Inputs)
	}
	if all := s.Sealed(); len(all) != 2 || all[1].URI != "file:///t" {
		t.Errorf("what is sealed: %+v", all)
	}
	for name, row := range map[string]struct{ lines, want string }{
		"the name of an input":    {`secrets: [{name: data, asset: t, uri: "file:///t"}]`, "secrets[0].name"},
		"a name twice":            {`secrets: [{name: a, asset: t, uri: "file:///t"}, {name: a, asset: t, uri: "file:///t"}]`, "secrets[1].name"},
		"a name that leaves":      {`secrets: [{name: ../a, asset: t, uri: "file:///t"}]`, "secrets[0].name"},
		"no folder":               {`secrets: [{name: a, asset: t, uri: "t"}]`, "secrets[0].uri"},
		"a place of its own":      {`secrets: [{name: a, asset: t, uri: "file:///t", mount: /a}]`, "secrets[0]"},
		"checkpoints among them":  {"checkpoints: {asset: c, uri: \"file:///c\", mount: /run/secrets/c}", "checkpoints.mount"},
		"checkpoints over them":   {"checkpoints: {asset: c, uri: \"file:///c\", mount: /run/secrets}", "checkpoints.mount"},
		"checkpoints over all":    {"checkpoints: {asset: c, uri: \"file:///c\", mount: /run}", "checkpoints.mount"},
		"a value in the job file": {`secrets: [{name: a, value: hunter2}]`, "secrets[0].value"},
	} {
		if _, err := withSecrets(row.lines); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v, want a problem of %s", name, err, row.want)
		}
	}
}
