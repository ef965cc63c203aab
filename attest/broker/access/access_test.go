package access_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/access"
	"github.com/coffer-run/coffer/attest/check"
)

const brokerID = "broker.test"

// noon is a Monday's.
var noon = time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC)

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func line(s ssh.Signer) string { return string(ssh.MarshalAuthorizedKey(s.PublicKey())) }

// people is who the tests know.
func people() access.People {
	return access.People{
		Groups: []access.Group{
			{Name: "ml", Roles: []string{"engineer"}},
			{Name: "weights-owners", Roles: []string{"owner"}},
			{Name: "weights-approvers", Roles: []string{"approver"}},
			{Name: "compliance", Roles: []string{"auditor"}},
			{Name: "sre", Roles: []string{"operator"}},
			{Name: "apollo"},
		},
		Workloads: []access.Workload{{Name: "agent/node-eu", Region: "eu"}, {Name: "agent/node-us", Region: "us"}},
	}
}

// maintainers have signed sets.
type maintainers struct {
	keys  map[string]ssh.Signer
	trust access.Trust
}

func newMaintainers(t testing.TB, threshold int, names ...string) maintainers {
	m := maintainers{map[string]ssh.Signer{}, access.Trust{Broker: brokerID, Threshold: threshold}}
	for _, n := range names {
		m.keys[n] = newKey(t)
		m.trust.Maintainers = append(m.trust.Maintainers, access.Maintainer{Name: n, Key: m.keys[n].PublicKey()})
	}
	return m
}

// files are a set of policies and people, signed by the named maintainers.
func (m maintainers) files(t testing.TB, serial uint64, p access.People, policies map[string]string, signers ...string) map[string][]byte {
	t.Helper()
	files, err := access.DefaultPolicies()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range policies {
		files[name] = []byte(text)
	}
	if files[access.PeopleFile], err = json.Marshal(p); err != nil {
		t.Fatal(err)
	}
	m.sign(t, files, brokerID, serial, signers...)
	return files
}

func (m maintainers) sign(t testing.TB, files map[string][]byte, broker string, serial uint64, signers ...string) {
	t.Helper()
	raw, err := access.Manifest(broker, serial, files)
	if err != nil {
		t.Fatal(err)
	}
	files[access.ManifestFile] = raw
	for _, n := range signers {
		if files[access.SignatureDir+"/"+n+".sig"], err = access.Sign(m.keys[n], raw); err != nil {
			t.Fatal(err)
		}
	}
}

// newSet is the default policies with these added.
func newSet(t testing.TB, p access.People, policies map[string]string) *access.Set {
	t.Helper()
	m := newMaintainers(t, 1, "ada")
	s, err := access.Open(m.files(t, 1, p, policies, "ada"), m.trust)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// user is someone who signed in with a password, from this machine.
func user(name string, groups ...string) access.Principal {
	return access.Principal{Name: name, Groups: groups, Assurance: access.AssuranceSingle, Address: netip.MustParseAddr("127.0.0.1")}
}

func service(role, name string) access.Principal { return access.Principal{Role: role, Name: name} }

func asset(owner string) access.Resource {
	return access.Resource{Type: access.TypeAsset, ID: "weights-a", Owner: owner, Kind: "weights"}
}

func grant(owner string) access.Resource {
	return access.Resource{Type: access.TypeGrant, ID: "grant-1", Owner: owner}
}

func thing(kind string) access.Resource { return access.Resource{Type: kind, ID: "x"} }

// failed returns the id and text of the one check that a refusal names.
func failed(t *testing.T, err error) (id, found string) {
	t.Helper()
	var r *check.Refusal
	if !errors.As(err, &r) || len(r.Checks) != 1 || r.Checks[0].Outcome != check.Fail {
		t.Fatalf("want a refusal with one check, got %v", err)
	}
	return r.Checks[0].ID, r.Checks[0].Found
}

// attributes are policies that a site could add.
var attributes = map[string]string{"site.cedar": `
@id("high-needs-several-factors")
forbid (
  principal is Coffer::User,
  action == Coffer::Action::"ApproveGrant",
  resource
)
when { resource.sensitivity.contains("high") && context.assurance < 2 };

@id("apollo-is-for-its-group")
forbid (
  principal is Coffer::User,
  action == Coffer::Action::"RequestGrant",
  resource
)
when { resource.project.contains("apollo") }
unless { principal in Coffer::Group::"apollo" };

@id("office-hours")
forbid (
  principal is Coffer::User,
  action == Coffer::Action::"ApproveGrant",
  resource
)
unless { context.now.toTime() >= duration("8h") && context.now.toTime() < duration("18h") };

@id("fresh-sign-in")
forbid (
  principal is Coffer::User,
  action == Coffer::Action::"UpdateAssetPolicy",
  resource
)
unless { context has signedIn && context.now.durationSince(context.signedIn) <= duration("1h") };

@id("no-public-networks")
forbid (
  principal is Coffer::User,
  action in Coffer::Action::"change",
  resource
)
unless { context.network == "loopback" || (context has address && context.address.isInRange(ip("10.1.0.0/16"))) };
`}

func TestAuthorize(t *testing.T) {
	s := newSet(t, people(), attributes)
	with := func(p access.Principal, change func(*access.Principal)) access.Principal { change(&p); return p }
	labelled := func(r access.Resource, change func(*access.Resource)) access.Resource { change(&r); return r }
	approver := user("alice", "weights-approvers")
	high := labelled(asset("olga"), func(r *access.Resource) { r.Sensitivity = "high" })
	eu := labelled(asset("olga"), func(r *access.Resource) { r.Region = "eu" })
	apollo := labelled(asset("olga"), func(r *access.Resource) { r.Project = "apollo" })
	owner := user("olga", "weights-owners")
	recent := with(owner, func(p *access.Principal) { p.SignedIn = noon.Add(-time.Minute) })
	from := func(a string) access.Principal {
		return with(approver, func(p *access.Principal) { p.Address = netip.MustParseAddr(a) })
	}
	for _, tc := range []struct {
		name      string
		principal access.Principal
		action    string
		resource  access.Resource
		at        time.Duration
		// id is of the failed check, by the policy that decided; empty is permitted.
		id, by string
	}{
		{"an approver approves", approver, "ApproveGrant", asset("olga"), 0, "", ""},
		{"an approver who left the group", user("alice"), "ApproveGrant", asset("olga"), 0, "access.denied", "no role"},
		{"a group that the set does not declare", user("alice", "weights-approvers2"), "ApproveGrant", asset("olga"), 0, "access.denied", "no role"},
		{"a group named like a role", user("alice", "approver"), "ApproveGrant", asset("olga"), 0, "access.denied", "no role"},
		{"high sensitivity with one factor", approver, "ApproveGrant", high, 0, "access.forbidden", "high-needs-several-factors"},
		{"high sensitivity with several factors", with(approver, func(p *access.Principal) { p.Assurance = access.AssuranceMulti }), "ApproveGrant", high, 0, "", ""},
		{"before office hours", approver, "ApproveGrant", asset("olga"), -4*time.Hour - time.Second, "access.forbidden", "office-hours"},
		{"as the office opens", approver, "ApproveGrant", asset("olga"), -4 * time.Hour, "", ""},
		{"as the office closes", approver, "ApproveGrant", asset("olga"), 6 * time.Hour, "access.forbidden", "office-hours"},
		{"from the internal network", from("10.1.2.3"), "ApproveGrant", asset("olga"), 0, "", ""},
		{"the same in IPv6 form", from("::ffff:10.1.2.3"), "ApproveGrant", asset("olga"), 0, "", ""},
		{"from another private network", from("10.2.0.1"), "ApproveGrant", asset("olga"), 0, "access.forbidden", "no-public-networks"},
		{"from the world", from("203.0.113.9"), "ApproveGrant", asset("olga"), 0, "access.forbidden", "no-public-networks"},
		{"from nobody knows where", with(approver, func(p *access.Principal) { p.Address = netip.Addr{} }), "ApproveGrant", asset("olga"), 0, "access.forbidden", "no-public-networks"},
		{"a sign-in of this hour", recent, "UpdateAssetPolicy", asset("olga"), 0, "", ""},
		{"a sign-in of this morning", recent, "UpdateAssetPolicy", asset("olga"), time.Hour, "access.forbidden", "fresh-sign-in"},
		{"a sign-in at an unknown time", owner, "UpdateAssetPolicy", asset("olga"), 0, "access.forbidden", "fresh-sign-in"},
		{"another owner's asset", recent, "UpdateAssetPolicy", asset("otto"), 0, "access.denied", "none does"},
		{"another owner's grant", owner, "Revoke", grant("otto"), 0, "access.denied", "none does"},
		{"a project's engineer", user("emil", "ml", "apollo"), "RequestGrant", apollo, 0, "", ""},
		{"an engineer outside the project", user("emil", "ml"), "RequestGrant", apollo, 0, "access.forbidden", "apollo-is-for-its-group"},
		{"the project's group alone", user("emil", "apollo"), "RequestGrant", apollo, 0, "access.denied", "no role"},
		{"a node in the region", service("agent", "node-eu"), "Release", eu, 0, "", ""},
		{"a node in another region", service("agent", "node-us"), "Release", eu, 0, "access.forbidden", "region"},
		{"a node that no one placed", service("agent", "node-9"), "Release", eu, 0, "access.forbidden", "region"},
		{"a node that no one placed, no region", service("agent", "node-9"), "Release", asset("olga"), 0, "", ""},
		{"a scheduler requests", service("scheduler", "slurm"), "RequestGrant", asset("olga"), 0, "", ""},
		{"a scheduler approves", service("scheduler", "slurm"), "ApproveGrant", asset("olga"), 0, "access.forbidden", "services-decide-nothing"},
		{"a scheduler in an approvers' group", access.Principal{Role: "scheduler", Name: "slurm", Groups: []string{"weights-approvers"}}, "DenyGrant", grant("olga"), 0, "access.forbidden", "services-decide-nothing"},
		{"a scheduler obtains a key", service("scheduler", "slurm"), "Release", asset("olga"), 0, "access.forbidden", "only-agents-release"},
		{"an auditor reads the log", user("ines", "compliance"), "Entries", thing("Job"), 0, "", ""},
		{"an auditor who is an owner too changes", user("olga", "compliance", "weights-owners"), "Revoke", grant("olga"), 0, "access.forbidden", "auditors-change-nothing"},
		{"an operator lifts a revocation", user("omar", "sre"), "LiftRevocation", thing("Broker"), 0, "", ""},
		{"an operator rewraps keys", user("omar", "sre"), "RewrapKeys", thing("Broker"), 0, "", ""},
		{"a scheduler rewraps keys", service("scheduler", "slurm"), "RewrapKeys", thing("Broker"), 0, "access.forbidden", "services-decide-nothing"},
		{"an owner rewraps keys", user("olga", "weights-owners"), "RewrapKeys", thing("Broker"), 0, "access.denied", "none does"},
		{"an operator approves", user("omar", "sre"), "ApproveGrant", asset("olga"), 0, "access.forbidden", "operators-decide-nothing"},
		{"an operator who is an approver too approves", user("omar", "sre", "weights-approvers"), "ApproveGrant", asset("olga"), 0, "access.forbidden", "operators-decide-nothing"},
		{"an operator obtains a key", user("omar", "sre"), "Release", asset("olga"), 0, "access.forbidden", "only-agents-release"},
		{"an owner obtains a key", user("olga", "weights-owners"), "Release", asset("olga"), 0, "access.forbidden", "only-agents-release"},
		{"an engineer lists everyone's grants", user("emil", "ml"), "ListGrants", thing("Broker"), 0, "access.denied", "none does"},
		{"an engineer lists their own requests", user("emil", "ml"), "ListOwnGrants", thing("Broker"), 0, "", ""},
		{"a node lists its own requests", service("agent", "node-eu"), "ListOwnGrants", thing("Broker"), 0, "access.denied", "none does"},
		{"an engineer lists a plan's grants", user("emil", "ml"), "ListGrants", thing("Plan"), 0, "", ""},
		{"a role that nobody knows", service("root", "x"), "Info", thing("Broker"), 0, "access.request", "role"},
		{"nobody", access.Principal{}, "Info", thing("Broker"), 0, "access.request", "without a name"},
		{"a call that nobody knows", owner, "Export", asset("olga"), 0, "access.request", "Export"},
		{"no call", owner, "", asset("olga"), 0, "access.request", "action"},
		{"a group of calls", owner, "read", thing("Broker"), 0, "access.request", "read"},
		{"a call about a thing that it is not of", owner, "Release", thing("Broker"), 0, "access.request", "Broker"},
		{"a thing that nobody knows", owner, "Info", thing("Vault"), 0, "access.request", "Vault"},
		{"nothing", owner, "Info", access.Resource{}, 0, "access.request", "resource"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := s.Authorize(access.Request{Principal: tc.principal, Action: tc.action, Resource: tc.resource}, noon.Add(tc.at))
			if tc.id == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			id, found := failed(t, err)
			if id != tc.id || !strings.Contains(found, tc.by) {
				t.Errorf("%s: %s; want %s by %s", id, found, tc.id, tc.by)
			}
		})
	}
}

func TestRefusalsNameEverything(t *testing.T) {
	s := newSet(t, people(), nil)
	_, found := failed(t, s.Authorize(access.Request{Principal: user("omar", "sre"), Action: "ApproveGrant", Resource: asset("olga")}, noon))
	for _, want := range []string{"operators-decide-nothing", "ApproveGrant", "user/omar", "roles operator", `asset "weights-a"`} {
		if !strings.Contains(found, want) {
			t.Errorf("%q is missing in %q", want, found)
		}
	}
}

// A policy that fails to evaluate is passed over by Cedar: a forbid that fails
// would permit.
func TestAPolicyThatFailsDenies(t *testing.T) {
	s := newSet(t, people(), map[string]string{"site.cedar": `
@id("overflows")
forbid (principal, action == Coffer::Action::"Info", resource)
when { context.assurance + 9223372036854775807 > 0 && false };
`})
	r := access.Request{Principal: user("ines", "compliance"), Action: "Info", Resource: thing("Broker")}
	r.Principal.Assurance = access.AssuranceUnknown
	if err := s.Authorize(r, noon); err != nil {
		t.Fatal("control:", err)
	}
	r.Principal.Assurance = access.AssuranceSingle
	if id, found := failed(t, s.Authorize(r, noon)); id != "access.error" || !strings.Contains(found, "overflows") {
		t.Errorf("%s: %s", id, found)
	}
}

func TestZeroSetDenies(t *testing.T) {
	for name, s := range map[string]*access.Set{"nil": nil, "zero": {}} {
		r := access.Request{Principal: user("olga", "weights-owners"), Action: "Info", Resource: thing("Broker")}
		if id, _ := failed(t, s.Authorize(r, noon)); id != "access.policy-set" {
			t.Errorf("%s: %s", name, id)
		}
		if _, _, ok := s.Approver("alice"); ok {
			t.Errorf("%s set knows an approver", name)
		}
	}
}

// table is who may do what under the default policies, as docs/access.md has it.
func table(t *testing.T, s *access.Set) string {
	principals := []struct {
		role string
		p    access.Principal
	}{
		{"engineer", user("me", "ml")},
		{"owner", user("me", "weights-owners")},
		{"approver", user("me", "weights-approvers")},
		{"auditor", user("me", "compliance")},
		{"operator", user("me", "sre")},
		{"scheduler", service("scheduler", "me")},
		{"agent", service("agent", "me")},
	}
	kinds := []string{access.TypeBroker, access.TypePlan, access.TypeJob, access.TypeAsset, access.TypeGrant}
	var b strings.Builder
	b.WriteString("| call | on |")
	for _, p := range principals {
		b.WriteString(" " + p.role + " |")
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", len(principals)) + "\n")
	for _, action := range s.Actions() {
		for _, kind := range kinds {
			row, fits := fmt.Sprintf("| %s | %s |", action, strings.ToLower(kind)), false
			for _, p := range principals {
				may := func(owner string) bool {
					r := thing(kind)
					if kind == access.TypeAsset || kind == access.TypeGrant {
						r.Owner = owner
					}
					err := s.Authorize(access.Request{Principal: p.p, Action: action, Resource: r}, noon)
					if err == nil {
						fits = true
						return true
					}
					id, _ := failed(t, err)
					fits = fits || id != "access.request"
					return false
				}
				own, others := may("me"), may("you")
				cell := ""
				switch {
				case own && others:
					cell = "yes"
				case own:
					cell = "own"
				case others:
					t.Errorf("%s may %s what is others' alone", p.role, action)
				}
				row += " " + cell + " |"
			}
			if fits {
				b.WriteString(row + "\n")
			}
		}
	}
	return b.String()
}

func TestDocumentedTable(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/access.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := table(t, newSet(t, people(), nil)); !strings.Contains(string(doc), want) {
		t.Errorf("docs/access.md does not have this table:\n%s", want)
	}
}

func TestDirectory(t *testing.T) {
	a, b := newKey(t), newKey(t)
	p := people()
	p.Users = []access.User{{Name: "alice", Groups: []string{"weights-approvers"}, Keys: []string{line(a), line(b)}}, {Name: "bob"}}
	s := newSet(t, p, nil)
	keys, groups, ok := s.Approver("alice")
	if !ok || len(keys) != 2 || len(groups) != 1 || groups[0] != "weights-approvers" {
		t.Errorf("alice: %v %v %v", keys, groups, ok)
	}
	if keys, groups, ok := s.Approver("bob"); !ok || len(keys)+len(groups) != 0 {
		t.Errorf("bob: %v %v %v", keys, groups, ok)
	}
	if _, _, ok := s.Approver("mallory"); ok {
		t.Error("mallory is known")
	}
	m := newMaintainers(t, 1, "ada")
	for name, change := range map[string]func(*access.People){
		"control":                      func(*access.People) {},
		"a user twice":                 func(p *access.People) { p.Users = append(p.Users, p.Users[1]) },
		"a user without a name":        func(p *access.People) { p.Users[1].Name = "" },
		"a name with a line break":     func(p *access.People) { p.Users[1].Name = "bob\nalice" },
		"a group twice":                func(p *access.People) { p.Groups = append(p.Groups, p.Groups[0]) },
		"a role that is none":          func(p *access.People) { p.Groups[0].Roles = []string{"root"} },
		"a service's role":             func(p *access.People) { p.Groups[0].Roles = []string{"agent"} },
		"a group that is not declared": func(p *access.People) { p.Users[1].Groups = []string{"none"} },
		"one key of two people":        func(p *access.People) { p.Users[1].Keys = []string{line(a)} },
		"two keys in one string":       func(p *access.People) { p.Users[1].Keys = []string{line(newKey(t)) + line(newKey(t))} },
		"a key that is none":           func(p *access.People) { p.Users[1].Keys = []string{"ssh-ed25519 AAAA"} },
		"a service of people's role":   func(p *access.People) { p.Workloads[0].Name = "owner/x" },
		"a service twice":              func(p *access.People) { p.Workloads = append(p.Workloads, p.Workloads[0]) },
	} {
		q := people()
		q.Users = []access.User{{Name: "alice", Groups: []string{"weights-approvers"}, Keys: []string{line(a), line(b)}}, {Name: "bob"}}
		change(&q)
		if _, err := access.Open(m.files(t, 1, q, nil, "ada"), m.trust); (err == nil) != (name == "control") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkAuthorize(b *testing.B) {
	s := newSet(b, people(), nil)
	r := access.Request{Principal: service("agent", "node-eu"), Action: "Release", Resource: asset("olga")}
	for b.Loop() {
		if err := s.Authorize(r, noon); err != nil {
			b.Fatal(err)
		}
	}
}

// The schema speaks of every call of the broker, and of no other.
func TestActions(t *testing.T) {
	var want []string
	for _, a := range broker.Actions() {
		want = append(want, string(a))
	}
	slices.Sort(want)
	if got := newSet(t, people(), nil).Actions(); !slices.Equal(got, want) {
		t.Errorf("schema has %v\nbroker has %v", got, want)
	}
}

// No default policy gives a role what the broker's own ceiling denies it.
func TestCeiling(t *testing.T) {
	s := newSet(t, people(), nil)
	groups := map[string]string{"engineer": "ml", "owner": "weights-owners", "approver": "weights-approvers", "auditor": "compliance", "operator": "sre"}
	for _, role := range access.Roles() {
		p := service(role, "me")
		if g := groups[role]; g != "" {
			p = user("me", g)
		}
		for _, a := range broker.Actions() {
			for _, kind := range []string{access.TypeBroker, access.TypePlan, access.TypeJob, access.TypeAsset, access.TypeGrant} {
				r := thing(kind)
				r.Owner = "me"
				if err := s.Authorize(access.Request{Principal: p, Action: string(a), Resource: r}, noon); err == nil && !broker.MayEver(role, a) {
					t.Errorf("%s may %s on %s, which the broker never lets it", role, a, kind)
				}
			}
		}
	}
}

func TestAuthorizer(t *testing.T) {
	var a access.Authorizer
	alice := broker.Actor{Role: broker.RoleUser, Name: "alice", Groups: []string{"weights-approvers"}, Network: "127.0.0.1", Assurance: 1}
	q := broker.Access{Principal: alice, Action: broker.ActionApproveGrant, Resource: broker.Resource{Kind: "asset", Name: "w", Owner: "olga"}, Time: noon}
	if id, _ := failed(t, a.Authorize(t.Context(), q)); id != "access.policy-set" {
		t.Error(id)
	}
	if _, _, err := a.Approver(t.Context(), "alice"); !errors.Is(err, broker.ErrNotFound) {
		t.Error(err)
	}
	if a.Use(nil) == nil || a.Use(&access.Set{}) == nil {
		t.Error("a set that nobody opened is in force")
	}
	p := people()
	p.Users = []access.User{{Name: "alice", Groups: []string{"weights-approvers"}, Keys: []string{line(newKey(t))}}}
	if err := a.Use(newSet(t, p, attributes)); err != nil {
		t.Fatal(err)
	}
	if keys, groups, err := a.Approver(t.Context(), "alice"); err != nil || len(keys) != 1 || len(groups) != 1 {
		t.Error(keys, groups, err)
	}
	with := func(change func(*broker.Access)) broker.Access { c := q; change(&c); return c }
	for _, tc := range []struct {
		name string
		q    broker.Access
		id   string
	}{
		{"control", q, ""},
		{"an asset of high sensitivity", with(func(q *broker.Access) {
			q.Resource = broker.Resource{Kind: "asset", Name: "w", Owner: "olga", AssetKind: broker.KindWeights, Labels: broker.Labels{Sensitivity: "high"}}
		}), "access.forbidden"},
		{"the same with several factors", with(func(q *broker.Access) {
			q.Resource = broker.Resource{Kind: "asset", Name: "w", Owner: "olga", AssetKind: broker.KindWeights, Labels: broker.Labels{Sensitivity: "high"}}
			q.Principal.Assurance = 2
		}), ""},
		{"at night", with(func(q *broker.Access) { q.Time = noon.Add(12 * time.Hour) }), "access.forbidden"},
		{"from elsewhere", with(func(q *broker.Access) { q.Principal.Network = "203.0.113.9" }), "access.forbidden"},
		{"from an address that is none", with(func(q *broker.Access) { q.Principal.Network = "localhost" }), "access.forbidden"},
		{"groups without a sign-in", with(func(q *broker.Access) { q.Principal.Role, q.Principal.Groups = "", nil }), "access.denied"},
		{"a role by certificate", with(func(q *broker.Access) { q.Principal.Role, q.Principal.Groups = "approver", nil }), ""},
		{"all grants", with(func(q *broker.Access) { q.Action, q.Resource = broker.ActionListGrants, broker.Resource{Kind: "grant"} }), ""},
		{"own grants, by an engineer", with(func(q *broker.Access) {
			q.Action, q.Resource, q.Principal.Groups = broker.ActionListOwnGrants, broker.Resource{}, []string{"ml"}
		}), ""},
		{"all grants, by an engineer", with(func(q *broker.Access) {
			q.Action, q.Resource, q.Principal.Groups = broker.ActionListGrants, broker.Resource{Kind: "grant"}, []string{"ml"}
		}), "access.denied"},
		{"a plan's grants, by an engineer", with(func(q *broker.Access) {
			q.Action, q.Resource, q.Principal.Groups = broker.ActionListGrants, broker.Resource{Kind: "grant", Plan: "sha384:00"}, []string{"ml"}
		}), ""},
		{"a thing that nobody knows", with(func(q *broker.Access) { q.Resource.Kind = "vault" }), "access.request"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := a.Authorize(t.Context(), tc.q)
			if tc.id == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if id, found := failed(t, err); id != tc.id {
				t.Errorf("%s: %s", id, found)
			}
		})
	}
}

func clone(files map[string][]byte) map[string][]byte { return maps.Clone(files) }
