package serve

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
)

// TestColumnsOfAnotherType: SQLite would make an empty text of NULL, and zero of
// any word.
func TestColumnsOfAnotherType(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broker.db")
	store, err := OpenStore(t.Context(), path, "broker.test")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	const null, word, two, minus, bytes = `SELECT NULL`, `SELECT 'word'`, `SELECT 2`, `SELECT -1`, `SELECT x'00'`
	var s session
	if err := s.open(path, nil, []string{null, word, two, minus, bytes}); err != nil {
		t.Fatal(err)
	}
	defer s.discard()
	for _, c := range []struct {
		q    string
		dest any
		ok   bool
	}{
		{word, new(string), true}, {null, new(string), false}, {two, new(string), false}, {bytes, new(broker.Kind), false},
		{two, new(int), true}, {word, new(int), false}, {null, new(int64), false}, {minus, new(uint64), false},
		{two, new(bool), false}, {null, new(bool), false},
		{bytes, new([]byte), true}, {null, new([]byte), false}, {word, new([]byte), false},
		{two, instant{new(time.Time)}, true}, {null, instant{new(time.Time)}, true}, {word, instant{new(time.Time)}, false},
		{word, jsonText{new(string)}, false}, {null, jsonText{new(string)}, false}, {two, new(float64), false},
	} {
		if err := (&tx{&s}).row(t.Context(), c.q).Scan(c.dest); (err == nil) != c.ok {
			t.Errorf("%s into a %T: %v", c.q, c.dest, err)
		}
	}
}
