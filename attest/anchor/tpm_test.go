package anchor_test

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/anchor"
)

func TestPinnedAttestationKeys(t *testing.T) {
	name := "000b" + strings.Repeat("ab", 32)
	s, err := anchor.Vendor().WithAKs(anchor.Discrete, name)
	if err != nil {
		t.Fatal(err)
	}
	more, err := s.WithAKs(anchor.SVSM, "000b"+strings.Repeat("cd", 32))
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := more.AK(name); !ok || c != anchor.Discrete {
		t.Errorf("%q, %t", c, ok)
	}
	for _, set := range []anchor.Set{{}, anchor.Vendor(), s} {
		if _, ok := set.AK("000b" + strings.Repeat("cd", 32)); ok {
			t.Error("a set knows a key that was pinned in another")
		}
	}
	for situation, err := range map[string]error{
		"the empty set":          second(anchor.Set{}.WithAKs(anchor.Discrete, name)),
		"unknown class":          second(s.WithAKs("magic", name)),
		"software among vendors": second(s.WithAKs(anchor.Software, name)),
		"none":                   second(s.WithAKs(anchor.Discrete)),
		"two classes":            second(s.WithAKs(anchor.SVSM, name)),
		"upper case":             second(s.WithAKs(anchor.SVSM, strings.ToUpper(name))),
		"another algorithm":      second(s.WithAKs(anchor.SVSM, "000c"+name[4:])),
		"too short":              second(s.WithAKs(anchor.SVSM, name[:66])),
		"no name":                second(s.WithAKs(anchor.SVSM, "")),
	} {
		if err == nil {
			t.Errorf("%s: taken", situation)
		}
	}
}

func TestParavisors(t *testing.T) {
	key := anchor.IDKeyDigest{1}
	s, err := anchor.Vendor().WithParavisors(key)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Paravisor(key) || s.Paravisor(anchor.IDKeyDigest{2}) || s.Paravisor(anchor.IDKeyDigest{}) || anchor.Vendor().Paravisor(key) || (anchor.Set{}).Paravisor(key) {
		t.Error("a set trusts another paravisor than it was given")
	}
	for situation, err := range map[string]error{
		"the empty set": second(anchor.Set{}.WithParavisors(key)),
		"none":          second(s.WithParavisors()),
		"no key at all": second(s.WithParavisors(anchor.IDKeyDigest{})),
	} {
		if err == nil {
			t.Errorf("%s: taken", situation)
		}
	}
}

func second[T any](_ T, err error) error { return err }
