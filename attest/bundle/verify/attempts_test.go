package verify_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

func statement(t *testing.T, file []byte) plan.Digest {
	t.Helper()
	b, err := bundle.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	return plan.Sum(b.Statement)
}

// attempts are the records of the first n of three attempts that used 10, 20 and 15 of
// 60 s.
func attempts(t *testing.T, l *bundletest.Lab, id string, n int) [][]byte {
	t.Helper()
	var out [][]byte
	var before plan.Digest
	var spent time.Duration
	for i, used := range []time.Duration{10 * time.Second, 20 * time.Second, 15 * time.Second}[:n] {
		w := &bundle.Attempt{Number: i + 1, Before: before, SpentNanos: int64(spent), UsedNanos: int64(used)}
		if i > 0 {
			w.First = id + "-1"
		}
		out = append(out, build(t, newJob(t, l, bundletest.Options{ID: fmt.Sprintf("%s-%d", id, i+1), Argument: "shared", Attempt: w, Fail: i < 2})))
		before, spent = statement(t, out[i]), spent+used
	}
	return out
}

// The records of the attempts before are added up, if they are those that this one
// follows.
func TestAttemptsAddUp(t *testing.T) {
	l := newLab(t)
	a, other := attempts(t, l, "job", 3), attempts(t, l, "other", 2)
	last := a[2]
	// Another second attempt, whose record says that it used more; the third names it, and
	// counts it as before.
	more := build(t, newJob(t, l, bundletest.Options{ID: "job-2b", Fail: true, Argument: "shared", Attempt: &bundle.Attempt{
		Number: 2, First: "job-1", Before: statement(t, a[0]), SpentNanos: int64(10 * time.Second), UsedNanos: int64(40 * time.Second),
	}}))
	less := build(t, newJob(t, l, bundletest.Options{ID: "job-3b", Argument: "shared", Attempt: &bundle.Attempt{
		Number: 3, First: "job-1", Before: statement(t, more), SpentNanos: int64(30 * time.Second), UsedNanos: int64(15 * time.Second),
	}}))
	// A second attempt that succeeded has none after it.
	good := build(t, newJob(t, l, bundletest.Options{ID: "job-2c", Argument: "shared", Attempt: &bundle.Attempt{
		Number: 2, First: "job-1", Before: statement(t, a[0]), SpentNanos: int64(10 * time.Second), UsedNanos: int64(20 * time.Second),
	}}))
	goodThen := build(t, newJob(t, l, bundletest.Options{ID: "job-3c", Argument: "shared", Attempt: &bundle.Attempt{
		Number: 3, First: "job-1", Before: statement(t, good), SpentNanos: int64(30 * time.Second), UsedNanos: int64(15 * time.Second),
	}}))
	// The third of the one job names a second of the other.
	crossed := build(t, newJob(t, l, bundletest.Options{ID: "job-3d", Argument: "shared", Attempt: &bundle.Attempt{
		Number: 3, First: "job-1", Before: statement(t, other[1]), SpentNanos: int64(30 * time.Second), UsedNanos: int64(15 * time.Second),
	}}))
	// A first attempt of another plan.
	otherPlan := build(t, newJob(t, l, bundletest.Options{ID: "job-1", Argument: "another", Fail: true, Attempt: &bundle.Attempt{Number: 1, UsedNanos: int64(10 * time.Second)}}))
	planThen := build(t, newJob(t, l, bundletest.Options{ID: "job-2e", Argument: "shared", Attempt: &bundle.Attempt{
		Number: 2, First: "job-1", Before: statement(t, otherPlan), SpentNanos: int64(10 * time.Second), UsedNanos: int64(15 * time.Second),
	}}))
	// A third that names the first as the one before it.
	skipped := build(t, newJob(t, l, bundletest.Options{ID: "job-3f", Argument: "shared", Attempt: &bundle.Attempt{
		Number: 3, First: "job-1", Before: statement(t, a[0]), SpentNanos: int64(10 * time.Second), UsedNanos: int64(15 * time.Second),
	}}))
	for name, tt := range map[string]struct {
		file    []byte
		earlier [][]byte
		verdict verify.Verdict
		failed  []string
	}{
		"all of them":                   {last, [][]byte{a[0], a[1]}, verify.Verified, nil},
		"in another order":              {last, [][]byte{a[1], a[0]}, verify.Verified, nil},
		"none":                          {last, nil, verify.Verified, nil},
		"the first alone":               {a[0], nil, verify.Verified, nil},
		"one is missing":                {last, [][]byte{a[0]}, verify.Unknown, nil},
		"the first is missing":          {last, [][]byte{a[1]}, verify.Unknown, nil},
		"one of another job":            {last, [][]byte{a[0], other[1]}, verify.Unknown, nil},
		"another job's besides":         {last, [][]byte{a[0], a[1], other[1]}, verify.Failed, []string{"attempt.earlier"}},
		"records before the first":      {a[0], [][]byte{a[1]}, verify.Failed, []string{"attempt.earlier"}},
		"another job's attempt named":   {crossed, [][]byte{other[0], other[1]}, verify.Failed, []string{"attempt.earlier"}},
		"an attempt of another plan":    {planThen, [][]byte{otherPlan}, verify.Failed, []string{"attempt.earlier"}},
		"an attempt is passed over":     {skipped, [][]byte{a[0]}, verify.Failed, []string{"attempt.earlier"}},
		"one that succeeded":            {goodThen, [][]byte{a[0], good}, verify.Failed, []string{"attempt.earlier"}},
		"a later one counts less":       {less, [][]byte{a[0], more}, verify.Failed, []string{"budget.attempts"}},
		"one that is not what it says":  {last, [][]byte{a[0], append(slices.Clone(a[1]), ' ')}, verify.Failed, []string{"attempt.earlier"}},
		"one that is no record at all":  {last, [][]byte{a[0], a[1], []byte("{}")}, verify.Failed, []string{"attempt.earlier"}},
		"of a job without any attempts": {build(t, newJob(t, l, bundletest.Options{ID: "single"})), [][]byte{a[0]}, verify.Failed, []string{"attempt.earlier"}},
	} {
		t.Run(name, func(t *testing.T) {
			trust := pinned(t, l)
			trust.Earlier = tt.earlier
			r := verify.Verify(tt.file, trust)
			if r.Verdict != tt.verdict || !slices.Equal(failedIDs(r), tt.failed) {
				t.Errorf("%s: %s", r.Verdict, r.Summary)
			}
			sum := outcomes(r, "budget.attempts")
			if added := slices.Equal(sum, []check.Outcome{check.Pass}); added != (tt.verdict == verify.Verified && len(tt.earlier) > 0) {
				t.Errorf("added up: %v", sum)
			}
		})
	}
}

// What one record says of its attempt and of the budget is held against its plan and its
// timeline. Of each row, that alone is wrong.
func TestAttemptOfOneRecord(t *testing.T) {
	l := newLab(t)
	const second = int64(time.Second)
	for name, tt := range map[string]struct {
		attempt bundle.Attempt
		failed  string
	}{
		"as it should be":              {bundle.Attempt{Number: 1, UsedNanos: 50 * second}, ""},
		"a second":                     {bundle.Attempt{Number: 2, First: "job-0", SpentNanos: 10 * second, UsedNanos: 50 * second}, ""},
		"told to end, and ending":      {bundle.Attempt{Number: 1, UsedNanos: 61 * second}, ""},
		"more than the plan allows":    {bundle.Attempt{Number: 4, First: "job-0", UsedNanos: 5 * second}, "attempt.number"},
		"none":                         {bundle.Attempt{UsedNanos: 5 * second}, "attempt.number"},
		"a first that follows another": {bundle.Attempt{Number: 1, First: "job-0", UsedNanos: 5 * second}, "attempt.form"},
		"a first with one before":      {bundle.Attempt{Number: 1, Before: plan.Sum(nil), UsedNanos: 5 * second}, "attempt.form"},
		"a second without a first":     {bundle.Attempt{Number: 2, UsedNanos: 5 * second}, "attempt.form"},
		"its own first":                {bundle.Attempt{Number: 2, First: "job-1", UsedNanos: 5 * second}, "attempt.form"},
		"less than nothing":            {bundle.Attempt{Number: 1, SpentNanos: -second, UsedNanos: 5 * second}, "attempt.form"},
		"too long":                     {bundle.Attempt{Number: 1, UsedNanos: 200 * second}, "budget.time"},
		"too long together":            {bundle.Attempt{Number: 2, First: "job-0", SpentNanos: 55 * second, UsedNanos: 55 * second}, "budget.time"},
		"too long before":              {bundle.Attempt{Number: 2, First: "job-0", SpentNanos: 1 << 62, UsedNanos: 1 << 62}, "budget.time"},
	} {
		t.Run(name, func(t *testing.T) {
			r := verify.Verify(build(t, newJob(t, l, bundletest.Options{Attempt: &tt.attempt})), pinned(t, l))
			if got := failedIDs(r); tt.failed == "" && len(got) > 0 || tt.failed != "" && !slices.Equal(got, []string{tt.failed}) {
				t.Errorf("failed: %v, want %q", got, tt.failed)
			}
		})
	}
	for name, tt := range map[string]struct {
		options bundletest.Options
		change  func(*testing.T, *bundletest.Job)
		failed  string
	}{
		"nothing said of attempts": {bundletest.Options{Attempt: &bundle.Attempt{Number: 1}}, edit(bundle.AgentPart, func(a *bundle.Agent) { a.Attempt = nil }), "attempt.form"},
		"attempts of a plan without": {bundletest.Options{}, edit(bundle.AgentPart, func(a *bundle.Agent) {
			a.Attempt = &bundle.Attempt{Number: 1}
		}), "attempt.form"},
		"less than its stages took": {bundletest.Options{Attempt: &bundle.Attempt{Number: 1, UsedNanos: second}}, func(_ *testing.T, j *bundletest.Job) {
			j.Timeline[len(j.Timeline)-2].Nanos += 5 * second
		}, "budget.time"},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, tt.options)
			tt.change(t, j)
			if got := failedIDs(verify.Verify(build(t, j), pinned(t, l))); !slices.Equal(got, []string{tt.failed}) {
				t.Errorf("failed: %v, want %q", got, tt.failed)
			}
		})
	}
}
