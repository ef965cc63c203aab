package e2e

import (
	"bytes"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the journal's driver

	"github.com/coffer-run/coffer/attest/bundle"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// TestDaemonsKilled kills each daemon with SIGKILL while one job runs, one after the
// other: after a restart the job has gone on.
func TestDaemonsKilled(t *testing.T) {
	n := need(t)
	id := n.submit(t, n.granted(t, "daemons-killed", 4))
	n.wait(t, id, "running", running)
	for _, daemon := range []string{"cofferd", "coffer-verifier", "coffer-broker"} {
		kill(t, n.pid(t, daemon))
		time.Sleep(300 * time.Millisecond)
		n.must(t, "restart")
		if s := n.status(t, id); s.State != "running" {
			t.Fatalf("%s was killed when the job no longer ran: %+v", daemon, s)
		}
	}
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Errorf("%+v", s)
	}
	n.verified(t, id)
}

// TestAgentKilledAtEachStage kills the agent when a job enters each of its stages, while
// the jobs before are still at work. A job to which no key was released begins again; one
// that may have keys and had not started is reported as failed with its stage; one that had
// started goes on, and one that had ended is concluded: with the record that it had, if the
// evidence log has that. Either way it leaves nothing.
func TestAgentKilledAtEachStage(t *testing.T) {
	n := need(t)
	const logged bundle.Stage = "logged" // the last stage's last moment
	killed := map[bundle.Stage]string{}
	for _, stage := range []bundle.Stage{
		bundle.StageAdmit, bundle.StageSandbox, bundle.StageCollect, bundle.StageVerify, bundle.StageRelease, bundle.StageDecrypt, bundle.StageStart, bundle.StageRun, bundle.StageEvidence, logged,
	} {
		job := n.jobFile(t, "killed-at-"+string(stage), func(s string) string {
			return strings.NewReplacer(trains, `[/usr/bin/python3, -c, "print(len(open('/inputs/model/model.safetensors', 'rb').read()))"]`, "gpus: 1", "gpus: 0", "cpu: 2", "cpu: 300m", "memory: 2Gi", "memory: 512Mi").Replace(s)
		})
		n.grant(t, n.planDigest(t, job), 1)
		killed[stage] = n.submit(t, job)
		agent := n.pid(t, "cofferd")
		switch stage {
		case bundle.StageAdmit:
		case logged:
			n.logged(t, killed[stage])
		default:
			n.told(t, killed[stage], string(stage), func(e *agentv1.WatchResponse) bool { return e.GetStage().GetStage() == string(stage) })
		}
		kill(t, agent)
		n.must(t, "restart")
	}
	mayFail := []string{string(bundle.StageRelease), string(bundle.StageDecrypt), string(bundle.StageStart)}
	for stage, id := range killed {
		s := n.wait(t, id, "ended", ended)
		t.Logf("killed at %s: %s at %s (%s)", stage, s.State, s.Stage, s.Reason)
		if s.State != "succeeded" && (s.State != "failed" || s.Reason != "agent-restarted" || !slices.Contains(mayFail, s.Stage)) {
			t.Errorf("killed at %s: %+v", stage, s)
		}
		// The kill comes after the stage was entered, and so never before it.
		if after := stage == bundle.StageRun || stage == bundle.StageEvidence || stage == logged; after && s.State != "succeeded" {
			t.Errorf("killed at %s, when it had started: %+v", stage, s)
		}
		if _, err := os.Stat(filepath.Join(n.layout.Jobs(), id)); !os.IsNotExist(err) {
			t.Errorf("killed at %s: the job's run directory is still there", stage)
		}
		if s.State == "succeeded" {
			n.verified(t, id)
		}
	}
}

// logged waits until the evidence log has a job's record.
func (n *node) logged(t *testing.T, id string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(n.dir, "broker", "broker.db")+"?mode=ro&_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		records := 0
		if err := db.QueryRow("SELECT count(*) FROM log WHERE job = ? AND bundle <> ''", id).Scan(&records); err != nil {
			t.Fatal(err)
		}
		if records > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the record of job %s is not in the log", id)
		}
	}
}

// TestHolderKilled kills the process that holds the keys: its job must stop.
func TestHolderKilled(t *testing.T) {
	n := need(t)
	id := n.submit(t, n.granted(t, "holder", 50))
	n.wait(t, id, "running", running)
	kill(t, n.holderPid(t, id))
	began := time.Now()
	s := n.wait(t, id, "ended", ended)
	if s.State != "failed" || s.Reason != "holder-lost" || s.Stage != "run" {
		t.Errorf("%+v", s)
	}
	t.Logf("stopped after %s", time.Since(began).Round(time.Millisecond))
	// Nobody zeroed the inputs' memory before the kernel took it, and the record says so.
	// Its signer is gone with the holder: it passes for nothing else.
	_, body := n.bundleOf(t, id)
	if out, err := n.verify(t, body, true); exitCode(err) != 1 || !strings.Contains(out, "not scrubbed: holder lost") || !strings.Contains(out, "statement.signature") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(n.layout.Jobs(), id)); !os.IsNotExist(err) {
		t.Error("the job's run directory is still there")
	}
}

// TestHolderKilledWhileAgentIsAway kills both; the agent that comes back must
// notice and stop the job.
func TestHolderKilledWhileAgentIsAway(t *testing.T) {
	n := need(t)
	id := n.submit(t, n.granted(t, "both", 50))
	n.wait(t, id, "running", running)
	kill(t, n.pid(t, "cofferd"))
	kill(t, n.holderPid(t, id))
	n.must(t, "restart")
	if s := n.wait(t, id, "ended", ended); s.State != "failed" || s.Reason != "holder-lost" {
		t.Errorf("%+v", s)
	}
}

// holderPid finds a job's holder.
func (n *node) holderPid(t *testing.T, job string) int {
	t.Helper()
	pid := findHolder(t, job)
	if pid == 0 {
		t.Fatalf("job %s has no holder", job)
	}
	return pid
}

// findHolder finds a job's holder by its command line; 0 means that it has none.
func findHolder(t *testing.T, job string) int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		if err != nil {
			continue
		}
		if args := strings.Split(string(b), "\x00"); filepath.Base(args[0]) == "coffer-holder" && strings.Contains(string(b), job) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(d)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	return 0
}

// TestOldJournalGainsNothing puts a journal back that was copied before the
// job's keys were released. The broker remembers what the journal forgot.
func TestOldJournalGainsNothing(t *testing.T) {
	n := need(t)
	job := n.granted(t, "journal", 1)
	journal := filepath.Join(n.dir, "agent")
	old := filepath.Join(t.TempDir(), "agent")

	// The journal as it is when the job has just been taken: before its release.
	id := n.submit(t, job)
	copyTree(t, journal, old)
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v", s)
	}
	kill(t, n.pid(t, "cofferd"))
	for _, f := range []string{"journal.db", "journal.db-wal", "journal.db-shm"} {
		if err := os.Remove(filepath.Join(journal, f)); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(old, f)); err == nil {
			if err := os.WriteFile(filepath.Join(journal, f), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	n.must(t, "restart")
	s := n.wait(t, id, "ended", ended)
	if s.State != "failed" || s.Reason != "submission-lost" {
		t.Errorf("the job that the old journal shows as unfinished is %+v", s)
	}
	again := n.wait(t, n.submit(t, job), "ended", ended)
	if again.State != "refused" || again.Stage != "release" || len(again.Checks) == 0 || again.Checks[0].ID != "grant.exhausted" {
		t.Errorf("the grant that the old journal knows as unused is used again: %+v", again)
	}
}

// TestEditedJournalIsNotAdopted changes what the journal says of a running job
// while the agent is away. The agent must not go on with the job.
func TestEditedJournalIsNotAdopted(t *testing.T) {
	n := need(t)
	for _, tt := range []struct{ name, check, field string }{
		{"another sandbox", "adopt.sandbox", "sandbox"},
		{"other evidence", "adopt.evidence", "evidence"},
		{"another job's result", "result.job", "result"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var other string
			if tt.field == "result" {
				b, err := bundle.Parse(n.honest(t).bundle)
				if err != nil {
					t.Fatal(err)
				}
				other = string(b.Parts[bundle.Result])
			}
			id := n.submit(t, n.granted(t, "edited", 50))
			n.wait(t, id, "running", running)
			kill(t, n.pid(t, "cofferd"))
			n.journalEntry(t, id, func(rec map[string]any) {
				if other != "" {
					rec[tt.field] = other
					return
				}
				// Another value of the same form: the nonce or the job it speaks of.
				b, err := base64.StdEncoding.DecodeString(rec[tt.field].(string))
				if err != nil {
					t.Fatal(err)
				}
				rec[tt.field] = base64.StdEncoding.EncodeToString(bytes.Replace(b, []byte(id), []byte(strings.ToLower(id)), 1))
			})
			n.must(t, "restart")
			s := n.wait(t, id, "ended", ended)
			if s.State != "refused" || !slices.ContainsFunc(s.Checks, func(c failedCheck) bool { return c.ID == tt.check }) {
				t.Errorf("want a refusal by %s: %+v", tt.check, s)
			}
		})
	}
}

// journalEntry changes the newest record of a job's stages in the agent's journal.
func (n *node) journalEntry(t *testing.T, id string, edit func(map[string]any)) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(n.dir, "agent", "journal.db")+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var seq int
	var data []byte
	if err := db.QueryRow("SELECT seq, data FROM entries WHERE job = ? ORDER BY seq DESC LIMIT 1", id).Scan(&seq, &data); err != nil {
		t.Fatal(err)
	}
	var rec map[string]any
	if err := json.Unmarshal(data, &rec); err != nil {
		t.Fatal(err)
	}
	edit(rec)
	if data, err = json.Marshal(rec); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("UPDATE entries SET data = ? WHERE job = ? AND seq = ?", data, id, seq); err != nil {
		t.Fatal(err)
	}
}

// TestOperatorExecIsSeen runs a program in the container from outside, as the
// node's root can, and expects the bundle to say so.
func TestOperatorExecIsSeen(t *testing.T) {
	n := need(t)
	id := n.submit(t, n.granted(t, "exec", 2))
	n.wait(t, id, "running", running)
	if out, err := ctr(n, "tasks", "exec", "--exec-id", "x", n.container(t, id), "/usr/bin/python3", "-c", "print(1)"); err != nil {
		t.Fatalf("exec: %v %s", err, out)
	}
	n.wait(t, id, "ended", ended)
	path := filepath.Join(t.TempDir(), "bundle.json")
	n.must(t, "evidence", "get", id, "-o", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.verify(t, b, true)
	if exitCode(err) != 1 || !strings.Contains(out, "trace.operator") {
		t.Errorf("exit code %d; the bundle does not name the operator's exec:\n%s", exitCode(err), out)
	}
}

func TestSecondUpIsRefused(t *testing.T) {
	n := need(t)
	out, err := n.coffer("up", "--tools", os.Getenv("COFFER_TOOLS"), "--port-base", fmt.Sprint(n.portBase))
	if exitCode(err) == 0 || strings.Count(strings.TrimSpace(out), "\n") > 2 {
		t.Errorf("a second up: exit code %d: %s", exitCode(err), out)
	}
	if n.pid(t, "cofferd") == 0 {
		t.Error("the stack is gone")
	}
}
