package main

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"
)

func TestExitCodes(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "missing")
	tests := map[string]struct {
		args  []string
		stdin io.Reader
		code  int
	}{
		"usage":          {[]string{}, nil, exitUsage},
		"unknown flag":   {[]string{"--x"}, nil, exitUsage},
		"missing roots":  {[]string{"--simulation-roots", empty, "-"}, strings.NewReader(""), exitUsage},
		"missing bundle": {[]string{empty}, nil, exitUnknown},
		"unreadable":     {[]string{"-"}, errReader{}, exitUnknown},
		"not a bundle":   {[]string{"-"}, strings.NewReader("{}"), exitFailed},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := run(t.Context(), tt.args, tt.stdin, io.Discard, io.Discard)
			var e *exitError
			if !errors.As(err, &e) || e.code != tt.code {
				t.Errorf("error %v, want exit code %d", err, tt.code)
			}
		})
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("broken") }

func TestReadIsBounded(t *testing.T) {
	if _, err := read("-", bytes.NewReader(make([]byte, 11)), 10); err == nil {
		t.Error("read more than the limit")
	}
}
