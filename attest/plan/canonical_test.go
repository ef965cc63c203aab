package plan_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/gowebpki/jcs"

	"github.com/coffer-run/coffer/attest/plan"
)

// FuzzCanonical holds the canonical form against that of another implementation
// of RFC 8785: what one of them writes is what the other does, or an error.
func FuzzCanonical(f *testing.F) {
	for _, s := range []string{
		`{"b":1,"a":[true,null,"x"]}`, `{"\u20ac":1,"\ufb33":2,"\ud83d\ude00":3,"":4}`, `"<&>\u2028\u007f\u0001\b\f\n\r\t\\\/"`, `[1.50,1e21,1E-7,123456789012345678,-0,-0.0,5e-324]`,
		`1e400`, `-1e400`, `[9007199254740993]`, `"\ud800"`, `"\udc00\ud800"`, `{"a":1,"a":2}`, `{"a":1,"\u0061":2}`, `"é"`, `""`, `{}`, `[]`, `1e-400`, `1.7976931348623159e308`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, err := plan.Canonical(json.RawMessage(b))
		if err != nil {
			return
		}
		whole, err := json.Marshal(json.RawMessage(b))
		if err != nil {
			t.Fatal(err)
		}
		// The other reads objects and lists only.
		theirs, err := jcs.Transform(append(append([]byte("["), whole...), ']'))
		if err != nil {
			t.Fatalf("%q is canonical as %q, and no JSON that has a form to the other: %v", b, ours, err)
		}
		if !bytes.Equal(theirs, append(append([]byte("["), ours...), ']')) {
			t.Fatalf("%q is %q, and %q to the other", b, ours, theirs)
		}
		again, err := plan.Canonical(json.RawMessage(ours))
		if err != nil || !bytes.Equal(again, ours) {
			t.Fatalf("%q is %q again: %v", ours, again, err)
		}
	})
}

func TestDigestForm(t *testing.T) {
	good := string(plan.Sum(nil))
	if d, err := plan.ParseDigest(good); err != nil || len(d.Bytes()) != 48 {
		t.Errorf("%s: %v", good, err)
	}
	for name, s := range map[string]string{
		"nothing": "", "no digits": "sha384:", "bare digits": good[7:], "another function": "sha256:" + good[7:], "a digit less": good[:len(good)-1], "two less": good[:len(good)-2],
		"two more": good + "00", "upper case": "sha384:" + strings.ToUpper(good[7:]), "upper case function": "SHA384:" + good[7:], "no digit": good[:len(good)-1] + "g",
		"space before": " " + good, "space after": good + " ", "line end": good + "\n", "line end for a digit": good[:len(good)-1] + "\n",
	} {
		if _, err := plan.ParseDigest(s); err == nil {
			t.Errorf("%s: parsed", name)
		}
		if plan.Digest(s).Bytes() != nil {
			t.Errorf("%s: has bytes", name)
		}
	}
}
