package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/identity"
	"github.com/coffer-run/coffer/runner/server"
)

// Access says which people may call, besides those with certificates. Without it
// nobody signs in.
type Access struct {
	// Issuers are the OpenID providers whose people may call. Each has an audience
	// that is for nodes alone: a token that the broker takes would let the node act
	// for its person there.
	Issuers []identity.Configured `json:"issuers"`
	// Roles are what groups of people may act as: engineer, owner, operator or
	// auditor. Groups that are not here mean nothing.
	Roles map[string]string `json:"roles"`
}

// peopleRoles are those that a group can give: what agents and schedulers are,
// a certificate says.
var peopleRoles = []string{daemon.RoleEngineer, daemon.RoleOwner, daemon.RoleOperator, daemon.RoleAuditor}

func (a *Access) validate() error {
	if a == nil {
		return nil
	}
	if len(a.Issuers) == 0 || len(a.Roles) == 0 {
		return errors.New("configuration: access: want issuers and roles")
	}
	for group, role := range a.Roles {
		if group == "" || !slices.Contains(peopleRoles, role) {
			return fmt.Errorf("configuration: access: group %.80q: role %.40q: want one of %v", group, role, peopleRoles)
		}
	}
	return nil
}

// callers says who calls and how they must come.
type callers struct {
	access   *Access
	verifier *identity.Verifier
}

// newCallers returns how callers are known, and the server's TLS configuration.
func newCallers(c Config) (*callers, *tls.Config, error) {
	if c.Access == nil {
		cfg, err := c.TLS.Server()
		return &callers{}, cfg, err
	}
	own, err := c.TLS.HTTPClient(daemon.RoleIssuer)
	if err != nil {
		return nil, nil, err
	}
	client, issuers, err := identity.Client(own, c.Access.Issuers)
	if err != nil {
		return nil, nil, err
	}
	v, err := identity.New(issuers, client, time.Now)
	if err != nil {
		return nil, nil, err
	}
	cfg, err := c.TLS.ServerForPeople()
	return &callers{c.Access, v}, cfg, err
}

// identify says who sent a request: whose certificate it came with, or whose token
// it brings. One of them: with both nobody could tell which counts.
func (k *callers) identify(r *http.Request) (server.Caller, error) {
	token, err := identity.Bearer(r)
	if err != nil {
		return server.Caller{}, err
	}
	switch {
	case token != "" && daemon.HasCertificate(r):
		var l check.List
		l.Fail("caller.identity", "a client certificate or a token", "both", "leave one of them out")
		return server.Caller{}, check.Refuse("authenticate", l)
	case token == "" || k.verifier == nil:
		role, name, err := daemon.Identity(r)
		if err != nil {
			return server.Caller{}, err
		}
		return server.Caller{Principal: role + "/" + name, Roles: []string{role}}, nil
	}
	p, err := k.verifier.Verify(r.Context(), token)
	if errors.Is(err, identity.ErrUnavailable) {
		return server.Caller{}, fmt.Errorf("%w: %w", server.ErrUnavailable, err)
	}
	if err != nil {
		return server.Caller{}, err
	}
	c := server.Caller{Principal: "user/" + p.Name}
	for _, g := range p.Groups {
		if role := k.access.Roles[g]; role != "" && !slices.Contains(c.Roles, role) {
			c.Roles = append(c.Roles, role)
		}
	}
	return c, nil
}
