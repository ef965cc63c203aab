package seal

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// What lies on the disk has no file's name, no digest of its content and no content; who
// has the key finds all three.
func TestSealedFolderTellsNoNames(t *testing.T) {
	key := testKey(t, 1)
	const name = "a-name-that-tells/model.safetensors"
	plain := pattern(testChunk + 7)
	dir, s := sealTest(t, key, "asset", map[string][]byte{name: plain})
	f, err := ReadFolder(openRoot(t, dir), "asset", s.Digest)
	must(t, err)
	es, err := f.Entries(key)
	must(t, err)
	if len(es) != 1 || es[0].Name != name || es[0].Size != int64(len(plain)) || es[0].PlainRoot == "" {
		t.Fatalf("%+v", es)
	}
	files, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range files {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		must(t, err)
		for what, secret := range map[string][]byte{
			"a part of the name": []byte("a-name-that-tells"), "its last part": []byte("model.safetensors"),
			"the digest": []byte(es[0].PlainRoot), "the size": []byte(`"size"`), "content": plain[:64], "its end": plain[len(plain)-32:],
		} {
			if bytes.Contains(b, secret) || bytes.Contains([]byte(e.Name()), secret) {
				t.Errorf("%s has %s", e.Name(), what)
			}
		}
	}
}
