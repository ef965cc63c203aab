package bench

import (
	"context"
	"database/sql"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	_ "modernc.org/sqlite" // the journal's driver

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/journal"
)

// Of a journal that is full.
const (
	manyJobs   = 5_000
	manyEvents = 30 // of each job
	listPage   = 100
)

// agentJournal measures what an agent with 5,000 jobs takes to list a page and to
// send a job's events again, while another job writes.
func agentJournal(t *testing.T) []row {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "journal.db")
	j := must[*journal.Journal](t)(journal.Open(path))
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	ids := fillJournal(t, j, path)

	stop := make(chan struct{})
	written := make(chan int, 1)
	go func() { written <- writeEvents(ctx, j, ids[0], stop) }()
	list := percentiles(1000, func(i int) {
		// Pages from everywhere in the list.
		rows, err := j.Jobs(ctx, ids[(i*37)%(len(ids)-listPage)+listPage], listPage+1)
		if err != nil || len(rows) < listPage {
			t.Fatal(len(rows), err)
		}
		out := &agentv1.ListResponse{}
		for _, r := range rows[:listPage] {
			out.Jobs = append(out.Jobs, runner.Describe(r))
		}
		if _, err := proto.Marshal(out); err != nil {
			t.Fatal(err)
		}
	})
	watch := percentiles(1000, func(i int) {
		events, err := j.Events(ctx, ids[(i*41)%len(ids)], 0, 1000)
		if err != nil || len(events) < manyEvents {
			t.Fatal(len(events), err)
		}
		for _, e := range events[:manyEvents] {
			var w agentv1.WatchResponse
			if err := proto.Unmarshal(e.Body, &w); err != nil {
				t.Fatal(err)
			}
			if _, err := proto.Marshal(&w); err != nil {
				t.Fatal(err)
			}
		}
	})
	close(stop)
	n := <-written

	// The floor: SQLite alone returns the same page's columns.
	db := must[*sql.DB](t)(sql.Open("sqlite", "file:"+path+"?_pragma=query_only(1)"))
	defer db.Close()
	floor := percentiles(300, func(i int) {
		rows, err := db.QueryContext(ctx, "SELECT id, name, plan_digest, submitter, state, stage, reason, message, submitted, ended, exit_code FROM jobs WHERE id < ? ORDER BY id DESC LIMIT ?", ids[(i*37)%(len(ids)-listPage)+listPage], listPage+1)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		var s [8]string
		var k [3]int64
		for rows.Next() {
			if err := rows.Scan(&s[0], &s[1], &s[2], &s[3], &s[4], &s[5], &s[6], &s[7], &k[0], &k[1], &k[2]); err != nil {
				t.Fatal(err)
			}
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
	})
	return []row{
		atMost("agent, 5,000 jobs: list a page of 100, p99", millis(list.p99), "ms", 50),
		info("agent, 5,000 jobs: list a page of 100, p50", millis(list.p50), "ms"),
		info("agent, 5,000 jobs: the page's columns from SQLite alone, p50", millis(floor.p50), "ms"),
		atMost("agent, 5,000 jobs: watch from the beginning, 30 events, p99", millis(watch.p99), "ms", 50),
		info("agent, 5,000 jobs: watch from the beginning, 30 events, p50", millis(watch.p50), "ms"),
		info("agent, 5,000 jobs: events written meanwhile", float64(n), "events"),
	}
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

type percentile struct{ p50, p99 time.Duration }

// percentiles runs f n times, after once that does not count.
func percentiles(n int, f func(i int)) percentile {
	f(0)
	took := make([]time.Duration, n)
	for i := range took {
		began := time.Now()
		f(i)
		took[i] = time.Since(began)
	}
	slices.Sort(took)
	return percentile{took[n/2], took[n*99/100]}
}

// fillJournal submits and ends jobs, each with a plan, a bundle and events of usual
// sizes, and returns their ids, which rise.
func fillJournal(t *testing.T, j *journal.Journal, path string) []string {
	t.Helper()
	ctx := t.Context()
	blob := func(n int) []byte { return make([]byte, n) }
	digest := plan.Sum([]byte("plan"))
	ids := make([]string, manyJobs)
	for i := range ids {
		ids[i] = fmt.Sprintf("01M80%021d", i)
	}
	// The first goes on: it is the one that writes. The second has ended.
	for i, id := range ids[:2] {
		job := journal.Job{
			ID: id, Name: "job", IdempotencyKey: id, FileDigest: digest, JobFile: blob(900), Plan: blob(1500), PlanDigest: digest,
			Submitter: "user/ada", State: journal.Queued, Stage: "admit", Submitted: time.Now(),
		}
		if _, _, err := j.Submit(ctx, job); err != nil {
			t.Fatal(err)
		}
		job.State, job.Stage, job.Ended = journal.Succeeded, "run", time.Now()
		if i == 0 {
			continue
		}
		if err := j.End(ctx, job, blob(60<<10)); err != nil {
			t.Fatal(err)
		}
	}
	// All others are like the second, in one transaction: it is reading that is measured.
	db := must[*sql.DB](t)(sql.Open("sqlite", "file:"+path+"?_pragma=busy_timeout(5000)"))
	defer db.Close()
	tx := must[*sql.Tx](t)(db.BeginTx(ctx, nil))
	body := must[[]byte](t)(proto.Marshal(&agentv1.WatchResponse{Sequence: 1, TimeUnixNano: 1, Event: &agentv1.WatchResponse_Stage{Stage: &agentv1.StageEvent{Stage: "collect", Phase: "done", Detail: "12345 bytes"}}}))
	for _, id := range ids {
		if id > ids[1] {
			for _, query := range []string{
				"INSERT INTO jobs SELECT ?, name, ?, file_digest, job_file, plan, plan_digest, submitter, state, stage, reason, message, checks, submitted, ended, exit_code, NULL FROM jobs WHERE id = ?",
				"INSERT INTO attempts SELECT ?, attempt, coalesce(retry_of, ?), retried_as, not_before, priority FROM attempts WHERE job = ?",
				"INSERT INTO bundles SELECT coalesce(?, ?), bundle FROM bundles WHERE job = ?",
			} {
				if _, err := tx.ExecContext(ctx, query, id, id, ids[1]); err != nil {
					t.Fatal(err)
				}
			}
		}
		for k := range manyEvents {
			if _, err := tx.ExecContext(ctx, "INSERT INTO events (job, seq, at, body) VALUES (?, ?, ?, ?)", id, k+1, k+1, body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	return ids
}

// writeEvents writes an event every 2 ms until stop, and returns how many.
func writeEvents(ctx context.Context, j *journal.Journal, id string, stop <-chan struct{}) int {
	for n := 0; ; n++ {
		select {
		case <-stop:
			return n
		case <-time.After(2 * time.Millisecond):
			if err := j.AddEvent(ctx, id, journal.Event{Sequence: uint64(1000 + n), At: time.Now(), Body: []byte{}}); err != nil {
				return n
			}
		}
	}
}
