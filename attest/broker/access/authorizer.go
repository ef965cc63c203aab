package access

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker"
)

// Authorizer answers a broker's questions from the policy set in force, and
// lets another set take its place. The zero value denies everything and knows
// nobody. It is safe for concurrent use.
type Authorizer struct{ set atomic.Pointer[Set] }

var (
	_ broker.Authorizer = (*Authorizer)(nil)
	_ broker.Directory  = (*Authorizer)(nil)
)

// Use puts a set into force. It does not look at the one before: what the broker
// has logged last decides whether a set may follow (broker.LogPolicySet).
func (a *Authorizer) Use(s *Set) error {
	if s == nil || s.policies == nil {
		return errors.New("no policy set to use")
	}
	a.set.Store(s)
	return nil
}

// Set returns the set in force, nil if there is none.
func (a *Authorizer) Set() *Set { return a.set.Load() }

// Authorize implements broker.Authorizer.
func (a *Authorizer) Authorize(_ context.Context, q broker.Access) error {
	p := Principal{
		Role: q.Principal.Role, Name: q.Principal.Name, Groups: q.Principal.Groups,
		Assurance: Assurance(q.Principal.Assurance), SignedIn: q.Principal.SignedIn,
	}
	if p.Role == broker.RoleUser {
		p.Role = ""
	}
	// An address that cannot be read is not known, which policies see.
	p.Address, _ = netip.ParseAddr(q.Principal.Network)
	r := Resource{ID: q.Resource.Name, Owner: q.Resource.Owner, Kind: string(q.Resource.AssetKind)}
	switch q.Resource.Kind {
	case "asset":
		r.Type = TypeAsset
	case "grant":
		r.Type = TypeGrant
		// Grants that have no name are a list of them: a plan's, or all.
		switch {
		case q.Resource.Name == "" && q.Resource.Plan != "":
			r.Type, r.ID = TypePlan, string(q.Resource.Plan)
		case q.Resource.Name == "":
			r.Type, r.ID = TypeBroker, "broker"
		}
	case "job":
		r.Type = TypeJob
	case "":
		r.Type, r.ID = TypeBroker, "broker"
	default:
		r.Type = q.Resource.Kind
	}
	r.Sensitivity, r.Region, r.Project = q.Resource.Labels.Sensitivity, q.Resource.Labels.Region, q.Resource.Labels.Project
	return a.set.Load().Authorize(Request{Principal: p, Action: string(q.Action), Resource: r}, q.Time)
}

// Approver implements broker.Directory.
func (a *Authorizer) Approver(_ context.Context, name string) (keys []ssh.PublicKey, groups []string, err error) {
	keys, groups, ok := a.set.Load().Approver(name)
	if !ok {
		return nil, nil, fmt.Errorf("approver %.80q: %w", name, broker.ErrNotFound)
	}
	return keys, groups, nil
}
