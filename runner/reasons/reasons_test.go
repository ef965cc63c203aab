package reasons

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// written are the reason codes that the runner gives jobs, as its source has them.
func written(t *testing.T) []string {
	t.Helper()
	var out []string
	files, err := filepath.Glob("../*.go")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, b, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			as, ok := n.(*ast.AssignStmt)
			if !ok || len(as.Lhs) != len(as.Rhs) {
				return true
			}
			for i, l := range as.Lhs {
				sel, ok := l.(*ast.SelectorExpr)
				lit, text := as.Rhs[i].(*ast.BasicLit)
				if ok && text && sel.Sel.Name == "Reason" && lit.Kind == token.STRING {
					if s, err := strconv.Unquote(lit.Value); err == nil {
						out = append(out, s)
					}
				}
			}
			return true
		})
	}
	return out
}

func TestEveryReasonHasACure(t *testing.T) {
	codes := written(t)
	if len(codes) < 10 {
		t.Fatalf("only %q are found in the runner's source", codes)
	}
	codes = append(codes, jobspec.RetryEvents()...)
	codes = append(codes, bundle.ReasonRevoked, bundle.ReasonLapsed, "verifier-unavailable", "broker-unavailable", bundle.ReasonRule+"x", "verify-refused", "release-refused", "resume-refused")
	for _, c := range codes {
		r, ok := Find(c)
		if !ok || r.Meaning == "" || r.Who == "" || len(r.Next) == 0 {
			t.Errorf("%q: %+v", c, r)
		}
	}
	if _, ok := Find("no-such-code"); ok {
		t.Error("a code that there is not is known")
	}
	if !slices.IsSortedFunc(All(), func(a, b Reason) int { return strings.Compare(a.Code, b.Code) }) {
		t.Error("codes are not in order")
	}
}
