// Package pages reads the commands that the repository's documents tell people to
// type, and says which test types each of them. A command in a document that
// nothing types fails a test, and so does a test that leaves one of its own out.
package pages

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Command is what a reader types at once: a line, with those that continue it.
type Command struct {
	// Page is the document's path from the root of the repository.
	Page string
	// Section is the heading above it.
	Section string
	// Line is where it begins, from 1.
	Line int
	// Text is the command without its comment.
	Text string
}

// At says where a command stands.
func (c Command) At() string { return fmt.Sprintf("%s:%d", c.Page, c.Line) }

var (
	opening = regexp.MustCompile("^ *```(.*)$")
	header  = regexp.MustCompile(`^#+ (.+)$`)
	prompt  = regexp.MustCompile(`^\s*[a-z]*\$ (.+)$`)
	comment = regexp.MustCompile(`(^| +)# .*$`)
	// What is typed without a prompt, in a fence that is not marked sh.
	hidden = regexp.MustCompile(`^\s*(sudo|make|coffer|coffer-[a-z-]+|curl|build/bin/\S+) [^:=|]*$`)
)

// languages are those that a fence may say; commands are in sh, and behind a
// prompt ($, or the name of who types and $) in all others.
var languages = []string{"", "sh", "text", "json", "yaml", "hcl", "python", "mermaid"}

// Parse returns a document's commands in its order. A fence in a language that it
// does not know is an error, and so is a line that looks like a command in one that
// is not marked sh: nothing would type it.
func Parse(page, text string) ([]Command, error) {
	var out []Command
	section, language, fenced, continued := "", "", false, false
	for i, line := range strings.Split(text, "\n") {
		if m := opening.FindStringSubmatch(line); m != nil {
			if fenced, continued = !fenced, false; fenced && !slices.Contains(languages, m[1]) {
				return nil, fmt.Errorf("%s:%d: a fence in %q, which may hold commands: mark them sh", page, i+1, m[1])
			}
			language = m[1]
			continue
		}
		if !fenced && strings.HasPrefix(strings.TrimSpace(line), "~~~") {
			return nil, fmt.Errorf("%s:%d: a fence of tildes: documents have fences of backticks", page, i+1)
		}
		if m := header.FindStringSubmatch(line); m != nil && !fenced {
			section = m[1]
		}
		if !fenced {
			// Four blanks are Markdown's other way to show code.
			if strings.HasPrefix(line, "    ") && (hidden.MatchString(line) || prompt.MatchString(line)) {
				return nil, fmt.Errorf("%s:%d: %q looks like a command: put it into a fence marked sh", page, i+1, line)
			}
			continue
		}
		if language != "sh" {
			m := prompt.FindStringSubmatch(line)
			if m == nil {
				if hidden.MatchString(line) {
					return nil, fmt.Errorf("%s:%d: %q looks like a command: mark the fence sh", page, i+1, line)
				}
				continue
			}
			line = m[1]
		} else {
			line = comment.ReplaceAllString(line, "")
		}
		line, more := strings.CutSuffix(strings.TrimSpace(line), "\\")
		switch line = strings.TrimSpace(line); {
		case continued:
			out[len(out)-1].Text += " " + line
		case line != "":
			out = append(out, Command{page, section, i + 1, line})
		}
		continued = more
	}
	if fenced {
		return nil, fmt.Errorf("%s: a fence does not end", page)
	}
	return out, nil
}

// Root is the root of the repository, above the folder that a test runs in.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no go.mod above this folder: %w", fs.ErrNotExist)
		}
	}
}

// Documents returns the text of the repository's documents, by path from its root.
func Documents() (map[string]string, error) {
	root, err := Root()
	if err != nil {
		return nil, err
	}
	dir := os.DirFS(root)
	out := map[string]string{}
	return out, fs.WalkDir(dir, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if n := d.Name(); d.IsDir() && (n == "build" || n == "testdata" || n == "node_modules" || (strings.HasPrefix(n, ".") && path != ".")) {
			return fs.SkipDir
		}
		if d.IsDir() || filepath.Ext(path) != ".md" {
			return nil
		}
		b, err := fs.ReadFile(dir, path)
		out[path] = string(b)
		return err
	})
}

// All returns the commands of all documents, by page and line.
func All() ([]Command, error) {
	docs, err := Documents()
	if err != nil {
		return nil, err
	}
	var out []Command
	for page, text := range docs {
		c, err := Parse(page, text)
		if err != nil {
			return nil, err
		}
		out = append(out, c...)
	}
	slices.SortFunc(out, func(a, b Command) int {
		if a.Page != b.Page {
			return strings.Compare(a.Page, b.Page)
		}
		return a.Line - b.Line
	})
	return out, nil
}

// Row says who types commands: those of a page, of a section of it, or those of
// either that begin in a way. Where several rows have a command, the one that says
// more counts: how it begins before where it stands.
type Row struct {
	Page string
	// Section is a heading; all of the page if empty.
	Section string
	// Begins is how the commands begin; all if empty.
	Begins []string
	// By is what types them: a package's folder, and a function of its tests.
	By string
	// Because is why nothing here can type them, in the place of By.
	Because string
}

// names says how much a row says of a command: 0 if it does not have it.
func (r Row) names(c Command) int {
	if r.Page != c.Page || (r.Section != "" && r.Section != c.Section) {
		return 0
	}
	n := 1
	if r.Section != "" {
		n++
	}
	if len(r.Begins) > 0 {
		if !slices.ContainsFunc(r.Begins, func(s string) bool { return strings.HasPrefix(c.Text, s) }) {
			return 0
		}
		n += 2
	}
	return n
}

// Assign finds each command's row, by its place in rows. It is an error if a
// command has none, or two that say as much, and if a row has no command.
func Assign(rows []Row, commands []Command) (map[Command]int, error) {
	out := map[Command]int{}
	used := make([]bool, len(rows))
	var wrong []string
	for _, c := range commands {
		best, row, again := 0, 0, false
		for i, r := range rows {
			if n := r.names(c); n > best {
				best, row, again = n, i, false
			} else if n == best && n > 0 {
				again = true
			}
		}
		switch {
		case best == 0:
			wrong = append(wrong, fmt.Sprintf("%s: nothing types %q", c.At(), c.Text))
		case again:
			wrong = append(wrong, fmt.Sprintf("%s: two rows have %q", c.At(), c.Text))
		default:
			out[c], used[row] = row, true
		}
	}
	for i, r := range rows {
		switch {
		case !used[i]:
			wrong = append(wrong, fmt.Sprintf("row %d (%s, section %q, %q) has no command", i, r.Page, r.Section, r.Begins))
		case (r.By == "") == (r.Because == ""):
			wrong = append(wrong, fmt.Sprintf("row %d (%s) needs either who types its commands or why nobody can", i, r.Page))
		}
	}
	if len(wrong) > 0 {
		return nil, fmt.Errorf("commands of documents:\n%s", strings.Join(wrong, "\n"))
	}
	return out, nil
}

// Script is what one test has to type.
type Script struct {
	by    string
	todo  []Command
	typed map[Command]bool
}

// For returns what the running test has to type by the table. The test fails if it
// ends well and has left one out.
func For(t testing.TB, by string) *Script {
	t.Helper()
	s, err := Of(by)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() || t.Skipped() {
			return
		}
		for _, c := range s.todo {
			if !s.typed[c] {
				t.Errorf("%s: nobody has typed %q", c.At(), c.Text)
			}
		}
	})
	return s
}

// Of returns what by has to type by the table, for what is no test itself.
func Of(by string) (*Script, error) {
	all, err := All()
	if err != nil {
		return nil, err
	}
	rows, err := Assign(Table, all)
	if err != nil {
		return nil, err
	}
	s := &Script{by: by, typed: map[Command]bool{}}
	for _, c := range all {
		if Table[rows[c]].By == by {
			s.todo = append(s.todo, c)
		}
	}
	if len(s.todo) == 0 {
		return nil, fmt.Errorf("the table has nothing that %s types", by)
	}
	return s, nil
}

// Commands returns those of a page, and of a section of it unless that is empty.
func (s *Script) Commands(page, section string) []Command {
	var out []Command
	for _, c := range s.todo {
		if c.Page == page && (section == "" || c.Section == section) {
			out = append(out, c)
		}
	}
	return out
}

// Typed takes down that a command has been typed.
func (s *Script) Typed(c Command) { s.typed[c] = true }

// TypedFence takes down that all of a fence's commands that are this test's have
// been typed.
func (s *Script) TypedFence(page, fence string) {
	in, err := Parse(page, "```sh\n"+fence+"```\n")
	if err != nil {
		return // then nothing of it counts
	}
	for _, c := range in {
		for _, have := range s.todo {
			if have.Page == page && slices.Equal(strings.Fields(have.Text), strings.Fields(c.Text)) {
				s.Typed(have)
			}
		}
	}
}
