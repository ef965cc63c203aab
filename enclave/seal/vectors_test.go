package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
)

var update = flag.Bool("update", false, "write the test vectors anew")

// vector is a sealed folder under testdata with everything that made it.
type vector struct {
	Folder string `json:"folder"`
	Asset  string `json:"asset"`
	// DataKey is in hex. Salts count up: the first file's is 32 bytes of 1.
	DataKey   string            `json:"dataKey"`
	ChunkSize int               `json:"chunkSize"`
	Digest    plan.Digest       `json:"digest"`
	SHA256    map[string]string `json:"plaintextSha256"`
}

const vectorFile = "testdata/vectors.json"

// vectorPlain is the plaintext of n bytes: byte i is i modulo 251.
func vectorPlain(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i % 251)
	}
	return b
}

var vectorInputs = map[string]map[string]int{
	"empty-file":     {"empty": 0},
	"small":          {"a.txt": 11, "dir/b.txt": 1, "dir/\u00e9.bin": 300},
	"one-full-chunk": {"full": MinChunkSize},
	"two-chunks":     {"w": MinChunkSize + 1},
}

func sealVector(t *testing.T, name, dst string) vector {
	t.Helper()
	v := vector{Folder: name, Asset: "vector-" + name, DataKey: strings.Repeat("0f1e", 16), ChunkSize: MinChunkSize, SHA256: map[string]string{}}
	raw, err := hex.DecodeString(v.DataKey)
	must(t, err)
	key, err := keys.NewDataKey(raw)
	must(t, err)
	var src []Source
	for n, size := range vectorInputs[name] {
		b := vectorPlain(size)
		h := sha256.Sum256(b)
		v.SHA256[n] = hex.EncodeToString(h[:])
		src = append(src, memSource(n, b))
	}
	var next byte
	s, err := Seal(t.Context(), key, v.Asset, src, dst, Options{ChunkSize: v.ChunkSize, salt: func() (s [saltSize]byte) {
		next++
		copy(s[:], bytes.Repeat([]byte{next}, saltSize))
		return s
	}})
	must(t, err)
	v.Digest = s.Digest
	return v
}

func readVectors(t *testing.T) []vector {
	t.Helper()
	b, err := os.ReadFile(vectorFile)
	must(t, err)
	var vs []vector
	must(t, plan.Decode(b, 1<<20, &vs))
	return vs
}

// TestVectors seals the same files with the same keys and salts and wants the
// same bytes, now and in every later version of this package.
func TestVectors(t *testing.T) {
	if *update {
		must(t, os.RemoveAll("testdata/vectors"))
		must(t, os.MkdirAll("testdata/vectors", 0o755))
		var vs []vector
		for n := range vectorInputs {
			vs = append(vs, sealVector(t, n, filepath.Join("testdata/vectors", n)))
		}
		slices.SortFunc(vs, func(a, b vector) int { return strings.Compare(a.Folder, b.Folder) })
		b, err := json.MarshalIndent(vs, "", "  ")
		must(t, err)
		must(t, os.WriteFile(vectorFile, append(b, '\n'), 0o600))
	}
	vs := readVectors(t)
	if len(vs) != len(vectorInputs) {
		t.Errorf("%d vectors, want %d", len(vs), len(vectorInputs))
	}
	for _, v := range vs {
		dst := filepath.Join(t.TempDir(), v.Folder)
		if got := sealVector(t, v.Folder, dst); got.Digest != v.Digest {
			t.Errorf("%s: digest %s, want %s", v.Folder, got.Digest, v.Digest)
		}
		es, err := os.ReadDir(filepath.Join("testdata/vectors", v.Folder))
		must(t, err)
		for _, e := range es {
			want, err := os.ReadFile(filepath.Join("testdata/vectors", v.Folder, e.Name()))
			must(t, err)
			got, err := os.ReadFile(filepath.Join(dst, e.Name()))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %s differs: %v", v.Folder, e.Name(), err)
			}
		}
		raw, err := hex.DecodeString(v.DataKey)
		must(t, err)
		key, err := keys.NewDataKey(raw)
		must(t, err)
		files, err := openAll(t, key, v.Asset, filepath.Join("testdata/vectors", v.Folder), v.Digest)
		must(t, err)
		for n, want := range v.SHA256 {
			if h := sha256.Sum256(files[n]); hex.EncodeToString(h[:]) != want {
				t.Errorf("%s: %s is %x, want %s", v.Folder, n, h, want)
			}
		}
	}
}

// TestPythonReader has a reader that shares no code with this package read the
// vectors, and refuse what was changed.
func TestPythonReader(t *testing.T) {
	if err := exec.Command("python3", "-c", "import cryptography").Run(); err != nil {
		t.Skip("python3 with the cryptography package (python3-cryptography) is not installed")
	}
	read := func(v vector, dir, out, key string) error {
		c := exec.Command("python3", "../../examples/sealed-reader/sealed_reader.py", dir, string(v.Digest), out)
		c.Stdin = strings.NewReader(key)
		b, err := c.CombinedOutput()
		if err != nil && !bytes.HasPrefix(b, []byte("refused: ")) {
			t.Errorf("%s: %v: %s", v.Folder, err, b)
		}
		return err
	}
	for _, v := range readVectors(t) {
		dir := filepath.Join("testdata/vectors", v.Folder)
		out := t.TempDir()
		if err := read(v, dir, out, v.DataKey); err != nil {
			t.Errorf("%s: %v", v.Folder, err)
		}
		for n, want := range v.SHA256 {
			b, err := os.ReadFile(filepath.Join(out, n))
			if h := sha256.Sum256(b); err != nil || hex.EncodeToString(h[:]) != want {
				t.Errorf("%s: %s is %x, want %s (%v)", v.Folder, n, h, want, err)
			}
		}
		if err := read(v, dir, t.TempDir(), strings.Repeat("00", 32)); err == nil {
			t.Errorf("%s: opened with another key", v.Folder)
		}
		changed := t.TempDir()
		must(t, os.CopyFS(changed, os.DirFS(dir)))
		p := filepath.Join(changed, "000000.sealed")
		b, err := os.ReadFile(p)
		must(t, err)
		b[len(b)-1] ^= 1
		must(t, os.WriteFile(p, b, 0o600))
		if err := read(v, changed, t.TempDir(), v.DataKey); err == nil {
			t.Errorf("%s: opened though changed", v.Folder)
		}
	}
}

// gfMul multiplies in GCM's field (NIST SP 800-38D, section 6.3).
func gfMul(x, y [16]byte) [16]byte {
	var z, v [2]uint64
	v[0], v[1] = binary.BigEndian.Uint64(y[:8]), binary.BigEndian.Uint64(y[8:])
	for i := range 128 {
		if x[i/8]>>(7-i%8)&1 == 1 {
			z[0], z[1] = z[0]^v[0], z[1]^v[1]
		}
		carry := v[1] & 1
		v[1] = v[1]>>1 | v[0]<<63
		v[0] >>= 1
		if carry == 1 {
			v[0] ^= 0xe1 << 56
		}
	}
	var out [16]byte
	binary.BigEndian.PutUint64(out[:8], z[0])
	binary.BigEndian.PutUint64(out[8:], z[1])
	return out
}

// TestTagsDoNotNameAFile makes, as one who holds the key can, a second file with
// the first one's tags: it opens, to other plaintext, and only the Merkle root
// tells them apart.
func TestTagsDoNotNameAFile(t *testing.T) {
	key := testKey(t, 1)
	plain := pattern(64)
	dir, s := sealTest(t, key, "a", map[string][]byte{"f": plain})
	p := filepath.Join(dir, "000000.sealed")
	orig, err := os.ReadFile(p)
	must(t, err)

	var hd header
	copy(hd[:], orig)
	k, _, err := fileKey(key, &hd)
	must(t, err)
	block, err := aes.NewCipher(k)
	must(t, err)
	var hashKey [16]byte
	block.Encrypt(hashKey[:], hashKey[:])
	// A difference in one block of ciphertext is undone by that difference times
	// the hash key in the next.
	delta := [16]byte{1, 2, 3}
	next := gfMul(delta, hashKey)
	forged := bytes.Clone(orig)
	for i := range 16 {
		forged[PayloadOffset+i] ^= delta[i]
		forged[PayloadOffset+16+i] ^= next[i]
	}
	if !bytes.Equal(forged[len(forged)-TagSize:], orig[len(orig)-TagSize:]) {
		t.Fatal("tags differ")
	}
	f, err := OpenFile(key, bytes.NewReader(forged), int64(len(forged)))
	must(t, err)
	var out bytes.Buffer
	if _, err := f.WriteTo(&out); err != nil || bytes.Equal(out.Bytes(), plain) {
		t.Fatalf("the forged file does not open to other bytes: %v", err)
	}
	must(t, Check(t.Context(), openRoot(t, dir), "a", s.Digest))
	must(t, os.WriteFile(p, forged, 0o600))
	if err := Check(t.Context(), openRoot(t, dir), "a", s.Digest); err == nil {
		t.Error("the Merkle root does not tell the files apart")
	}
}
