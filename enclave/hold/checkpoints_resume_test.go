package hold_test

import (
	"bytes"
	"encoding/hex"
	"errors"
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

// resumePlan is a plan that resumes from rule.
func resumePlan(t *testing.T, rule string) []byte {
	t.Helper()
	b, err := plan.Plan{
		Version: plan.Version, Name: "n", Image: "sha256:" + hex.EncodeToString(make([]byte, 32)), Command: []string{"/x"}, Inputs: []plan.Input{},
		Checkpoints: &plan.Checkpoints{Asset: "ckpt", Mount: "/checkpoints", Resume: rule}, Output: plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1}, Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
	}.Canonical()
	must(t, err)
	return b
}

// earlier is a line of checkpoints that another job made.
type earlier struct {
	key     *keys.DataKey
	session *keys.Session
	dir     string
	made    []seal.Checkpoint
	folders []string
}

// earlierJob seals n checkpoints as change says.
func earlierJob(t *testing.T, key *keys.DataKey, p plan.Digest, n int, change func(*seal.Commit)) *earlier {
	t.Helper()
	session, err := keys.GenerateSession()
	must(t, err)
	e := &earlier{key: key, session: session, dir: t.TempDir()}
	root, err := os.OpenRoot(e.dir)
	must(t, err)
	defer root.Close()
	for i := 1; i <= n; i++ {
		c := seal.Commit{JobID: "job-0", Plan: p, Asset: "ckpt", Sequence: uint64(i), Name: "step", Folder: holdapi.CheckpointFolder(uint64(i), "step")}
		if i > 1 {
			c.Parent = e.made[i-2].Record.Digest
		}
		if change != nil {
			change(&c)
		}
		b := stepContent(i)
		got, err := seal.SealCheckpoint(t.Context(), key, session, []seal.Source{
			{Name: "model", Size: int64(len(b)), Open: func() (seal.Reader, error) { return memReader{bytes.NewReader(b)}, nil }},
			{Name: "sub/state", Size: 3, Open: func() (seal.Reader, error) { return memReader{bytes.NewReader([]byte("abc"))}, nil }},
		}, root, c, time.Now, seal.Options{ChunkSize: seal.MinChunkSize})
		must(t, err)
		e.made, e.folders = append(e.made, got), append(e.folders, filepath.Join(e.dir, c.Folder))
	}
	return e
}

func stepContent(i int) []byte { return pattern(2*seal.MinChunkSize + i) }

// point is the broker's word that checkpoint number n of e is the newest.
func (e *earlier) point(t *testing.T, p plan.Digest, challenge []byte, n int, change func(*receipt.ResumePoint)) string {
	t.Helper()
	r := receipt.ResumePoint{Issuer: "broker.test", IssuedAt: time.Now().Unix(), JobID: jobID, Plan: p, Asset: "ckpt", Challenge: challenge}
	if n > 0 {
		c := e.made[n-1]
		r.From, r.Sequence, r.Digest, r.Record = c.Record.JobID, c.Record.Sequence, c.Record.Digest, plan.Sum(c.Encoded)
	}
	if change != nil {
		change(&r)
	}
	token, err := leaser.Sign(receipt.TypeResumePoint, r)
	must(t, err)
	return token
}

// resuming is a holder that has the checkpoints' key under a plan with a rule.
func resuming(t *testing.T, key *keys.DataKey, canonical []byte) *holder {
	t.Helper()
	h := start(t)
	h.askRelease("ckpt")
	info, err := receipt.WrapInfo("grant", plan.Sum(canonical), "ckpt", "result", leaser.LeaseTerms(int64(receipt.MaxLease.Seconds())))
	must(t, err)
	enc, ct, err := key.Wrap(h.hi.RecipientKey, info, []byte("ckpt"))
	must(t, err)
	must(t, h.c.Deliver(t.Context(), holdapi.Deliver{Asset: "ckpt", Info: info, Enc: enc, Ciphertext: ct, LeaseKeys: leaser.jwks}))
	must(t, h.c.Sink(t.Context(), holdapi.Sink{Asset: "ckpt", Plan: plan.Sum(canonical), MaxBytes: 64 << 20}, t.TempDir()))
	return h
}

func TestResume(t *testing.T) {
	key := keys.GenerateDataKey()
	canonical := resumePlan(t, plan.ResumeLatest)
	e := earlierJob(t, key, plan.Sum(canonical), 2, nil)
	h := resuming(t, key, canonical)
	ctx := t.Context()
	rule, err := h.c.ResumeBegin(ctx, canonical)
	must(t, err)
	if rule.Rule != plan.ResumeLatest || len(rule.Challenge) != receipt.ChallengeSize {
		t.Fatalf("%+v", rule)
	}
	must(t, h.c.Resume(ctx, holdapi.Resume{Point: e.point(t, plan.Sum(canonical), rule.Challenge, 2, nil)}, e.folders[1]))
	if _, err := h.c.ResumeBegin(ctx, canonical); code(err) != holdapi.CodeState {
		t.Errorf("asked again: %v", err)
	}
	_, err = h.c.Decrypt(ctx)
	must(t, err)
	h.trace().start()
	h.waitStarted()
	for name, want := range map[string][]byte{"model": stepContent(2), "sub/state": []byte("abc")} {
		got, err := os.ReadFile(h.path("checkpoints/resume", name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if es, err := os.ReadDir(h.path("checkpoints")); err != nil || len(es) != 1 || es[0].Name() != "resume" || !es[0].IsDir() {
		t.Errorf("%v, %v", es, err)
	}
	// The job can write beside it and not into it.
	must(t, os.WriteFile(h.path("checkpoints/x"), []byte("x"), 0o600))
	for what, err := range map[string]error{
		"written to":     os.WriteFile(h.path("checkpoints/resume/model"), []byte("x"), 0o600),
		"added to":       os.WriteFile(h.path("checkpoints/resume/new"), []byte("x"), 0o600),
		"given a folder": os.Mkdir(h.path("checkpoints/resume/d"), 0o700),
		"removed from":   os.Remove(h.path("checkpoints/resume/model")),
		"removed":        os.Remove(h.path("checkpoints/resume/sub")),
		"renamed within": os.Rename(h.path("checkpoints/resume/model"), h.path("checkpoints/resume/m")),
		"moved out of":   os.Rename(h.path("checkpoints/resume/model"), h.path("checkpoints/m")),
		"moved into":     os.Rename(h.path("checkpoints/x"), h.path("checkpoints/resume/x")),
		"replaced":       os.Rename(h.path("checkpoints/x"), h.path("checkpoints/resume")),
		"moved away":     os.Rename(h.path("checkpoints/resume"), h.path("checkpoints/r")),
		"truncated":      os.Truncate(h.path("checkpoints/resume/model"), 0),
		"made":           os.Mkdir(h.path("checkpoints/resume"), 0o700),
	} {
		if err == nil {
			t.Errorf("what the job resumes from was %s", what)
		}
	}
	if got, err := os.ReadFile(h.path("checkpoints/resume/model")); err != nil || !bytes.Equal(got, stepContent(2)) {
		t.Errorf("after that: %d bytes, %v", len(got), err)
	}
	// Its own checkpoints go on from there.
	must(t, os.WriteFile(h.path("checkpoints/step.tmp"), []byte("3"), 0o600))
	must(t, os.Rename(h.path("checkpoints/step.tmp"), h.path("checkpoints/step")))
	l, err := h.c.Checkpoints(ctx)
	must(t, err)
	if len(l) != 1 || l[0].Sequence != 3 || l[0].Parent != e.made[1].Record.Digest {
		t.Errorf("%+v", l)
	}
	evs, err := h.c.Events(ctx, holdapi.Events{})
	must(t, err)
	if evs[0].Kind != "resumed" || evs[0].Digest != string(e.made[1].Record.Digest) || !strings.Contains(evs[0].Detail, "job-0") {
		t.Errorf("first event %+v", evs[0])
	}
	st, err := h.c.Finish(ctx)
	must(t, err)
	if !st.Scrubbed || st.RegionBytes != 0 {
		t.Errorf("%+v", st)
	}
	must(t, h.c.Exit(ctx))
}

func TestResumeFromNothing(t *testing.T) {
	key := keys.GenerateDataKey()
	canonical := resumePlan(t, plan.ResumeLatest)
	h := resuming(t, key, canonical)
	rule, err := h.c.ResumeBegin(t.Context(), canonical)
	must(t, err)
	must(t, h.c.Resume(t.Context(), holdapi.Resume{Point: (&earlier{}).point(t, plan.Sum(canonical), rule.Challenge, 0, nil), Nothing: true}, ""))
	_, err = h.c.Decrypt(t.Context())
	must(t, err)
	h.trace().start()
	h.waitStarted()
	if _, err := os.Stat(h.path("checkpoints/resume")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a folder to resume from: %v", err)
	}
	must(t, os.WriteFile(h.path("checkpoints/a.tmp"), []byte("1"), 0o600))
	must(t, os.Rename(h.path("checkpoints/a.tmp"), h.path("checkpoints/a")))
	if l, err := h.c.Checkpoints(t.Context()); err != nil || len(l) != 1 || l[0].Sequence != 1 || l[0].Parent != "" {
		t.Errorf("%+v, %v", l, err)
	}
}

// TestResumeRefusals: in each row everything is as it should be but for one thing.
// One check finds it, and without that check the job would go on from the
// checkpoint.
func TestResumeRefusals(t *testing.T) {
	key := keys.GenerateDataKey()
	canonical := resumePlan(t, plan.ResumeLatest)
	digest := plan.Sum(canonical)
	h := resuming(t, key, canonical)
	good := earlierJob(t, key, digest, 3, nil)
	stranger, err := keys.GenerateSession()
	must(t, err)
	// made is another line, whose newest checkpoint the broker vouches for.
	made := func(change func(*seal.Commit)) *earlier { return earlierJob(t, key, digest, 1, change) }
	copied := func(folder string) string {
		to := filepath.Join(t.TempDir(), "c")
		must(t, os.CopyFS(to, os.DirFS(folder)))
		return to
	}
	otherKey := newLeaser("broker.test")
	for name, tc := range map[string]struct {
		give func(challenge []byte) (token, folder string)
		want string
	}{
		"rolled back":           {func(c []byte) (string, string) { return good.point(t, digest, c, 2, nil), good.folders[0] }, "resume.rollback"},
		"not yet countersigned": {func(c []byte) (string, string) { return good.point(t, digest, c, 2, nil), good.folders[2] }, "resume.unanchored"},
		"forked": {func(c []byte) (string, string) {
			return good.point(t, digest, c, 1, nil), earlierJob(t, key, digest, 1, nil).folders[0]
		}, "resume.fork"},
		"of another job": {func(c []byte) (string, string) {
			e := made(func(c *seal.Commit) { c.JobID = "job-7" })
			return e.point(t, digest, c, 1, func(r *receipt.ResumePoint) { r.From = "job-0" }), e.folders[0]
		}, "resume.from"},
		"of another plan": {func(c []byte) (string, string) {
			e := made(func(c *seal.Commit) { c.Plan = plan.Sum([]byte("other")) })
			return e.point(t, digest, c, 1, nil), e.folders[0]
		}, "resume.plan"},
		"of another asset": {func(c []byte) (string, string) {
			e := made(func(c *seal.Commit) { c.Asset = "weights" })
			return e.point(t, digest, c, 1, nil), e.folders[0]
		}, "resume.asset"},
		"with a bad signature": {func(c []byte) (string, string) {
			dir := copied(good.folders[0])
			b, err := plan.Canonical(receipt.SignedCheckpoint{Record: good.made[0].Encoded, Signature: must1(stranger.SignCheckpoint(good.made[0].Encoded)), SessionKey: good.session.Public()})
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, seal.RecordName), b, 0o600))
			return good.point(t, digest, c, 1, nil), dir
		}, "resume.signature"},
		"without a record": {func(c []byte) (string, string) {
			dir := copied(good.folders[0])
			must(t, os.Remove(filepath.Join(dir, seal.RecordName)))
			return good.point(t, digest, c, 1, nil), dir
		}, "resume.signature"},
		"with a file missing": {func(c []byte) (string, string) {
			dir := copied(good.folders[0])
			must(t, os.Remove(filepath.Join(dir, "000001.sealed")))
			return good.point(t, digest, c, 1, nil), dir
		}, "resume.whole"},
		"with a file cut short": {func(c []byte) (string, string) {
			dir := copied(good.folders[0])
			must(t, os.Truncate(filepath.Join(dir, "000000.sealed"), 5000))
			return good.point(t, digest, c, 1, nil), dir
		}, "resume.whole"},
		"with a damaged chunk": {func(c []byte) (string, string) {
			dir := copied(good.folders[0])
			name := filepath.Join(dir, "000000.sealed")
			b, err := os.ReadFile(name)
			must(t, err)
			b[len(b)-1] ^= 1
			must(t, os.WriteFile(name, b, 0o600))
			return good.point(t, digest, c, 1, nil), dir
		}, "resume.whole"},
		"with a file more": {func(c []byte) (string, string) {
			dir := copied(good.folders[0])
			must(t, os.WriteFile(filepath.Join(dir, "000002.sealed"), []byte("x"), 0o600))
			return good.point(t, digest, c, 1, nil), dir
		}, "resume.whole"},
		"with another manifest": {func(c []byte) (string, string) {
			dir := copied(good.folders[0])
			b, err := os.ReadFile(filepath.Join(good.folders[1], seal.ManifestName))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, seal.ManifestName), b, 0o600))
			return good.point(t, digest, c, 1, nil), dir
		}, "resume.manifest"},
		"by an earlier answer of the broker": {func(c []byte) (string, string) {
			old := bytes.Clone(c)
			old[0]++
			return good.point(t, digest, old, 1, nil), good.folders[0]
		}, "resume.challenge"},
		"by another broker's word": {func(c []byte) (string, string) {
			r := receipt.ResumePoint{Issuer: "broker.test", JobID: jobID, Plan: digest, Asset: "ckpt", Challenge: c, From: "job-0", Sequence: 1, Digest: good.made[0].Record.Digest, Record: plan.Sum(good.made[0].Encoded)}
			return must1(otherKey.Sign(receipt.TypeResumePoint, r)), good.folders[0]
		}, "resume.signature"},
		"by the broker's word to another job": {func(c []byte) (string, string) {
			return good.point(t, digest, c, 1, func(r *receipt.ResumePoint) { r.JobID = "job-9" }), good.folders[0]
		}, "resume.job"},
		"from the beginning though there is one": {func(c []byte) (string, string) { return good.point(t, digest, c, 1, nil), "" }, "a folder comes with that: false"},
		"though the broker knows of none":        {func(c []byte) (string, string) { return good.point(t, digest, c, 0, nil), good.folders[0] }, "a folder comes with that: true"},
	} {
		t.Run(name, func(t *testing.T) {
			rule, err := h.c.ResumeBegin(t.Context(), canonical)
			must(t, err)
			token, folder := tc.give(rule.Challenge)
			err = h.c.Resume(t.Context(), holdapi.Resume{Point: token, Nothing: folder == ""}, folder)
			if code(err) != holdapi.CodeRefused || !strings.Contains(err.Error(), tc.want) || strings.Count(err.Error(), "resume.") > 1 {
				t.Errorf("got %v, want a refusal by %s alone", err, tc.want)
			}
		})
	}
	// What was refused left nothing behind: the good one is taken.
	rule, err := h.c.ResumeBegin(t.Context(), canonical)
	must(t, err)
	must(t, h.c.Resume(t.Context(), holdapi.Resume{Point: good.point(t, digest, rule.Challenge, 3, nil)}, good.folders[2]))

	for name, p := range map[string][]byte{"another plan": resumePlan(t, string(digest)), "no plan": []byte("{}"), "a plan that resumes from nothing": resumePlan(t, "")} {
		if _, err := h.c.ResumeBegin(t.Context(), p); err == nil {
			t.Errorf("%s is believed", name)
		}
	}
}

func TestResumeFromANamedCheckpoint(t *testing.T) {
	key := keys.GenerateDataKey()
	e := earlierJob(t, key, plan.Sum([]byte("an earlier plan")), 3, nil)
	named := e.made[1].Record.Digest
	canonical := resumePlan(t, string(named))
	head := func(n int, by leaseSigner) string {
		c := e.made[n-1]
		return must1(by.Sign(receipt.TypeCheckpointHead, receipt.CheckpointHead{
			Issuer: "broker.test", IssuedAt: 1, JobID: c.Record.JobID, Plan: c.Record.Plan, Asset: "ckpt", Sequence: c.Record.Sequence, Digest: c.Record.Digest, Record: plan.Sum(c.Encoded),
		}))
	}
	h := resuming(t, key, canonical)
	rule, err := h.c.ResumeBegin(t.Context(), canonical)
	must(t, err)
	if rule.Rule != string(named) || rule.Challenge != nil {
		t.Fatalf("%+v", rule)
	}
	other := earlierJob(t, key, plan.Sum([]byte("an earlier plan")), 1, func(c *seal.Commit) { c.Asset = "weights" })
	_ = other
	for name, tc := range map[string]struct {
		folder, anchor, want string
	}{
		"another checkpoint":             {e.folders[0], "", "resume.digest"},
		"another countersignature":       {e.folders[1], head(3, leaser), "resume.anchor"},
		"another broker's countersigned": {e.folders[1], head(2, newLeaser("broker.test")), "resume.anchor"},
	} {
		err := h.c.Resume(t.Context(), holdapi.Resume{Anchor: tc.anchor}, tc.folder)
		if code(err) != holdapi.CodeRefused || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
	if err := h.c.Resume(t.Context(), holdapi.Resume{Nothing: true}, ""); code(err) != holdapi.CodeRefused {
		t.Errorf("no checkpoint though the plan names one: %v", err)
	}
	// It may be unanchored, of another job and of another plan: it is named.
	must(t, h.c.Resume(t.Context(), holdapi.Resume{}, e.folders[1]))
	_, err = h.c.Decrypt(t.Context())
	must(t, err)
	h.trace().start()
	h.waitStarted()
	if got, err := os.ReadFile(h.path("checkpoints/resume/model")); err != nil || !bytes.Equal(got, stepContent(2)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	must(t, os.WriteFile(h.path("checkpoints/a.tmp"), []byte("1"), 0o600))
	must(t, os.Rename(h.path("checkpoints/a.tmp"), h.path("checkpoints/a")))
	// A line of its own begins, under a plan that names where it begins.
	if l, err := h.c.Checkpoints(t.Context()); err != nil || len(l) != 1 || l[0].Sequence != 1 || l[0].Parent != "" {
		t.Errorf("%+v, %v", l, err)
	}
	evs, err := h.c.Events(t.Context(), holdapi.Events{})
	must(t, err)
	if evs[0].Kind != "resumed" || !strings.Contains(evs[0].Detail, "unanchored") {
		t.Errorf("%+v", evs[0])
	}
}

// TestResumeDamaged: what is changed in a chunk after it was held against the manifest
// fails when the job is started, not when the job reads it.
func TestResumeDamaged(t *testing.T) {
	key := keys.GenerateDataKey()
	canonical := resumePlan(t, plan.ResumeLatest)
	e := earlierJob(t, key, plan.Sum(canonical), 1, nil)
	file := filepath.Join(e.folders[0], "000000.sealed")
	b, err := os.ReadFile(file)
	must(t, err)
	h := resuming(t, key, canonical)
	rule, err := h.c.ResumeBegin(t.Context(), canonical)
	must(t, err)
	must(t, h.c.Resume(t.Context(), holdapi.Resume{Point: e.point(t, plan.Sum(canonical), rule.Challenge, 1, nil)}, e.folders[0]))
	b[len(b)-1] ^= 1
	must(t, os.WriteFile(file, b, 0o600))
	if _, err := h.c.Decrypt(t.Context()); err == nil || !strings.Contains(err.Error(), "does not authenticate") {
		t.Errorf("a flipped bit: %v", err)
	}
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
