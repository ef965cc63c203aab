package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// other is a program that people seal files with.
type other struct {
	name string
	// prepare seals plain and returns what reads it back once, to nowhere, or says
	// what is missing.
	prepare func(t *testing.T, plain []byte) (read func() time.Duration, missing string)
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
	return string(out)
}

var age = other{"age", func(t *testing.T, plain []byte) (func() time.Duration, string) {
	if _, err := exec.LookPath("age"); err != nil {
		return nil, "age is not installed"
	}
	dir := t.TempDir()
	key, clear, sealed := filepath.Join(dir, "key"), filepath.Join(dir, "f"), filepath.Join(dir, "f.age")
	run(t, "age-keygen", "-o", key)
	if err := os.WriteFile(clear, plain, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "age", "-e", "-i", key, "-o", sealed, clear)
	if err := os.Remove(clear); err != nil {
		t.Fatal(err)
	}
	return func() time.Duration {
		return timed(1, func() { run(t, "age", "-d", "-i", key, "-o", "/dev/null", sealed) })
	}, ""
}}

// gocryptfs is a file system: its reader is another process, and each timing is
// of a new mount, which has nothing in the page cache but ciphertext.
var gocryptfs = other{"gocryptfs", func(t *testing.T, plain []byte) (func() time.Duration, string) {
	if _, err := exec.LookPath("gocryptfs"); err != nil {
		return nil, "gocryptfs is not installed"
	}
	if os.Geteuid() != 0 {
		return nil, "mounting needs root"
	}
	dir := t.TempDir()
	pass, sealed, at := filepath.Join(dir, "pass"), filepath.Join(dir, "sealed"), filepath.Join(dir, "clear")
	for _, d := range []string{sealed, at} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(pass, []byte("password"), 0o600); err != nil {
		t.Fatal(err)
	}
	// The cost of the password is no part of reading.
	run(t, "gocryptfs", "-init", "-q", "-passfile", pass, "-scryptn", "10", sealed)
	mounted := func(f func()) {
		run(t, "gocryptfs", "-q", "-passfile", pass, sealed, at)
		defer run(t, "fusermount3", "-u", at)
		f()
	}
	name := filepath.Join(at, "f")
	mounted(func() {
		if err := os.WriteFile(name, plain, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	return func() (took time.Duration) {
		mounted(func() {
			took = timed(1, func() {
				if out := run(t, "dd", "if="+name, "of=/dev/null", "bs=1M"); !strings.Contains(out, "bytes") {
					t.Fatal(out)
				}
			})
		})
		return took
	}, ""
}}
