// Package deptest holds the rules of who may link what, so that a trust zone is
// a fact of the build and not a habit. The rules are data, each with its reason;
// they run over one `go list -deps` of the whole module.
package deptest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"os/exec"
	"path"
	"slices"
	"strings"
)

// Module is the path of the module whose packages the rules are about.
const Module = "github.com/coffer-run/coffer"

// Graph is the import graph of the non-test code. Packages of this module are
// named "./attest/plan", all others by their import path.
type Graph map[string][]string

// Load asks the go command for the graph of the module in dir. A package that
// does not load is an error: a rule holds only over the whole graph.
func Load(ctx context.Context, dir string) (Graph, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-e", "-deps", "-json=ImportPath,Imports,Error,Standard", "./...")
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list packages: %w: %s", err, stderr.Bytes())
	}
	g := Graph{}
	var broken []string
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath string
			Imports    []string
			Error      *struct{ Err string }
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("list packages: %w", err)
		}
		if p.Error != nil {
			broken = append(broken, p.ImportPath+": "+p.Error.Err)
		}
		imports := make([]string, 0, len(p.Imports))
		for _, i := range p.Imports {
			imports = append(imports, short(i))
		}
		g[short(p.ImportPath)] = imports
	}
	if len(broken) > 0 {
		return g, fmt.Errorf("list packages: %s", strings.Join(broken, "\n"))
	}
	return g, nil
}

func short(p string) string {
	if p == Module {
		return "."
	}
	if rest, ok := strings.CutPrefix(p, Module+"/"); ok {
		return "./" + rest
	}
	return p
}

// Rule says what the packages it is about may not link. Patterns are those of
// path.Match; a final "/..." stands for the package and all below it.
type Rule struct {
	// About are the packages that must keep the rule, Except those among them
	// that need not.
	About, Except []string
	// Direct looks at the imports of each package alone. Otherwise everything
	// that the package links is looked at.
	Direct bool
	// Forbid lists what may not be linked, whosever it is.
	Forbid []string
	// Past are packages whose own imports are not looked at, for the reason that
	// Why gives.
	Past []string
	// Ours lists the packages of this module that may be linked; nil allows all.
	Ours []string
	// Why is the reason, shown with each breach.
	Why string
}

// Breach is one import that a rule forbids.
type Breach struct {
	// Chain leads from the package that the rule is about to the forbidden one.
	Chain []string
	Why   string
}

func (b Breach) String() string {
	return strings.Join(b.Chain, " -> ") + ": " + b.Why
}

// Check returns every breach of r in g, the shortest chain for each.
func (r Rule) Check(g Graph) []Breach {
	var out []Breach
	for _, pkg := range sortedKeys(g) {
		if !matchAny(r.About, pkg) || matchAny(r.Except, pkg) {
			continue
		}
		for _, chain := range r.chains(g, pkg) {
			out = append(out, Breach{Chain: chain, Why: r.Why})
		}
	}
	return out
}

func (r Rule) chains(g Graph, from string) [][]string {
	var out [][]string
	parent := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; {
		at := queue[0]
		queue = queue[1:]
		for _, next := range g[at] {
			if _, seen := parent[next]; seen {
				continue
			}
			parent[next] = at
			if r.forbids(next) {
				chain := []string{next}
				for p := at; p != ""; p = parent[p] {
					chain = append(chain, p)
				}
				slices.Reverse(chain)
				out = append(out, chain)
				continue
			}
			if !r.Direct && !matchAny(r.Past, next) {
				queue = append(queue, next)
			}
		}
	}
	return out
}

func (r Rule) forbids(pkg string) bool {
	if matchAny(r.Forbid, pkg) {
		return true
	}
	return r.Ours != nil && strings.HasPrefix(pkg, "./") && !matchAny(r.Ours, pkg)
}

func matchAny(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, pkg) })
}

func match(pattern, pkg string) bool {
	base, below := strings.CutSuffix(pattern, "/...")
	if below {
		n := strings.Count(base, "/") + 1
		parts := strings.Split(pkg, "/")
		if len(parts) < n {
			return false
		}
		pkg = strings.Join(parts[:n], "/")
	}
	ok, err := path.Match(base, pkg)
	return err == nil && ok
}

func sortedKeys(g Graph) []string {
	keys := make([]string, 0, len(g))
	for k := range g {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
