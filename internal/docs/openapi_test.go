package docs

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// openAPI is what the tests read of a document.
type openAPI struct {
	Paths      map[string]any `json:"paths"`
	Components struct {
		Schemas map[string]schema `json:"schemas"`
	} `json:"components"`
}

// schema is one of a message. One with a oneof has its fields in parts.
type schema struct {
	Properties map[string]any `json:"properties"`
	AllOf      []schema       `json:"allOf"`
	OneOf      []schema       `json:"oneOf"`
	AnyOf      []schema       `json:"anyOf"`
}

func (s schema) names(into map[string]bool) {
	for n := range s.Properties {
		into[n] = true
	}
	for _, part := range slices.Concat(s.AllOf, s.OneOf, s.AnyOf) {
		part.names(into)
	}
}

// inStep returns what a document lacks of the linked services, and what it has besides.
func inStep(doc openAPI, file protoreflect.FileDescriptor) (out []string) {
	calls, seen := map[string]bool{}, map[protoreflect.FullName]bool{}
	var message func(m protoreflect.MessageDescriptor)
	message = func(m protoreflect.MessageDescriptor) {
		if seen[m.FullName()] {
			return
		}
		seen[m.FullName()] = true
		of, there := doc.Components.Schemas[string(m.FullName())]
		if !there {
			out = append(out, "no message "+string(m.FullName()))
			return
		}
		fields, documented := map[string]bool{}, map[string]bool{}
		of.names(documented)
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			fields[f.JSONName()] = true
			if !documented[f.JSONName()] {
				out = append(out, "no field "+string(f.FullName()))
			}
			if f.Message() != nil && !f.IsMap() {
				message(f.Message())
			}
		}
		for name := range documented {
			if !fields[name] {
				out = append(out, "a field "+string(m.FullName())+"."+name+" that is not there")
			}
		}
	}
	for i := range file.Services().Len() {
		s := file.Services().Get(i)
		for k := range s.Methods().Len() {
			c := s.Methods().Get(k)
			path := "/" + string(s.FullName()) + "/" + string(c.Name())
			if calls[path] = true; doc.Paths[path] == nil {
				out = append(out, "no call "+path)
			}
			message(c.Input())
			message(c.Output())
		}
	}
	for path := range maps.Keys(doc.Paths) {
		if !calls[path] {
			out = append(out, "a call "+path+" that is not there")
		}
	}
	slices.Sort(out)
	return out
}

// The OpenAPI documents are those of the linked messages, no more and no less.
func TestOpenAPIDocuments(t *testing.T) {
	for name, file := range map[string]protoreflect.FileDescriptor{
		"agent": agentv1.File_runner_api_agent_v1_agent_proto, "broker": brokerv1.File_attest_api_broker_v1_broker_proto, "verifier": verifierv1.File_attest_api_verifier_v1_verifier_proto,
	} {
		b, err := os.ReadFile(filepath.Join(root, "docs", "formats", name+"-openapi.json"))
		if err != nil {
			t.Fatal(err)
		}
		var doc openAPI
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
		for _, problem := range inStep(doc, file) {
			t.Errorf("%s-openapi.json has %s: run make generate", name, problem)
		}
		// The test sees what it is there for.
		if len(doc.Paths) == 0 || file.Services().Len() == 0 {
			t.Fatalf("%s: nothing to compare", name)
		}
		for path := range doc.Paths {
			delete(doc.Paths, path)
			break
		}
		doc.Paths["/x"] = true
		if n := len(inStep(doc, file)); n != 2 {
			t.Errorf("%s: a call that is gone and one that is new are %d problems", name, n)
		}
	}
}
