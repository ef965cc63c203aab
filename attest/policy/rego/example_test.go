package rego_test

import (
	"fmt"

	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
)

// Evidence that is not there is refused, with every rule that it breaks.
func ExamplePolicy_Decide() {
	document, err := policy.Named("production")
	if err != nil {
		fmt.Println(err)
		return
	}
	p, err := rego.Compile(document)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, c := range p.Decide(policy.Evidence{WantGPUs: 1}).All().Failed() {
		fmt.Printf("%s: expected %s, found %s\n", c.ID, c.Expected, c.Found)
	}
	// Output:
	// policy.snp.required: expected evidence from snp, found none
	// policy.tpm.required: expected evidence from tpm, found none
	// policy.gpu.count: expected 1, found 0
}
