package jobspec

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

var setForm = regexp.MustCompile(`(?s)^([A-Za-z][A-Za-z0-9]*(?:\[\d+\]|\.[A-Za-z_][A-Za-z0-9_]*)*)=(.*)$`)

// Set returns a job file in which fields have other values: each setting is
// "resources.gpus=2" or "env.EPOCHS=3". A value is YAML on one line, that of a
// variable is taken as it is. Comments are lost. The result is not checked.
func Set(file []byte, settings []string) ([]byte, error) {
	tree, err := parser.ParseBytes(file, 0)
	if err != nil {
		return nil, syntax(err)
	}
	if len(tree.Docs) != 1 || tree.Docs[0].Body == nil {
		return nil, &Error{Problem: "want exactly one YAML document"}
	}
	if err := onlyPlain(tree); err != nil {
		return nil, err
	}
	for _, s := range settings {
		m := setForm.FindStringSubmatch(s)
		if m == nil || strings.ContainsAny(m[2], "\n\r") {
			return nil, &Error{Problem: fmt.Sprintf("%.80q: want FIELD=VALUE on one line, such as resources.gpus=2 or env.EPOCHS=3", s)}
		}
		value := m[2]
		if strings.HasPrefix(m[1], "env.") {
			value = strconv.Quote(value)
		}
		if err := set(tree, m[1], value); err != nil {
			return nil, err
		}
	}
	return []byte(tree.String() + "\n"), nil
}

// set replaces the value of a field, or adds the field to what it is a part of.
func set(tree *ast.File, field, value string) error {
	wrong := func(err error) error { return &Error{Field: field, Problem: err.Error()} }
	path, err := yaml.PathString("$." + field)
	if err != nil {
		return wrong(err)
	}
	if n, err := path.FilterFile(tree); err == nil && n != nil {
		if err := path.ReplaceWithReader(tree, strings.NewReader(value)); err != nil {
			return wrong(err)
		}
		return nil
	}
	i := strings.LastIndexByte(field, '.')
	if strings.HasSuffix(field, "]") {
		return &Error{Field: field, Problem: "the file has no such element"}
	}
	if i < 0 {
		return merge(tree, "$", field+": "+value)
	}
	parent, err := yaml.PathString("$." + field[:i])
	if err != nil {
		return wrong(err)
	}
	if n, err := parent.FilterFile(tree); err == nil && n != nil && n.Type() != ast.NullType {
		return merge(tree, "$."+field[:i], field[i+1:]+": "+value)
	}
	return set(tree, field[:i], "{"+field[i+1:]+": "+value+"}")
}

func merge(tree *ast.File, at, text string) error {
	path, err := yaml.PathString(at)
	if err == nil {
		err = path.MergeFromReader(tree, strings.NewReader(text))
	}
	if err != nil {
		return &Error{Problem: err.Error()}
	}
	return nil
}
