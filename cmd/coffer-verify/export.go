package main

import (
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/statement"
)

// program names this one in what it writes for others.
const program = "https://coffer.run/coffer-verify"

// exportable checks the form of every --export before anything is read.
func (o options) exportable() error {
	for _, e := range o.exports {
		format, path, ok := strings.Cut(e, "=")
		if !ok || path == "" || !slices.Contains(statement.Formats(), statement.Format(format)) {
			return fmt.Errorf("--export %q: want FORMAT=FILE, with vsa, slsa, training or cyclonedx", e)
		}
	}
	return nil
}

// writeExports leaves a file unwritten where there is nothing to state: the verdict
// says why.
func (o options) writeExports(r verify.Report, file []byte, now time.Time) error {
	version := "unknown"
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		version = bi.Main.Version
	}
	in := statement.Input{Report: r, File: file, Now: now, Verifier: program, Version: version}
	for _, e := range o.exports {
		format, path, _ := strings.Cut(e, "=")
		b, err := statement.Write(statement.Format(format), in)
		if errors.Is(err, statement.ErrUnverified) {
			continue
		}
		if err != nil {
			return fmt.Errorf("export %s: %w", format, err)
		}
		if err := replace(path, b); err != nil {
			return fmt.Errorf("export %s: %w", format, err)
		}
	}
	return nil
}
