package sandbox

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestBinaryIsReadAgain(t *testing.T) {
	for name, size := range map[string]int{"empty": 0, "less than a piece": 10, "one piece": pieceSize, "two and some": 2*pieceSize + 7, "three pieces": 3 * pieceSize} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "program")
			content := bytes.Repeat([]byte{1}, size)
			write := func(b []byte) {
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write(content)
			b, err := readBinary(path)
			if err != nil {
				t.Fatal(err)
			}
			if want, err := FileDigest(path); err != nil || b.digest != want {
				t.Fatalf("digest %s, %v; want %s", b.digest, err, want)
			}
			again, err := readPieces(path)
			if err != nil || len(again) != len(b.pieces) {
				t.Fatalf("%d pieces, %v; want %d", len(again), err, len(b.pieces))
			}
			if got, err := b.digestNow(path); err != nil || got != b.digest {
				t.Errorf("untouched it is %s, %v", got, err)
			}
			if size > 0 {
				last := bytes.Clone(content)
				last[size-1] ^= 1
				write(last)
				if got, err := b.digestNow(path); err != nil || got == b.digest {
					t.Errorf("with another last bit it is the same, %v", err)
				}
				write(content[:size-1])
				if got, err := b.digestNow(path); err != nil || got == b.digest {
					t.Errorf("a byte shorter it is the same, %v", err)
				}
			}
			write(append(bytes.Clone(content), 0))
			if got, err := b.digestNow(path); err != nil || got == b.digest {
				t.Errorf("a byte longer it is the same, %v", err)
			}
			if got, err := (binary{}).digestNow(path); err != nil || got == "" || got == b.digest {
				t.Errorf("by nobody's pieces it is %q, %v", got, err)
			}
		})
	}
	if _, err := (binary{}).digestNow(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file that is not there has a digest")
	}
}
