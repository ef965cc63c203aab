package jobspec

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// SchemaID names the schema of this version of the job file.
const SchemaID = "https://coffer.run/schema/jobfile.v1.json"

// Schema returns the JSON Schema (draft 2020-12) of a job file: the structure comes
// from Spec, the rest from Fields. Parse checks job files against this schema first.
// The formats cores, size and duration are ours; the patterns beside them say nearly
// the same to those who do not know them.
func Schema() ([]byte, error) {
	fields := map[string]Field{}
	for _, f := range Fields() {
		fields[f.Path] = f
	}
	s, err := schemaOf(reflect.TypeFor[Spec](), "", fields)
	if err != nil {
		return nil, err
	}
	// What reseals has no container, and every other job has one.
	container := []string{"image", "command"}
	if all, ok := s["required"].([]string); ok {
		s["required"] = slices.DeleteFunc(all, func(name string) bool { return slices.Contains(container, name) })
	}
	s["if"] = map[string]any{"required": []string{"reseal"}}
	s["then"] = map[string]any{"properties": map[string]any{"image": false, "command": false}}
	s["else"] = map[string]any{"required": container}
	s["$schema"], s["$id"], s["title"] = "https://json-schema.org/draft/2020-12/schema", SchemaID, "coffer job file"
	b, err := json.MarshalIndent(s, "", "  ")
	return append(b, '\n'), err
}

func schemaOf(t reflect.Type, path string, fields map[string]Field) (map[string]any, error) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	f, known := fields[path]
	if !known && path != "" && !strings.HasSuffix(path, "[]") {
		return nil, fmt.Errorf("field %q of a job file has no description", path)
	}
	s := map[string]any{}
	if f.Doc != "" {
		s["description"] = f.Doc
	}
	if f.Default != "" {
		s["x-default"] = f.Default
	}
	for k, v := range map[string]*int64{"minimum": f.min, "maximum": f.max} {
		if v != nil {
			s[k] = *v
		}
	}
	if f.pattern != "" {
		s["pattern"] = f.pattern
	}
	if f.enum != nil {
		s["enum"] = f.enum
	}
	switch t {
	case reflect.TypeFor[CPU]():
		s["type"], s["format"], s["pattern"] = []string{"string", "integer"}, "cores", "^[0-9]+m?$"
		return s, nil
	case reflect.TypeFor[Bytes]():
		s["type"], s["format"], s["pattern"] = []string{"string", "integer"}, "size", "^[0-9]+(Ki|Mi|Gi|Ti)?$"
		return s, nil
	case reflect.TypeFor[Duration]():
		s["type"], s["format"], s["pattern"] = "string", "duration", `^([0-9.]+(ns|us|ms|s|m|h))+$`
		return s, nil
	}
	switch t.Kind() {
	case reflect.String:
		s["type"] = "string"
	case reflect.Int, reflect.Int64:
		s["type"] = "integer"
	case reflect.Map:
		// YAML takes 2 for a number; a variable's value is what is written.
		value := map[string]any{"description": fields[path+".*"].Doc, "type": []string{"string", "number", "boolean"}}
		s["type"], s["propertyNames"], s["additionalProperties"] = "object", map[string]any{"pattern": envPattern}, value
	case reflect.Slice:
		item, err := schemaOf(t.Elem(), path+"[]", fields)
		if err != nil {
			return nil, err
		}
		s["type"], s["items"] = "array", item
		if f.firstMatch != "" {
			s["prefixItems"] = []any{map[string]any{"type": "string", "pattern": f.firstMatch}}
		}
		if f.minItems > 0 {
			s["minItems"] = f.minItems
		}
		if f.maxItems > 0 {
			s["maxItems"] = f.maxItems
		}
	case reflect.Struct:
		properties, required := map[string]any{}, []string{}
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
			at := strings.TrimPrefix(path+"."+name, ".")
			p, err := schemaOf(t.Field(i).Type, at, fields)
			if err != nil {
				return nil, err
			}
			properties[name] = p
			if fields[at].Required {
				required = append(required, name)
			}
		}
		s["type"], s["properties"], s["additionalProperties"] = "object", properties, false
		if len(required) > 0 {
			s["required"] = required
		}
	default:
		return nil, fmt.Errorf("field %q of a job file has the type %s, for which there is no schema", path, t)
	}
	return s, nil
}

// compiled is the schema, ready to check with.
var compiled = sync.OnceValues(func() (*jsonschema.Schema, error) {
	b, err := Schema()
	if err != nil {
		return nil, err
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
	if err != nil {
		return nil, err
	}
	c := jsonschema.NewCompiler()
	c.UseLoader(jsonschema.SchemeURLLoader{}) // nothing is fetched
	c.AssertFormat()
	format := func(name string, parse func(string) error) {
		c.RegisterFormat(&jsonschema.Format{Name: name, Validate: func(v any) error { return parse(fmt.Sprint(v)) }})
	}
	format("cores", func(s string) error { _, err := parseCPU(s); return err })
	format("size", func(s string) error { _, err := parseBytes(s); return err })
	format("duration", func(s string) error { _, err := parseDuration(s); return err })
	if err := c.AddResource(SchemaID, doc); err != nil {
		return nil, err
	}
	return c.Compile(SchemaID)
})
