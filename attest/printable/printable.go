// Package printable makes foreign text fit to be shown: to people on a terminal or a
// page, where it must not move the cursor, hide a part of itself, turn its direction
// round, or look like a line of its own.
//
// Trusted: nothing. Checked: every character. One that cannot be seen is written as
// JSON escapes it (RFC 8259, section 7), so that it is seen, and so that a JSON
// document goes on to say the same. Not checked: characters that look like others, as
// the Cyrillic а does like the Latin a; Apart shows those.
package printable

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// maxMarks is how many combining marks one character may carry: more of them write
	// over the lines above and below.
	maxMarks = 3
	// maxSpaces is how many spaces may follow each other in a Line: more of them push
	// what comes after to where a terminal begins its next line.
	maxSpaces = 16
)

// Line returns s for one line: no character of it ends the line or cannot be seen.
func Line(s string) string { return show(s, "", maxSpaces) }

// Output returns a line that a program printed: as Line, with as many spaces as there
// are.
func Output(s string) string { return show(s, "", len(s)) }

// Text returns s for several lines: newlines and tabs stay as they are.
func Text(s string) string { return show(s, "\n\t", len(s)) }

// Apart returns two values that differ so that they look different: as Lines, or, where
// either has a letter that may look like another one, with every character beyond
// ASCII as an escape.
func Apart(a, b string) (string, string) {
	if x, y := Line(a), Line(b); x != y && ascii(a) && ascii(b) {
		return x, y
	}
	return strconv.QuoteToASCII(a), strconv.QuoteToASCII(b)
}

func ascii(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r > unicode.MaxASCII }) < 0
}

// Writer passes text on that may be cut anywhere, within a character too.
type Writer struct {
	w     io.Writer
	stay  string
	carry []byte
}

// NewWriter returns a writer that passes Text on to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w, stay: "\n\t"} }

// NewOutput returns a writer that passes on what a program prints: as Text, with
// carriage returns, by which a program writes over a line of its own.
func NewOutput(w io.Writer) *Writer { return &Writer{w: w, stay: "\n\t\r"} }

// Unwrap returns the writer behind it, for what must not be changed.
func (w *Writer) Unwrap() io.Writer { return w.w }

// Write implements io.Writer.
func (w *Writer) Write(b []byte) (int, error) {
	text := append(w.carry, b...)
	end := whole(text)
	w.carry = append([]byte(nil), text[end:]...)
	if _, err := w.w.Write([]byte(show(string(text[:end]), w.stay, end))); err != nil {
		return 0, err
	}
	return len(b), nil
}

// whole returns how many bytes of b hold no character that the next write could end.
func whole(b []byte) int {
	for i := max(0, len(b)-utf8.UTFMax+1); i < len(b); i++ {
		if utf8.RuneStart(b[i]) && !utf8.FullRune(b[i:]) {
			return i
		}
	}
	return len(b)
}

// show escapes what cannot be seen, but for the characters in stay.
func show(s, stay string, spaces int) string {
	var out strings.Builder
	marks, blanks := maxMarks, 0 // a mark at the beginning would be on what stands before s
	for i := 0; i < len(s); {
		if c := s[i]; c > ' ' && c < 0x7f {
			out.WriteByte(c)
			marks, blanks, i = 0, 0, i+1
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		seen := visible(r) && (r != utf8.RuneError || n > 1)
		if unicode.In(r, unicode.Mn, unicode.Me) {
			marks++
			seen = seen && marks <= maxMarks
		} else {
			marks = 0
		}
		if r == ' ' {
			blanks++
			seen = blanks <= spaces
		} else {
			blanks = 0
		}
		switch {
		case seen || strings.ContainsRune(stay, r):
			out.WriteString(s[i : i+n])
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&out, `\x%02x`, s[i])
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, hi, lo)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
		i += n
	}
	return out.String()
}

// blank is the braille pattern without dots, which looks like a space.
const blank = '\u2800'

// visible reports whether a character shows by itself: controls, formats (direction
// and joining among them), spaces other than U+0020, what Unicode says may be left out
// when it is drawn (Default_Ignorable_Code_Point, UAX #44), and what has no
// meaning do not.
func visible(r rune) bool {
	return unicode.IsPrint(r) && r != blank && !unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}
