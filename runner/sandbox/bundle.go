package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

// What the runtime itself needs of a job lies in memory, in a folder of the job's run
// directory: the specification with the values of the environment, from which it starts,
// and its own records, which repeat it. containerd keeps specifications on a disk. It is
// given one that has the values' digests, and the wrapper puts the other in its place
// in the bundle, by a link.
const (
	memoryName = "runtime"
	runscRoot  = "runsc-root"
	configName = "config.json"
)

func memoryOf(runDir string) string    { return filepath.Join(runDir, memoryName) }
func configOf(runDir string) string    { return filepath.Join(memoryOf(runDir), configName) }
func runtimeRoot(runDir string) string { return filepath.Join(memoryOf(runDir), runscRoot) }

// keepSpec mounts the folder and writes the specification into it. It is a ramfs:
// pages of a tmpfs go where memory is swapped to.
func keepSpec(runDir string, spec *specs.Spec) error {
	// A start that was cut off while containerd was away has left it.
	if err := dropSpec(runDir); err != nil {
		return err
	}
	if err := os.Mkdir(memoryOf(runDir), 0o700); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	if err := unix.Mount("coffer-runtime", memoryOf(runDir), "ramfs", unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("create sandbox: mount memory for the runtime at %s: %w", memoryOf(runDir), err)
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode sandbox specification: %w", err)
	}
	if err := os.WriteFile(configOf(runDir), b, 0o600); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	return nil
}

// dropSpec gives the memory back. What is gone already is no error.
func dropSpec(runDir string) error {
	// With --network=none runsc keeps a network namespace mounted in its root.
	for _, at := range []string{filepath.Join(runtimeRoot(runDir), Namespace, "null-netns"), memoryOf(runDir)} {
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", at, err)
		}
	}
	if err := os.RemoveAll(memoryOf(runDir)); err != nil {
		return fmt.Errorf("remove the runtime's folder: %w", err)
	}
	return nil
}

// wrapperScript runs the runtime with the job's flags: containerd's runc shim
// knows a binary's name, not its flags, and the runtime must not take flags from
// the specification (--allow-flag-override stays off). In the bundle that the shim names
// it puts a link to the specification with the values.
func wrapperScript(argv []string, config string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "#!/bin/sh\nlast=\nfor arg do\n\tif [ \"$last\" = --bundle ]; then\n\t\tln -sf %s \"$arg/%s\" || exit\n\tfi\n\tlast=$arg\ndone\nexec", quote(config), configName)
	for _, a := range argv {
		b.WriteString(" " + quote(a))
	}
	b.WriteString(" \"$@\"\n")
	return b.Bytes()
}

// quote makes one word of the shell's.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// redactEnv returns the specification with environment values replaced by their
// digests: it is what containerd keeps, and evidence, and is shown to people.
func redactEnv(spec *specs.Spec, p plan.Plan) *specs.Spec {
	c := *spec
	proc := *spec.Process
	proc.Env = slices.Clone(proc.Env[:len(proc.Env)-len(p.Env)])
	for _, e := range p.Env {
		proc.Env = append(proc.Env, e.Name+"="+string(e.ValueDigest))
	}
	c.Process = &proc
	return &c
}

// describeSpec returns the digest of a specification whose values are those of the
// plan, as redactEnv leaves it. Another one has the digest of nothing.
func describeSpec(spec *specs.Spec, p plan.Plan) (plan.Digest, error) {
	if spec.Process == nil || len(spec.Process.Env) < len(p.Env) {
		return plan.Sum(nil), nil
	}
	values := spec.Process.Env[len(spec.Process.Env)-len(p.Env):]
	for i, kv := range values {
		name, value, _ := strings.Cut(kv, "=")
		if name != p.Env[i].Name || plan.Sum([]byte(value)) != p.Env[i].ValueDigest {
			return plan.Sum(nil), nil
		}
	}
	c, err := canonicalSpec(redactEnv(spec, p))
	if err != nil {
		return "", err
	}
	return plan.Sum(c), nil
}

func canonicalSpec(spec *specs.Spec) ([]byte, error) {
	b, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("encode sandbox specification: %w", err)
	}
	return plan.Canonical(json.RawMessage(b))
}

// bundleSpec reads the specification that the runtime started from.
func (s *Sandbox) bundleSpec() (*specs.Spec, error) {
	dir, err := s.bundleDir()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, configName))
	if err != nil {
		return nil, fmt.Errorf("recheck sandbox: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("recheck sandbox: runtime bundle: %w", err)
	}
	return &spec, nil
}

// bundleDir finds the bundle from runsc's own record of the container, which
// names the folder that it was created from.
func (s *Sandbox) bundleDir() (string, error) {
	root := filepath.Join(runtimeRoot(s.runDir), Namespace)
	matches, err := filepath.Glob(filepath.Join(root, s.id+"*.state"))
	if err != nil || len(matches) != 1 {
		return "", fmt.Errorf("recheck sandbox: %d state files of the runtime in %s, want 1", len(matches), root)
	}
	b, err := os.ReadFile(matches[0])
	if err != nil {
		return "", fmt.Errorf("recheck sandbox: %w", err)
	}
	var state struct {
		BundleDir string `json:"bundleDir"`
	}
	if err := json.Unmarshal(b, &state); err != nil || state.BundleDir == "" {
		return "", errors.New("recheck sandbox: the runtime's state names no bundle")
	}
	return state.BundleDir, nil
}
