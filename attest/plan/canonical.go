package plan

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

// largest is the largest double in the form of RFC 8785, section 3.2.2.3.
const largest = "1.7976931348623157e+308"

// canonical returns JSON in the form of RFC 8785. A number that no double holds
// (I-JSON, RFC 7493, section 2.2) is an error: the library writes the largest
// double for every one of them, and two documents would have one digest.
func canonical(b []byte) ([]byte, error) {
	c := jsontext.Value(bytes.Clone(b))
	if err := c.Canonicalize(); err != nil {
		return nil, err
	}
	if bytes.Contains(c, []byte(largest)) {
		if err := inRange(b); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func inRange(b []byte) error {
	d := jsontext.NewDecoder(bytes.NewReader(b))
	for {
		switch t, err := d.ReadToken(); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case t.Kind() == '0':
			if _, err := strconv.ParseFloat(t.String(), 64); err != nil {
				return fmt.Errorf("number %.40s is out of range", t.String())
			}
		}
	}
}
