package pages

import (
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	got, err := Parse("x.md", "# One\n\n```sh\n# a remark\nsudo a 'b' \\\n  --d # e\n\nf | g\n```\n## Two\n```text\nnot typed\nbob$ h\n$ i\n```\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []Command{{"x.md", "One", 5, "sudo a 'b' --d"}, {"x.md", "One", 8, "f | g"}, {"x.md", "Two", 13, "h"}, {"x.md", "Two", 14, "i"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	for name, text := range map[string]string{
		"a language that may be a shell's": "```console\ncoffer up\n```\n",
		"a fence without an end":           "```sh\ncoffer up\n",
		"a command in a fence of text":     "```text\ncoffer up --image x\n```\n",
		"a command, further in":            "```text\n  coffer up\n```\n",
		"a command that is indented":       "Then:\n\n    coffer up\n",
		"a prompt that is indented":        "Then:\n\n    $ ls\n",
		"a fence of tildes":                "~~~sh\ncoffer up\n~~~\n",
	} {
		if got, err := Parse("x.md", text); err == nil {
			t.Errorf("%s is read as %+v", name, got)
		}
	}
}

func TestAssign(t *testing.T) {
	a, b, c := Command{"x.md", "One", 1, "make a"}, Command{"x.md", "One", 2, "b"}, Command{"x.md", "Two", 3, "c"}
	whole, section := Row{Page: "x.md", By: "p TestX"}, Row{Page: "x.md", Section: "One", By: "p TestOne"}
	begins := Row{Page: "x.md", Begins: []string{"make"}, Because: "hardware"}
	got, err := Assign([]Row{whole, section, begins}, []Command{a, b, c})
	if err != nil || got[a] != 2 || got[b] != 1 || got[c] != 0 {
		t.Errorf("%v, %v", got, err)
	}
	for name, tt := range map[string]struct {
		rows []Row
		says string
	}{
		"a command that nothing types":  {[]Row{section}, `x.md:3: nothing types "c"`},
		"two who type the same":         {[]Row{whole, whole}, "two rows have"},
		"a row without a command":       {[]Row{whole, {Page: "y.md", By: "p TestY"}}, "row 1 (y.md"},
		"a row shadowed by others":      {[]Row{whole, section, {Page: "x.md", Section: "One", Begins: []string{"make", "b"}, By: "p TestZ"}}, "row 1 (x.md"},
		"neither a typist nor a reason": {[]Row{{Page: "x.md"}}, "needs either"},
		"both a typist and a reason":    {[]Row{{Page: "x.md", By: "p TestX", Because: "hardware"}}, "needs either"},
		"nothing in the table at all":   {nil, "nothing types"},
	} {
		if _, err := Assign(tt.rows, []Command{a, b, c}); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// fakeTest is a test that a Script watches.
type fakeTest struct {
	testing.TB
	cleanup []func()
	errors  int
	failed  bool
}

func (f *fakeTest) Helper()               {}
func (f *fakeTest) Failed() bool          { return f.failed }
func (f *fakeTest) Skipped() bool         { return false }
func (f *fakeTest) Cleanup(fn func())     { f.cleanup = append(f.cleanup, fn) }
func (f *fakeTest) Errorf(string, ...any) { f.errors++ }
func (f *fakeTest) end() int {
	for _, fn := range f.cleanup {
		fn()
	}
	return f.errors
}

func TestScriptWantsAllOfIt(t *testing.T) {
	const by = "internal/e2e TestSchedulerPage"
	lazy := &fakeTest{TB: t}
	s := For(lazy, by)
	todo := s.Commands("docs/scheduler.md", "")
	if len(todo) < 2 {
		t.Fatalf("%d commands of docs/scheduler.md", len(todo))
	}
	for _, c := range todo[1:] {
		s.Typed(c)
	}
	if got := lazy.end(); got != 1 {
		t.Errorf("a test that leaves one command out ends with %d errors", got)
	}
	s.Typed(todo[0])
	lazy.errors = 0
	if got := lazy.end(); got != 0 {
		t.Errorf("a test that has typed everything ends with %d errors", got)
	}
	whole := &fakeTest{TB: t}
	s = For(whole, by)
	s.TypedFence("docs/scheduler.md", "coffer up\n")
	for _, c := range todo {
		s.TypedFence("docs/scheduler.md", c.Text+"\n")
	}
	if got := whole.end(); got != 0 || s.typed[Command{}] {
		t.Errorf("a test that has typed its fences ends with %d errors", got)
	}
	if _, err := Of("internal/e2e TestNobody"); err == nil {
		t.Error("who types nothing has something to type")
	}
}

func TestShell(t *testing.T) {
	s := NewShell(t, &Script{typed: map[Command]bool{}}, "/nonexistent")
	s.Here = strings.NewReplacer("WORD", "there")
	s.Must(Command{Text: `NAME=$(sudo echo hello)`}, 0, "")
	s.Must(Command{Text: `echo $NAME WORD; exit 3`}, 3, "^hello there$")
	if _, code := s.Type(Command{Text: "false | true"}); code == 0 {
		t.Error("a failure before a pipe is none")
	}
	r := s.Start(Command{Text: "echo here; sleep 60"})
	r.Says(`^here\n`)
	r.Interrupt()
	if out, code := r.End(); code == 0 {
		t.Errorf("what was interrupted ended well: %s", out)
	}
}
