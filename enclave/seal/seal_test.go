package seal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/keys"
)

const testChunk = MinChunkSize

func testKey(t testing.TB, b byte) *keys.DataKey {
	t.Helper()
	k, err := keys.NewDataKey(bytes.Repeat([]byte{b}, keys.DataKeySize))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

type memReader struct{ *bytes.Reader }

func (memReader) Close() error { return nil }

func memSource(name string, b []byte) Source {
	return Source{Name: name, Size: int64(len(b)), Open: func() (Reader, error) { return memReader{bytes.NewReader(b)}, nil }}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8(sha256.Sum256([]byte(fmt.Sprint(n))))
	_, _ = r.Read(b)
	return b
}

func openRoot(t testing.TB, dir string) *os.Root {
	t.Helper()
	r, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func sealTest(t testing.TB, key *keys.DataKey, asset string, files map[string][]byte) (string, Sealed) {
	t.Helper()
	dst := filepath.Join(t.TempDir(), "sealed")
	var src []Source
	for n, b := range files {
		src = append(src, memSource(n, b))
	}
	s, err := Seal(t.Context(), key, asset, src, dst, Options{ChunkSize: testChunk})
	if err != nil {
		t.Fatal(err)
	}
	return dst, s
}

// openAll reads everything back as the holder does.
func openAll(t testing.TB, key *keys.DataKey, asset, dir string, digest plan.Digest) (map[string][]byte, error) {
	t.Helper()
	f, err := ReadFolder(openRoot(t, dir), asset, digest)
	if err != nil {
		return nil, err
	}
	es, err := f.Entries(key)
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	for _, e := range es {
		o, err := f.Open(key, e)
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		_, err = o.WriteTo(&b)
		if cerr := o.Close(); err != nil || cerr != nil {
			return nil, errors.Join(err, cerr)
		}
		out[e.Name] = b.Bytes()
	}
	return out, nil
}

func TestRoundTrip(t *testing.T) {
	key := testKey(t, 1)
	files := map[string][]byte{}
	for _, n := range []int{0, 1, 4095, testChunk - 1, testChunk, testChunk + 1, 3*testChunk - 1, 3 * testChunk, 5*testChunk + 7} {
		files[fmt.Sprintf("d/%d.bin", n)] = pattern(n)
	}
	dir, s := sealTest(t, key, "weights", files)
	if err := Check(t.Context(), openRoot(t, dir), "weights", s.Digest); err != nil {
		t.Fatal(err)
	}
	got, err := openAll(t, key, "weights", dir, s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(files) {
		t.Fatalf("%d files of %d", len(got), len(files))
	}
	for n, b := range files {
		if !bytes.Equal(got[n], b) {
			t.Errorf("%s differs", n)
		}
	}
}

func TestReadAt(t *testing.T) {
	key := testKey(t, 1)
	plain := pattern(3*testChunk + 100)
	dir, s := sealTest(t, key, "a", map[string][]byte{"f": plain})
	f, err := ReadFolder(openRoot(t, dir), "a", s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	es, err := f.Entries(key)
	if err != nil {
		t.Fatal(err)
	}
	o, err := f.Open(key, es[0])
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	want := bytes.NewReader(plain)
	for _, c := range [][2]int{{0, 1}, {0, len(plain)}, {1, testChunk}, {testChunk - 1, 2}, {testChunk, testChunk}, {3 * testChunk, 100}, {3 * testChunk, 200}, {len(plain), 1}, {len(plain) + 5, 1}, {5, 0}, {100, 3 * testChunk}} {
		a, b := make([]byte, c[1]), make([]byte, c[1])
		n, err := o.ReadAt(a, int64(c[0]))
		wn, werr := want.ReadAt(b, int64(c[0]))
		if n != wn || !errors.Is(err, werr) || !bytes.Equal(a, b) {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v; want %d, %v", c[1], c[0], n, err, wn, werr)
		}
	}
	if _, err := io.Copy(io.Discard, io.NewSectionReader(o, 0, o.Size())); err != nil {
		t.Error(err)
	}
}

// TestEveryChange changes one small folder in every place and wants an error
// from opening, never other bytes.
func TestEveryChange(t *testing.T) {
	key := testKey(t, 1)
	dir, s := sealTest(t, key, "a", map[string][]byte{"f": []byte("the plaintext of a small file")})
	p := filepath.Join(dir, "000000.sealed")
	orig, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	mf, err := os.ReadFile(filepath.Join(dir, ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	open := func(b []byte) error {
		f, err := OpenFile(key, bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return err
		}
		_, err = f.WriteTo(io.Discard)
		return err
	}
	if err := open(orig); err != nil {
		t.Fatal(err)
	}
	count := 0
	for i := range orig {
		for bit := range 8 {
			orig[i] ^= 1 << bit
			if err := open(orig); err == nil {
				t.Fatalf("byte %d bit %d flipped: opened", i, bit)
			}
			orig[i] ^= 1 << bit
			count++
		}
	}
	for n := range orig {
		if err := open(orig[:n]); err == nil {
			t.Fatalf("cut to %d bytes: opened", n)
		}
		count++
	}
	for n := 1; n <= 64; n++ {
		for _, fill := range []byte{0, 0xff} {
			if err := open(append(bytes.Clone(orig), bytes.Repeat([]byte{fill}, n)...)); err == nil {
				t.Fatalf("%d bytes longer: opened", n)
			}
			count++
		}
	}
	t.Logf("%d changes of a file of %d bytes refused", count, len(orig))

	count = 0
	m, _, err := ParseManifest(mf)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Open(key); err != nil {
		t.Fatal(err)
	}
	for i := range mf {
		for bit := range 8 {
			mf[i] ^= 1 << bit
			// The digest is left out: only the form and the key stand here.
			if m, d, err := ParseManifest(mf); err == nil {
				if d == s.Digest {
					t.Fatalf("byte %d bit %d flipped: same digest", i, bit)
				}
				if _, err := m.Open(key); err == nil {
					t.Fatalf("manifest byte %d bit %d flipped: opened", i, bit)
				}
			}
			mf[i] ^= 1 << bit
			count++
		}
	}
	t.Logf("%d changes of a manifest of %d bytes refused", count, len(mf))
}

func TestChunkAttacks(t *testing.T) {
	key := testKey(t, 1)
	plain := pattern(4*testChunk + 100)
	dir, _ := sealTest(t, key, "a", map[string][]byte{"f": plain, "g": pattern(4*testChunk + 100)})
	read := func(n string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	f, g := read("000000.sealed"), read("000001.sealed")
	stride := testChunk + TagSize
	at := func(b []byte, i int) []byte {
		return b[PayloadOffset+i*stride : min(PayloadOffset+(i+1)*stride, len(b))]
	}
	build := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	head := f[:PayloadOffset]
	for name, b := range map[string][]byte{
		"first two chunks swapped":         build(head, at(f, 1), at(f, 0), at(f, 2), at(f, 3), at(f, 4)),
		"a chunk repeated":                 build(head, at(f, 0), at(f, 0), at(f, 2), at(f, 3), at(f, 4)),
		"a chunk left out":                 build(head, at(f, 0), at(f, 2), at(f, 3), at(f, 4)),
		"cut after a whole chunk":          f[:PayloadOffset+3*stride],
		"last chunk alone":                 build(head, at(f, 4)),
		"last chunk twice":                 build(f, at(f, 4)),
		"an empty chunk at the end":        build(f[:PayloadOffset+4*stride], make([]byte, TagSize)),
		"a chunk of another file":          build(head, at(f, 0), at(g, 1), at(f, 2), at(f, 3), at(f, 4)),
		"header of another file":           build(g[:PayloadOffset], f[PayloadOffset:]),
		"chunk size in the header doubled": func() []byte { b := bytes.Clone(f); b[17] = 2; return b }(),
		"chunk size in the header of 4 GiB": func() []byte {
			b := bytes.Clone(f)
			copy(b[16:20], []byte{0xff, 0xff, 0xff, 0xff})
			return b
		}(),
		"header only": head,
		"empty":       nil,
	} {
		o, err := OpenFile(key, bytes.NewReader(b), int64(len(b)))
		if err != nil {
			continue
		}
		var out bytes.Buffer
		if _, err := o.WriteTo(&out); err == nil {
			t.Errorf("%s: opened", name)
		}
		if !bytes.HasPrefix(plain, out.Bytes()) {
			t.Errorf("%s: gave bytes that were never sealed there", name)
		}
	}
}

func TestFolderAttacks(t *testing.T) {
	key, other := testKey(t, 1), testKey(t, 2)
	a, b := pattern(testChunk+1), pattern(testChunk+1)
	b[0] ^= 1
	for name, c := range map[string]struct {
		change func(t *testing.T, dir string) // what the attacker does
		key    *keys.DataKey
		asset  string
		digest plan.Digest
		// hidden: Check, which has no key, cannot see it.
		hidden bool
	}{
		"two files of one asset swapped": {change: func(t *testing.T, dir string) {
			swap(t, filepath.Join(dir, "000000.sealed"), filepath.Join(dir, "000001.sealed"))
		}},
		"a file of another asset under the same key": {change: func(t *testing.T, dir string) {
			d, _ := sealTest(t, key, "a", map[string][]byte{"f": a, "g": b})
			swap(t, filepath.Join(dir, "000000.sealed"), filepath.Join(d, "000000.sealed"))
		}},
		"manifest of another sealing of the same files": {change: func(t *testing.T, dir string) {
			d, _ := sealTest(t, key, "a", map[string][]byte{"f": a, "g": b})
			swap(t, filepath.Join(dir, ManifestName), filepath.Join(d, ManifestName))
		}},
		"a file missing":  {change: func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "000001.sealed"))) }},
		"a file cut":      {change: func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "000001.sealed"), 5000)) }},
		"a file extended": {change: func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "000001.sealed"), 1<<20)) }},
		"a symbolic link in the place of a file": {change: func(t *testing.T, dir string) {
			p := filepath.Join(dir, "000000.sealed")
			must(t, os.Rename(p, p+"x"))
			must(t, os.Symlink("000000.sealedx", p))
		}},
		"a symbolic link in the place of the manifest": {change: func(t *testing.T, dir string) {
			p := filepath.Join(dir, ManifestName)
			must(t, os.Rename(p, p+"x"))
			must(t, os.Symlink("manifest.jsonx", p))
		}},
		"a fifo in the place of a file": {change: func(t *testing.T, dir string) {
			p := filepath.Join(dir, "000000.sealed")
			must(t, os.Remove(p))
			must(t, syscall.Mkfifo(p, 0o600))
		}},
		"manifest missing": {change: func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, ManifestName))) }},
		"another asset":    {asset: "b"},
		"another digest":   {digest: plan.Sum([]byte("x"))},
		"no digest":        {digest: "-"},
		"another key":      {key: other, hidden: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir, s := sealTest(t, key, "a", map[string][]byte{"f": a, "g": b})
			k, asset, digest := key, "a", s.Digest
			if c.change != nil {
				c.change(t, dir)
			}
			if c.key != nil {
				k = c.key
			}
			if c.asset != "" {
				asset = c.asset
			}
			if c.digest != "" {
				digest = c.digest
			}
			if _, err := openAll(t, k, asset, dir, digest); err == nil {
				t.Error("opened")
			}
			if err := Check(t.Context(), openRoot(t, dir), asset, digest); (err == nil) != c.hidden {
				t.Errorf("check: %v", err)
			}
		})
	}
	t.Run("a file that the manifest does not name", func(t *testing.T) {
		dir, s := sealTest(t, key, "a", map[string][]byte{"f": a})
		must(t, os.WriteFile(filepath.Join(dir, "extra"), nil, 0o600))
		if err := Check(t.Context(), openRoot(t, dir), "a", s.Digest); err == nil {
			t.Error("check passes")
		}
	})
}

// TestKeyCommitment takes the commitment away from a header and shows that
// nothing but it stands between a file and a second key in GCM: the same bytes
// authenticate under the key that was used, and the header names only that one.
func TestKeyCommitment(t *testing.T) {
	key, other := testKey(t, 1), testKey(t, 2)
	dir, _ := sealTest(t, key, "a", map[string][]byte{"f": []byte("x")})
	b, err := os.ReadFile(filepath.Join(dir, "000000.sealed"))
	must(t, err)
	if _, err := OpenFile(other, bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrKey) {
		t.Errorf("another key: %v, want ErrKey before any chunk is read", err)
	}
	h, _, err := headerWithSalt(key, testChunk, [saltSize]byte{1})
	must(t, err)
	g, _, err := headerWithSalt(other, testChunk, [saltSize]byte{1})
	must(t, err)
	if bytes.Equal(h[commitmentAt:], g[commitmentAt:]) {
		t.Error("two keys have one commitment")
	}
	copy(g[commitmentAt:], h[commitmentAt:])
	block := make([]byte, PayloadOffset)
	copy(block, g[:])
	if _, _, err := parseHeader(other, block); !errors.Is(err, ErrKey) {
		t.Errorf("a commitment to another key: %v", err)
	}
}

func TestNames(t *testing.T) {
	key := testKey(t, 1)
	for _, n := range []string{"", "/a", "../a", "a/../b", "a//b", "a/", ".", "..", "./a", "a/./b", "a\x00b", "\xff", strings.Repeat("a", 256), strings.Repeat("a/", 600) + "a"} {
		dst := filepath.Join(t.TempDir(), "d")
		if _, err := Seal(t.Context(), key, "a", []Source{memSource(n, nil)}, dst, Options{}); err == nil {
			t.Errorf("name %.40q was sealed", n)
		}
		if !utf8.ValidString(n) {
			continue // has no JSON form
		}
		// One who holds the key could still write such a manifest.
		m := Manifest{Version: Version, Asset: "a", ChunkSize: testChunk, Files: []SealedFile{{ID: fileID(0), CipherSize: PayloadOffset + TagSize, Root: merkleRoot(nil)}}}
		b, err := sealManifest(key, m, privatePart{Files: []privateEntry{{Name: n, Salt: make([]byte, saltSize), Root: merkleRoot(nil)}}}, nil)
		must(t, err)
		if m, _, err = ParseManifest(b); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Open(key); err == nil {
			t.Errorf("name %.40q was opened", n)
		}
	}
	for name, list := range map[string][]string{"twice": {"a", "a"}, "file and folder": {"a", "a/b"}, "file and deep folder": {"a", "a!", "a/b/c"}} {
		var src []Source
		for _, n := range list {
			src = append(src, memSource(n, nil))
		}
		if _, err := Seal(t.Context(), key, "a", src, filepath.Join(t.TempDir(), "d"), Options{}); err == nil {
			t.Errorf("%s: sealed", name)
		}
	}
}

func TestTree(t *testing.T) {
	key := testKey(t, 1)
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "sub/deep"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "sub/deep/f"), []byte("one"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "g"), []byte("two"), 0o600))
	seal := func(path string) error {
		tr, err := OpenTree(path)
		if err != nil {
			return err
		}
		defer tr.Close()
		dst := filepath.Join(t.TempDir(), "d")
		s, err := Seal(t.Context(), key, "a", tr.Sources, dst, Options{})
		if err == nil {
			_, err = openAll(t, key, "a", dst, s.Digest)
		}
		return err
	}
	must(t, seal(dir))
	must(t, seal(filepath.Join(dir, "g")))
	for name, target := range map[string]string{"inside": "g", "outside": "/etc/hostname", "dangling": "nowhere"} {
		l := filepath.Join(dir, "link")
		must(t, os.Symlink(target, l))
		if err := seal(dir); err == nil {
			t.Errorf("link %s: sealed", name)
		}
		if err := seal(l); err == nil {
			t.Errorf("link %s itself: sealed", name)
		}
		must(t, os.Remove(l))
	}
	tr, err := OpenTree(dir)
	must(t, err)
	defer tr.Close()
	must(t, os.WriteFile(filepath.Join(dir, "g"), []byte("three"), 0o600))
	if _, err := Seal(t.Context(), key, "a", tr.Sources, filepath.Join(t.TempDir(), "d"), Options{}); err == nil {
		t.Error("a source that changed its size was sealed")
	}
	if err := seal(t.TempDir()); err == nil {
		t.Error("an empty folder was sealed")
	}
}

// A source that fails, is short, changes, or a cancelled context leaves nothing behind.
func TestSealIsWholeOrNothing(t *testing.T) {
	key := testKey(t, 1)
	big := pattern(8 * testChunk)
	ctx, cancel := context.WithCancel(t.Context())
	for name, c := range map[string]struct {
		ctx context.Context
		src Source
	}{
		"open fails":  {t.Context(), Source{Name: "b", Open: func() (Reader, error) { return nil, errors.New("no") }}},
		"short":       {t.Context(), Source{Name: "b", Size: int64(len(big)) + 1, Open: memSource("b", big).Open}},
		"close fails": {t.Context(), Source{Name: "b", Size: 3, Open: func() (Reader, error) { return failClose{memReader{bytes.NewReader([]byte("abc"))}}, nil }}},
		"cancelled": {ctx, Source{Name: "b", Size: int64(len(big)), Open: func() (Reader, error) {
			cancel()
			return memReader{bytes.NewReader(big)}, nil
		}}},
		"too long": {t.Context(), Source{Name: "b", Size: maxPlain + 1, Open: memSource("b", big).Open}},
	} {
		dir := t.TempDir()
		if _, err := Seal(c.ctx, key, "a", []Source{memSource("a", big), c.src}, filepath.Join(dir, "d"), Options{ChunkSize: testChunk}); err == nil {
			t.Errorf("%s: sealed", name)
		}
		if es, err := os.ReadDir(dir); err != nil || len(es) != 0 {
			t.Errorf("%s: left %v behind", name, es)
		}
	}
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "d"), 0o700))
	if _, err := Seal(t.Context(), key, "a", []Source{memSource("a", big)}, filepath.Join(dir, "d"), Options{}); err == nil {
		t.Error("replaced a folder that exists")
	}
}

type failClose struct{ memReader }

func (failClose) Close() error { return errors.New("changed") }

func TestCheckpointRecord(t *testing.T) {
	key := testKey(t, 1)
	session, err := keys.GenerateSession()
	must(t, err)
	dir := t.TempDir()
	root := openRoot(t, dir)
	c := Commit{JobID: "job", Plan: plan.Sum([]byte("p")), Asset: "ckpt", Sequence: 1, Name: "epoch-1", Folder: "000001-epoch-1"}
	got, err := SealCheckpoint(t.Context(), key, session, []Source{memSource("w", pattern(100))}, root, c, time.Now, Options{})
	must(t, err)
	r, err := receipt.DecodeCheckpointRecord(got.Encoded)
	must(t, err)
	if r != got.Record {
		t.Errorf("record reads back as %+v, want %+v", r, got.Record)
	}
	must(t, keys.VerifyLabelled(session.Public(), receipt.CheckpointLabel, got.Encoded, got.Signature))
	must(t, Check(t.Context(), openRoot(t, filepath.Join(dir, c.Folder)), "ckpt", r.Digest))
	if _, err := openAll(t, key, "ckpt", filepath.Join(dir, c.Folder), r.Digest); err != nil {
		t.Error(err)
	}
	for name, bad := range map[string]func(*Commit){
		"a first with a parent":     func(c *Commit) { c.Parent = plan.Sum(nil) },
		"a second without a parent": func(c *Commit) { c.Sequence = 2 },
		"no plan":                   func(c *Commit) { c.Plan = "" },
		"no sequence":               func(c *Commit) { c.Sequence = 0 },
		"no job":                    func(c *Commit) { c.JobID = "" },
	} {
		c := c
		c.Folder = "bad"
		bad(&c)
		if _, err := SealCheckpoint(t.Context(), key, session, []Source{memSource("w", nil)}, root, c, time.Now, Options{}); err == nil {
			t.Errorf("%s: sealed", name)
		}
		if _, err := root.Lstat("bad.tmp"); err == nil {
			t.Errorf("%s: left its folder behind", name)
		}
	}
}

func TestMerkleRootAgainstRFC6962(t *testing.T) {
	// Certificate Transparency's reference implementation uses these leaves; the
	// roots follow from section 2.1.
	h := newLeafHasher()
	var ls []leaf
	for _, b := range [][]byte{{}, {0}, {0x10}, {0x20, 0x21}, {0x30, 0x31}, {0x40, 0x41, 0x42, 0x43}, {0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57}, {0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e, 0x6f}} {
		var l leaf
		h.sum(b, &l)
		ls = append(ls, l)
	}
	for n, want := range map[int]Root{
		0: "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		1: "sha256:6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
		2: "sha256:fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
		3: "sha256:aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
		7: "sha256:ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
		8: "sha256:5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
	} {
		if got := merkleRoot(ls[:n]); got != want {
			t.Errorf("root of %d leaves is %s, want %s", n, got, want)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	key := testKey(f, 1)
	m := Manifest{Version: Version, Asset: "a", ChunkSize: testChunk, Files: []SealedFile{{ID: fileID(0), CipherSize: PayloadOffset + TagSize, Root: merkleRoot(nil)}}}
	b, err := sealManifest(key, m, privatePart{Files: []privateEntry{{Name: "n", Salt: make([]byte, saltSize), Root: merkleRoot(nil)}}}, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, _, err := ParseManifest(b)
		if err != nil {
			return
		}
		_, _ = m.Open(key)
	})
}

func FuzzOpenFile(f *testing.F) {
	key := testKey(f, 1)
	h, _, err := headerWithSalt(key, testChunk, [saltSize]byte{})
	if err != nil {
		f.Fatal(err)
	}
	b := make([]byte, PayloadOffset+TagSize)
	copy(b, h[:])
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := OpenFile(key, bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		if _, err := o.WriteTo(io.Discard); err == nil && len(b) > PayloadOffset+TagSize {
			t.Error("opened bytes that nobody sealed")
		}
	})
}

func BenchmarkReadChunk(b *testing.B) {
	key := testKey(b, 1)
	dir, s := sealTest(b, key, "a", map[string][]byte{"f": pattern(64 << 20)})
	fo, err := ReadFolder(openRoot(b, dir), "a", s.Digest)
	must(b, err)
	es, err := fo.Entries(key)
	must(b, err)
	o, err := fo.Open(key, es[0])
	must(b, err)
	defer o.Close()
	w, dst := o.Worker(), make([]byte, o.ChunkSize())
	b.SetBytes(int64(o.ChunkSize()))
	b.ReportAllocs()
	i := int64(0)
	for b.Loop() {
		must(b, w.ReadChunk(i%o.Chunks(), dst))
		i++
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func swap(t *testing.T, a, b string) {
	t.Helper()
	tmp := a + ".swap"
	must(t, os.Rename(a, tmp))
	must(t, os.Rename(b, a))
	must(t, os.Rename(tmp, b))
}
