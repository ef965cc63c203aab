package seal

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

// An asset's manifest has the plaintext's digests, which name the same content
// however often it is sealed; a checkpoint's has none.
func TestPlaintextDigests(t *testing.T) {
	key := testKey(t, 1)
	files := map[string][]byte{"a": pattern(10), "b": pattern(2*testChunk + 1)}
	entries := func(dir string, d plan.Digest, asset string) []Entry {
		f, err := ReadFolder(openRoot(t, dir), asset, d)
		must(t, err)
		es, err := f.Entries(key)
		must(t, err)
		return es
	}
	dir, s := sealTest(t, key, "a", files)
	again, s2 := sealTest(t, key, "a", files)
	first, second := entries(dir, s.Digest, "a"), entries(again, s2.Digest, "a")
	for i := range first {
		if first[i].PlainRoot == "" || first[i].PlainRoot != second[i].PlainRoot {
			t.Errorf("%s: %q, sealed again %q", first[i].Name, first[i].PlainRoot, second[i].PlainRoot)
		}
	}
	sink := t.TempDir()
	c, err := commitFor(t, sink, 1, "", Options{})
	must(t, err)
	root := openRoot(t, sink)
	folder, err := root.OpenRoot("000001-c")
	must(t, err)
	defer folder.Close()
	f, err := ReadFolder(folder, c.Record.Asset, c.Record.Digest)
	must(t, err)
	es, err := f.Entries(key)
	must(t, err)
	for _, e := range es {
		if e.PlainRoot != "" {
			t.Errorf("%s of a checkpoint has the digest %s", e.Name, e.PlainRoot)
		}
	}
}

func TestManifestHasAllPlaintextDigestsOrNone(t *testing.T) {
	key := testKey(t, 1)
	dir, s := sealTest(t, key, "a", map[string][]byte{"a": pattern(10), "b": pattern(11), "c": pattern(12)})
	f, err := ReadFolder(openRoot(t, dir), "a", s.Digest)
	must(t, err)
	es, err := f.Entries(key)
	must(t, err)
	for _, row := range []struct {
		name string
		edit func(*privatePart)
		ok   bool
	}{
		{"all", func(*privatePart) {}, true},
		{"none", func(p *privatePart) { p.Files[0].Root, p.Files[1].Root, p.Files[2].Root = "", "", "" }, true},
		{"not the first's", func(p *privatePart) { p.Files[0].Root = "" }, false},
		{"not the second's", func(p *privatePart) { p.Files[1].Root = "" }, false},
		{"not the last's", func(p *privatePart) { p.Files[2].Root = "" }, false},
		{"the last's alone", func(p *privatePart) { p.Files[0].Root, p.Files[1].Root = "", "" }, false},
		{"one in capitals", func(p *privatePart) { p.Files[1].Root = Root(strings.ToUpper(string(p.Files[1].Root))) }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			var p privatePart
			for _, e := range es {
				p.Files = append(p.Files, privateEntry{Name: e.Name, Size: e.Size, Root: e.PlainRoot, Salt: e.salt})
			}
			row.edit(&p)
			b, err := sealManifest(key, f.Manifest(), p, nil)
			must(t, err)
			var m Manifest
			must(t, json.Unmarshal(b, &m))
			if _, err := m.Open(key); (err == nil) != row.ok {
				t.Errorf("%v", err)
			}
		})
	}
}
