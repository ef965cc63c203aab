package jobspec

import (
	"fmt"
	"path"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/source"
)

// MaxSecrets bounds the secrets of one job.
const MaxSecrets = 16

// Secret is a sealed file that the job finds in plan.SecretsMount.
type Secret struct {
	Name  string `yaml:"name"`
	Asset string `yaml:"asset"`
	// URI is where the sealed folder lies, as for an input.
	URI string `yaml:"uri"`
}

func (c *checker) secrets(l []Secret, names map[string]bool) {
	for i, s := range l {
		at := fmt.Sprintf("secrets[%d].", i)
		c.require(!names[s.Name], at+"name", "%q is used twice", s.Name)
		names[s.Name] = true
		if _, err := source.Parse(s.URI); err != nil {
			c.folder(s.URI, at+"uri", ", s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix")
		}
	}
}

// Sealed is something that is opened for the job.
type Sealed struct {
	Input
	Secret bool
}

// Sealed is everything that is opened for the job, in the order of the plan's
// inputs: the inputs, then the secrets as inputs at their fixed places.
func (s Spec) Sealed() []Sealed {
	var out []Sealed
	for _, in := range s.Inputs {
		out = append(out, Sealed{Input: in})
	}
	for _, one := range s.Secrets {
		out = append(out, Sealed{Input{Name: one.Name, Asset: one.Asset, URI: one.URI, Mount: path.Join(plan.SecretsMount, one.Name)}, true})
	}
	return out
}
