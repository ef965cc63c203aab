package sink

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// mark is U+FFFD, the replacement character. Text has it only where something was escaped.
const mark = string(utf8.RuneError)

// escape makes a text UTF-8 so that every text has a form of its own: a byte that is part of no character becomes mark and two hex digits,
// and so does each of the three bytes of a mark that the text had. Any other text stays as it is, so a pattern
// matches it, and '/' and '.' stay where they are.
func escape(s string) string {
	if utf8.ValidString(s) && !strings.Contains(s, mark) {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError {
			for _, c := range []byte(s[:n]) {
				fmt.Fprintf(&b, "%s%02x", mark, c)
			}
		} else {
			b.WriteString(s[:n])
		}
		s = s[n:]
	}
	return b.String()
}

// escapeText escapes every text in a message. Lists are replaced: the kernel may have the same one.
func escapeText(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		text := f.Kind() == protoreflect.StringKind
		switch {
		case f.IsList() && text:
			list := m.NewField(f).List()
			for i := range v.List().Len() {
				list.Append(protoreflect.ValueOfString(escape(v.List().Get(i).String())))
			}
			m.Set(f, protoreflect.ValueOfList(list))
		case f.IsList() || f.IsMap(): // there are none of messages
		case text:
			m.Set(f, protoreflect.ValueOfString(escape(v.String())))
		case f.Kind() == protoreflect.MessageKind:
			escapeText(v.Message())
		}
		return true
	})
}
