package main

import (
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

// anchors adds to a set what its user trusts besides.
func (o options) anchors(set anchor.Set) (anchor.Set, error) {
	var err error
	for _, k := range o.attestationKeys {
		class, name, ok := strings.Cut(k, "=")
		if !ok {
			return anchor.Set{}, fmt.Errorf("attestation key %.120q: want CLASS=NAME", k)
		}
		if set, err = set.WithAKs(anchor.Class(class), name); err != nil {
			return anchor.Set{}, err
		}
	}
	for _, s := range o.paravisors {
		b, err := hex.DecodeString(s)
		if err != nil || len(b) != len(anchor.IDKeyDigest{}) {
			return anchor.Set{}, fmt.Errorf("paravisor %.120q: want a SHA-384 in hex", s)
		}
		if set, err = set.WithParavisors(anchor.IDKeyDigest(b)); err != nil {
			return anchor.Set{}, err
		}
	}
	return set, nil
}

// readPolicies reads what the caller named. Whether a bundle's plan asks for it
// is for the verification to say; what no bundle could ask for is an error.
func (o options) readPolicies() (policies []policy.Policy, references []string, err error) {
	for _, path := range o.policies {
		p, err := readPolicy(path)
		if err != nil {
			return nil, nil, fmt.Errorf("policy %s: %w", path, err)
		}
		policies = append(policies, p)
	}
	for _, path := range o.references {
		b, err := read(path, nil, receipt.MaxToken)
		if err != nil {
			return nil, nil, fmt.Errorf("reference values: %w", err)
		}
		references = append(references, strings.TrimSpace(string(b)))
	}
	if len(references) > 0 && len(policies) == 0 {
		return nil, nil, fmt.Errorf("reference values of which policy? name it with --policy")
	}
	return policies, references, nil
}

func readPolicy(path string) (policy.Policy, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return policy.ParseFolder(os.DirFS(path))
	}
	b, err := read(path, nil, policy.MaxSize)
	if err != nil {
		return policy.Policy{}, err
	}
	return policy.Parse(b)
}
