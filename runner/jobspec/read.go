package jobspec

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"
)

// Error says where a job file is wrong. Line is 0 where no line is to blame.
type Error struct {
	Line int `json:"line"`
	// Field is a place, such as inputs[0].mount; "" for the whole file.
	Field   string `json:"field"`
	Problem string `json:"problem"`
}

// Error names line, field and problem.
func (e *Error) Error() string { return "job file" + e.rest() }

func (e *Error) rest() string {
	var b strings.Builder
	if e.Line > 0 {
		fmt.Fprintf(&b, ", line %d", e.Line)
	}
	if e.Field != "" {
		fmt.Fprintf(&b, ", %s", e.Field)
	}
	return b.String() + ": " + e.Problem
}

// Errors is every problem of a job file, by line. It has at least two.
type Errors []*Error

// Error has a line for each problem.
func (l Errors) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "job file: %d problems", len(l))
	for _, e := range l {
		b.WriteString("\n  " + strings.TrimPrefix(e.rest(), ", "))
	}
	return b.String()
}

// Unwrap returns the problems.
func (l Errors) Unwrap() []error {
	out := make([]error, len(l))
	for i, e := range l {
		out[i] = e
	}
	return out
}

// Problems returns every problem of an error of Parse, by line.
func Problems(err error) []*Error {
	var all Errors
	var one *Error
	switch {
	case errors.As(err, &all):
		return all
	case errors.As(err, &one):
		return []*Error{one}
	}
	return nil
}

// Parse reads and checks a job file, first against Schema, then what a schema cannot
// say. Its error is an *Error, or Errors if there are several problems: all that can be
// told at once.
func Parse(b []byte) (Spec, error) {
	if len(b) > MaxSize {
		return Spec{}, &Error{Problem: fmt.Sprintf("%d bytes, at most %d are allowed", len(b), MaxSize)}
	}
	if err := shallow(b); err != nil {
		return Spec{}, err
	}
	file, err := parser.ParseBytes(b, 0)
	if err != nil {
		return Spec{}, syntax(err)
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return Spec{}, &Error{Problem: "want exactly one YAML document"}
	}
	if err := onlyPlain(file); err != nil {
		return Spec{}, err
	}
	c := checker{lines: map[string]int{}}
	value := c.value(file.Docs[0].Body, "")
	schema, err := compiled()
	if err != nil {
		return Spec{}, err
	}
	if err := c.schema(schema, value); err != nil {
		return Spec{}, err
	}
	var s Spec
	if len(c.problems) == 0 {
		if err := yaml.UnmarshalWithOptions(b, &s, yaml.Strict()); err != nil {
			return Spec{}, syntax(err)
		}
		c.check(&s)
	} else {
		c.checkRest(value)
	}
	return s, c.err()
}

type checker struct {
	// lines has the line of every place of the file.
	lines    map[string]int
	problems Errors
}

func (c *checker) err() error {
	// A field that is there under a wrong name is not missing too.
	c.problems = slices.DeleteFunc(c.problems, func(e *Error) bool {
		i := strings.LastIndexByte(e.Field, '.')
		return strings.HasPrefix(e.Problem, missing) && slices.ContainsFunc(c.problems, func(u *Error) bool {
			return u.Problem == didYouMean(e.Field[i+1:]) && u.Field[:max(strings.LastIndexByte(u.Field, '.'), 0)] == e.Field[:max(i, 0)]
		})
	})
	slices.SortStableFunc(c.problems, func(a, b *Error) int { return a.Line - b.Line })
	switch len(c.problems) {
	case 0:
		return nil
	case 1:
		return c.problems[0]
	}
	return c.problems
}

// require records a requirement that does not hold, unless something is known to be
// wrong with that field, a part of it or what it is a part of.
func (c *checker) require(ok bool, field, format string, args ...any) {
	if ok {
		return
	}
	for _, e := range c.problems {
		if within(field, e.Field) || within(e.Field, field) {
			return
		}
	}
	c.add(field, field, fmt.Sprintf(format, args...))
}

// within reports whether a place is another one or a part of it.
func within(place, of string) bool {
	return place == of || strings.HasPrefix(place, of+".") || strings.HasPrefix(place, of+"[")
}

// add records a problem at the line of a place, or of the nearest parent that is there.
func (c *checker) add(at, field, problem string) {
	e := &Error{Field: field, Problem: problem}
	for at != "" && e.Line == 0 {
		e.Line = c.lines[at]
		at = at[:max(strings.LastIndexAny(at, ".["), 0)]
	}
	c.problems = append(c.problems, e)
}

// onlyPlain refuses anchors and aliases, since a few lines of them can stand for
// gigabytes and a reviewer should see what is asked for where it is asked, and tags,
// which change what a value is.
func onlyPlain(file *ast.File) error {
	v := &finder{}
	ast.Walk(v, file.Docs[0].Body)
	if v.line > 0 {
		return &Error{Line: v.line, Problem: v.what + " are not allowed"}
	}
	return nil
}

type finder struct {
	line int
	what string
}

func (v *finder) Visit(n ast.Node) ast.Visitor {
	switch n.Type() {
	case ast.AnchorType, ast.AliasType, ast.MergeKeyType:
		v.line, v.what = n.GetToken().Position.Line, "anchors and aliases"
	case ast.TagType:
		v.line, v.what = n.GetToken().Position.Line, "tags"
	default:
	}
	return v
}

// value turns YAML into what a schema checks, and notes the line of every place.
// A field without a value is left out, as if it were not there; a variable is not.
func (c *checker) value(n ast.Node, at string) any {
	if at != "" {
		if _, ok := c.lines[at]; !ok {
			c.lines[at] = n.GetToken().Position.Line
		}
	}
	switch n := n.(type) {
	case *ast.MappingNode:
		return c.mapping(n.Values, at)
	case *ast.MappingValueNode:
		return c.mapping([]*ast.MappingValueNode{n}, at)
	case *ast.SequenceNode:
		out := []any{}
		for i, v := range n.Values {
			out = append(out, c.value(v, fmt.Sprintf("%s[%d]", at, i)))
		}
		return out
	case *ast.StringNode:
		return n.Value
	case *ast.LiteralNode:
		return n.Value.Value
	case *ast.BoolNode:
		return n.Value
	case *ast.IntegerNode:
		return json.Number(fmt.Sprint(n.Value))
	case *ast.FloatNode:
		return n.Value
	case *ast.NullNode:
		return nil
	}
	return n.GetToken().Value
}

func (c *checker) mapping(values []*ast.MappingValueNode, at string) map[string]any {
	out := map[string]any{}
	for _, v := range values {
		// The key as the decoder reads it: without quotes.
		key := v.Key.GetToken().Value
		place := strings.TrimPrefix(at+"."+key, ".")
		c.lines[place] = v.Key.GetToken().Position.Line
		if value := c.value(v.Value, place); value != nil || at == "env" {
			out[key] = value
		}
	}
	return out
}

// schema records what the schema has against a value.
func (c *checker) schema(s *jsonschema.Schema, value any) error {
	err := s.Validate(value)
	if err == nil {
		return nil
	}
	var invalid *jsonschema.ValidationError
	if !errors.As(err, &invalid) {
		return fmt.Errorf("check job file: %w", err)
	}
	c.invalid(invalid, value)
	return nil
}

func (c *checker) invalid(e *jsonschema.ValidationError, value any) {
	at, found := place(value, e.InstanceLocation)
	f := fieldOf(at)
	switch k := e.ErrorKind.(type) {
	case *kind.Schema, *kind.Group:
		for _, cause := range e.Causes {
			c.invalid(cause, value)
		}
	case *kind.Required:
		for _, name := range k.Missing {
			absent := strings.TrimPrefix(at+"."+name, ".")
			c.add(at, absent, missing+": want "+fieldOf(absent).Want)
		}
	case *kind.FalseSchema:
		// Only a job that reseals has such a rule.
		c.once(at, resealAlone)
	case *kind.AdditionalProperties:
		for _, name := range k.Properties {
			extra := strings.TrimPrefix(at+"."+name, ".")
			c.add(extra, extra, suggest(at, name))
		}
	case *kind.PropertyNames:
		// Only env has such a rule; e.InstanceLocation is overwritten in this error.
		name := "env." + k.Property
		c.add(name, name, fmt.Sprintf("%.80q is not the name of a variable", k.Property))
	case *kind.Format:
		c.once(at, k.Err.Error())
	default:
		problem := "want " + f.Want
		if shown := show(found); shown != "" {
			problem = fmt.Sprintf("%.120s: %s", shown, problem)
		}
		if f.Path == "apiVersion" {
			problem = show(found) + " is not supported: want " + APIVersion
		}
		c.once(at, problem)
	}
}

// once adds a problem to a field that has none: a value may break several rules.
func (c *checker) once(at, problem string) {
	for i, e := range c.problems {
		if e.Field == at {
			// What a parser of ours says is the more exact.
			if strings.Contains(problem, " is not ") {
				c.problems[i].Problem = problem
			}
			return
		}
	}
	c.add(at, at, problem)
}

// show is a value of one line.
func show(v any) string {
	switch v := v.(type) {
	case string:
		return fmt.Sprintf("%.80q", v)
	case json.Number, bool, float64:
		return fmt.Sprint(v)
	}
	return ""
}

// place writes a location as Error.Field does and returns what is there.
func place(value any, location []string) (string, any) {
	at := ""
	for _, l := range location {
		switch v := value.(type) {
		case []any:
			at += "[" + l + "]"
			var i int
			if _, err := fmt.Sscan(l, &i); err == nil && i < len(v) {
				value = v[i]
			}
		case map[string]any:
			at, value = strings.TrimPrefix(at+"."+l, "."), v[l]
		}
	}
	return at, value
}

// checkRest makes the checks that no schema can, of what is left of a job file without
// the fields that have problems.
func (c *checker) checkRest(value any) {
	for _, e := range c.problems {
		value = without(value, "", e.Field)
	}
	b, err := json.Marshal(value)
	if err != nil {
		return
	}
	var s Spec
	if yaml.Unmarshal(b, &s) == nil {
		c.check(&s)
	}
}

// without returns a value without what is at a place. An element of a list is
// emptied, so that those after it keep their places.
func without(value any, at, place string) any {
	switch v := value.(type) {
	case map[string]any:
		for k := range v {
			if p := strings.TrimPrefix(at+"."+k, "."); p == place {
				delete(v, k)
			} else {
				v[k] = without(v[k], p, place)
			}
		}
	case []any:
		for i := range v {
			if p := fmt.Sprintf("%s[%d]", at, i); p == place {
				v[i] = nil
			} else {
				v[i] = without(v[i], p, place)
			}
		}
	}
	return value
}

func syntax(err error) error {
	var ours *Error
	if errors.As(err, &ours) {
		return ours
	}
	var located yaml.Error
	if errors.As(err, &located) && located.GetToken() != nil {
		return &Error{Line: located.GetToken().Position.Line, Problem: located.GetMessage()}
	}
	return &Error{Problem: err.Error()}
}

// suggest is the problem of an unknown field with the known field that is nearest: one
// like it in the same place, or one in another place. Otherwise it names those that the
// place has.
func suggest(at, name string) string {
	at = element.ReplaceAllString(at, "[]")
	best, distance := "", 2*min(4, 1+(len(name)+1)/2)
	var here []string
	for _, f := range Fields() {
		i := strings.LastIndexByte(f.Path, '.')
		parent, last := f.Path[:max(i, 0)], f.Path[i+1:]
		if strings.HasSuffix(last, "[]") || last == "*" {
			continue
		}
		d := 2 * levenshtein(strings.ToLower(name), strings.ToLower(last))
		if strings.HasPrefix(last, name) {
			d-- // gpu is gpus rather than cpu
		}
		if parent == at {
			here = append(here, last)
		} else {
			d += 3 // rather one of this place
		}
		if name != "" && d < distance {
			best, distance = f.Path, d
			if parent == at {
				best = last
			}
		}
	}
	if best != "" {
		return didYouMean(best)
	}
	if len(here) == 0 {
		return unknown
	}
	slices.Sort(here)
	return unknown + "; known fields: " + strings.Join(here, ", ")
}

// Suggest names the field that is nearest to a place that is no field.
func Suggest(place string) string {
	i := strings.LastIndexByte(place, '.')
	at, name := place[:max(i, 0)], place[i+1:]
	parent := func(path string) bool {
		return slices.ContainsFunc(Fields(), func(f Field) bool { return strings.HasPrefix(f.Path, path+".") })
	}
	switch {
	case parent(at + "[]"):
		at += "[]"
	case at != "" && !parent(at):
		return Suggest(at) // nothing is below it
	}
	return suggest(at, name)
}

const (
	missing = "it is missing"
	unknown = "unknown field"
)

func didYouMean(name string) string { return fmt.Sprintf("%s; did you mean %q?", unknown, name) }

func levenshtein(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			prev, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, prev+cost)
		}
	}
	return row[len(b)]
}
