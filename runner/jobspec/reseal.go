package jobspec

import (
	"errors"
	"net/url"
	"path"
	"strings"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/source"
)

// Reseal is what a job without a container does: it opens a sealed asset and seals
// it under another key.
type Reseal struct {
	Asset string `yaml:"asset"`
	// URI is where its sealed folder lies, as for an input.
	URI string `yaml:"uri"`
	// Checkpoint is the digest of one checkpoint, where Asset is that of checkpoints;
	// empty elsewhere.
	Checkpoint plan.Digest `yaml:"checkpoint,omitempty"`
	// To is the asset under whose key it is sealed, whose digest is open.
	To string `yaml:"to"`
	// Out is the folder of the node that is made: "file:///absolute/path".
	Out string `yaml:"out"`
}

// Folder is the folder that is made, and the URI of the one in which it is made.
func (r Reseal) Folder() (parent, name string, err error) {
	u, err := url.Parse(r.Out)
	if err != nil {
		return "", "", err
	}
	dir, name := path.Split(u.Path)
	if name == "" || dir == "/" {
		return "", "", errors.New("the new folder has no name, or lies in the root")
	}
	return (&url.URL{Scheme: "file", Path: path.Clean(dir)}).String(), name, nil
}

// reseal checks that part of a job file, and that the job has no other.
func (c *checker) reseal(s *Spec) {
	r := s.Reseal
	if r == nil {
		return
	}
	if _, err := source.Parse(r.URI); err != nil {
		c.folder(r.URI, "reseal.uri", ", s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix")
	}
	c.folder(r.Out, "reseal.out", "")
	_, name, err := r.Folder()
	c.require(err == nil && !strings.HasSuffix(name, ".tmp"), "reseal.out", "%.200q: want the folder that is made, in one that is there", r.Out)
	if r.Checkpoint != "" {
		_, err := plan.ParseDigest(string(r.Checkpoint))
		c.require(err == nil, "reseal.checkpoint", "%.120q: want the digest of a checkpoint", r.Checkpoint)
	}
	c.require(r.Asset != r.To, "reseal.to", "%q is the asset itself", r.To)
	for field, there := range map[string]bool{
		"env": len(s.Env) > 0, "inputs": len(s.Inputs) > 0, "secrets": len(s.Secrets) > 0, "checkpoints": s.Checkpoints != nil, "egress": len(s.Egress) > 0, "resources.gpus": s.Resources.GPUs != 0,
	} {
		c.require(!there, field, "%s", resealAlone)
	}
}

// resealAlone is what is wrong with a field that a job which reseals cannot have.
const resealAlone = "a job that reseals has no container: leave this out"

// plan is the part that is approved.
func (r *Reseal) plan(digests map[string]plan.Digest) *plan.Reseal {
	if r == nil {
		return nil
	}
	if r.Checkpoint != "" {
		return &plan.Reseal{Asset: r.Asset, Digest: r.Checkpoint, Checkpoint: true, To: r.To}
	}
	return &plan.Reseal{Asset: r.Asset, Digest: digests[r.Asset], To: r.To}
}
