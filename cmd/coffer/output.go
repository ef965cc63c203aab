package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
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
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}

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

// terminal reports whether w is one.
func terminal(w io.Writer) bool {
	f, ok := w.(interface{ Fd() uintptr })
	return ok && isatty.IsTerminal(f.Fd())
}

// printable passes text on to a terminal without what would move its cursor,
// change its colours or its title: what a job prints is not ours.
type printable struct {
	w     io.Writer
	carry []byte
}

func (p *printable) Write(b []byte) (int, error) {
	buf := append(p.carry, b...)
	p.carry = nil
	out := make([]byte, 0, len(buf))
	for len(buf) > 0 {
		if !utf8.FullRune(buf) {
			p.carry = append([]byte(nil), buf...)
			break
		}
		r, n := utf8.DecodeRune(buf)
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			out = append(out, byte(r))
		case unicode.IsControl(r) || (r == utf8.RuneError && n == 1):
			out = append(out, '?')
		default:
			out = append(out, buf[:n]...)
		}
		buf = buf[n:]
	}
	if _, err := p.w.Write(out); err != nil {
		return 0, err
	}
	return len(b), nil
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
	s = clean(strings.ReplaceAll(strings.ToValidUTF8(s, "?"), "\t", "    "))
	if l.each != nil {
		l.each(s)
		return nil
	}
	_, err := fmt.Fprintf(l.w, "%s%s\n", l.mark, s)
	return err
}
