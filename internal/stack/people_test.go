package stack

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker/access"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/internal/issuer"
)

// What the stack signs, its own broker takes, and knows the approvers by.
func TestPeopleAndPolicies(t *testing.T) {
	l, err := NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := &starter{Layout: l}
	if _, err := s.people(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(s.passwordFile("alice"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.people(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(s.passwordFile("alice")); err != nil || string(again) != string(before) || len(strings.TrimSpace(string(again))) < 20 {
		t.Errorf("alice's password changed or is short: %v", err)
	}
	b, err := os.ReadFile(s.peopleFile())
	if err != nil || strings.Contains(string(b), strings.TrimSpace(string(before))) {
		t.Errorf("a password is in the file of people, or %v", err)
	}
	if _, err := issuer.ParsePeople(b); err != nil {
		t.Error(err)
	}

	rules, err := s.access()
	if err != nil {
		t.Fatal(err)
	}
	trust := access.Trust{Broker: BrokerID, Threshold: rules.Threshold}
	for _, m := range rules.Maintainers {
		keys, err := sshsig.ParseKeys([]byte(m.Key))
		if err != nil {
			t.Fatal(err)
		}
		trust.Maintainers = append(trust.Maintainers, access.Maintainer{Name: m.Name, Key: keys[0]})
	}
	files, err := access.ReadFiles(os.DirFS(rules.Policies))
	if err != nil {
		t.Fatal(err)
	}
	set, err := access.Open(files, trust)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, p := range people() {
		keys, groups, ok := set.Approver(p.name)
		approves := p.group == "weights-approvers"
		// The owner signs policies and consents.
		if !ok || !slices.Equal(groups, []string{p.group}) || (len(keys) == 1) != (approves || p.name == "owner") {
			t.Errorf("%s: %d keys, groups %v", p.name, len(keys), groups)
		}
		if roles := set.Roles(access.Principal{Name: p.name, Groups: groups}); len(roles) != 1 {
			t.Errorf("%s has roles %v", p.name, roles)
		}
		if approves {
			key, err := readSSHKey(s.sshKey(p.name))
			if err != nil || !sshsig.Same(key.PublicKey(), keys[0]) || seen[ssh.FingerprintSHA256(keys[0])] {
				t.Errorf("%s: the key is another's, or %v", p.name, err)
			}
			seen[ssh.FingerprintSHA256(keys[0])] = true
		}
	}
	if len(seen) != 3 {
		t.Errorf("%d approvers, want 3", len(seen))
	}
}
