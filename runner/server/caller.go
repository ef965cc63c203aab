package server

import (
	"context"
	"slices"
)

// Caller is who sent a request. The zero value may make no call.
type Caller struct {
	// Principal is the caller as grants name it: "engineer/ada" of a certificate,
	// "user/ada" of a token. What is submitted is this principal's.
	Principal string
	// Roles are what the caller may act as.
	Roles []string
}

// Roles of callers.
const (
	roleEngineer  = "engineer"
	roleOwner     = "owner"
	roleOperator  = "operator"
	roleAuditor   = "auditor"
	roleScheduler = "scheduler"
)

type callerKey struct{}

func callerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// may returns the caller's roles that may make a call.
func (c Caller) may(procedure string) []string {
	var out []string
	for _, r := range c.Roles {
		if c.Principal != "" && slices.Contains(allowed[procedure], r) {
			out = append(out, r)
		}
	}
	return out
}

// ofOwnOnly reports whether the caller may make a call for its own jobs only.
func (c Caller) ofOwnOnly(procedure string) bool {
	return !slices.ContainsFunc(c.may(procedure), func(r string) bool { return r != roleEngineer && r != roleScheduler })
}
