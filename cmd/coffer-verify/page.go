package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/report"
)

// frameworks are those of --controls, or those that come with the program. Without
// --report there are none to read.
func (o options) frameworks() ([]report.Framework, error) {
	if o.report == "" {
		if len(o.controls) > 0 {
			return nil, errors.New("--controls goes with --report")
		}
		return nil, nil
	}
	if len(o.controls) == 0 {
		return report.Shipped()
	}
	var out []report.Framework
	for _, name := range o.controls {
		b, err := read(name, nil, report.MaxControls)
		if err != nil {
			return nil, err
		}
		f, err := report.ParseControls(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, f)
	}
	return out, nil
}

func writePage(path string, r verify.Report, file []byte, frameworks []report.Framework) error {
	var page bytes.Buffer
	if err := report.Write(&page, r, file, frameworks); err != nil {
		return err
	}
	return replace(path, page.Bytes())
}

// replace writes the file at path, whole or not at all. What it writes first has a name
// that nobody knows beforehand: a link that waits there would have another file written.
func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(b)
	// It is for others to read.
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
