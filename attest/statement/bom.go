package statement

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	cyclonedx "github.com/CycloneDX/cyclonedx-go"

	"github.com/coffer-run/coffer/attest/plan"
)

// bom is an ML-BOM (CycloneDX 1.6, ECMA-424): the trained model with its sealed
// checkpoints, inputs and image. What was checked stands in properties that begin
// with coffer:checked:, what is declared in those that begin with coffer:declared:.
func (r *reading) bom() ([]byte, error) {
	b := cyclonedx.NewBOM()
	b.SpecVersion, b.JSONSchema = cyclonedx.SpecVersion1_6, "http://cyclonedx.org/schema/bom-1.6.schema.json"
	b.SerialNumber = serial(r.Report.Statement)
	model := &cyclonedx.Component{
		BOMRef: "model", Type: cyclonedx.ComponentTypeMachineLearningModel, Name: r.plan.Name, Version: r.Report.JobID,
		Description: "what the job's checkpoints hold, sealed",
	}
	if n := len(r.checkpoints); n > 0 {
		model.Hashes = hash(cyclonedx.HashAlgoSHA384, digests(r.checkpoints[n-1].Digest)["sha384"])
	}
	properties, err := r.properties()
	if err != nil {
		return nil, err
	}
	model.Properties = &properties
	var parts []cyclonedx.Component
	var datasets []cyclonedx.MLDatasetChoice
	depends := []string{}
	if r.plan.Image != "" {
		parts = append(parts, cyclonedx.Component{
			BOMRef: "image", Type: cyclonedx.ComponentTypeContainer, Name: "image", Version: r.plan.Image, Hashes: hash(cyclonedx.HashAlgoSHA256, digests(r.plan.Image)["sha256"]),
			Components: r.contents(),
		})
		depends = append(depends, "image")
	}
	for _, i := range r.plan.Inputs {
		ref := "input-" + i.Name
		parts = append(parts, cyclonedx.Component{
			BOMRef: ref, Type: cyclonedx.ComponentTypeData, Name: i.Asset, Description: "sealed input " + i.Name, Hashes: hash(cyclonedx.HashAlgoSHA384, digests(i.Digest)["sha384"]),
		})
		datasets = append(datasets, cyclonedx.MLDatasetChoice{Ref: ref})
		depends = append(depends, ref)
	}
	for _, c := range r.checkpoints {
		parts = append(parts, cyclonedx.Component{
			BOMRef: fmt.Sprintf("checkpoint-%d", c.Sequence), Type: cyclonedx.ComponentTypeData, Name: c.Name, Version: fmt.Sprint(c.Sequence), Description: "sealed checkpoint",
			Hashes: hash(cyclonedx.HashAlgoSHA384, digests(c.Digest)["sha384"]),
		})
	}
	model.ModelCard = &cyclonedx.MLModelCard{ModelParameters: &cyclonedx.MLModelParameters{Datasets: &datasets}, QuantitativeAnalysis: r.performance()}
	b.Metadata = &cyclonedx.Metadata{
		Timestamp: stamp(r.Now), Component: model,
		Tools: &cyclonedx.ToolsChoice{Components: &[]cyclonedx.Component{{Type: cyclonedx.ComponentTypeApplication, Name: r.Verifier, Version: r.Version}}},
	}
	b.Components = &parts
	b.Dependencies = &[]cyclonedx.Dependency{{Ref: "model", Dependencies: &depends}}
	var out bytes.Buffer
	if err := cyclonedx.NewBOMEncoder(&out, cyclonedx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(b, cyclonedx.SpecVersion1_6); err != nil {
		return nil, fmt.Errorf("write CycloneDX: %w", err)
	}
	return out.Bytes(), nil
}

func (r *reading) properties() ([]cyclonedx.Property, error) {
	out := []cyclonedx.Property{
		{Name: "coffer:record", Value: string(r.Report.Statement)},
		{Name: "coffer:verdict", Value: string(r.Report.Verdict)},
		{Name: "coffer:simulated", Value: fmt.Sprint(r.Report.Simulated)},
	}
	c := r.claims()
	for _, side := range []struct {
		name   string
		claims map[string]Claim
	}{{"checked", c.Checked}, {"declared", c.Declared}} {
		for _, name := range slices.Sorted(maps.Keys(side.claims)) {
			v, err := plan.Canonical(side.claims[name].Value)
			if err != nil {
				return nil, err
			}
			text := string(v)
			// A string stands as it is.
			_ = json.Unmarshal(v, &text)
			out = append(out, cyclonedx.Property{Name: "coffer:" + side.name + ":" + name, Value: text})
		}
	}
	return out, nil
}

func hash(a cyclonedx.HashAlgorithm, digits string) *[]cyclonedx.Hash {
	return &[]cyclonedx.Hash{{Algorithm: a, Value: digits}}
}

// serial is a UUID of version 8 (RFC 9562, section 5.8) from the record's digest, so
// that one record has one serial number.
func serial(d plan.Digest) string {
	b := d.Bytes()[:16]
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
