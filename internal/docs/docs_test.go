package docs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/docs/pages"
)

const root = "../.."

// documents are the repository's own, by path from its root.
func documents(t *testing.T) map[string]string {
	t.Helper()
	out, err := pages.Documents()
	if err != nil {
		t.Fatal(err)
	}
	if out["README.md"] == "" {
		t.Fatal("README.md is missing")
	}
	return out
}

// command is one simple command.
type command struct {
	at    string
	words []string
}

// commands takes what a document has people type apart: sudo, variables and &&.
func commands(t *testing.T, name, text string) []command {
	t.Helper()
	parsed, err := pages.Parse(name, text)
	if err != nil {
		t.Fatal(err)
	}
	var out []command
	for _, p := range parsed {
		for c := range strings.SplitSeq(p.Text, "&&") {
			w := strings.Fields(c)
			for len(w) > 0 && (w[0] == "sudo" || strings.Contains(w[0], "=")) {
				if _, command, ok := strings.Cut(w[0], "=$("); ok {
					w[0] = command
					break
				}
				w = w[1:]
			}
			// What follows a pipe, and the end of $(...), is the shell's.
			if i := slices.IndexFunc(w, func(s string) bool { return s == "|" }); i >= 0 {
				w = w[:i]
			}
			if len(w) > 0 {
				out = append(out, command{p.At(), w})
			}
		}
	}
	return out
}

// inline are the commands of coffer's that a document names in its sentences.
func inline(name, text string) []command {
	var out []command
	for _, m := range spans.FindAllStringSubmatch(fences.ReplaceAllString(text, ""), -1) {
		if w := strings.Fields(m[1]); len(w) > 1 && w[0] == "coffer" && w[1] != "sealed" && !strings.HasPrefix(w[1], "-") {
			out = append(out, command{name, w})
		}
	}
	return out
}

func TestCommands(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	bin := os.Getenv("COFFER_BIN")
	if _, err := os.Stat(filepath.Join(bin, "coffer")); bin == "" || err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("COFFER_BIN holds no coffer: run make test")
		}
		t.Skip("COFFER_BIN holds no coffer: run make test")
	}
	found := 0
	for name, text := range documents(t) {
		for _, c := range append(commands(t, name, text), inline(name, text)...) {
			found++
			var err error
			switch program := filepath.Base(c.words[0]); program {
			case "make":
				for _, target := range c.words[1:] {
					if !strings.Contains(target, "=") && !regexp.MustCompile(`(?m)^([\w-]+ )*`+regexp.QuoteMeta(target)+`( [\w-]+)*:`).Match(makefile) {
						err = fmt.Errorf("make has no target %s", target)
					}
				}
			case "coffer":
				err = checkCoffer(bin, c.words[1:])
			case "coffer-verify":
				err = checkFlags(help(bin, program), c.words[1:])
			default:
				// Whoever types it finds out: TestEveryCommandIsTyped.
			}
			if err != nil {
				t.Errorf("%s: %s: %v", c.at, strings.Join(c.words, " "), err)
			}
		}
	}
	if found == 0 {
		t.Error("no commands found: README.md must show how to begin")
	}
}

// helps has what programs said to --help: pages name the same few commands often.
var helps = map[string]string{}

func help(bin, program string, words ...string) string {
	key := strings.Join(append([]string{bin, program}, words...), " ")
	if text, ok := helps[key]; ok {
		return text
	}
	out, err := exec.Command(filepath.Join(bin, program), append(words, "--help")...).CombinedOutput()
	if err != nil {
		out = nil
	}
	helps[key] = string(out)
	return helps[key]
}

// checkCoffer follows subcommands as far as there are some: for an unknown one
// the command shows the help of its parent.
func checkCoffer(bin string, words []string) error {
	path := []string{}
	text := help(bin, "coffer")
	for _, w := range words {
		if !strings.Contains(text, "Available Commands:") {
			break
		}
		if strings.HasPrefix(w, "-") {
			return fmt.Errorf("put %s after the subcommand", w)
		}
		path = append(path, w)
		if text = help(bin, "coffer", path...); !strings.Contains(text, "\n  coffer "+strings.Join(path, " ")) {
			return fmt.Errorf("coffer has no command %s", strings.Join(path, " "))
		}
	}
	if len(path) == 0 {
		return fmt.Errorf("no subcommand")
	}
	own := words[len(path):]
	if i := slices.Index(own, "--"); i >= 0 {
		if err := checkFlags(help(bin, "coffer-verify"), own[i+1:]); err != nil {
			return err
		}
		own = own[:i]
	}
	return checkFlags(text, own)
}

func checkFlags(help string, words []string) error {
	for _, w := range words {
		flag, _, _ := strings.Cut(w, "=")
		if strings.HasPrefix(flag, "-") && flag != "-" && !regexp.MustCompile(regexp.QuoteMeta(flag)+`[ ,\n]`).MatchString(help) {
			return fmt.Errorf("no flag %s", flag)
		}
	}
	return nil
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	code    = regexp.MustCompile("(?s)```.*?```|`[^`\n]*`")
	fences  = regexp.MustCompile("(?s)```.*?```")
	spans   = regexp.MustCompile("`([^`\n]+)`")
)

// slugs are the anchors that headings have.
func slugs(text string) []string {
	var out []string
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		s := regexp.MustCompile(`[^\w\- ]`).ReplaceAllString(strings.ToLower(m[1]), "")
		out = append(out, strings.ReplaceAll(s, " ", "-"))
	}
	return out
}

func TestLinks(t *testing.T) {
	docs := documents(t)
	for name, text := range docs {
		for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(text, ""), -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			path, anchor, _ := strings.Cut(m[1], "#")
			target := name
			if path != "" {
				target = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s: link to %s: %v", name, m[1], err)
			} else if anchor != "" && !slices.Contains(slugs(docs[target]), anchor) {
				t.Errorf("%s: link to %s: no such heading", name, m[1])
			}
		}
	}
}

// The checks above pass on anything if they cannot tell a good command from a bad one.
func TestRefusals(t *testing.T) {
	got := commands(t, "x.md", "```sh\nsudo A=$(make demo) # now\ncoffer up \\\n  --nonsense\nmake a && make b\n```\n```text\nsays c\nbob$ make d\n```\n")
	want := []string{"x.md:2 make demo)", "x.md:3 coffer up --nonsense", "x.md:5 make a", "x.md:5 make b", "x.md:9 make d"}
	var have []string
	for _, c := range got {
		have = append(have, c.at+" "+strings.Join(c.words, " "))
	}
	if !slices.Equal(have, want) {
		t.Errorf("commands %q, want %q", have, want)
	}
	if checkFlags("  --file FILE\n", []string{"--fil", "x"}) == nil || checkFlags("  -o, --file FILE\n", []string{"-o", "--file=x", "-"}) != nil {
		t.Error("flags are not told apart")
	}
	if bin := os.Getenv("COFFER_BIN"); bin != "" {
		if _, err := os.Stat(filepath.Join(bin, "coffer")); err == nil {
			for _, bad := range []string{"nonsense", "grant nonsense", "up --nonsense", "--dir x up"} {
				if checkCoffer(bin, strings.Fields(bad)) == nil {
					t.Errorf("coffer %s passes", bad)
				}
			}
		}
	}
}
