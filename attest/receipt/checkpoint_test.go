package receipt_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func checkpointRecord() receipt.CheckpointRecord {
	d := plan.Sum([]byte("d"))
	return receipt.CheckpointRecord{
		Version: receipt.CheckpointVersion, JobID: "a", Plan: d, Asset: "ckpt", Sequence: 2, Name: "step-2", Digest: d, Parent: d, Bytes: 7, UnixNano: 1,
	}
}

// TestCheckpointRecordForm: in each row one thing alone is wrong, and neither who makes
// records nor who reads them takes it.
func TestCheckpointRecordForm(t *testing.T) {
	for name, change := range map[string]func(*receipt.CheckpointRecord){
		"another version":                 func(r *receipt.CheckpointRecord) { r.Version = "coffer.run/checkpoint/v2" },
		"no job":                          func(r *receipt.CheckpointRecord) { r.JobID = "" },
		"no plan":                         func(r *receipt.CheckpointRecord) { r.Plan = "" },
		"no asset":                        func(r *receipt.CheckpointRecord) { r.Asset = "" },
		"no name":                         func(r *receipt.CheckpointRecord) { r.Name = "" },
		"no number":                       func(r *receipt.CheckpointRecord) { r.Sequence = 0 },
		"no digest":                       func(r *receipt.CheckpointRecord) { r.Digest = "" },
		"a digest that is none":           func(r *receipt.CheckpointRecord) { r.Digest = "sha384:00" },
		"a parent that is no digest":      func(r *receipt.CheckpointRecord) { r.Parent = "x" },
		"a second one without a parent":   func(r *receipt.CheckpointRecord) { r.Parent = "" },
		"a first one with a parent":       func(r *receipt.CheckpointRecord) { r.Sequence = 1 },
		"fewer bytes than none":           func(r *receipt.CheckpointRecord) { r.Bytes = -1 },
		"no time":                         func(r *receipt.CheckpointRecord) { r.UnixNano = 0 },
		"a name that is too long to sign": func(r *receipt.CheckpointRecord) { r.Name = strings.Repeat("n", receipt.MaxCheckpointRecord) },
	} {
		t.Run(name, func(t *testing.T) {
			r := checkpointRecord()
			change(&r)
			if _, err := r.Canonical(); err == nil && len(r.Name) < receipt.MaxCheckpointRecord {
				t.Error("it is made")
			}
			b, err := plan.Canonical(r)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := receipt.DecodeCheckpointRecord(b); err == nil {
				t.Errorf("it is read: %+v", got)
			}
		})
	}
	b, err := checkpointRecord().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := receipt.DecodeCheckpointRecord(b); err != nil || got != checkpointRecord() {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := receipt.DecodeCheckpointRecord(bytes.Replace(b, []byte(`,`), []byte(`, `), 1)); err == nil {
		t.Error("a second encoding of the record is read")
	}
}

// FuzzParseSignedCheckpoint: what is taken has one encoding, and the key in it signed it.
func FuzzParseSignedCheckpoint(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		f.Fatal(err)
	}
	record, err := checkpointRecord().Canonical()
	if err != nil {
		f.Fatal(err)
	}
	sum := sha256.Sum256(append([]byte(receipt.CheckpointLabel+"\x00"), record...))
	sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		f.Fatal(err)
	}
	b, err := plan.Canonical(receipt.SignedCheckpoint{Record: record, Signature: sig, SessionKey: der})
	if err != nil {
		f.Fatal(err)
	}
	if _, r, err := receipt.ParseSignedCheckpoint(b); err != nil || r != checkpointRecord() {
		f.Fatalf("%+v, %v", r, err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, r, err := receipt.ParseSignedCheckpoint(b)
		if err != nil {
			return
		}
		if again, err := r.Canonical(); err != nil || !bytes.Equal(again, s.Record) {
			t.Errorf("%q was read as %q, %v", s.Record, again, err)
		}
	})
}
