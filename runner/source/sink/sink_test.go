package sink

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// checkpoint writes a folder with a signed record of the given digest.
func checkpoint(t *testing.T, dir string, digest plan.Digest) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	rec, err := plan.Canonical(receipt.CheckpointRecord{
		Version: receipt.CheckpointVersion, JobID: "a", Plan: plan.Sum(nil), Asset: "ckpt", Sequence: 1, Name: "x", Digest: digest, UnixNano: 1,
	})
	must(t, err)
	sum := sha256.Sum256(append([]byte("coffer/v1 checkpoint\x00"), rec...))
	sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	must(t, err)
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	must(t, err)
	b, err := plan.Canonical(receipt.SignedCheckpoint{Record: rec, Signature: sig, SessionKey: der})
	must(t, err)
	must(t, os.MkdirAll(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, recordName), b, 0o600))
}

func TestFind(t *testing.T) {
	base := t.TempDir()
	uri := "file://" + base
	one, two := plan.Sum([]byte("1")), plan.Sum([]byte("2"))
	checkpoint(t, filepath.Join(base, "job-a", "000001-x"), one)
	checkpoint(t, filepath.Join(base, "job-b", "000012-y"), two)
	checkpoint(t, filepath.Join(base, "job-b", "000013-z.tmp"), plan.Sum([]byte("3")))
	must(t, os.WriteFile(filepath.Join(base, "stray"), nil, 0o600))
	// Others say that they are it, in folders before and after it.
	mine := filepath.Join(base, "job-a", "000001-x")
	checkpoint(t, filepath.Join(base, "a-decoy", "000001-x"), one)
	checkpoint(t, filepath.Join(base, "z-decoy", "000001-x"), one)
	// In the job's own folder another one has the number.
	twelfth := filepath.Join(base, "job-b", "000012-y")
	checkpoint(t, filepath.Join(base, "job-b", "000012-a"), two)
	checkpoint(t, filepath.Join(base, "job-b", "000012-z"), two)
	var tried []string
	errDecoy := errors.New("a decoy")
	takes := func(want string) func(string) error {
		tried = nil
		return func(dir string) error {
			tried = append(tried, dir)
			if dir != want {
				return errDecoy
			}
			return nil
		}
	}
	if err := TryDigest(uri, one, takes(mine)); err != nil || tried[len(tried)-1] != mine {
		t.Errorf("%q, %v", tried, err)
	}
	if err := TryNumber(uri, "job-b", 12, takes(twelfth)); err != nil || tried[len(tried)-1] != twelfth {
		t.Errorf("%q, %v", tried, err)
	}
	if err := TryNumber(uri, "job-b", 12, takes("")); !errors.Is(err, errDecoy) || errors.Is(err, ErrNotFound) || len(tried) != 3 {
		t.Errorf("%q, %v", tried, err)
	}
	if err := TryDigest(uri, one, takes("")); !errors.Is(err, errDecoy) || errors.Is(err, ErrNotFound) || len(tried) != 3 {
		t.Errorf("%q, %v", tried, err)
	}
	for _, err := range []error{TryNumber(uri, "job-b", 1, takes("")), TryNumber(uri, "job-b", 13, takes("")), TryDigest(uri, plan.Sum([]byte("9")), takes(""))} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("what is not there: %v", err)
		}
	}
	for _, job := range []string{"../x", "", "a/b", ".."} {
		if dir, err := Dir(uri, job); err == nil {
			t.Errorf("job %q leads to %s", job, dir)
		}
	}
	// A record that somebody changed names nothing.
	b, err := os.ReadFile(filepath.Join(base, "job-a", "000001-x", recordName))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(base, "job-a", "000001-x", recordName), []byte(strings.Replace(string(b), `"signature":"M`, `"signature":"N`, 1)), 0o600))
	if err := TryDigest(uri, one, takes(mine)); !errors.Is(err, errDecoy) || len(tried) != 2 {
		t.Errorf("a changed record: %q, %v", tried, err)
	}
}

func TestCreate(t *testing.T) {
	uri := "file://" + t.TempDir()
	dir, err := Create(uri, "job-a")
	must(t, err)
	if again, err := Create(uri, "job-a"); err != nil || again != dir {
		t.Errorf("a job that begins anew: %s, %v", again, err)
	}
	must(t, os.Mkdir(filepath.Join(dir, "000001-x"), 0o700))
	if _, err := Create(uri, "job-a"); err == nil {
		t.Error("a folder with checkpoints is taken")
	}
}

// TestAnchorWriting: whatever an agent that was killed leaves, there is a whole
// countersignature or none, and the next attempt writes it.
func TestAnchorWriting(t *testing.T) {
	for name, left := range map[string]string{"nothing": "", "an empty file": "-", "half of it": "tok", "all of it, not renamed": "token"} {
		dir := t.TempDir()
		if left != "" {
			must(t, os.WriteFile(filepath.Join(dir, anchorName+tmpSuffix), []byte(strings.TrimPrefix(left, "-")), 0o600))
		}
		if got, err := ReadAnchor(dir); err != nil || got != "" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		for range 2 {
			must(t, WriteAnchor(dir, "token"))
		}
		l, err := os.ReadDir(dir)
		if got, rerr := ReadAnchor(dir); err != nil || rerr != nil || got != "token" || len(l) != 1 {
			t.Errorf("%s: %q, %v, %d files", name, got, rerr, len(l))
		}
	}
	dir := t.TempDir()
	must(t, os.Symlink("/etc/hostname", filepath.Join(dir, anchorName)))
	if got, err := ReadAnchor(dir); err == nil {
		t.Errorf("a link is followed to %q", got)
	}
}
