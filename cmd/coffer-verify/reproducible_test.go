package main

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

var reproducible = flag.Bool("reproducible", false, "build the program twice and compare")

// maxProgram bounds the program, in bytes.
const maxProgram = 40 << 20

// TestReproducible builds the program twice, the second time in a copy of its
// sources elsewhere, and wants one static program.
func TestReproducible(t *testing.T) {
	if !*reproducible {
		t.Skip("-reproducible builds the program twice")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	for _, part := range []string{"go.mod", "go.sum", "attest", "cmd/coffer-verify"} {
		from, to := filepath.Join(root, part), filepath.Join(elsewhere, part)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(from); err == nil && !info.IsDir() {
			b, err := os.ReadFile(from) //nolint:gosec // a file of the clone
			if err == nil {
				err = os.WriteFile(to, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.CopyFS(to, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
	}
	var sums [][sha256.Size]byte
	for _, dir := range []string{root, elsewhere} {
		out := filepath.Join(t.TempDir(), "coffer-verify")
		// As the Makefile builds it.
		cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, "./cmd/coffer-verify") //nolint:gosec // the test's own words
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		b, err := os.ReadFile(out) //nolint:gosec // it was built a moment ago
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > maxProgram {
			t.Errorf("%d bytes, at most %d are wanted", len(b), maxProgram)
		}
		f, err := elf.NewFile(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				t.Error("the program is not static")
			}
		}
		sums = append(sums, sha256.Sum256(b))
		t.Logf("%d bytes, SHA-256 %x", len(b), sums[len(sums)-1])
	}
	if sums[0] != sums[1] {
		t.Error("two builds of one source differ")
	}
}
