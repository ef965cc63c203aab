package hold

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"io"
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
)

// resealing is a holder with what a re-sealing of two files needs.
type resealing struct {
	*clocked
	old, fresh *keys.DataKey
	folder     string
	digest     plan.Digest
	plan       []byte
	content    []byte
}

func newResealing(t *testing.T) *resealing {
	t.Helper()
	c := newClocked(t)
	r := &resealing{clocked: c, old: keys.GenerateDataKey(), fresh: keys.GenerateDataKey(), folder: filepath.Join(t.TempDir(), "old"), content: bytes.Repeat([]byte("plain"), 50_000)}
	s, err := seal.Seal(t.Context(), r.old, "old", []seal.Source{sourceOf("a", r.content), sourceOf("b", []byte("short"))}, r.folder, seal.Options{})
	ok(t, err)
	r.digest = s.Digest
	r.plan = r.planFor(t, "old", r.digest, "new")
	return r
}

func (r *resealing) planFor(t *testing.T, from string, digest plan.Digest, to string) []byte {
	t.Helper()
	none, err := plan.NoContainer().Digest()
	ok(t, err)
	b, err := plan.Plan{
		Version: plan.Version, Name: "reseal", Inputs: []plan.Input{}, Reseal: &plan.Reseal{Asset: from, Digest: digest, To: to}, Output: plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 28, Pids: 16, MaxSeconds: 60}, Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: none,
	}.Canonical()
	ok(t, err)
	return b
}

// deliverFor releases a key to the holder under a plan.
func (r *resealing) deliverFor(key *keys.DataKey, asset string, document []byte) {
	r.t.Helper()
	ok(r.t, r.request(asset))
	info, err := receipt.WrapInfo("g", plan.Sum(document), asset, "r", r.sign.LeaseTerms(60))
	ok(r.t, err)
	enc, ct, err := key.Wrap(r.recipient.Public(), info, []byte(asset))
	ok(r.t, err)
	ok(r.t, r.deliver(holdapi.Deliver{Asset: asset, Info: info, Enc: enc, Ciphertext: ct, LeaseKeys: r.jwks}))
}

func (r *resealing) source(asset string, digest plan.Digest) error {
	root, err := os.OpenRoot(r.folder)
	ok(r.t, err)
	return r.resealSource(holdapi.ResealSource{Asset: asset, Digest: digest}, root)
}

func (r *resealing) begin(document []byte, name string) error {
	root, err := os.OpenRoot(r.clocked.sink)
	ok(r.t, err)
	return r.beginReseal(holdapi.Reseal{Plan: document, Name: name}, root)
}

func codeOf(err error) string {
	var e *apiError
	if errors.As(err, &e) {
		return e.code
	}
	return ""
}

// over waits for the end of the work.
func (r *resealing) over() holdapi.ResealStatus {
	r.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		st, err := r.resealStatus(holdapi.ResealStatusQuery{})
		ok(r.t, err)
		if st.State == holdapi.ResealDone || st.State == holdapi.ResealFailed {
			return st
		}
	}
	r.t.Fatal("the work does not end")
	return holdapi.ResealStatus{}
}

func TestReseal(t *testing.T) {
	r := newResealing(t)
	ok(t, r.source("old", r.digest))
	ok(t, r.source("old", r.digest))
	r.deliverFor(r.old, "old", r.plan)
	r.deliverFor(r.fresh, "new", r.plan)
	ok(t, r.begin(r.plan, "new"))
	// An agent that was restarted says the same again.
	ok(t, r.begin(r.plan, "new"))
	st := r.over()
	if st.State != holdapi.ResealDone || st.Files != 2 || len(st.Records) != 2 || st.Bytes != int64(len(r.content)+5) || st.Total != st.Bytes {
		t.Fatalf("%+v", st)
	}
	key, err := x509.ParsePKIXPublicKey(r.session.Public())
	ok(t, err)
	pub, _ := key.(*ecdsa.PublicKey)
	for _, rec := range append(st.Records, *st.Result) {
		ok(t, receipt.VerifyReseal(pub, rec.Record, rec.Signature))
	}
	last, err := receipt.ParseResealRecord(st.Result.Record)
	ok(t, err)
	if last.JobID != "job-1" || last.Plan != plan.Sum(r.plan) || last.FromDigest != r.digest || last.To != "new" {
		t.Errorf("%+v", last)
	}
	root, err := os.OpenRoot(filepath.Join(r.clocked.sink, "new"))
	ok(t, err)
	defer root.Close()
	folder, err := seal.ReadFolder(root, "new", last.Digest)
	ok(t, err)
	entries, err := folder.Entries(r.fresh)
	ok(t, err)
	f, err := folder.Open(r.fresh, entries[0])
	ok(t, err)
	defer f.Close()
	got := make([]byte, f.Size())
	if _, err := f.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(got, r.content) {
		t.Errorf("the new folder has other content: %v", err)
	}
	if rest, err := r.resealStatus(holdapi.ResealStatusQuery{After: 1}); err != nil || len(rest.Records) != 1 {
		t.Errorf("the records after the first: %+v, %v", rest, err)
	}
	// What it did can be read once the keys are gone, and nothing more begins.
	_, err = r.finish(context.WithoutCancel(t.Context()))
	ok(t, err)
	if after, err := r.resealStatus(holdapi.ResealStatusQuery{}); err != nil || after.Result == nil {
		t.Errorf("after the end: %+v, %v", after, err)
	}
	if err := r.begin(r.plan, "another"); codeOf(err) != holdapi.CodeState {
		t.Errorf("after the end: %v", err)
	}
}

func TestResealRefusals(t *testing.T) {
	other := plan.Sum([]byte("other"))
	for name, tc := range map[string]struct {
		do   func(t *testing.T, r *resealing) error
		code string
	}{
		"another source than the plan's": {func(t *testing.T, r *resealing) error {
			r.plan = r.planFor(t, "old", other, "new")
			r.deliverFor(r.old, "old", r.plan)
			r.deliverFor(r.fresh, "new", r.plan)
			return r.begin(r.plan, "new")
		}, holdapi.CodeRefused},
		"another plan than the keys'": {func(t *testing.T, r *resealing) error {
			r.deliverFor(r.old, "old", r.planFor(t, "old", r.digest, "third"))
			r.deliverFor(r.fresh, "new", r.planFor(t, "old", r.digest, "third"))
			return r.begin(r.plan, "new")
		}, holdapi.CodeRefused},
		"no key of the source": {func(_ *testing.T, r *resealing) error {
			r.deliverFor(r.fresh, "new", r.plan)
			return r.begin(r.plan, "new")
		}, holdapi.CodeState},
		"no key of the target": {func(_ *testing.T, r *resealing) error {
			r.deliverFor(r.old, "old", r.plan)
			return r.begin(r.plan, "new")
		}, holdapi.CodeState},
		"no plan":         {func(_ *testing.T, r *resealing) error { return r.begin(nil, "new") }, holdapi.CodeInvalid},
		"a second source": {func(_ *testing.T, r *resealing) error { return r.source("old", other) }, holdapi.CodeRefused},
		"a second target": {func(_ *testing.T, r *resealing) error {
			r.deliverFor(r.old, "old", r.plan)
			r.deliverFor(r.fresh, "new", r.plan)
			if err := r.begin(r.plan, "new"); err != nil {
				return err
			}
			return r.begin(r.plan, "newer")
		}, holdapi.CodeState},
		"a lease that has lapsed": {func(_ *testing.T, r *resealing) error {
			r.deliverFor(r.old, "old", r.plan)
			r.deliverFor(r.fresh, "new", r.plan)
			r.clock.Add(int64(time.Hour))
			return r.begin(r.plan, "new")
		}, holdapi.CodeState},
		"records that are not there": {func(_ *testing.T, r *resealing) error {
			_, err := r.resealStatus(holdapi.ResealStatusQuery{After: 1})
			return err
		}, holdapi.CodeInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			r := newResealing(t)
			ok(t, r.source("old", r.digest))
			if err := tc.do(t, r); codeOf(err) != tc.code {
				t.Errorf("%v, want %s", err, tc.code)
			}
		})
	}
}

// A key is not used once the lease is over, though the work is under way.
func TestResealEndsWithTheLease(t *testing.T) {
	r := newResealing(t)
	ok(t, r.source("old", r.digest))
	r.deliverFor(r.old, "old", r.plan)
	r.deliverFor(r.fresh, "new", r.plan)
	work := seal.Reseal{
		JobID: "job-1", Plan: plan.Sum(r.plan), From: r.reseal.source.folder, FromKey: r.old, To: "new", ToKey: r.fresh, Name: "new",
		Use:  func() error { r.clock.Add(int64(20 * time.Second)); return r.lease.use() },
		Each: r.reseal.add,
	}
	root, err := os.OpenRoot(r.clocked.sink)
	ok(t, err)
	r.reseal.sink, r.reseal.over = root, make(chan struct{})
	r.runReseal(t.Context(), work)
	if st := r.over(); st.State != holdapi.ResealFailed || !strings.Contains(st.Error, "lapsed") || st.Result != nil {
		t.Errorf("%+v", st)
	}
	if _, err := os.Lstat(filepath.Join(r.clocked.sink, "new")); err == nil {
		t.Error("the folder is there")
	}
}
