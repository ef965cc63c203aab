package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/docs/pages"
)

// TestEveryCommandIsTyped: each command of each document has a test that types it,
// or stands in the table with the reason why none can.
func TestEveryCommandIsTyped(t *testing.T) {
	all, err := pages.All()
	if err != nil {
		t.Fatal(err)
	}
	rows, err := pages.Assign(pages.Table, all)
	if err != nil {
		t.Fatal(err)
	}
	excused, wrong := 0, map[string]bool{}
	for _, c := range all {
		row := pages.Table[rows[c]]
		if row.Because != "" {
			excused++
			continue
		}
		if err := typist(row.By, c.Text); err != nil && !wrong[err.Error()] {
			wrong[err.Error()] = true
			t.Errorf("%s: %q: %v", c.At(), c.Text, err)
		}
	}
	t.Logf("%d commands in documents, of which %d are typed by no test", len(all), excused)
	for by, text := range map[string]string{
		"internal/docs TestNobody": "true", "internal/docs TestCommands": "true", "Makefile test": "make demo", ".ci run": "make nothing", "nowhere TestCommands": "true",
	} {
		if typist(by, text) == nil {
			t.Errorf("%s passes for one who types %q", by, text)
		}
	}
}

// TestShownOutput: what a page shows right below commands is what they print, so it
// stands in a section of which a test compares it.
func TestShownOutput(t *testing.T) {
	compared, seen := "docs/access.md An example: two of three", false
	shown := regexp.MustCompile("(?m)^```\n\n*```text\n")
	for page, text := range documents(t) {
		for _, at := range shown.FindAllStringIndex(text, -1) {
			above := heading.FindAllStringSubmatch(fences.ReplaceAllString(text[:at[0]]+"```", ""), -1)
			section := above[len(above)-1][1]
			switch place := page + " " + section; {
			case page == "docs/tour.md":
			case place == compared:
				seen = true
			default:
				t.Errorf("%s: output is shown, and no test compares it", place)
			}
		}
	}
	if !seen {
		t.Errorf("%s shows no output", compared)
	}
}

// typist finds out whether by types a command: a test that takes its commands from
// the table, the script of CI, or what make does first for a target.
func typist(by, text string) error {
	folder, name, _ := strings.Cut(by, " ")
	words := strings.Fields(strings.TrimPrefix(text, "sudo "))
	switch folder {
	case ".ci":
		b, err := os.ReadFile(filepath.Join(root, folder, name))
		if err == nil && !regexp.MustCompile(`(?m)^(exec )?`+regexp.QuoteMeta(strings.Join(words, " "))+`$`).Match(b) {
			err = fmt.Errorf("%s/%s does not run it", folder, name)
		}
		return err
	case "Makefile":
		b, err := os.ReadFile(filepath.Join(root, folder))
		if err != nil {
			return err
		}
		made := []string{name}
		for i := 0; i < len(made); i++ {
			if m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(made[i]) + `:([^#\n]*)`).FindSubmatch(b); m != nil {
				made = append(made, strings.Fields(string(m[1]))...)
			}
		}
		for _, target := range words[1:] {
			if !slices.Contains(made[1:], target) {
				return fmt.Errorf("make %s does not make %s", name, target)
			}
		}
		return nil
	}
	files, err := filepath.Glob(filepath.Join(root, folder, "*_test.go"))
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == name && fn.Body != nil && takes(fn.Body, by) {
				return nil
			}
		}
	}
	return fmt.Errorf("no function %s in tests of %s takes its commands from the table", name, folder)
}

// takes is whether a body calls pages.For or pages.Of with the name by.
func takes(body *ast.BlockStmt, by string) bool {
	found := false
	ast.Inspect(body, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || len(call.Args) == 0 {
			return true
		}
		fn, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		last, ok := call.Args[len(call.Args)-1].(*ast.BasicLit)
		if pkg, isName := fn.X.(*ast.Ident); ok && isName && pkg.Name == "pages" && (fn.Sel.Name == "For" || fn.Sel.Name == "Of") && last.Value == strconv.Quote(by) {
			found = true
		}
		return true
	})
	return found
}
