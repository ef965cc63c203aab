package broker

import (
	"context"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// Actor is who asks, as the server authenticated them.
type Actor struct {
	Role string
	Name string
	// ID is the SPIFFE ID of a workload, empty for others.
	ID string
	// Groups are a person's groups, as the identity provider or the policy set
	// says.
	Groups []string
	// ACR is the assurance level of the sign-in (OpenID Connect Core, section 2).
	ACR string
	// Assurance is what the server makes of ACR: 0 not known, 1 one factor, 2
	// several, 3 a hardware-backed one that cannot be phished.
	Assurance int
	// SignedIn is when the person signed in, zero if nobody says.
	SignedIn time.Time
	// Network is the address the call came from, without a port.
	Network string
}

func (a Actor) String() string { return a.Role + "/" + a.Name }

// RoleUser is a person whose policies decide by groups what he may do.
const RoleUser = "user"

// Action is one call of the broker, by the name of its RPC.
type Action string

// Actions.
const (
	ActionInfo              Action = "Info"
	ActionCreateAsset       Action = "CreateAsset"
	ActionReadAsset         Action = "ReadAsset"
	ActionUpdateAssetPolicy Action = "UpdateAssetPolicy"
	ActionCreateGrant       Action = "CreateGrant"
	ActionRequestGrant      Action = "RequestGrant"
	ActionApproveGrant      Action = "ApproveGrant"
	ActionConsentGrant      Action = "ConsentGrant"
	ActionDenyGrant         Action = "DenyGrant"
	ActionReadGrant         Action = "ReadGrant"
	ActionListGrants        Action = "ListGrants"
	// ActionListOwnGrants is to list the grants that one has asked for.
	ActionListOwnGrants Action = "ListOwnGrants"
	ActionRevoke        Action = "Revoke"
	// ActionRevokeAny is to revoke what another owns, or for all owners.
	ActionRevokeAny       Action = "RevokeAny"
	ActionListRevocations Action = "ListRevocations"
	ActionLiftRevocation  Action = "LiftRevocation"
	ActionRewrapKeys      Action = "RewrapKeys"
	ActionRelease         Action = "Release"
	ActionRenew           Action = "Renew"
	ActionReattest        Action = "Reattest"
	ActionReportStopped   Action = "ReportStopped"
	ActionCountersign     Action = "CountersignCheckpoint"
	ActionCommitReseal    Action = "CommitReseal"
	ActionLogBundle       Action = "LogBundle"
	ActionEntries         Action = "Entries"
	// ActionReadLog is to read the entries of every job.
	ActionReadLog Action = "ReadLog"
)

const (
	roleOwner     = "owner"
	roleAgent     = "agent"
	roleOperator  = "operator"
	roleEngineer  = "engineer"
	roleApprover  = "approver"
	roleAuditor   = "auditor"
	roleScheduler = "scheduler"
)

// Actions returns every action.
func Actions() []Action {
	return []Action{
		ActionInfo, ActionCreateAsset, ActionReadAsset, ActionUpdateAssetPolicy, ActionCreateGrant, ActionRequestGrant, ActionApproveGrant, ActionConsentGrant,
		ActionDenyGrant, ActionReadGrant, ActionListGrants, ActionListOwnGrants, ActionRevoke, ActionRevokeAny, ActionListRevocations, ActionLiftRevocation, ActionRewrapKeys, ActionRelease,
		ActionRenew, ActionReattest, ActionReportStopped, ActionCountersign, ActionCommitReseal, ActionLogBundle, ActionEntries, ActionReadLog,
	}
}

// MayEver says whether a role can be allowed an action at all. It is the ceiling
// of every Authorizer: no policy gives an agent a person's calls, nor a person
// the calls that act for a running job.
func MayEver(role string, a Action) bool {
	if role == RoleUser {
		return slices.ContainsFunc([]string{roleOwner, roleOperator, roleEngineer, roleApprover, roleAuditor}, func(r string) bool { return MayEver(r, a) })
	}
	switch a {
	case ActionInfo, ActionReadAsset, ActionReadGrant, ActionListGrants:
		return slices.Contains([]string{roleOwner, roleEngineer, roleAgent, roleAuditor, roleApprover, roleOperator, roleScheduler}, role)
	case ActionListOwnGrants:
		return role != roleAgent && MayEver(role, ActionListGrants)
	case ActionCreateAsset, ActionUpdateAssetPolicy, ActionCreateGrant, ActionConsentGrant:
		return role == roleOwner
	case ActionRequestGrant:
		return role == roleOwner || role == roleEngineer || role == roleScheduler
	case ActionApproveGrant:
		return role == roleApprover
	case ActionDenyGrant:
		return role == roleApprover || role == roleOwner
	case ActionRevoke:
		return role == roleOwner || role == roleOperator
	case ActionListRevocations:
		return role == roleOwner || role == roleOperator || role == roleAuditor
	case ActionRevokeAny, ActionLiftRevocation, ActionRewrapKeys:
		return role == roleOperator
	case ActionRelease, ActionRenew, ActionReattest, ActionReportStopped, ActionCountersign, ActionCommitReseal, ActionLogBundle:
		return role == roleAgent
	case ActionReadLog:
		return role == roleAuditor
	case ActionEntries:
		return role == roleOwner || role == roleAgent || role == roleAuditor || role == roleOperator
	}
	return false
}

// Resource is what an action is about. The zero Resource is the broker itself.
type Resource struct {
	// Kind is "asset", "grant", "job" or empty.
	Kind string
	Name string
	// Owner is the name of the owner of the asset or of the grant's assets.
	Owner     string
	AssetKind Kind
	Labels    Labels
	Plan      plan.Digest
}

// Access is one question to an Authorizer. A grant over several assets is one
// question for each.
type Access struct {
	Principal Actor
	Action    Action
	Resource  Resource
	Time      time.Time
	// Simulated is whether a result rooted in a simulation anchor asks.
	Simulated bool
}

// Authorizer decides who may do what.
//
// Authorize MUST return nil only if the policy in force allows it, and a
// *check.Refusal at stage "authorize" if it does not; every other error counts
// as no. It MUST be safe for concurrent use, quick, and hold no lock while it
// waits for anything.
type Authorizer interface {
	Authorize(ctx context.Context, a Access) error
}

// Roles is the Authorizer of a broker without policies: a caller may do what
// its role may ever do, and RoleUser nothing. Who deals with single plans lists
// the grants of a plan that he names, and not all. The broker's own rules of who
// owns what hold besides.
type Roles struct{}

// Authorize implements Authorizer.
func (Roles) Authorize(_ context.Context, a Access) error {
	if a.Principal.Role == RoleUser || a.Principal.Name == "" || !MayEver(a.Principal.Role, a.Action) {
		return Unauthorized("one of the roles that may call "+string(a.Action), trim(a.Principal.Role))
	}
	if of := a.Principal.Role; a.Action == ActionListGrants && a.Resource.Plan == "" && (of == roleEngineer || of == roleAgent || of == roleScheduler) {
		return Unauthorized("the digest of a plan, or a role that lists all grants", of+" without a plan")
	}
	return nil
}

// Unauthorized is the refusal of a caller who may not do what it asks.
func Unauthorized(expected, found string) error {
	var l check.List
	l.Fail("role", expected, found, "use an identity of another role")
	return check.Refuse("authorize", l)
}

// Directory knows approvers. Approver returns the SSH keys that a person signs
// approvals with and the groups that the person is in at this moment, or
// ErrNotFound. It MUST be quick and safe for concurrent use.
type Directory interface {
	Approver(ctx context.Context, name string) (keys []ssh.PublicKey, groups []string, err error)
}

// may asks the Authorizer.
func (b *Broker) may(ctx context.Context, who Actor, a Action, r Resource) error {
	return b.authorize(ctx, Access{Principal: who, Action: a, Resource: r, Time: b.now()})
}

// authorize asks the Authorizer what it may decide.
func (b *Broker) authorize(ctx context.Context, q Access) error {
	if !MayEver(q.Principal.Role, q.Action) {
		return Unauthorized("one of the roles that may ever call "+string(q.Action), trim(q.Principal.Role))
	}
	return b.access.Authorize(ctx, q)
}

func (a Asset) resource() Resource {
	return Resource{Kind: "asset", Name: a.Name, Owner: a.Owner, AssetKind: a.Kind, Labels: a.Labels}
}

func (g Grant) resource() Resource {
	return Resource{Kind: "grant", Name: g.ID, Owner: g.Owner, Plan: g.Plan}
}
