package printable

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// Hostile is text as jobs, nodes and bundles may choose it, by what it is meant to do.
var hostile = map[string]string{
	"move the cursor":              "a\x1b[1A\x1b[2KVERIFIED",
	"move it with one byte":        "a\u009b2JVERIFIED",
	"move it with a byte alone":    "a\x9b2JVERIFIED",
	"set the title":                "a\x1b]0;VERIFIED\x07",
	"make a link":                  "\x1b]8;;https://evil.test\x1b\\coffer.run\x1b]8;;\x1b\\",
	"write the clipboard":          "\x1b]52;c;cm0gLXJmIC8=\x07",
	"write over the line":          "failed\rVERIFIED",
	"write over it with backspace": "failed\b\b\b\b\b\bpassed",
	"begin a line":                 "x\nVERIFIED: all passed",
	"begin a line, Unicode":        "x\u2028VERIFIED\u2029\u0085",
	"begin a column":               "x\tpass\v\f",
	"turn the direction round":     "user/\u202eecila",
	"isolate a direction":          "\u2066a\u2069\u061c\u200f",
	"hide between letters":         "al\u200bi\u200dc\u2060e\ufeff",
	"hide as a soft hyphen":        "al\u00adice",
	"hide as a letter":             "alice\u3164\u115f\uffa0",
	"hide as a variant":            "alice\ufe0f\U000e0100",
	"hide as tags":                 "alice\U000e0041\U000e007f",
	"look like a space":            "alice\u00a0\u2003\u2800\u3000",
	"be of nobody":                 "\ue000\ufdd0\U0010ffff",
	"write over its neighbours":    "pass" + strings.Repeat("\u0335", 50),
	"write on what is before":      "\u0338pass",
	"push the rest to a new line":  "x" + strings.Repeat(" ", 79) + "VERIFIED",
	"end the text":                 "a\x00b",
	"delete":                       "a\x7f",
}

func TestLineShowsWhatHides(t *testing.T) {
	for name, s := range hostile {
		t.Run(name, func(t *testing.T) {
			got := Line(s)
			if got == s || !strings.ContainsRune(got, '\\') {
				t.Errorf("%q is shown as it is: %q", s, got)
			}
			if Line(got) != got {
				t.Errorf("%q is shown as %q, which is not fit to be shown", s, got)
			}
			harmless(t, got)
		})
	}
	for _, s := range []string{
		"", "demo", "12 ms  affirming (simulated)", "sha384:00ff", `C:\users`, "Zoë Łukasz Αθηνά Дмитрий 太郎 אבג عمر", "e\u0301a\u0302\u0323", "✓ … │ ▁█ 🎉",
	} {
		if got := Line(s); got != s {
			t.Errorf("%q, which hides nothing, is shown as %q", s, got)
		}
	}
	if got, want := Line("a\x1b]0;t\x07é\u202e\xff\U000e0041"), `a\u001b]0;t\u0007é\u202e\xff\udb40\udc41`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// harmless fails the test for text that could steer a terminal or hide something.
func harmless(t *testing.T, s string) {
	t.Helper()
	marks := 0
	for _, r := range s {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r) {
			t.Errorf("%U is left in %q", r, s)
		}
		if marks++; !unicode.Is(unicode.Mn, r) {
			marks = 0
		}
		if marks > maxMarks {
			t.Errorf("%d marks on one character in %q", marks, s)
		}
	}
	if strings.Contains(s, strings.Repeat(" ", maxSpaces+1)) {
		t.Errorf("more than %d spaces in %q", maxSpaces, s)
	}
}

// What stays in a text of several lines are its newlines and tabs, and in a line of
// output its spaces.
func TestTextAndOutput(t *testing.T) {
	if got, want := Text("a\tb\n\r\x1b[m\n"), "a\tb\n\\u000d\\u001b[m\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	deep := strings.Repeat(" ", 40) + "raise"
	if got := Output(deep + "\n"); got != deep+`\u000a` {
		t.Errorf("got %q", got)
	}
}

// A JSON document says the same after it has been made fit to be shown.
func TestJSONSaysTheSame(t *testing.T) {
	want := map[string]string{}
	for name, s := range hostile {
		want[name] = strings.ToValidUTF8(s, "\ufffd")
	}
	b, err := json.MarshalIndent(want, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	var shown bytes.Buffer
	if _, err := NewWriter(&shown).Write(b); err != nil {
		t.Fatal(err)
	}
	var got map[string]string
	if err := json.Unmarshal(shown.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s: %q became %q", name, want[name], got[name])
		}
	}
	harmless(t, strings.Join(strings.Fields(shown.String()), " "))
}

// However writes are cut, what comes out is the same.
func TestWriterJoinsWhatWasCut(t *testing.T) {
	const s = "é\u202e太\U000e0041🎉\x9b\xe2\x80x\n\xff"
	for size := 1; size <= len(s); size++ {
		var b bytes.Buffer
		w := NewWriter(&b)
		for i := 0; i < len(s); i += size {
			part := []byte(s[i:min(i+size, len(s))])
			if n, err := w.Write(part); err != nil || n != len(part) {
				t.Fatalf("%d, %v", n, err)
			}
		}
		if got := b.String(); got != Text(s) {
			t.Errorf("by %d bytes: %q, want %q", size, got, Text(s))
		}
	}
}

func TestApart(t *testing.T) {
	for name, tt := range map[string][2]string{
		"letters of two scripts": {"alice", "\u0430lice"},
		"composed or not":        {"\u00e9", "e\u0301"},
		"something unseen":       {"alice", "alice\u200b"},
		"two things unseen":      {"a\u200b", "a\u200c"},
		"an escape and its text": {"a\u202e", `a\u202e`},
		"bytes and their text":   {"a\xff", `a\xff`},
		"spaces":                 {"a b", "a\u00a0b"},
	} {
		a, b := Apart(tt[0], tt[1])
		if a == b || !ascii(a) || !ascii(b) {
			t.Errorf("%s: shown as %s and %s", name, a, b)
		}
	}
	if a, b := Apart("one", "two words"); a != "one" || b != "two words" {
		t.Errorf("shown as %s and %s", a, b)
	}
}

func FuzzLine(f *testing.F) {
	for _, s := range hostile {
		f.Add(s, "x")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		got := Line(a)
		harmless(t, got)
		if !utf8.ValidString(got) || Line(got) != got {
			t.Errorf("%q is shown as %q", a, got)
		}
		if x, y := Apart(a, b); a != b && x == y {
			t.Errorf("%q and %q are both shown as %q", a, b, x)
		}
	})
}
