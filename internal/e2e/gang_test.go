package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/runner/client"
)

// TestGangInAQueue runs a gang of two in one of a node's queues, through the client that
// schedulers use. The agent is killed while the gang waits and while it runs; then one of
// the gang is cancelled, and the other one ends.
func TestGangInAQueue(t *testing.T) {
	n := need(t)
	n.withConfig(t, "cofferd", func(c map[string]any) {
		c["queues"] = []map[string]any{
			{"name": "default", "users": []string{"*"}}, {"name": "nightly", "users": []string{"scheduler/*", "engineer/*"}, "limit": map[string]any{"jobs": 2}},
			{"name": "theirs", "users": []string{"scheduler/another"}},
		}
	})
	e, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	pki := filepath.Join(n.dir, "pki")
	a, err := client.New(client.Options{URL: e.Agent(), CA: e.CA(), Cert: filepath.Join(pki, "engineer-engineer.pem"), Key: filepath.Join(pki, "engineer-engineer.key")})
	if err != nil {
		t.Fatal(err)
	}
	submit := func(name, more string) (string, error) {
		file, err := os.ReadFile(n.small(t, name, "import time; time.sleep(90)", more))
		if err != nil {
			t.Fatal(err)
		}
		j, err := a.Submit(t.Context(), file, name)
		return j.GetId(), err
	}
	const gang = "queue: nightly\ngang: {name: night-1, size: 2}\n"
	if id, err := submit("not-its-queue", "queue: theirs\n"); err == nil || !strings.Contains(err.Error(), "queue.user") {
		t.Errorf("job %s: %v", id, err)
	}
	one, err := submit("gang-one", gang)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := submit("gang-of-three", strings.Replace(gang, "size: 2", "size: 3", 1)); err == nil || !strings.Contains(err.Error(), "gang.alike") {
		t.Errorf("job %s: %v", id, err)
	}
	waits := func() {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			j, err := a.Get(t.Context(), one)
			if err != nil {
				t.Fatal(err)
			}
			if j.GetQueue() == "nightly" && j.GetGang() == "night-1" && j.GetQueuePosition() == 1 && strings.Contains(j.GetWaitsFor(), "1 wait with their approvals") && len(j.GetGangJobs()) == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("it does not wait for its gang: %v", j)
			}
		}
	}
	waits()
	if s, _ := n.coffer("why", one); !strings.Contains(s, "queue nightly") || !strings.Contains(s, "night-1") {
		t.Errorf("%s", s)
	}
	n.restartAgent(t)
	waits()
	two, err := submit("gang-two", gang)
	if err != nil {
		t.Fatal(err)
	}
	together := func() {
		t.Helper()
		for _, id := range []string{one, two} {
			if s := n.wait(t, id, "running", running); s.State != "running" {
				t.Fatalf("%+v", s)
			}
			j, err := a.Get(t.Context(), id)
			if err != nil || !slices.Contains(j.GetGangJobs(), one) || !slices.Contains(j.GetGangJobs(), two) || len(j.GetGangJobs()) != 2 {
				t.Fatalf("%v, %v", j, err)
			}
		}
	}
	together()
	// The gang has all that its queue may have; other queues go on.
	third, err := submit("third", "queue: nightly\n")
	if err != nil {
		t.Fatal(err)
	}
	other := n.submit(t, n.small(t, "other-queue", "print(1)", ""))
	if s := n.wait(t, other, "ended", ended); s.State != "succeeded" {
		t.Errorf("%+v", s)
	}
	j, err := a.Get(t.Context(), third)
	if err != nil || j.GetState() != "queued" || !strings.Contains(j.GetWaitsFor(), "room of the queue nightly") {
		t.Errorf("%v, %v", j, err)
	}
	c, err := a.Capacity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range c.GetQueues() {
		if q.GetName() == "nightly" && (q.GetRunning() != 2 || q.GetWaiting() != 1) {
			t.Errorf("%v", q)
		}
	}
	n.restartAgent(t)
	together()
	if _, err := a.Cancel(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	if s := n.wait(t, two, "ended", ended); s.State != "cancelled" {
		t.Errorf("%+v", s)
	}
	if s := n.wait(t, one, "ended", ended); s.State != "failed" || s.Reason != "gang-failed" || !strings.Contains(s.Message, two) {
		t.Errorf("%+v", s)
	}
	if s := n.wait(t, third, "running", running); s.State != "running" {
		t.Errorf("%+v", s)
	}
	if _, err := a.Cancel(t.Context(), third); err != nil {
		t.Error(err)
	}
	n.wait(t, third, "ended", ended)
	for _, id := range []string{one, two} {
		n.verified(t, id)
	}
}
