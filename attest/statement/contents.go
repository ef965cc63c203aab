package statement

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"

	cyclonedx "github.com/CycloneDX/cyclonedx-go"

	"github.com/coffer-run/coffer/attest/bundle"
)

// contents are the components of the image's own bill of materials, which its author
// declared; nil if the record has none. What CycloneDX 1.6 has no word for is left out.
func (r *reading) contents() *[]cyclonedx.Component {
	if len(r.sbom.Components) == 0 {
		return nil
	}
	by := []cyclonedx.Property{{Name: "coffer:declared:by", Value: cmp.Or(r.sbomSigner, "nobody who signed it")}}
	out := make([]cyclonedx.Component, 0, len(r.sbom.Components))
	for i, c := range r.sbom.Components {
		one := cyclonedx.Component{
			BOMRef: fmt.Sprintf("image-%d", i+1), Type: cyclonedx.ComponentType(c.Type), Name: cmp.Or(c.Name, "unnamed"), Version: c.Version,
			PackageURL: c.PURL, Hashes: hashes(c.Hashes), Properties: &by,
		}
		if !slices.Contains(componentTypes, one.Type) {
			one.Type = cyclonedx.ComponentTypeLibrary
		}
		out = append(out, one)
	}
	return &out
}

// componentTypes are those of software in an image.
var componentTypes = []cyclonedx.ComponentType{
	cyclonedx.ComponentTypeApplication, cyclonedx.ComponentTypeFramework, cyclonedx.ComponentTypeLibrary, cyclonedx.ComponentTypeContainer,
	cyclonedx.ComponentTypeOS, cyclonedx.ComponentTypeFirmware, cyclonedx.ComponentTypeFile, cyclonedx.ComponentTypeData,
	cyclonedx.ComponentTypeMachineLearningModel,
}

var hexDigest = regexp.MustCompile(`^([0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64}|[0-9a-fA-F]{96}|[0-9a-fA-F]{128})$`)

var algorithms = []cyclonedx.HashAlgorithm{
	cyclonedx.HashAlgoMD5, cyclonedx.HashAlgoSHA1, cyclonedx.HashAlgoSHA256, cyclonedx.HashAlgoSHA384, cyclonedx.HashAlgoSHA512,
	cyclonedx.HashAlgoSHA3_256, cyclonedx.HashAlgoSHA3_384, cyclonedx.HashAlgoSHA3_512,
	cyclonedx.HashAlgoBlake2b_256, cyclonedx.HashAlgoBlake2b_384, cyclonedx.HashAlgoBlake2b_512, cyclonedx.HashAlgoBlake3,
}

func hashes(l []bundle.ComponentHash) *[]cyclonedx.Hash {
	var out []cyclonedx.Hash
	for _, h := range l {
		if a := cyclonedx.HashAlgorithm(h.Alg); slices.Contains(algorithms, a) && hexDigest.MatchString(h.Content) {
			out = append(out, cyclonedx.Hash{Algorithm: a, Value: h.Content})
		}
	}
	if out == nil {
		return nil
	}
	return &out
}

// performance has the numbers that the job reported: its own word, which the holder
// counted; nil if there are none.
func (r *reading) performance() *cyclonedx.MLQuantitativeAnalysis {
	var out []cyclonedx.MLPerformanceMetric
	for _, m := range r.metrics {
		for _, one := range []struct {
			slice string
			value float64
		}{{"last", m.Last}, {"least", m.Min}, {"most", m.Max}} {
			out = append(out, cyclonedx.MLPerformanceMetric{
				Type: m.Name, Value: strconv.FormatFloat(one.value, 'g', -1, 64), Slice: fmt.Sprintf("%s of %d values, as the job declared them", one.slice, m.Count),
			})
		}
	}
	if out == nil {
		return nil
	}
	return &cyclonedx.MLQuantitativeAnalysis{PerformanceMetrics: &out}
}
