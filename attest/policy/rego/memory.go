package rego

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"sync"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
)

const (
	// MaxAnswers and MaxAnswered bound what a policy remembers of what its rules
	// answered: answers, and bytes of text in them. A full memory is emptied.
	MaxAnswers  = 1024
	MaxAnswered = 4 << 20
)

// momentary are the claims, by kind of device, that differ between two reports of a
// machine in one state. Results have them; rules do not see them.
var momentary = map[string]string{"tpm": "tpm.clock", "gpu": "eat_nonce"}

// answers remembers what rules answered, by all that they saw of the evidence. A
// policy's rules, document and accepted values do not change, and rules have no
// clock but their input's, no randomness and no other source: where input is
// equal, the answer is. It may be used concurrently.
type answers struct {
	mu   sync.Mutex
	by   map[inputID]*answered // guarded by mu; what it points to does not change
	size int                   // guarded by mu
}

type inputID [sha256.Size]byte

func (m *answers) get(id inputID) *answered {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.by[id]
}

func (m *answers) put(id inputID, a *answered) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.by == nil || len(m.by) >= MaxAnswers || m.size+a.size > MaxAnswered {
		m.by, m.size = map[inputID]*answered{}, 0
	}
	if m.by[id] == nil {
		m.size += a.size
	}
	m.by[id] = a
}

// identify names the input that rules see of evidence, while all reference values
// are valid. It returns false where there is no such name: for rules that read the
// clock, and for claims in a form that is not known here.
func (p *Policy) identify(ev policy.Evidence, subs []submodule) (inputID, bool) {
	if p.clocked || slices.ContainsFunc(p.references, func(r policy.References) bool { return !r.ValidAt(ev.Now) }) {
		return inputID{}, false
	}
	w := writer{b: make([]byte, 0, 8<<10), ok: true}
	w.number('n', uint64(max(ev.WantGPUs, 0)))
	w.count('f', len(ev.Failures))
	for _, source := range slices.Sorted(maps.Keys(ev.Failures)) {
		w.text(source)
		w.text(ev.Failures[source])
	}
	w.count('d', len(subs))
	for _, s := range subs {
		w.text(s.name)
		w.text(s.kind)
		w.value(s.device.Simulated)
		w.claims(s.device.Claims, momentary[s.kind])
		w.checks(s.device.Checks)
	}
	if !w.ok || ev.WantGPUs < 0 {
		return inputID{}, false
	}
	return sha256.Sum256(w.b), true
}

// writer writes values such that different ones differ in their bytes: each has a
// letter for its form, and its length before it.
type writer struct {
	b []byte
	// ok is false once a value could not be written.
	ok bool
}

func (w *writer) count(form byte, n int) { w.number(form, uint64(n)) } //nolint:gosec // lengths are not negative

func (w *writer) number(form byte, n uint64) {
	w.b = binary.AppendUvarint(append(w.b, form), n)
}

func (w *writer) text(s string) {
	// What is no text has the form of encoding/json's replacement to rules.
	w.ok = w.ok && utf8.ValidString(s)
	w.count('s', len(s))
	w.b = append(w.b, s...)
}

func (w *writer) claims(m map[string]any, except string) {
	names := make([]string, 0, 64)
	for name := range m {
		if name != except {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	w.count('m', len(names))
	for _, name := range names {
		w.text(name)
		w.value(m[name])
	}
}

func (w *writer) value(v any) {
	switch v := v.(type) {
	case string:
		w.text(v)
	case bool:
		if v {
			w.count('b', 1)
		} else {
			w.count('b', 0)
		}
	case []string:
		w.present(v != nil)
		w.count('l', len(v))
		for _, e := range v {
			w.text(e)
		}
	case []any:
		w.present(v != nil)
		w.count('l', len(v))
		for _, e := range v {
			w.value(e)
		}
	case map[string]string:
		w.present(v != nil)
		w.count('m', len(v))
		for _, name := range slices.Sorted(maps.Keys(v)) {
			w.text(name)
			w.text(v[name])
		}
	case map[string]any:
		w.present(v != nil)
		w.claims(v, "")
	case int:
		w.json(strconv.AppendInt(make([]byte, 0, 20), int64(v), 10))
	default:
		// Other numbers above all, which rules see in this form too.
		b, err := json.Marshal(v)
		w.ok = w.ok && err == nil
		w.json(b)
	}
}

func (w *writer) json(b []byte) {
	w.count('j', len(b))
	w.b = append(w.b, b...)
}

// present keeps a list or an object that is null, which rules can tell from an
// empty one, out of the memory.
func (w *writer) present(there bool) { w.ok = w.ok && there }

func (w *writer) checks(l check.List) {
	w.count('c', len(l))
	for _, c := range l {
		w.text(c.ID)
		w.text(string(c.Outcome))
		if found, there := seen(c); there {
			w.text(found)
		}
	}
}

// seen is what rules see of what a check found: nothing of one that passed, which
// says what the appraisal was asked for.
func seen(c check.Check) (found string, there bool) {
	return c.Found, c.Outcome != check.Pass
}

// readsClock is true if rules may read the time in their input.
func readsClock(c *ast.Compiler) bool {
	found := false
	for _, m := range c.Modules {
		var v *ast.GenericVisitor
		v = ast.NewGenericVisitor(func(x any) bool {
			switch x := x.(type) {
			case ast.Ref:
				if len(x) == 0 || !x[0].Equal(ast.InputRootDocument) {
					return found
				}
				// A part of the input by a name that is not written out may be any.
				if len(x) == 1 {
					found = true
				} else if name, constant := x[1].Value.(ast.String); !constant || name == "now" {
					found = true
				}
				for _, t := range x[1:] {
					v.Walk(t)
				}
				return true
			case ast.Var:
				found = found || ast.InputRootDocument.Value.Compare(x) == 0
			}
			return found
		})
		v.Walk(m)
	}
	return found
}
