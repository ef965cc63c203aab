// Package vectortest finds the real evidence that tests run on. It is kept
// beside the repository, not in it.
package vectortest

import (
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
)

// Vector is one entry of the manifest.
type Vector struct {
	Name   string `json:"name"`
	Kind   string `json:"kind"`
	Report string `json:"report"`
	Chain  string `json:"chain"`
	Nonce  string `json:"nonce"`
	Driver string `json:"driver"`
	VBIOS  string `json:"vbios"`
	Source string `json:"source"`
	Note   string `json:"note"`
	SHA256 string `json:"sha256"`
}

// Dir returns the folder of the vectors. The test is skipped without it, and
// fails if CI is true.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("no go.mod above the test")
		}
		dir = up
	}
	dir = filepath.Join(dir, "..", "shared", "vectors")
	if _, err := os.Stat(filepath.Join(dir, "manifest.json")); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("real evidence is missing: %v", err)
		}
		t.Skipf("real evidence is not here: %v", err)
	}
	return dir
}

// All returns the manifest's vectors of the kinds given.
func All(t testing.TB, kinds ...string) []Vector {
	t.Helper()
	var all, out []Vector
	if err := json.Unmarshal(Read(t, "manifest.json"), &all); err != nil {
		t.Fatal(err)
	}
	for _, v := range all {
		for _, k := range kinds {
			if v.Kind == k {
				out = append(out, v)
			}
		}
	}
	if len(out) == 0 {
		t.Fatalf("the manifest has no vector of kind %v", kinds)
	}
	return out
}

// Read returns a file of the vectors.
func Read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(Dir(t), name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ReadPEM returns the first PEM block of a file of the vectors.
func ReadPEM(t testing.TB, name string) []byte {
	t.Helper()
	block, _ := pem.Decode(Read(t, name))
	if block == nil {
		t.Fatalf("%s is not PEM", name)
	}
	return block.Bytes
}
