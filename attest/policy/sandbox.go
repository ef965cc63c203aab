package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// Sandbox are the rules for what the plan's sandbox is made of. That the agent keeps
// to the profile is the measured agent's word.
type Sandbox struct {
	// ImageStores lists where image content may lie: plan.ImageStoreTmpfs, ImageStoreDisk.
	ImageStores []string `json:"imageStores"`
	// RequireImageSignature refuses nodes that run images which nobody signed.
	RequireImageSignature bool `json:"requireImageSignature,omitempty"`
	// ImageSigners are acceptable digests of plan.ImageSigners. None means not
	// checked; with some, a node that names no signers is refused.
	ImageSigners []plan.Digest `json:"imageSigners,omitempty"`
}

func (s Sandbox) validate() error {
	if err := among("imageStores", s.ImageStores, []string{plan.ImageStoreTmpfs, plan.ImageStoreDisk}); err != nil {
		return err
	}
	if len(s.ImageSigners) > maxValues {
		return fmt.Errorf("imageSigners has %d values, at most %d are allowed", len(s.ImageSigners), maxValues)
	}
	for _, d := range s.ImageSigners {
		if d.Bytes() == nil {
			return errors.New("imageSigners: a value is no digest")
		}
	}
	return nil
}

// CheckSandbox holds a sandbox against the policy.
func (p Policy) CheckSandbox(l *check.List, s plan.Sandbox) {
	const store, signed = "policy.sandbox.image-store", "policy.sandbox.image-signature"
	switch {
	case !s.Profile.HasContainer():
		l.Skip(store, "the job runs no image")
		return
	case p.Sandbox == nil:
		l.Skip(store, "the policy does not ask where image content lies")
		return
	case slices.Contains(p.Sandbox.ImageStores, s.Profile.ImageStore):
		l.Pass(store, s.Profile.ImageStore)
	default:
		l.Fail(store, strings.Join(p.Sandbox.ImageStores, " or "), fmt.Sprintf("%.40q", s.Profile.ImageStore), "keep containerd's folders on a tmpfs, and say so in the agent's imageStore")
	}
	if !p.Sandbox.RequireImageSignature && len(p.Sandbox.ImageSigners) == 0 {
		l.Skip(signed, "the policy does not ask who signed the image")
		return
	}
	signers := s.Profile.ImageSigners
	if signers == nil || s.ImageSignature.Bytes() == nil {
		l.Fail(signed, "a node that runs signed images only", "one that names no signers", "name image signers in the agent's configuration")
		return
	}
	d, err := signers.Digest()
	switch {
	case err != nil:
		l.Fail(signed, "signers", err.Error(), "")
	case len(p.Sandbox.ImageSigners) > 0 && !slices.Contains(p.Sandbox.ImageSigners, d):
		l.Fail(signed, fmt.Sprintf("one of %d lists of signers", len(p.Sandbox.ImageSigners)), string(d), "run where the signers are those that the policy lists, or have it listed")
	default:
		l.Pass(signed, string(d))
	}
}
