// Package access decides who may call what at the broker: Cedar policies over
// roles, groups, labels, time, network and assurance, from a policy set that m of
// n maintainers signed.
//
// Trusted: the maintainers' keys and their threshold, which are not part of a
// set; who the caller says a principal is; the clock. Checked: every signature,
// every file's digest, the broker that a set is for, its serial number, every
// policy against the schema, and each request against both. What no policy
// permits is denied, a forbid wins, and a policy that cannot be evaluated denies.
// Not checked: ownership of what a request names, approvals and releases; the
// broker has those rules, and they hold whatever a policy permits.
package access

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	cedar "github.com/cedar-policy/cedar-go"

	"github.com/coffer-run/coffer/attest/check"
)

// Roles that a principal may have.
const (
	RoleEngineer  = "engineer"
	RoleOwner     = "owner"
	RoleApprover  = "approver"
	RoleAuditor   = "auditor"
	RoleOperator  = "operator"
	RoleScheduler = "scheduler"
	RoleAgent     = "agent"
)

// Roles returns every role.
func Roles() []string {
	return []string{RoleEngineer, RoleOwner, RoleApprover, RoleAuditor, RoleOperator, RoleScheduler, RoleAgent}
}

// workload reports whether a role is that of a service and not of a person.
func workload(role string) bool { return role == RoleAgent || role == RoleScheduler }

// Assurance is how sure a sign-in is. The zero value is the least.
type Assurance int

// Levels of assurance.
const (
	AssuranceUnknown Assurance = iota
	// AssuranceSingle is one factor: a password, or the key of a certificate.
	AssuranceSingle
	// AssuranceMulti is several factors.
	AssuranceMulti
	// AssuranceHardware is a hardware-backed factor that cannot be phished.
	AssuranceHardware
)

// Principal is who asks, as authentication found out.
type Principal struct {
	// Role and Name are those of a SPIFFE name. Role is empty for people who
	// signed in by OpenID Connect: their roles come from Groups.
	Role string
	Name string
	// Groups are those of the sign-in. What the policy set does not declare is
	// ignored.
	Groups    []string
	Assurance Assurance
	// SignedIn is zero if nobody says when.
	SignedIn time.Time
	// Address is where the request came from, invalid if not known.
	Address netip.Addr
}

// Types of resources.
const (
	TypeBroker = "Broker"
	TypePlan   = "Plan"
	TypeJob    = "Job"
	TypeAsset  = "Asset"
	TypeGrant  = "Grant"
)

// Resource is what a request is about.
type Resource struct {
	Type string
	// ID is the asset's name, the grant's or job's id, the plan's digest, or
	// the broker's name.
	ID string
	// Owner is the owner of the asset or of the grant's assets.
	Owner string
	// Kind is that of an asset.
	Kind string
	// Sensitivity, Region and Project are the labels of an asset, each empty or
	// one value.
	Sensitivity, Region, Project string
}

// Request is one question: may this principal do this with that?
type Request struct {
	Principal Principal
	// Action is the name of the broker's call: "ApproveGrant".
	Action   string
	Resource Resource
}

const namespace = "Coffer::"

func uid(kind, id string) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(namespace+kind), cedar.String(id))
}

// Actions returns the names of the calls that policies can speak of, sorted.
func (s *Set) Actions() []string {
	var out []string
	for a, def := range s.schema.Actions {
		if def.AppliesTo != nil {
			out = append(out, string(a.ID))
		}
	}
	slices.Sort(out)
	return out
}

// Authorize returns nil if the set's policies permit the request at now, and a
// check.Refusal that names the policies that decided otherwise.
func (s *Set) Authorize(r Request, now time.Time) error {
	if s == nil || s.policies == nil {
		return refuse(r, nil, "access.policy-set", "a policy set that maintainers signed", "none", "load one")
	}
	e, err := s.entities(r)
	if err != nil {
		return refuse(r, nil, "access.request", "a request that fits the schema of access policies", err.Error(), "report this as a defect")
	}
	q := cedar.Request{
		Principal: e.principal.UID,
		Action:    uid("Action", r.Action),
		Resource:  e.resource.UID,
		Context:   situation(r.Principal, now),
	}
	if err := s.fits(q, e); err != nil {
		return refuse(r, nil, "access.request", "a request that fits the schema of access policies", err.Error(), "report this as a defect")
	}
	decision, why := cedar.Authorize(s.policies, e, q)
	roles := s.roles(r.Principal)
	// Cedar passes over a policy that fails, which for a forbid would permit.
	if len(why.Errors) > 0 {
		var ids []string
		for _, e := range why.Errors {
			ids = append(ids, string(e.PolicyID))
		}
		slices.Sort(ids)
		return refuse(r, roles, "access.error", "policies that can be evaluated", "failed: "+strings.Join(ids, ", "), "ask the maintainers to mend the policy set")
	}
	var ids []string
	for _, reason := range why.Reasons {
		ids = append(ids, string(reason.PolicyID))
	}
	slices.Sort(ids)
	switch {
	case decision == cedar.Allow && len(ids) > 0:
		return nil
	case len(ids) > 0:
		return refuse(r, roles, "access.forbidden", "no policy that forbids it", "forbidden by policy "+strings.Join(ids, ", "), "the policy says what would have to change")
	}
	return refuse(r, roles, "access.denied", "a policy that permits it", "none does", "use an identity whose role may do this, or ask the maintainers")
}

// refuse names action, principal and resource besides what decided.
func refuse(r Request, roles []string, id, expected, found, hint string) error {
	var l check.List
	kind, has := "user", "roles "+strings.Join(roles, ", ")
	if r.Principal.Role != "" {
		kind = r.Principal.Role
	}
	if len(roles) == 0 {
		has = "no role"
	}
	l.Fail(id, expected, fmt.Sprintf("%s for %s by %s/%s (%s) on %s %q", found, trim(r.Action), trim(kind), trim(r.Principal.Name), has, trim(strings.ToLower(r.Resource.Type)), trim(r.Resource.ID)), hint)
	return check.Refuse("authorize", l)
}

// situation is the context of a request.
func situation(p Principal, now time.Time) cedar.Record {
	m := cedar.RecordMap{
		"now":       cedar.NewDatetime(now),
		"assurance": cedar.Long(p.Assurance),
		"network":   cedar.String(networkOf(p.Address)),
	}
	if !p.SignedIn.IsZero() {
		m["signedIn"] = cedar.NewDatetime(p.SignedIn)
	}
	if p.Address.IsValid() {
		// IPv4 in IPv6 is the same address to whoever writes a policy.
		a := p.Address.Unmap().WithZone("")
		m["address"] = cedar.IPAddr(netip.PrefixFrom(a, a.BitLen()))
	}
	return cedar.NewRecord(m)
}

// networkOf is the class of an address: loopback, private (RFC 1918, RFC 4193,
// link-local), public, or unknown.
func networkOf(a netip.Addr) string {
	a = a.Unmap()
	switch {
	case !a.IsValid() || a.IsUnspecified() || a.IsMulticast():
		return "unknown"
	case a.IsLoopback():
		return "loopback"
	case a.IsPrivate() || a.IsLinkLocalUnicast():
		return "private"
	}
	return "public"
}

// entities are what policies see of one request: the roles and groups of the
// set, the principal as their member, and the resource with its attributes.
type entities struct {
	standing            cedar.EntityMap
	principal, resource cedar.Entity
}

// Get implements cedar.EntityGetter.
func (e entities) Get(id cedar.EntityUID) (cedar.Entity, bool) {
	switch id {
	case e.principal.UID:
		return e.principal, true
	case e.resource.UID:
		return e.resource, true
	}
	return e.standing.Get(id)
}

func entity(id cedar.EntityUID, attributes cedar.RecordMap, parents ...cedar.EntityUID) cedar.Entity {
	return cedar.Entity{UID: id, Parents: cedar.NewEntityUIDSet(parents...), Attributes: cedar.NewRecord(attributes)}
}

func (s *Set) entities(r Request) (entities, error) {
	p, err := s.principal(r.Principal)
	if err != nil {
		return entities{}, err
	}
	return entities{standing: s.standing, principal: p, resource: resource(r.Resource)}, nil
}

func (s *Set) principal(p Principal) (cedar.Entity, error) {
	switch {
	case p.Name == "":
		return cedar.Entity{}, errors.New("principal without a name")
	case p.Role != "" && !slices.Contains(Roles(), p.Role):
		return cedar.Entity{}, fmt.Errorf("principal of role %.40q", p.Role)
	case workload(p.Role):
		name := p.Role + "/" + p.Name
		attributes := cedar.RecordMap{}
		if w, ok := s.directory.workloads[name]; ok && w.Region != "" {
			attributes["region"] = cedar.String(w.Region)
		}
		return entity(uid("Workload", name), attributes, uid("Role", p.Role)), nil
	}
	var parents []cedar.EntityUID
	for _, g := range s.directory.groups {
		if slices.Contains(p.Groups, g.Name) {
			parents = append(parents, uid("Group", g.Name))
		}
	}
	if p.Role != "" {
		parents = append(parents, uid("Role", p.Role))
	}
	return entity(uid("User", p.Name), nil, parents...), nil
}

func resource(r Resource) cedar.Entity {
	attributes := cedar.RecordMap{}
	switch r.Type {
	case TypeAsset:
		attributes["owner"], attributes["kind"] = uid("User", r.Owner), cedar.String(r.Kind)
		attributes["sensitivity"], attributes["region"], attributes["project"] = label(r.Sensitivity), label(r.Region), label(r.Project)
	case TypeGrant:
		attributes["owner"] = uid("User", r.Owner)
	}
	return entity(uid(r.Type, r.ID), attributes)
}

// label is a set, because Cedar has no value for none.
func label(v string) cedar.Set {
	if v == "" {
		return cedar.NewSet()
	}
	return cedar.NewSet(cedar.String(v))
}

// roles returns what a principal is, for messages and logs.
func (s *Set) roles(p Principal) []string {
	have := map[string]bool{p.Role: p.Role != ""}
	if !workload(p.Role) {
		for _, g := range s.directory.groups {
			if slices.Contains(p.Groups, g.Name) {
				for _, r := range g.Roles {
					have[r] = true
				}
			}
		}
	}
	var out []string
	for _, r := range Roles() {
		if have[r] {
			out = append(out, r)
		}
	}
	return out
}

// Roles returns the roles of a principal under this set, in the order of the
// package's Roles.
func (s *Set) Roles(p Principal) []string {
	if s == nil {
		return nil
	}
	return s.roles(p)
}

// trim bounds foreign text in messages.
func trim(s string) string {
	if len(s) > 120 {
		return s[:120] + "..."
	}
	return s
}
