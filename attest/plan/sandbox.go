package plan

import (
	"encoding/json"
	"errors"
	"fmt"
)

// SandboxVersion is the only sandbox description version there is.
const SandboxVersion = "coffer.run/sandbox/v1"

// MaxSandbox bounds a sandbox description, in bytes.
const MaxSandbox = 512 << 10

// Profile is the set of rules from which sandboxes are made on a node. Its
// digest is part of every plan, so that other binaries or flags are another plan.
type Profile struct {
	Version string `json:"version"`
	// Shim is the containerd runtime name, "io.containerd.runc.v2".
	Shim       string `json:"shim"`
	ShimDigest Digest `json:"shimDigest"`
	// Runtime is what `runsc --version` says.
	Runtime       string   `json:"runtime"`
	RuntimeDigest Digest   `json:"runtimeDigest"`
	RuntimeFlags  []string `json:"runtimeFlags"`
	// Trace is the digest of the trace points that must be watched.
	Trace Digest `json:"trace"`
	// Rules names the version of the specification builder's allow-list.
	Rules string `json:"rules"`
	// ImageStore says where image content lies: ImageStoreTmpfs or ImageStoreDisk.
	ImageStore string `json:"imageStore"`
	// Egress is absent on a node that offers no network.
	Egress *EgressProfile `json:"egress,omitempty"`
	// RuleSet is the digest of the rules that the job's trace is held against
	// (docs/watching.md). Absent on a node without rules.
	RuleSet Digest `json:"ruleSet,omitempty"`
	// GPU is absent on a node that gives sandboxes no GPU device.
	GPU *GPUProfile `json:"gpu,omitempty"`
	// ImageSigners is who must have signed the images that run here. Absent on a node
	// that runs images which nobody signed.
	ImageSigners *ImageSigners `json:"imageSigners,omitempty"`
}

// Digest returns the SHA-384 of the canonical profile.
func (p Profile) Digest() (Digest, error) {
	if !p.none() && (p.Version != SandboxVersion || p.ShimDigest.Bytes() == nil || p.RuntimeDigest.Bytes() == nil || p.Trace.Bytes() == nil) {
		return "", errors.New("sandbox profile is incomplete")
	}
	b, err := Canonical(p)
	if err != nil {
		return "", err
	}
	return Sum(b), nil
}

// Sandbox describes one created, not yet started, sandbox. Its digest is bound
// into the evidence before any key is asked for.
type Sandbox struct {
	Version string  `json:"version"`
	JobID   string  `json:"jobId"`
	Image   string  `json:"image"`
	Profile Profile `json:"profile"`
	// ImageSignature is the digest of the image's signature (attest/bundle, part
	// image-signature). It is there if and only if the profile names signers.
	ImageSignature Digest `json:"imageSignature,omitempty"`
	// ImageSBOM is the digest of the image's bill of materials (attest/bundle, part
	// image-sbom). Absent where the agent found none.
	ImageSBOM Digest `json:"imageSbom,omitempty"`
	// Wrapper is the exact command line prefix with which the shim runs the
	// runtime for this job.
	Wrapper []string `json:"wrapper"`
	// Trace is the exact trace configuration handed to the runtime.
	Trace json.RawMessage `json:"trace"`
	// Spec is the OCI runtime specification, as created.
	Spec json.RawMessage `json:"spec"`
}

// Canonical returns the description in the form of RFC 8785.
func (s Sandbox) Canonical() ([]byte, error) {
	if s.Version != SandboxVersion {
		return nil, fmt.Errorf("sandbox version %.40q: want %q", s.Version, SandboxVersion)
	}
	return Canonical(s)
}

// ParseSandbox reads a sandbox description.
func ParseSandbox(b []byte) (Sandbox, error) {
	var s Sandbox
	if err := decodeOwn(b, MaxSandbox, &s); err != nil {
		return Sandbox{}, fmt.Errorf("parse sandbox: %w", err)
	}
	if s.Version != SandboxVersion {
		return Sandbox{}, fmt.Errorf("parse sandbox: version %.40q: want %q", s.Version, SandboxVersion)
	}
	if err := errors.Join(s.validateNone(), s.validateImage()); err != nil {
		return Sandbox{}, fmt.Errorf("parse sandbox: %w", err)
	}
	return s, nil
}
