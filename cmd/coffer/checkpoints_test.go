package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/runner/source/sink"
)

type inMemory struct{ *bytes.Reader }

func (inMemory) Close() error { return nil }

// TestVerifyCheckpoints: a line of three holds; with one thing false it does not.
func TestVerifyCheckpoints(t *testing.T) {
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	data := keys.GenerateDataKey()
	session, err := keys.GenerateSession()
	ok(err)
	other, err := keys.GenerateSession()
	ok(err)
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	ok(err)
	broker, err := receipt.NewSigner("broker.test", k)
	ok(err)
	jwks, err := broker.JWKS()
	ok(err)
	p := plan.Sum([]byte("plan"))

	seals := func(dir string, by *keys.Session, seq uint64, parent plan.Digest, job string) seal.Checkpoint {
		root, err := os.OpenRoot(dir)
		ok(err)
		defer root.Close()
		b := []byte(strings.Repeat("x", int(seq)))
		c, err := seal.SealCheckpoint(t.Context(), data, by, []seal.Source{{Name: "f", Size: int64(len(b)), Open: func() (seal.Reader, error) { return inMemory{bytes.NewReader(b)}, nil }}},
			root, seal.Commit{JobID: job, Plan: p, Asset: "ckpt", Sequence: seq, Parent: parent, Name: "s", Folder: holdapi.CheckpointFolder(seq, "s")}, time.Now, seal.Options{})
		ok(err)
		return c
	}
	anchor := func(dir string, c seal.Checkpoint) {
		r := c.Record
		token, err := broker.Sign(receipt.TypeCheckpointHead, receipt.CheckpointHead{
			Issuer: "broker.test", IssuedAt: 1, JobID: r.JobID, Plan: r.Plan, Asset: r.Asset, Sequence: r.Sequence, Digest: r.Digest, Record: plan.Sum(c.Encoded),
		})
		ok(err)
		ok(sink.WriteAnchor(filepath.Join(dir, holdapi.CheckpointFolder(r.Sequence, "s")), token))
	}
	// The line goes on from number 4 of another job; the last is unanchored, and the
	// keep rules have removed the first.
	good := t.TempDir()
	five := seals(good, session, 5, plan.Sum([]byte("4")), "a")
	six := seals(good, session, 6, five.Record.Digest, "a")
	seals(good, session, 7, six.Record.Digest, "a")
	anchor(good, five)
	anchor(good, six)
	ok(sink.Trim(filepath.Join(good, "000005-s")))
	ok(os.Mkdir(filepath.Join(good, "000008-s.tmp"), 0o700))

	l, err := verifyCheckpoints(t.Context(), good, jwks)
	ok(err)
	if len(l) != 3 || l[0].Content != "removed" || l[1].Content != "whole" || l[0].Anchored != "yes" || l[2].Anchored != "no" {
		t.Errorf("%+v", l)
	}
	for _, c := range l {
		if len(c.Problems) > 0 {
			t.Errorf("%s: %v", c.Folder, c.Problems)
		}
	}
	if l, err := verifyCheckpoints(t.Context(), good, nil); err != nil || l[1].Anchored != "unknown" {
		t.Errorf("without keys: %+v, %v", l, err)
	}
	for name, tc := range map[string]struct {
		change func(dir string)
		want   string
	}{
		"one taken away":            {func(d string) { ok(os.RemoveAll(filepath.Join(d, "000006-s"))) }, "follows number"},
		"one called otherwise":      {func(d string) { ok(os.Rename(filepath.Join(d, "000007-s"), filepath.Join(d, "000008-s"))) }, "the record has number"},
		"a stranger among them":     {func(d string) { ok(os.Mkdir(filepath.Join(d, "x"), 0o700)) }, "no checkpoint is called so"},
		"a flipped bit":             {func(d string) { flip(t, filepath.Join(d, "000006-s", "000000.sealed")) }, "merkle root"},
		"a changed manifest":        {func(d string) { flip(t, filepath.Join(d, "000006-s", "manifest.json")) }, ""},
		"a file missing":            {func(d string) { ok(os.Remove(filepath.Join(d, "000006-s", "000000.sealed"))) }, "000000"},
		"a changed record":          {func(d string) { flip(t, filepath.Join(d, "000006-s", "record.json")) }, "checkpoint"},
		"no record":                 {func(d string) { ok(os.Remove(filepath.Join(d, "000006-s", "record.json"))) }, "record"},
		"no countersignature":       {func(d string) { ok(os.Remove(filepath.Join(d, "000005-s", "anchor.jwt"))) }, "taken away or lost"},
		"a forged countersignature": {func(d string) { flip(t, filepath.Join(d, "000006-s", "anchor.jwt")) }, ""},
		"another's countersignature": {func(d string) {
			b, err := os.ReadFile(filepath.Join(d, "000005-s", "anchor.jwt"))
			ok(err)
			ok(os.WriteFile(filepath.Join(d, "000006-s", "anchor.jwt"), b, 0o600))
		}, "checkpoint.countersigned"},
		"another parent": {func(d string) {
			ok(os.RemoveAll(filepath.Join(d, "000007-s")))
			seals(d, session, 7, plan.Sum([]byte("fork")), "a")
		}, "does not follow"},
		"another job's": {func(d string) {
			ok(os.RemoveAll(filepath.Join(d, "000007-s")))
			seals(d, session, 7, six.Record.Digest, "b")
		}, "another job"},
		"another session key's": {func(d string) {
			ok(os.RemoveAll(filepath.Join(d, "000007-s")))
			seals(d, other, 7, six.Record.Digest, "a")
		}, "another session key"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "line")
			ok(os.CopyFS(dir, os.DirFS(good)))
			tc.change(dir)
			l, err := verifyCheckpoints(t.Context(), dir, jwks)
			ok(err)
			var said []string
			for _, c := range l {
				said = append(said, c.Problems...)
			}
			if len(said) == 0 || !strings.Contains(strings.Join(said, "\n"), tc.want) {
				t.Errorf("%q does not say %q", said, tc.want)
			}
		})
	}
}

func flip(t *testing.T, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
