// Package refusal carries a refusal, every failed check of it, through a
// Connect error and back.
//
// Trusted: nothing. Checked: sizes and form of what a peer sends. Not checked:
// whether the peer is right to refuse; a refusal grants nothing.
package refusal

import (
	"errors"
	"strings"
	"unicode"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/coffer-run/coffer/attest/check"
)

const (
	// MaxChecks bounds how many failed checks are carried.
	MaxChecks = 128
	// MaxText bounds each text, in bytes.
	MaxText = 512
)

// marker tells this detail from other structures.
const marker = "coffer.run/refusal/v1"

// Encode returns r as a PermissionDenied error with the checks in a detail.
func Encode(r *check.Refusal) *connect.Error {
	checks := make([]any, 0, len(r.Checks))
	for i, c := range r.Checks {
		if i == MaxChecks {
			break
		}
		checks = append(checks, map[string]any{
			"id": clean(c.ID), "expected": clean(c.Expected), "found": clean(c.Found), "hint": clean(c.Hint),
		})
	}
	out := connect.NewError(connect.CodePermissionDenied, errors.New(clean(r.Error())))
	s, err := structpb.NewStruct(map[string]any{"type": marker, "stage": clean(r.Stage), "checks": checks})
	if err != nil {
		return out
	}
	d, err := connect.NewErrorDetail(s)
	if err != nil {
		return out
	}
	out.AddDetail(d)
	return out
}

// Decode returns the refusal that err carries, if it carries one. Text from the
// peer comes back printable and bounded.
func Decode(err error) (*check.Refusal, bool) {
	var ce *connect.Error
	if !errors.As(err, &ce) || ce.Code() != connect.CodePermissionDenied {
		return nil, false
	}
	for _, d := range ce.Details() {
		v, err := d.Value()
		if err != nil {
			continue
		}
		s, ok := v.(*structpb.Struct)
		if !ok || text(s, "type") != marker {
			continue
		}
		var l check.List
		for i, c := range s.GetFields()["checks"].GetListValue().GetValues() {
			if i == MaxChecks {
				break
			}
			f := c.GetStructValue()
			l.Fail(text(f, "id"), text(f, "expected"), text(f, "found"), text(f, "hint"))
		}
		return check.Refuse(text(s, "stage"), l), true
	}
	return nil, false
}

func text(s *structpb.Struct, field string) string {
	return clean(s.GetFields()[field].GetStringValue())
}

// clean keeps terminal control sequences and broken UTF-8 out of texts that end
// up in front of people.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > MaxText {
		s = strings.ToValidUTF8(s[:MaxText], "") + "..."
	}
	return s
}
