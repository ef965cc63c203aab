package rego

import (
	"encoding/json"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
)

// Input returns what rules see of evidence, as JSON.
func (p *Policy) Input(ev policy.Evidence) ([]byte, error) {
	d := policy.Decision{GPUs: make([]check.List, len(ev.GPUs))}
	subs := p.submodules(ev, &d)
	for i := range subs {
		subs[i].readClaims()
	}
	v, err := ast.JSON(input(ev, subs, p.accepted))
	if err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

// Forget empties the memory of answers.
func (p *Policy) Forget() { p.answers = &answers{} }
