package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/printable"
)

// format is the value of --output.
type format string

const (
	formatText format = "text"
	formatJSON format = "json"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }
func (f *format) Set(s string) error {
	switch v := format(s); v {
	case formatText, formatJSON:
		*f = v
		return nil
	}
	return fmt.Errorf("want text or json")
}

func outputFlag(cmd *cobra.Command) *format {
	f := formatText
	cmd.Flags().VarP(&f, "output", "o", "`text` or json")
	return &f
}

func writeJSON(w io.Writer, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", b)
	return err
}

// table prints rows in columns. The first row is the head.
func table(w io.Writer, rows ...[]string) error {
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		for i := range r {
			r[i] = clean(r[i])
		}
		if _, err := fmt.Fprintln(tw, strings.Join(r, "\t")); err != nil {
			return err
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// clean makes foreign text fit for one line of a terminal.
func clean(s string) string { return printable.Line(s) }

func took(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

func clock(unix int64) string {
	if unix == 0 {
		return "-"
	}
	return time.Unix(unix, 0).UTC().Format("2006-01-02 15:04:05Z")
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// raw is the writer behind one that makes what is written printable: for what moves
// the cursor on purpose, and for bytes that are a job's or a document's own.
func raw(w io.Writer) io.Writer {
	if p, ok := w.(*printable.Writer); ok {
		return p.Unwrap()
	}
	return w
}

// terminal reports whether w is one.
func terminal(w io.Writer) bool {
	f, ok := raw(w).(interface{ Fd() uintptr })
	return ok && isatty.IsTerminal(f.Fd())
}

// logTo is where a job's output goes: byte for byte, and on a terminal without what
// would move its cursor, change its colours or its title.
func logTo(w io.Writer) io.Writer {
	if terminal(w) {
		return printable.NewOutput(raw(w))
	}
	return raw(w)
}

// maxLine is the longest line of a job's output that is held back until its end.
const maxLine = 8 << 10

// lines passes a job's output on line by line, each behind a mark, so that
// nothing a job prints looks like what coffer says.
type lines struct {
	w    io.Writer
	mark string
	held []byte
	// each takes a line in place of w.
	each func(string)
}

func (l *lines) write(b []byte) error {
	l.held = append(l.held, b...)
	for {
		i := bytes.IndexByte(l.held, '\n')
		switch {
		case i >= 0:
			if err := l.line(l.held[:i]); err != nil {
				return err
			}
			l.held = l.held[i+1:]
		case len(l.held) >= maxLine:
			if err := l.line(l.held[:maxLine]); err != nil {
				return err
			}
			l.held = l.held[maxLine:]
		default:
			return nil
		}
	}
}

// flush ends a line that the job has not.
func (l *lines) flush() error {
	if len(l.held) == 0 {
		return nil
	}
	held := l.held
	l.held = nil
	return l.line(held)
}

func (l *lines) line(b []byte) error {
	// A carriage return rewrites the line: what stands after the last one stays.
	s := strings.TrimRight(string(b), "\r")
	if i := strings.LastIndexByte(s, '\r'); i >= 0 {
		s = s[i+1:]
	}
	s = printable.Output(strings.ReplaceAll(s, "\t", "    "))
	if l.each != nil {
		l.each(s)
		return nil
	}
	_, err := fmt.Fprintf(l.w, "%s%s\n", l.mark, s)
	return err
}
