package receipt_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func resealing() receipt.Resealing {
	return receipt.Resealing{JobID: "job-1", Plan: plan.Sum([]byte("plan")), From: "old", FromDigest: plan.Sum([]byte("old")), To: "new"}
}

func resealFile() receipt.ResealFile {
	return receipt.ResealFile{
		Version: receipt.ResealFileVersion, Resealing: resealing(), SealedBy: "job-0", ID: "000001", FromRoot: "sha256:" + strings.Repeat("0", 64), ToRoot: "sha256:" + strings.Repeat("1", 64), Bytes: 7,
	}
}

func resealRecord() receipt.ResealRecord {
	return receipt.ResealRecord{Version: receipt.ResealVersion, Resealing: resealing(), Digest: plan.Sum([]byte("new")), Files: 1, Bytes: 7, Records: plan.Sum([]byte("records"))}
}

func TestResealRecords(t *testing.T) {
	file, err := resealFile().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := receipt.ParseResealFile(file); err != nil || got != resealFile() {
		t.Errorf("%+v, %v", got, err)
	}
	record, err := resealRecord().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := receipt.ParseResealRecord(record); err != nil || got != resealRecord() {
		t.Errorf("%+v, %v", got, err)
	}
	for name, b := range map[string][]byte{
		"nothing": nil, "a space after it": append(bytes.Clone(file), ' '), "the other kind": record, "another order": bytes.Replace(file, []byte(`{"bytes":7,`), []byte(`{ "bytes":7,`), 1),
		"more than a record has": bytes.Replace(file, []byte(`{"bytes"`), []byte(`{"a":1,"bytes"`), 1), "a long one": bytes.Repeat([]byte(" "), receipt.MaxResealRecord+1),
	} {
		if _, err := receipt.ParseResealFile(b); err == nil {
			t.Errorf("%s: taken for a record of a file", name)
		}
	}
	if _, err := receipt.ParseResealRecord(file); err == nil {
		t.Error("the record of a file was taken for a job's")
	}
	for name, change := range map[string]func(*receipt.ResealFile){
		"no version":           func(r *receipt.ResealFile) { r.Version = "" },
		"the other version":    func(r *receipt.ResealFile) { r.Version = receipt.ResealVersion },
		"no job":               func(r *receipt.ResealFile) { r.JobID = "" },
		"no plan":              func(r *receipt.ResealFile) { r.Plan = "" },
		"no source":            func(r *receipt.ResealFile) { r.From = "" },
		"no digest":            func(r *receipt.ResealFile) { r.FromDigest = "" },
		"no target":            func(r *receipt.ResealFile) { r.To = "" },
		"the source as target": func(r *receipt.ResealFile) { r.To = r.From },
		"nobody who sealed it": func(r *receipt.ResealFile) { r.SealedBy = "" },
		"a path as its id":     func(r *receipt.ResealFile) { r.ID = "../../1" },
		"fewer than no bytes":  func(r *receipt.ResealFile) { r.Bytes = -1 },
		"no root":              func(r *receipt.ResealFile) { r.ToRoot = "" },
		"a root in capitals":   func(r *receipt.ResealFile) { r.FromRoot = "sha256:" + strings.Repeat("A", 64) },
		"one ciphertext twice": func(r *receipt.ResealFile) { r.ToRoot = r.FromRoot },
	} {
		r := resealFile()
		change(&r)
		if _, err := r.Canonical(); err == nil {
			t.Errorf("file with %s: accepted", name)
		}
	}
	for name, change := range map[string]func(*receipt.ResealRecord){
		"no version":           func(r *receipt.ResealRecord) { r.Version = "" },
		"no job":               func(r *receipt.ResealRecord) { r.JobID = "" },
		"no digest":            func(r *receipt.ResealRecord) { r.Digest = "" },
		"the source's digest":  func(r *receipt.ResealRecord) { r.Digest = r.FromDigest },
		"no digest of records": func(r *receipt.ResealRecord) { r.Records = "" },
		"no files":             func(r *receipt.ResealRecord) { r.Files = 0 },
		"fewer than no bytes":  func(r *receipt.ResealRecord) { r.Bytes = -1 },
		"the source as target": func(r *receipt.ResealRecord) { r.To = r.From },
	} {
		r := resealRecord()
		change(&r)
		if _, err := r.Canonical(); err == nil {
			t.Errorf("record with %s: accepted", name)
		}
	}
}

func TestVerifyReseal(t *testing.T) {
	record, err := resealRecord().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	var keys [2]*ecdsa.PrivateKey
	for i := range keys {
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	sign := func(label string) []byte {
		sum := sha256.Sum256(append([]byte(label), record...))
		s, err := ecdsa.SignASN1(rand.Reader, keys[0], sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	good := sign(receipt.ResealLabel + "\x00")
	if err := receipt.VerifyReseal(&keys[0].PublicKey, record, good); err != nil {
		t.Error(err)
	}
	for name, tc := range map[string]struct {
		key       *ecdsa.PublicKey
		record    []byte
		signature []byte
	}{
		"no key":                 {nil, record, good},
		"another key":            {&keys[1].PublicKey, record, good},
		"another record":         {&keys[0].PublicKey, append(bytes.Clone(record), ' '), good},
		"no signature":           {&keys[0].PublicKey, record, nil},
		"without the label":      {&keys[0].PublicKey, record, sign("")},
		"a statement's label":    {&keys[0].PublicKey, record, sign("coffer/v1 statement\x00")},
		"a checkpoint's label":   {&keys[0].PublicKey, record, sign("coffer/v1 checkpoint\x00")},
		"the label without zero": {&keys[0].PublicKey, record, sign(receipt.ResealLabel)},
	} {
		if err := receipt.VerifyReseal(tc.key, tc.record, tc.signature); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestVerifyResealed(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner("broker.test", key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := signer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := receipt.ParseKeys("broker.test", jwks)
	if err != nil {
		t.Fatal(err)
	}
	r := resealRecord()
	record, err := r.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		kind   string
		change func(*receipt.Resealed)
		ok     bool
	}{
		"as it is":         {receipt.TypeResealed, func(*receipt.Resealed) {}, true},
		"of another kind":  {receipt.TypeCheckpointHead, func(*receipt.Resealed) {}, false},
		"of another job":   {receipt.TypeResealed, func(w *receipt.Resealed) { w.JobID = "job-2" }, false},
		"of another plan":  {receipt.TypeResealed, func(w *receipt.Resealed) { w.Plan = plan.Sum(nil) }, false},
		"another asset":    {receipt.TypeResealed, func(w *receipt.Resealed) { w.Asset = "third" }, false},
		"another digest":   {receipt.TypeResealed, func(w *receipt.Resealed) { w.Digest = plan.Sum(nil) }, false},
		"another record":   {receipt.TypeResealed, func(w *receipt.Resealed) { w.Record = plan.Sum(nil) }, false},
		"without a digest": {receipt.TypeResealed, func(w *receipt.Resealed) { w.Digest = "" }, false},
	} {
		w := receipt.Resealed{Issuer: "broker.test", IssuedAt: 1, JobID: r.JobID, Plan: r.Plan, Asset: r.To, Digest: r.Digest, Record: plan.Sum(record), LogIndex: 3, LogHash: []byte{1}}
		tc.change(&w)
		token, err := signer.Sign(tc.kind, w)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := receipt.VerifyResealed(keys, token, record, r); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestResealRecordsDigest(t *testing.T) {
	a, b := []byte("a"), []byte("b")
	seen := map[plan.Digest]string{}
	for _, l := range [][][]byte{nil, {a}, {b}, {a, b}, {b, a}, {[]byte("ab")}, {a, nil, b}} {
		d := receipt.ResealRecords(l)
		if other, twice := seen[d]; twice {
			t.Errorf("%q has the digest of %s", l, other)
		}
		seen[d] = fmt.Sprintf("%q", l)
	}
}

func FuzzParseReseal(f *testing.F) {
	for _, c := range []interface{ Canonical() ([]byte, error) }{resealFile(), resealRecord()} {
		b, err := c.Canonical()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := receipt.ParseResealFile(b); err == nil {
			if again, err := r.Canonical(); err != nil || !bytes.Equal(again, b) {
				t.Errorf("%q was read as %q, %v", b, again, err)
			}
		}
		if r, err := receipt.ParseResealRecord(b); err == nil {
			if again, err := r.Canonical(); err != nil || !bytes.Equal(again, b) {
				t.Errorf("%q was read as %q, %v", b, again, err)
			}
		}
	})
}
