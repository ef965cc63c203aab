package plan

import (
	"errors"
	"fmt"
)

// Reseal is what a job without a container does: its holder opens each file of a
// sealed asset and seals it under the data key of another.
type Reseal struct {
	// Asset is the source, and Digest that of its sealed manifest.
	Asset  string `json:"asset"`
	Digest Digest `json:"digest"`
	// Checkpoint: the source is one checkpoint of those under the key of Asset, which
	// has no digest of its own.
	Checkpoint bool `json:"checkpoint,omitempty"`
	// To is the asset under whose key the files are sealed. Its digest is open: the
	// job sets it.
	To string `json:"to"`
}

// rulesNone are the rules of a sandbox that is none.
const rulesNone = "no-container/v1"

// NoContainer is the profile of a job without a container: no runtime, no flags,
// nothing to watch.
func NoContainer() Profile { return Profile{Version: SandboxVersion, Rules: rulesNone} }

// NoSandbox describes the sandbox of a job without a container.
func NoSandbox(jobID string) Sandbox {
	return Sandbox{Version: SandboxVersion, JobID: jobID, Profile: NoContainer()}
}

// none reports whether p is NoContainer. A profile that is that only in part is
// incomplete.
func (p Profile) none() bool {
	return p.Version == SandboxVersion && p.Rules == rulesNone && p.Shim == "" && p.ShimDigest == "" && p.Runtime == "" && p.RuntimeDigest == "" &&
		len(p.RuntimeFlags) == 0 && p.Trace == "" && p.ImageStore == "" && p.Egress == nil && p.RuleSet == "" && p.GPU == nil && p.ImageSigners == nil
}

// validateNone is an error if s has a container that its profile says it has not.
func (s Sandbox) validateNone() error {
	absent := func(raw []byte) bool { return len(raw) == 0 || string(raw) == "null" }
	if s.Profile.none() && (s.Image != "" || s.ImageSBOM != "" || len(s.Wrapper) > 0 || !absent(s.Trace) || !absent(s.Spec)) {
		return errors.New("sandbox without a container describes one")
	}
	return nil
}

// validateReseal wants a plan that reseals to do nothing else, and one that does
// not to have a container.
func (p Plan) validateReseal() error {
	none, err := NoContainer().Digest()
	if err != nil {
		return err
	}
	r := p.Reseal
	if r == nil {
		if p.SandboxProfile == none {
			return errors.New("plan runs a container in a sandbox without one")
		}
		return nil
	}
	switch {
	case r.Asset == "" || r.To == "" || r.Digest.Bytes() == nil:
		return errors.New("plan reseals from or to no asset")
	case r.Asset == r.To:
		return fmt.Errorf("plan reseals asset %.80q to itself", r.Asset)
	case p.Image != "" || len(p.Command) > 0 || len(p.Env) > 0 || len(p.Inputs) > 0 || p.Checkpoints != nil || len(p.Egress) > 0 || p.Resources.GPUs != 0:
		return errors.New("plan reseals, and has an image, command, variables, inputs, checkpoints, egress or GPUs as well")
	case p.SandboxProfile != none:
		return errors.New("plan reseals in a sandbox with a container")
	}
	return nil
}
