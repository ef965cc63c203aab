package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/docs/pages"
)

const tourPath = "../../docs/tour.md"

// tourStep is one command of the tour.
type tourStep struct {
	// say is what the reader is told before it.
	say  string
	who  string
	args string
	// exit is the exit code that it must end with.
	exit int
	// keep says which lines of the output are shown; nil is all of them.
	keep *regexp.Regexp
	// find puts what it matches in the output into a variable, $NAME.
	find *regexp.Regexp
	name string
}

var (
	anyGrant = regexp.MustCompile(`grant-[a-z0-9]+`)
)

// tour is what a new user does with nothing but the README and the help texts.
func tour() []tourStep {
	stages := regexp.MustCompile(`^(job |plan |  [a-z]+ +(ok|waits) |succeeded)`)
	return []tourStep{
		{say: "The owner of some weights signs in, and seals them. Whoever wants to use them needs the word of two people of a group.\n\n`--password-file` is for the stack's own people; elsewhere `coffer login` shows an address and a code.",
			who: "owner", args: "login --password-file $STACK/people/owner.password"},
		{who: "owner", args: "seal model.safetensors --asset base-weights --kind weights --approvals '2 of weights-approvers' --out $DEMO/base-weights"},
		{who: "owner", args: "seal /usr/share/datasets/fashion-mnist --asset fashion-mnist --kind dataset --out $DEMO/fashion-mnist"},
		{who: "owner", args: "assets create fine-tune-checkpoints --kind checkpoints"},
		{say: "An engineer has a job file, [examples/fine-tune/job.yaml](../examples/fine-tune/job.yaml), and makes a mistake in it.",
			who: "engineer", args: "login --password-file $STACK/people/engineer.password"},
		{who: "engineer", args: "validate job.yaml --set resources.gpu=1", exit: 2},
		{who: "engineer", args: "validate job.yaml"},
		{say: "What would be submitted, and what stands in its way?", who: "engineer", args: "submit job.yaml --dry-run"},
		{say: "The engineer asks for the grant, and submits the job before anybody has answered.",
			who: "engineer", args: "grant request --job job.yaml --allow-simulated --purpose 'fine-tuning on Fashion-MNIST'", find: anyGrant, name: "GRANT"},
		{who: "engineer", args: "submit job.yaml", find: jobID, name: "JOB"},
		{say: "It does not begin. Why?", who: "engineer", args: "why $JOB", exit: 3},
		{say: "Two of the three approvers read the request, compare it with the job file, and sign. The owner agrees for the assets that ask for no approvals.",
			who: "owner", args: "grant approve $GRANT --consent"},
		{who: "alice", args: "login --password-file $STACK/people/alice.password"},
		{who: "alice", args: "grant approve $GRANT --job job.yaml --key $STACK/people/alice.ssh --reason 'read the program'"},
		{who: "engineer", args: "why $JOB", exit: 3},
		{who: "bob", args: "login --password-file $STACK/people/bob.password"},
		{who: "bob", args: "grant approve $GRANT --job job.yaml --key $STACK/people/bob.ssh --reason 'the data is public'"},
		{say: "The job goes on by itself. The engineer looks on: each stage with its time, and in between what the job prints and its checkpoints.",
			who: "engineer", args: "watch $JOB", keep: stages},
		{say: "A reviewer gets one file, and verifies it. This trusts the keys and roots of the stack; a reviewer elsewhere names those that they were given.",
			who: "engineer", args: "evidence get $JOB -o bundle.json"},
		{who: "engineer", args: "evidence verify bundle.json", keep: regexp.MustCompile(`(?i)^(verified|not verified|verdict|simulated|\d+ (checks|claims|pass))|do not trust|by .*(alice|bob)`)},
		{say: "The same as a page to read and to print.", who: "engineer", args: "evidence report bundle.json -o report.html", keep: regexp.MustCompile(`report\.html|^(verified|verdict)`)},
	}
}

// stable takes out of a transcript what differs between two runs.
var stable = []struct {
	what *regexp.Regexp
	is   string
}{
	{regexp.MustCompile(`sha(256|384):[0-9a-f]{64,96}`), "sha$1:..."},
	{jobID, "JOB"},
	{anyGrant, "GRANT"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?Z?`), "TIME"},
	{regexp.MustCompile(` +\d+(\.\d+)? (ms|s)\b`), " T"},
	{regexp.MustCompile(`\d+(\.\d+)? [KMGT]?B/s`), "N B/s"},
	{regexp.MustCompile(`\d+(\.\d+)? ([KMGT]i?B|bytes|B)\b`), "N $2"},
	{regexp.MustCompile(`\d+ of (\d+) GPUs`), "N of $1 GPUs"},
	{regexp.MustCompile(`\d+ jobs run, \d+ wait`), "N jobs run, N wait"},
	{regexp.MustCompile(`\d+ (checks|claims|pass|passed|not checked|fail|failed)\b`), "N $1"},
}

func TestTour(t *testing.T) {
	n := need(t)
	p := n.people(t)
	dir := t.TempDir()
	demo := filepath.Join(n.dir, "tour")
	job, err := os.ReadFile("../../examples/fine-tune/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		filepath.Join(dir, "job.yaml"):          []byte(strings.ReplaceAll(string(job), "/var/lib/coffer/demo", demo)),
		filepath.Join(dir, "model.safetensors"): n.weights,
	} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(demo, "fine-tune-checkpoints"), 0o700); err != nil {
		t.Fatal(err)
	}
	var typed *pages.Script
	if !*update {
		typed = pages.For(t, "internal/e2e TestTour")
	}
	vars := map[string]string{"STACK": n.dir, "DEMO": demo}
	expand := func(s string) string { return os.Expand(s, func(k string) string { return vars[k] }) }
	shown := strings.NewReplacer(demo, "/var/lib/coffer/demo", n.dir, "/var/lib/coffer", dir, ".")

	var b strings.Builder
	b.WriteString("# A tour\n\nWritten by `go test ./internal/e2e -run TestTour -update`: every command below ran on a stack of its own, over simulated devices, and this is what it said.\nDigests, ids, times and amounts are left out. `$` is followed by who types.\n")
	for _, s := range tour() {
		cmd := p.command(s.who, words(expand(s.args))...)
		cmd.Dir = dir
		raw, err := cmd.CombinedOutput()
		out := string(raw)
		if got := exitCode(err); got != s.exit {
			t.Fatalf("%s: coffer %s: exit code %d, want %d\n%s", s.who, s.args, got, s.exit, out)
		}
		if s.find != nil {
			if vars[s.name] = s.find.FindString(out); vars[s.name] == "" {
				t.Fatalf("coffer %s does not name a %s:\n%s", s.args, s.name, out)
			}
		}
		if s.say != "" {
			fmt.Fprintf(&b, "\n%s\n", s.say)
		}
		text := shown.Replace(out)
		for _, r := range stable {
			text = r.what.ReplaceAllString(text, r.is)
		}
		line := "coffer " + os.Expand(s.args, func(k string) string {
			return map[string]string{"STACK": "/var/lib/coffer", "DEMO": "/var/lib/coffer/demo", "JOB": "JOB", "GRANT": "GRANT"}[k]
		})
		if typed != nil {
			typed.TypedFence("docs/tour.md", line+"\n")
		}
		fmt.Fprintf(&b, "\n```text\n%s$ %s\n%s", s.who, line, kept(text, s.keep))
		if s.exit != 0 {
			fmt.Fprintf(&b, "(exit code %d)\n", s.exit)
		}
		b.WriteString("```\n")
	}
	b.WriteString("\nThe page is like [these](report.md). What no check here can show is in [limitations.md](limitations.md).\n")
	if *update {
		if err := os.WriteFile(tourPath, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if was, err := os.ReadFile(tourPath); err != nil || string(was) != b.String() {
		t.Errorf("docs/tour.md is not what this run shows (%v); go test ./internal/e2e -run TestTour -update writes it\n%s", err, firstDifference(string(was), b.String()))
	}
}

// kept returns the lines that are shown, with [...] for those between that are not.
func kept(text string, keep *regexp.Regexp) string {
	var b strings.Builder
	gap := false
	for l := range strings.Lines(text) {
		l = strings.TrimRight(l, " \n")
		switch {
		case keep == nil || keep.MatchString(l):
			b.WriteString(l + "\n")
			gap = false
		case !gap:
			b.WriteString("[...]\n")
			gap = true
		}
	}
	return b.String()
}

// words splits a command line at blanks outside of single quotes.
func words(line string) []string {
	var out []string
	for i, part := range strings.Split(line, "'") {
		if i%2 == 1 {
			out = append(out, part)
		} else {
			out = append(out, strings.Fields(part)...)
		}
	}
	return out
}

func firstDifference(was, is string) string {
	a, b := strings.Split(was, "\n"), strings.Split(is, "\n")
	for i := range b {
		if i >= len(a) || a[i] != b[i] {
			old := "(nothing)"
			if i < len(a) {
				old = a[i]
			}
			return fmt.Sprintf("line %d was %q, is %q", i+1, old, b[i])
		}
	}
	return "lines are missing at the end"
}
