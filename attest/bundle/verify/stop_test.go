package verify_test

import (
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/translog"
)

const takenBack = "grant: licence ended"

// stopped is a job that was revoked while it ran.
func stopped(t *testing.T, l *bundletest.Lab, edit func(*bundle.Outcome)) *bundletest.Job {
	t.Helper()
	j := newJob(t, l, bundletest.Options{})
	at := time.Now().UnixNano()
	run := slices.IndexFunc(j.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageRun })
	j.Timeline[run].Outcome = bundle.StepFailed
	j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: bundle.ReasonRevoked, Stop: &bundle.Stop{
		By: takenBack, ToldUnixNano: at, GoneUnixNano: at + 1e9, ScrubbedUnixNano: at + 2e9,
	}}
	if edit != nil {
		edit(&j.Outcome)
	}
	return j
}

// logged adds the broker's entry that it told the job to stop.
func logged(t *testing.T, l *bundletest.Lab, j *bundletest.Job, reason string) {
	t.Helper()
	last := j.Log.Entries[len(j.Log.Entries)-1]
	e, err := l.Append(translog.Body{Kind: translog.KindStop, Job: j.ID, JobSequence: uint64(len(j.Log.Entries)) + 1, JobPrev: last.Hash, Stop: &translog.Stop{Reason: reason}})
	if err != nil {
		t.Fatal(err)
	}
	j.Log.Entries = append(j.Log.Entries, e)
}

func TestStoppedJobs(t *testing.T) {
	l := newLab(t)
	for _, tt := range []struct {
		name   string
		edit   func(*bundle.Outcome)
		logged string
		// failed is the check that must fail, empty if none may. stop and log are
		// what becomes of the two checks.
		failed    string
		stop, log []check.Outcome
	}{
		{"revoked", nil, takenBack, "", []check.Outcome{check.Pass}, []check.Outcome{check.Pass}},
		{"lapsed with nobody there to tell", func(o *bundle.Outcome) {
			o.Reason, o.Stop.By, o.Stop.ToldUnixNano = bundle.ReasonLapsed, "no renewal for 60 s", 0
		}, "", "", []check.Outcome{check.Pass}, nil},
		{"ended by itself when it was told", func(o *bundle.Outcome) { o.Reason, o.Stop = "exit-code", nil }, takenBack, "", nil, []check.Outcome{check.Pass}},
		{"never scrubbed", func(o *bundle.Outcome) { o.Stop.ScrubbedUnixNano = 0 }, takenBack, "", []check.Outcome{check.NotChecked}, []check.Outcome{check.Pass}},
		{"never gone", func(o *bundle.Outcome) { o.Stop.GoneUnixNano = 0 }, takenBack, "", []check.Outcome{check.NotChecked}, []check.Outcome{check.Pass}},
		{"a revocation that the broker knows nothing of", nil, "", "log.stop", []check.Outcome{check.Pass}, []check.Outcome{check.Fail}},
		{"a revocation for another reason", nil, "grant: another", "log.stop", []check.Outcome{check.Pass}, []check.Outcome{check.Fail}},
		{"revoked, and no word of how", func(o *bundle.Outcome) { o.Stop = nil }, takenBack, "outcome.stop", []check.Outcome{check.Fail}, []check.Outcome{check.Fail}},
		{"revoked by nobody", func(o *bundle.Outcome) { o.Stop.By = "" }, takenBack, "outcome.stop", []check.Outcome{check.Fail}, []check.Outcome{check.Fail}},
		{"a stop of a job with another reason", func(o *bundle.Outcome) { o.Reason = "exit-code" }, takenBack, "outcome.stop", []check.Outcome{check.Fail}, []check.Outcome{check.Pass}},
		{"told when it was gone", func(o *bundle.Outcome) { o.Stop.ToldUnixNano += 10e9 }, takenBack, "outcome.stop", []check.Outcome{check.Fail}, []check.Outcome{check.Pass}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := stopped(t, l, tt.edit)
			if tt.logged != "" {
				logged(t, l, j, tt.logged)
			}
			r := verify.Verify(build(t, j), pinned(t, l))
			if tt.failed == "" && len(failedIDs(r)) > 0 || tt.failed != "" && !slices.Contains(failedIDs(r), tt.failed) {
				dump(t, r)
				t.Errorf("failed %v, want %q", failedIDs(r), tt.failed)
			}
			if o := outcomes(r, "outcome.stop"); !slices.Equal(o, tt.stop) {
				t.Errorf("outcome.stop %v, want %v", o, tt.stop)
			}
			if o := outcomes(r, "log.stop"); !slices.Equal(o, tt.log) {
				t.Errorf("log.stop %v, want %v", o, tt.log)
			}
		})
	}
}
