package rego

import (
	"context"
	"maps"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/util"
)

// MaxKnown bounds what is kept of the values that are known before any evidence
// is, as text, in bytes.
const MaxKnown = 256 << 10

// known are the values, by name, of rules that depend on nothing but the document
// and the values that it and the signed files accept: they are asked for once, and
// are the same in every decision. A rule whose value cannot be had in time, or is
// too large, is asked again each time.
type known map[string]*ast.Term

// know asks for the values of the policy's constants.
func (p *Policy) know() known {
	ctx, cancel := context.WithTimeout(context.Background(), Deadline)
	defer cancel()
	in := ast.NewObject(item("accepted", ast.NewTerm(p.accepted)))
	out, size := known{}, 0
	for _, name := range constants(p.compiler) {
		query, err := queryOf(p.compiler, name)
		if err != nil {
			continue
		}
		v, err := p.ask(ctx, query, in, out)
		if err != nil {
			continue
		}
		if size += len(v.String()); size > MaxKnown {
			break
		}
		out[name] = ast.NewTerm(v)
	}
	return out
}

// memory is OPA's memory of one evaluation, with what is known already in it. A
// rule that replaces a part of input or data with another looks past it.
func (k known) memory() topdown.VirtualCache {
	m := topdown.NewVirtualCache()
	for name, v := range k {
		m.Put(ruleRef(name), v)
	}
	return m
}

// constants are the names of rules of one value, the decision aside, that read no
// input but what is accepted, nor does anything that they depend on.
func constants(c *ast.Compiler) []string {
	node := c.RuleTree
	for _, t := range packageRef {
		if node = node.Child(t.Value); node == nil {
			return nil
		}
	}
	variable := map[*ast.Rule]bool{}
	var out []string
	for key, child := range node.Children {
		name, ok := key.(ast.String)
		if ok && name != EntryPoint && len(child.Children) == 0 && len(child.Values) > 0 && !slices.ContainsFunc(child.Values, func(r *ast.Rule) bool {
			return r.Head.RuleKind() != ast.SingleValue || len(r.Head.Ref()) != 1 || len(r.Head.Args) > 0 || varies(c.Graph, r, variable)
		}) {
			out = append(out, string(name))
		}
	}
	slices.Sort(out)
	return out
}

// varies is true if a rule or one that it depends on reads more of the input than
// what is accepted, or replaces a part of input or data.
func varies(g *ast.Graph, r *ast.Rule, seen map[*ast.Rule]bool) bool {
	if v, ok := seen[r]; ok {
		return v
	}
	// Rules cannot depend on themselves: the compiler refuses those that do.
	v := reads(r) || slices.ContainsFunc(slices.Collect(maps.Keys(g.Dependencies(r))), func(d util.T) bool {
		on, ok := d.(*ast.Rule)
		return !ok || varies(g, on, seen)
	})
	seen[r] = v
	return v
}

func reads(r *ast.Rule) (found bool) {
	accepted := ast.MustParseRef("input.accepted")
	var v *ast.GenericVisitor
	v = ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case *ast.With:
			found = true
		case ast.Ref:
			if x.HasPrefix(accepted) {
				for _, t := range x[len(accepted):] {
					v.Walk(t)
				}
				return true
			}
		case ast.Var:
			found = found || ast.InputRootDocument.Value.Compare(x) == 0
		}
		return found
	})
	v.Walk(r)
	return found
}

// document is the policy's own data, which rules read from memory.
type document struct{ policy ast.Value }

// Get returns what is at a reference below data.policy, and nil for any other.
func (d document) Get(ref ast.Ref) ast.Value {
	if len(ref) < 2 || !ref[0].Equal(ast.DefaultRootDocument) || ref[1].Value.Compare(ast.String("policy")) != 0 {
		return nil
	}
	v, err := d.policy.Find(ref[2:])
	if err != nil {
		return nil
	}
	return v
}

// Put keeps nothing: there is no other data.
func (document) Put(ast.Ref, ast.Value) {}
