package verify_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

var (
	update = flag.Bool("update", false, "write the tables in docs/tamper.md from this run")
	every  = flag.Bool("every", false, "judge every edit of the corpus, and not every sixteenth")
)

// sample is of how many edits one is judged if not every one is.
const sample = 16

// Kinds of edits.
const (
	changed   = "changed"
	removed   = "removed"
	reordered = "reordered"
	foreign   = "another job's"
)

// variant is a JSON value with one thing done to it.
type variant struct {
	kind, path string
	value      any
	// nothing is true for what leaves out a field that says nothing: a reader sees
	// the same.
	nothing bool
}

// variants returns v with each of its fields changed, each removed, and each two
// neighbours of a list exchanged. Strings that are encoded JSON or signed tokens are
// edited within. Of a list's elements that have the same fields, one is edited within.
func variants(path string, v any) []variant {
	var out []variant
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			at := strings.TrimPrefix(path+"."+k, ".")
			for _, e := range variants(at, v[k]) {
				c := maps.Clone(v)
				c[k] = e.value
				e.value = c
				out = append(out, e)
			}
			c := maps.Clone(v)
			delete(c, k)
			out = append(out, variant{removed, at, c, empty(v[k])})
		}
	case []any:
		at := path + "[]"
		var seen []string
		for i := range v {
			inside := variants(at, v[i])
			if s := shape(inside); slices.Contains(seen, s) {
				inside = nil
			} else {
				seen = append(seen, s)
			}
			for _, e := range inside {
				c := slices.Clone(v)
				c[i] = e.value
				e.value = c
				out = append(out, e)
			}
			out = append(out, variant{kind: removed, path: at, value: slices.Delete(slices.Clone(v), i, i+1)})
			if i > 0 && !same(v[i-1], v[i]) {
				c := slices.Clone(v)
				c[i-1], c[i] = c[i], c[i-1]
				out = append(out, variant{kind: reordered, path: at, value: c})
			}
		}
	case string:
		return inText(path, v)
	case json.Number:
		out = append(out, variant{kind: changed, path: path, value: json.Number(more(v.String()))})
	case bool:
		out = append(out, variant{kind: changed, path: path, value: !v})
	case nil:
		out = append(out, variant{kind: changed, path: path, value: true})
	}
	return out
}

// shape is what can be done to a value, whatever the value is.
func shape(l []variant) string {
	var out []string
	for _, v := range l {
		out = append(out, v.kind+v.path)
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), " ")
}

// empty reports whether a field with this value says what a missing one says.
func empty(v any) bool {
	n, isNumber := v.(json.Number)
	list, isList := v.([]any)
	return v == nil || v == false || v == "" || isNumber && n == "0" || isList && len(list) == 0
}

func same(a, b any) bool {
	x, errX := plan.Canonical(a)
	y, errY := plan.Canonical(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// more is another number that a double tells apart.
func more(n string) string {
	if n == "0" {
		return "1"
	}
	if len(n) > 15 {
		return n[:3] + string('0'+(n[3]-'0'+1)%10) + n[4:]
	}
	return n + "1"
}

func inText(path, s string) []variant {
	if head, rest, ok := strings.Cut(s, "."); ok && strings.HasPrefix(s, "ey") {
		claims, signature, _ := strings.Cut(rest, ".")
		var out []variant
		for _, p := range []struct{ name, part, before, after string }{{".header", head, "", "." + rest}, {"", claims, head + ".", "." + signature}} {
			b, err := base64.RawURLEncoding.DecodeString(p.part)
			if err != nil {
				continue
			}
			for _, e := range within(path+p.name, b) {
				e.value = p.before + base64.RawURLEncoding.EncodeToString(e.value.([]byte)) + p.after
				out = append(out, e)
			}
		}
		return append(out, variant{kind: changed, path: path + ".signature", value: head + "." + claims + "." + flipped(signature)}, variant{kind: removed, path: path + ".signature", value: head + "." + claims + "."})
	}
	if b, err := base64.StdEncoding.DecodeString(s); err == nil && len(b) > 0 {
		// A part may hold a token or JSON, or bytes.
		if bytes.HasPrefix(b, []byte("ey")) && bytes.Count(b, []byte(".")) == 2 {
			var out []variant
			for _, e := range inText(path, string(b)) {
				e.value = base64.StdEncoding.EncodeToString([]byte(e.value.(string)))
				out = append(out, e)
			}
			return out
		}
		if list := within(path, b); list != nil {
			for i := range list {
				list[i].value = base64.StdEncoding.EncodeToString(list[i].value.([]byte))
			}
			return list
		}
		b[len(b)/2] ^= 1
		return []variant{{kind: changed, path: path, value: base64.StdEncoding.EncodeToString(b)}}
	}
	if s == "" {
		return []variant{{kind: changed, path: path, value: "x"}}
	}
	return []variant{{kind: changed, path: path, value: flipped(s)}}
}

// within returns the edits of b, if it is a JSON object or list, as bytes.
func within(path string, b []byte) []variant {
	if b[0] != '{' && b[0] != '[' {
		return nil
	}
	v, err := decode(b)
	if err != nil {
		return nil
	}
	out := variants(path, v)
	for i, e := range out {
		if out[i].value, err = plan.Canonical(e.value); err != nil {
			panic(err) // it was JSON a moment ago
		}
	}
	return out
}

func decode(b []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	err := d.Decode(&v)
	return v, err
}

// flipped changes one letter or digit in the midst of s to another.
func flipped(s string) string {
	b := []byte(s)
	i := len(b) / 2
	for !utf8.RuneStart(b[i]) || b[i] >= utf8.RuneSelf {
		i--
	}
	if b[i]++; b[i] == 'z'+1 || b[i] == '9'+1 || b[i] == 'Z'+1 || b[i] == 'f'+1 {
		b[i] -= 2
	}
	return string(b)
}

// tampered is one edited file and what became of it.
type tampered struct {
	part, kind, path string
	// file makes the edited bundle.
	file    func() []byte
	judged  bool
	verdict verify.Verdict
}

// judge verifies the edited files on all cores, or a sample of them: one of so many.
// Files are made one after the other.
func judge(list []tampered, trust verify.Trust, sample int) {
	type made struct {
		i    int
		file []byte
	}
	next := make(chan made)
	var all sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for m := range next {
				list[m.i].verdict = verify.Verify(m.file, trust).Verdict
			}
		})
	}
	for i := range list {
		if *every || *update || i%sample == 0 {
			list[i].judged = true
			next <- made{i, list[i].file()}
		}
	}
	close(next)
	all.Wait()
}

// wholeJob has every part that there is: vendors' endorsements, approvals and signed
// policies, egress, a checkpoint to go on from and countersigned ones of its own.
func wholeJob(t *testing.T, l *bundletest.Lab, id string, again *plan.Reattest) *bundletest.Job {
	t.Helper()
	// No program but the verifier has this policy, and rules need not be compiled for
	// each of many files.
	o := bundletest.Options{ID: id, Resume: plan.ResumeLatest, Policy: bundletest.OwnPolicy, Reattest: again,
		Attempt: &bundle.Attempt{Number: 2, First: id + "-first", Before: plan.Sum([]byte(id)), SpentNanos: 10e9, UsedNanos: 30e9}}
	j := newJob(t, l, o)
	must(t, j.ReleaseUnder(ownedBy(t, j)))
	if again != nil {
		// Its log begins anew with the releases.
		must(t, j.AttestTwice(o))
	}
	o.ID = id + "-before"
	from := newJob(t, l, o)
	first := must2(from.Checkpoint(1, "", func(r *receipt.CheckpointRecord) { r.Plan = j.Plan }))(t)
	must(t, j.Resumed(from, &first, nil))
	return j
}

// words are edits by the agent that has the job's signature which nothing refutes:
// nobody signed for these fields but itself, and the report says so of them.
var words = []struct{ part, path, kind, why string }{
	{"agent", "", "", "the node's word (`agent.word`)"},
	{"alerts", "", "", "the measured agent's word"},
	{"approvals", "[].approvals[]", reordered, "their order means nothing"},
	{"approvals", "[].policies[]", reordered, "their order means nothing"},
	{"broker-keys", "", "", "not used where the reader pins keys"},
	{"checkpoints", "[].anchor", removed, "told as unanchored (`checkpoint.anchor`)"},
	{"egress", "", "", "the measured agent's word (`egress.word`)"},
	{"endorsements", "", removed, "told (`endorsements.listed`): the verifier's word stands for them"},
	{"holder-status", "dropped", "", "the holder's word (`holder.word`)"},
	{"holder-status", "metrics", "", "the holder's word (`holder.word`)"},
	{"holder-status", "execs", removed, "the holder's word (`holder.word`)"},
	{"job-file", "", "", "free text: the plan is what was resolved from it (`plan.job-file`)"},
	{"logs-digest", "stdout.digest", "", "the agent's word (`logs.digest`)"},
	{"logs-digest", "stderr.digest", "", "the agent's word (`logs.digest`)"},
	{"reattestations", "list[].cause", "", "the node's word, told with each"},
	{"reattestations", "list[].nanos", "", "the node's word"},
	{"reattestations", "list[].tries", "", "the node's word"},
	{"trace", "[].detail", "", "the holder's word (`holder.word`)"},
	{"trace", "[].process", "", "the holder's word (`holder.word`)"},
	{"trace", "[].unixNano", "", "the holder's word (`holder.word`)"},
	{"verifier-keys", "", "", "not used where the reader pins keys"},
}

// reason says why an edit that a liar with the job's key made may go unfound.
func reason(s tampered) string {
	for _, w := range words {
		if w.part == s.part && (w.kind == "" || w.kind == s.kind) && (w.path == "" || s.path == w.path || strings.HasPrefix(s.path, w.path+".") || strings.HasPrefix(s.path, w.path+"[")) {
			return w.why
		}
	}
	return ""
}

// unmade are parts that the corpus's record has not: a job that reseals has no
// container, and none of what comes of one.
var unmade = []bundle.Part{bundle.ResealPart}

// TestTamperCorpus edits each field of each part of a record. With no key, nothing
// can be changed. With the job's own key, by an agent that lies, nothing can be
// changed but what is its word.
func TestTamperCorpus(t *testing.T) {
	rich, _ := endorsed(t)
	plain := newLab(t)
	// What vendors published is long to check, and so are later attestations, which are
	// judged as often as the first: each is edited once.
	apart := []string{string(bundle.Endorsements), string(bundle.ReattestPart)}
	stranger, liar := corpus(t, plain, sample, nil, func(p string) bool { return !slices.Contains(apart, p) })
	s, l := corpus(t, rich, sample, nil, func(p string) bool { return p == apart[0] })
	stranger, liar = append(stranger, s...), append(liar, l...)
	s, l = corpus(t, plain, 4*sample, everyTen.Reattest, func(p string) bool { return p == apart[1] })
	stranger, liar = append(stranger, s...), append(liar, l...)
	for _, s := range stranger {
		if s.judged && s.verdict == verify.Verified {
			t.Errorf("without a key, %s %s: %s, and verified", s.part, s.path, s.kind)
		}
	}
	for _, s := range liar {
		if s.judged && s.verdict == verify.Verified && reason(s) == "" {
			t.Errorf("by a liar with the job's key, %s %s: %s, and verified", s.part, s.path, s.kind)
		}
	}
	document(t, stranger, liar)
}

// corpus edits those parts of a record of the lab's that are wanted, and judges what
// came out: of somebody who has the file, and of an agent that has the job's key.
func corpus(t *testing.T, l *bundletest.Lab, sample int, again *plan.Reattest, wanted func(part string) bool) (stranger, liar []tampered) {
	t.Helper()
	j, other := wholeJob(t, l, "job-1", again), wholeJob(t, l, "job-2", again)
	file, foreigner := build(t, j), must2(bundle.Parse(build(t, other)))(t)
	trust := withOwner(t, l)
	inLog := trust
	origin := translog.KeyName(bundletest.BrokerID)
	key, witness := newNoteKey(t, origin), newNoteKey(t, "witness.test")
	inLog.Log = must2(translog.NewTrust(key.public, []string{witness.public}, 1))(t)
	b := must2(bundle.Parse(file))(t)
	file = must2(b.WithProofs(prove(t, b, l.Entries, key, origin, witness)))(t)
	if r := verify.Verify(file, inLog); r.Verdict != verify.Verified {
		dump(t, r)
		t.Fatal(r.Verdict)
	}
	for _, p := range bundle.Parts() {
		if _, there := b.Parts[p]; !there && wanted(string(p)) && !slices.Contains(unmade, p) {
			t.Fatalf("the record has no part %s", p)
		}
	}

	whole := must2(decode(file))(t)
	for _, e := range variants("", whole) {
		path := strings.TrimPrefix(e.path, "parts.")
		part := path[:len(path)-len(strings.TrimLeft(path, "abcdefghijklmnopqrstuvwxyz-"))]
		if wanted(part) {
			stranger = append(stranger, tampered{part: part, kind: e.kind, path: strings.TrimPrefix(path[len(part):], "."), file: func() []byte { return must2(plan.Canonical(e.value))(t) }})
		}
	}
	lie := func(p bundle.Part, kind, path string, body []byte) {
		liar = append(liar, tampered{part: string(p), kind: kind, path: path, file: func() []byte {
			c := *j
			c.Parts = maps.Clone(j.Parts)
			if c.Parts[p] = body; body == nil {
				delete(c.Parts, p)
			}
			return build(t, &c)
		}})
	}
	for _, p := range bundle.Parts() {
		body, there := b.Parts[p]
		if !there || !wanted(string(p)) {
			continue
		}
		if !bytes.Equal(body, foreigner.Parts[p]) {
			c := *b
			c.Parts = maps.Clone(b.Parts)
			c.Parts[p] = foreigner.Parts[p]
			stranger = append(stranger, tampered{part: string(p), kind: foreign, file: func() []byte { return must2(plan.Canonical(c))(t) }})
			lie(p, foreign, "", foreigner.Parts[p])
		}
		lie(p, removed, "", nil)
		for _, e := range inText("", base64.StdEncoding.EncodeToString(body)) {
			if e.nothing {
				continue
			}
			lie(p, e.kind, strings.TrimPrefix(e.path, "."), must2(base64.StdEncoding.DecodeString(e.value.(string)))(t))
		}
	}
	judge(stranger, inLog, sample)
	judge(liar, trust, sample)
	return stranger, liar
}

// edited is a table without what only a run of the whole corpus knows.
func edited(s string) string {
	return regexp.MustCompile(`\d+ of (\d+) \|.*`).ReplaceAllString(s, "$1")
}

var generated = regexp.MustCompile(`(?s)(<!-- generated: TestTamperCorpus -->\n).*?(<!-- end -->)`)

// document holds the tables in docs/tamper.md against this run.
func document(t *testing.T, stranger, liar []tampered) {
	t.Helper()
	type row struct {
		changed, removed, reordered, foreign, found int
		open                                        map[string]bool
	}
	table := func(list []tampered, fields bool) string {
		rows := map[string]*row{}
		total := row{open: map[string]bool{}}
		for _, s := range list {
			r := rows[s.part]
			if r == nil {
				r = &row{open: map[string]bool{}}
				rows[s.part] = r
			}
			for _, r := range []*row{r, &total} {
				*map[string]*int{changed: &r.changed, removed: &r.removed, reordered: &r.reordered, foreign: &r.foreign}[s.kind]++
				if s.verdict != verify.Verified {
					r.found++
				} else {
					r.open[reason(s)] = true
				}
			}
		}
		var out strings.Builder
		head := "| part | changed | removed | reordered | another job's | found |"
		if fields {
			head += " what is not found, and why |"
		}
		fmt.Fprintf(&out, "%s\n|%s\n", head, strings.Repeat("---|", strings.Count(head, "|")-1))
		line := func(name string, r *row, why string) {
			n := r.changed + r.removed + r.reordered + r.foreign
			fmt.Fprintf(&out, "| %s | %d | %d | %d | %d | %d of %d |", name, r.changed, r.removed, r.reordered, r.foreign, r.found, n)
			if fields {
				fmt.Fprintf(&out, " %s |", why)
			}
			out.WriteString("\n")
		}
		for _, name := range slices.Sorted(maps.Keys(rows)) {
			line("`"+name+"`", rows[name], strings.Join(slices.Sorted(maps.Keys(rows[name].open)), "; "))
		}
		line("all", &total, "")
		return out.String()
	}
	const path = "../../../docs/tamper.md"
	doc, err := os.ReadFile(path)
	must(t, err)
	tables := []string{table(stranger, false), table(liar, true)}
	if !*every && !*update {
		// How many are found is known of all of them only.
		tables[0], tables[1], doc = edited(tables[0]), edited(tables[1]), []byte(edited(string(doc)))
	}
	n := 0
	next := generated.ReplaceAllFunc(doc, func(m []byte) []byte {
		s := generated.FindSubmatch(m)
		out := slices.Concat(s[1], []byte(tables[n]), s[2])
		n++
		return out
	})
	switch {
	case n != len(tables):
		t.Errorf("docs/tamper.md has %d of %d tables", n, len(tables))
	case *update:
		must(t, os.WriteFile(path, next, 0o644)) //nolint:gosec // a document
	case !bytes.Equal(doc, next):
		t.Error("docs/tamper.md is not what this test finds: make tamper")
	}
}
