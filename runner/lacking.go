package runner

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/source"
)

const (
	manifestName = "manifest.json" // docs/formats/sealed.md
	maxManifest  = 32 << 20
)

// Lacking says what this node lacks at this moment of what a job file names, whose plan is
// canonical: a sentence for each input, and for the place for checkpoints. It is for
// people who would otherwise hear of it when the job begins; nothing rests on it. Object
// stores are not asked.
func (a *Agent) Lacking(file, canonical []byte) []string {
	spec, err := jobspec.Parse(file)
	if err != nil {
		return nil
	}
	p, err := plan.Parse(canonical)
	if err != nil {
		return nil
	}
	return a.lacking(spec, p.Inputs)
}

func (a *Agent) lacking(spec jobspec.Spec, inputs []plan.Input) []string {
	sealed := spec.Sealed()
	if len(sealed) != len(inputs) {
		return nil // another job's plan
	}
	var out []string
	for i, in := range inputs {
		if err := a.inputThere(sealed[i].URI, in.Digest); err != nil {
			out = append(out, fmt.Sprintf("input %s: %s", in.Name, notThere(sealed[i].URI, err)))
		}
	}
	if c := spec.Checkpoints; c != nil {
		b, err := a.bucket(c.URI)
		if err == nil && b == nil {
			_, err = source.Folder(c.URI)
		}
		if err != nil {
			out = append(out, fmt.Sprintf("checkpoints: %s", notThere(c.URI, err)))
		}
	}
	return out
}

// notThere says in words of the job file that a folder is not there.
func notThere(uri string, err error) error {
	if errors.Is(err, source.ErrNotThere) && errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("there is no folder %s on the node", strings.TrimPrefix(uri, "file://"))
	}
	return err
}

// inputThere looks whether a folder has the manifest that a plan names.
func (a *Agent) inputThere(uri string, want plan.Digest) error {
	if at, err := source.Parse(uri); err == nil {
		if a.Cache == nil {
			return fmt.Errorf("this node fetches nothing from object stores, and so not %s", at)
		}
		return nil
	}
	dir, err := source.Folder(uri)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, manifestName)
	// Whose folder it is, is for the holder to ask: a pipe or a link there leads nowhere.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is no sealed folder: it has no %s; `coffer seal` makes one", dir, manifestName)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > maxManifest {
		return fmt.Errorf("%s is no manifest of a sealed folder", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return err
	}
	if got := plan.Sum(b); got != want {
		return fmt.Errorf("%s is another sealed folder than the one registered for its asset: its manifest is %s, and the plan has %s", dir, got, want)
	}
	return nil
}

// AssetsOf lists the assets whose keys a job of a canonical plan needs.
func AssetsOf(canonical []byte) []string {
	p, err := plan.Parse(canonical)
	if err != nil {
		return nil // a journal that somebody edited
	}
	return (&Job{plan: p}).assets()
}
