// Package rego decides by a policy's rules, which are written in Rego, whether
// evidence is acceptable.
//
// Trusted: the policy document, which a plan pins by digest, and the claims and
// checks that the appraisals of attest/snp, attest/vtpm and attest/nvgpu made.
// Checked: that the rules use nothing but a list of pure functions, end in time
// and say something of every device that the document asks for; and, whatever
// they say, that the devices that the document asks for are there, in the number
// that the plan asks for, and that none is simulated where the document does not
// allow it. Not checked: what rules do not look at; those that ship report that
// as not checked, never as passed.
package rego

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
)

const (
	// Package is the only package that rules may be in.
	Package = "coffer.appraisal"
	// EntryPoint is the rule in it that is asked.
	EntryPoint = "decision"
	// Deadline is how long rules may take for one decision. Those that ship take
	// less than a thousandth of it.
	Deadline = 2 * time.Second
	// MaxInput bounds the claims of all devices, as JSON, in bytes.
	MaxInput = 1 << 20
	// MaxChecks and MaxOutput bound what rules answer: checks, and bytes of text.
	MaxChecks = 1024
	MaxOutput = 256 << 10
)

// builtins are the functions that rules may use: pure ones, of which none makes
// much out of little in one call. The clock is an input. There is no arithmetic:
// a number that is squared thirty times cannot be written out before any deadline.
var builtins = []string{
	"eq", "assign", "equal", "neq", "lt", "lte", "gt", "gte",
	"internal.member_2", "internal.member_3", "internal.template_string", "and", "or",
	"count", "max", "min", "sort", "intersection", "union",
	"array.concat", "array.flatten", "array.reverse", "array.slice", "object.get", "object.keys", "object.subset",
	"concat", "contains", "endswith", "indexof", "lower", "split", "startswith", "substring", "upper",
	"trim", "trim_left", "trim_prefix", "trim_right", "trim_space", "trim_suffix",
	"is_array", "is_boolean", "is_null", "is_number", "is_object", "is_set", "is_string", "type_name",
	"regex.match", "semver.compare", "semver.is_valid", "time.parse_rfc3339_ns",
}

// Policy is a policy whose rules are compiled. It may be used concurrently. Nil
// and the zero value accept nothing.
type Policy struct {
	source     policy.Policy
	compiler   *ast.Compiler
	query      ast.Body
	store      storage.Store
	document   document
	references []policy.References
	// accepted are the values that rules see while all references are valid, and
	// known is what follows from them.
	accepted ast.Value
	known    known
	// clocked is true of rules whose answers are not remembered.
	clocked bool
	answers *answers
}

var packageRef = ast.MustParseRef("data." + Package)

func ruleRef(name string) ast.Ref { return packageRef.Append(ast.StringTerm(name)) }

// answer is the variable of queries.
const answer ast.Var = "answer"

func queryOf(c *ast.Compiler, name string) (ast.Body, error) {
	return c.QueryCompiler().Compile(ast.NewBody(ast.Equality.Expr(ast.NewTerm(answer), ast.NewTerm(ruleRef(name)))))
}

// Compile makes the rules of a policy ready. Rules that use a function that is
// not allowed, that are in another package, that lack the entry point, or that
// Rego's strict mode does not accept, are errors. The reference values are those
// that Policy.OpenReferences returned for this very policy.
func Compile(p policy.Policy, references ...policy.References) (*Policy, error) {
	digest, err := p.Digest()
	if err != nil {
		return nil, fmt.Errorf("compile policy: %w", err)
	}
	out, err := compile(p, digest, references)
	if err != nil {
		return nil, fmt.Errorf("compile policy %s: %w", p.Name, err)
	}
	return out, nil
}

func compile(p policy.Policy, digest plan.Digest, references []policy.References) (*Policy, error) {
	allowed := capabilities()
	modules := map[string]*ast.Module{}
	for _, name := range slices.Sorted(maps.Keys(p.Rules)) {
		m, err := ast.ParseModuleWithOpts(name, p.Rules[name], ast.ParserOptions{Capabilities: allowed, RegoVersion: ast.RegoV1})
		if err != nil {
			return nil, err
		}
		if m == nil {
			return nil, fmt.Errorf("%s is empty", name)
		}
		if !m.Package.Path.Equal(packageRef) {
			return nil, fmt.Errorf("%s is in package %s: want %s", name, m.Package.Path, packageRef)
		}
		modules[name] = m
	}
	c := ast.NewCompiler().WithCapabilities(allowed).WithStrict(true).WithEnablePrintStatements(false).WithDefaultRegoVersion(ast.RegoV1)
	if c.Compile(modules); c.Failed() {
		return nil, c.Errors
	}
	if len(c.GetRulesExact(ruleRef(EntryPoint))) == 0 {
		return nil, fmt.Errorf("no rule %s", EntryPoint)
	}
	out := &Policy{source: p, compiler: c, clocked: readsClock(c), answers: &answers{}}
	var err error
	if out.query, err = queryOf(c, EntryPoint); err != nil {
		return nil, err
	}
	data, err := requirements(p)
	if err != nil {
		return nil, err
	}
	out.document = document{data}
	out.store = inmem.NewFromASTObject(ast.NewObject(ast.Item(ast.StringTerm("policy"), ast.NewTerm(data))))
	for _, r := range references {
		if r.Policy() != digest {
			return nil, errors.New("reference values were not opened under this policy")
		}
	}
	out.references = slices.Clone(references)
	if out.accepted, err = accept(p, references); err != nil {
		return nil, err
	}
	out.known = out.know()
	return out, nil
}

func capabilities() *ast.Capabilities {
	all := ast.CapabilitiesForThisVersion()
	c := &ast.Capabilities{Features: all.Features, FutureKeywords: all.FutureKeywords, AllowNet: []string{}}
	for _, b := range all.Builtins {
		if slices.Contains(builtins, b.Name) && !b.Nondeterministic {
			c.Builtins = append(c.Builtins, b)
		}
	}
	return c
}

// Source returns the policy that was compiled. It is the zero policy for nil.
func (p *Policy) Source() policy.Policy {
	if p == nil {
		return policy.Policy{}
	}
	return p.source
}

// evaluate asks the rules for a decision.
func (p *Policy) evaluate(input ast.Value, k known) (ast.Value, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Deadline)
	defer cancel()
	deepen(0)
	return p.ask(ctx, p.query, input, k)
}

// ask asks a query of the rules until the context ends. Everything but one answer
// is an error.
func (p *Policy) ask(ctx context.Context, query ast.Body, input ast.Value, k known) (out ast.Value, err error) {
	stop := topdown.NewCancel()
	defer context.AfterFunc(ctx, stop.Cancel)()
	// The engine is a large interpreter: a defect in it must refuse, and not
	// end the verifier.
	defer func() {
		if r := recover(); r != nil {
			out, err = nil, fmt.Errorf("evaluation panicked: %v", r)
		}
	}()
	txn, err := p.store.NewTransaction(ctx)
	if err != nil {
		return nil, err
	}
	defer p.store.Abort(ctx, txn)
	results := 0
	q := topdown.NewQuery(query).WithCompiler(p.compiler).WithStore(p.store).WithTransaction(txn).WithInput(ast.NewTerm(input)).
		WithVirtualCache(k.memory()).WithBaseCache(p.document).WithMetrics(metrics.NoOp()).
		WithCancel(stop).WithStrictBuiltinErrors(true).WithTime(time.Unix(0, 0)).WithSeed(noSeed{})
	err = q.Iter(ctx, func(r topdown.QueryResult) error {
		results++
		if t := r[answer]; t != nil {
			out = t.Value
		}
		return nil
	})
	switch {
	case topdown.IsCancel(err):
		return nil, fmt.Errorf("no answer within %s", Deadline)
	case err != nil:
		return nil, err
	case results == 0:
		return nil, fmt.Errorf("%s is undefined", EntryPoint)
	case results > 1 || out == nil:
		return nil, fmt.Errorf("%d answers", results)
	}
	return out, nil
}

// noSeed is the source of randomness of rules, which have none.
type noSeed struct{}

func (noSeed) Read([]byte) (int, error) { return 0, errors.New("rules have no randomness") }
