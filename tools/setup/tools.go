package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/tools/step"
)

// tool is a pinned program built from the Go module proxy. Its JSON form is part of its key in the cache.
type tool struct {
	// Dir holds the go.mod that pins Module and everything below it, and what of our own is built into the tool.
	Dir      string
	Module   string
	Packages []string
	Tags     string
	// LDFlags holds %s where the module's version goes.
	LDFlags string
	// Check is the program that must print the module's version (some leave out the v), and its arguments.
	Check []string
}

var tools = map[string]tool{
	"containerd": {
		Dir:    "tools/containerd",
		Module: "github.com/containerd/containerd/v2",
		Packages: []string{
			"github.com/containerd/containerd/v2/cmd/containerd",
			"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
			"github.com/containerd/containerd/v2/cmd/ctr",
		},
		Tags:    "no_btrfs,no_devmapper,no_zfs",
		LDFlags: "-s -w -X github.com/containerd/containerd/v2/version.Version=%s",
		Check:   []string{"containerd", "--version"},
	},
	"runsc": {
		Dir:      "tools/gvisor",
		Module:   "gvisor.dev/gvisor",
		Packages: []string{"github.com/coffer-run/coffer/tools/gvisor/runsc"},
		LDFlags:  "-s -w -X gvisor.dev/gvisor/runsc/version.version=%s",
		Check:    []string{"runsc", "--version"},
	},
	"golangci-lint": {
		Dir:      "tools/lint",
		Module:   "github.com/golangci/golangci-lint/v2",
		Packages: []string{"github.com/golangci/golangci-lint/v2/cmd/golangci-lint"},
		LDFlags:  "-s -w",
		Check:    []string{"golangci-lint", "version"},
	},
}

func toolNames() string { return strings.Join(slices.Sorted(maps.Keys(tools)), ", ") }

// version reads the pin from the tool's go.mod, the only place that states it.
func (t tool) version() (string, error) {
	mod, err := os.ReadFile(filepath.Join(t.Dir, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("reading a tool's pin: %w", err)
	}
	for line := range strings.Lines(string(mod)) {
		fields := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "require "))
		if len(fields) >= 2 && fields[0] == t.Module && strings.HasPrefix(fields[1], "v") {
			return fields[1], nil
		}
	}
	return "", fmt.Errorf("%s/go.mod requires no version of %s", t.Dir, t.Module)
}

func (t tool) key() (string, error) {
	h := sha256.New()
	if err := json.NewEncoder(h).Encode(t); err != nil {
		return "", fmt.Errorf("hashing a tool's recipe: %w", err)
	}
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH)
	err := fs.WalkDir(os.DirFS(t.Dir), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasSuffix(name, "_test.go") {
			return err
		}
		b, err := os.ReadFile(filepath.Join(t.Dir, name))
		if err != nil {
			return err
		}
		fmt.Fprintln(h, name, len(b))
		h.Write(b)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("hashing a tool's recipe: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// ensure builds and checks the tool unless the cache has it, then links its programs.
func (t tool) ensure(ctx context.Context, p *step.Progress, version, cache, link string) (string, error) {
	key, err := t.key()
	if err != nil {
		return "", err
	}
	usable := func(dir string) error { return t.check(ctx, p, version, dir) }
	fill := func(dir string) error { return t.build(ctx, p, version, dir) }
	dir, reused, err := step.Cached(ctx, p, filepath.Join(cache, "tools"), filepath.Base(t.Dir)+"-"+key, usable, fill)
	if err != nil {
		return "", err
	}
	size, err := linkPrograms(dir, link)
	if err != nil {
		return "", err
	}
	if reused {
		return "in the cache", nil
	}
	return fmt.Sprintf("built, %d MB", size>>20), nil
}

func (t tool) build(ctx context.Context, p *step.Progress, version, out string) error {
	args := []string{"-trimpath", "-buildvcs=false", "-tags=" + t.Tags, "-ldflags=" + strings.ReplaceAll(t.LDFlags, "%s", version)}
	env := append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")

	var stale bytes.Buffer
	list := step.Command(ctx, p, "go", slices.Concat([]string{"list", "-deps", "-f", "{{if .Stale}}{{.ImportPath}}{{end}}"}, args, t.Packages)...)
	list.Dir, list.Env, list.Stdout = t.Dir, env, &stale
	if err := list.Run(); err != nil {
		return fmt.Errorf("downloading the modules of %s: %w", t.Module, err)
	}
	isPackage := func(line string) bool { return !strings.ContainsAny(line, " :") }
	p.Expect(bytes.Count(stale.Bytes(), []byte("\n")), "packages compiled", isPackage)

	build := step.Command(ctx, p, "go", slices.Concat([]string{"build", "-v", "-o", out + "/"}, args, t.Packages)...)
	build.Dir, build.Env = t.Dir, env
	if err := build.Run(); err != nil {
		return fmt.Errorf("building %s: %w", t.Module, err)
	}
	return nil
}

// check runs a built program: what it says of itself must be the pin.
func (t tool) check(ctx context.Context, p io.Writer, version, dir string) error {
	var said bytes.Buffer
	cmd := step.Command(ctx, io.MultiWriter(p, &said), filepath.Join(dir, t.Check[0]), t.Check[1:]...)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running the built %s: %w", t.Check[0], err)
	}
	if !strings.Contains(said.String(), strings.TrimPrefix(version, "v")) {
		return fmt.Errorf("the built %s does not say that it is %s: %q", t.Check[0], version, said.String())
	}
	return nil
}

// linkPrograms makes dir/PROGRAM a link to each program in from, replacing older links in one step each, and returns the programs' size.
func linkPrograms(from, dir string) (int64, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, fmt.Errorf("creating the link folder: %w", err)
	}
	programs, err := os.ReadDir(from)
	if err != nil {
		return 0, fmt.Errorf("listing a built tool: %w", err)
	}
	var size int64
	for _, program := range programs {
		info, err := program.Info()
		if err != nil {
			return 0, fmt.Errorf("listing a built tool: %w", err)
		}
		size += info.Size()
		fresh := filepath.Join(dir, "."+program.Name()+".new")
		if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, fmt.Errorf("linking a built tool: %w", err)
		}
		if err := os.Symlink(filepath.Join(from, program.Name()), fresh); err != nil {
			return 0, fmt.Errorf("linking a built tool: %w", err)
		}
		if err := os.Rename(fresh, filepath.Join(dir, program.Name())); err != nil {
			return 0, fmt.Errorf("linking a built tool: %w", err)
		}
	}
	return size, nil
}
