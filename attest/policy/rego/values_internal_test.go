package rego

import (
	"encoding/json"
	"testing"

	"github.com/coffer-run/coffer/attest/anchor"
)

// Claims read the short way are what their JSON form says.
func TestReaderIsJSON(t *testing.T) {
	on := true
	var none *bool
	claims := map[string]any{
		"text": "a", "empty": "", "not UTF-8": "a\xffb", "named text": anchor.Genoa, "on": true, "number": 7, "negative": -1, "large": uint64(1) << 63,
		"fraction": 0.5, "bytes": []byte{1, 2}, "texts": []string{"a", "b"}, "no texts": []string{}, "nil texts": []string(nil), "numbers": []int{1},
		"list": []any{"a", 1, true, nil, map[string]any{"x": []any{}}}, "nil list": []any(nil), "map": map[string]string{"1": "a"}, "nil map": map[string]any(nil),
		"nil": nil, "pointer": &on, "nil pointer": none, "nested": map[string]any{"fmc": 0, "snp": 23}, "digest": [2]byte{1, 2},
		"struct": struct {
			A int `json:"a"`
		}{1},
	}
	b, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	want, err := fromJSON(b)
	if err != nil {
		t.Fatal(err)
	}
	var r reader
	got, err := r.read(claims)
	if err != nil {
		t.Fatal(err)
	}
	if want.Compare(got.Value) != 0 {
		t.Errorf("read %v\nwant %v", got, want)
	}
	if r.size < 100 || r.size > len(b) {
		t.Errorf("size is %d of %d", r.size, len(b))
	}
	for _, bad := range []any{func() {}, make(chan int), map[string]any{"x": func() {}}, []any{func() {}}, map[string]any{"\xff": 1}} {
		if _, err := r.read(bad); err == nil {
			t.Errorf("%T can be read", bad)
		}
	}
}
