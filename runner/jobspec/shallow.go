package jobspec

import (
	"fmt"

	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/token"
)

// maxDepth bounds how deep a job file nests within a line. No field is deeper than six.
const maxDepth = 32

// shallow refuses a file that nests deeper than any job file does, before it is parsed:
// the parser's time and memory grow with the square of the depth, and 64 KiB of brackets
// take it half a minute. What nests by its indentation takes as many bytes itself.
func shallow(b []byte) error {
	depth, entries, line := 0, 0, 0
	for _, t := range lexer.Tokenize(string(b)) {
		if at := t.Position.Line; at != line {
			entries, line = 0, at
		}
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		case token.SequenceEntryType, token.MappingKeyType:
			entries++
		default:
		}
		if depth > maxDepth || entries > maxDepth {
			return &Error{Line: line, Problem: fmt.Sprintf("nested deeper than %d levels", maxDepth)}
		}
	}
	return nil
}
