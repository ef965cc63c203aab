package runner

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/device"
	"github.com/coffer-run/coffer/internal/executable"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/sandbox"
)

const (
	warmMB = 1 << 20
	// warmNode is a node with room for one job of half of it beside the holder that
	// waits, and a little.
	warmNode = 1 << 30
)

// warmAgent has one region of 256 MiB made ready by a program that only waits.
func warmAgent(t *testing.T, does string) *Agent {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("control groups need root")
		}
		t.Skip("control groups need root")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "holder")
	if err := executable.Write(program, []byte("#!/bin/sh\necho $$ >"+dir+"/pid.part; mv "+dir+"/pid.part "+dir+"/pid\n"+does+"\n")); err != nil {
		t.Fatal(err)
	}
	a := &Agent{
		Deps:  Deps{Holder: program, RunDir: dir, Cgroup: "/coffer-test-warm-" + strconv.Itoa(os.Getpid()), WarmRegions: []int64{256 * warmMB}},
		log:   slog.New(slog.DiscardHandler),
		queue: newQueue(Room{8, 8000, warmNode}, nil, everybody()), live: map[string]*Job{}, ended: map[string]*feed{},
	}
	a.ctx, a.stop = context.WithCancelCause(context.WithoutCancel(t.Context()))
	var err error
	if a.warm, err = a.openWarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.coolDown()
		if err := sandbox.OpenCgroup(a.Cgroup).Remove(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// pid is that of the program, once it runs.
func (a *Agent) warmPid(t *testing.T) int {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if b, err := os.ReadFile(filepath.Join(a.RunDir, "pid")); err == nil {
			pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
		if time.Now().After(end) {
			t.Fatal("no holder waits")
		}
	}
}

func alive(pid int) bool { return !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

// warmJob is a job that has its room, with one input of a file of size bytes.
func (a *Agent) warmJob(t *testing.T, id string, memory, size int64) *Job {
	t.Helper()
	j := newJob(id, "")
	j.plan.Resources = plan.Resources{CPUMillis: 1000, MemoryBytes: memory, Pids: 10}
	dir := filepath.Join("/tmp", "coffer-warm-"+strconv.Itoa(os.Getpid())+id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Truncate(touch(t, filepath.Join(dir, "000000.sealed")), size); err != nil {
		t.Fatal(err)
	}
	j.spec.Inputs = []jobspec.Input{{Name: "in", Asset: "a", URI: "file://" + dir, Mount: "/in"}}
	j.place = newPlace(id, "default", 0, noon, j.plan.Resources)
	a.queue.enter(j.place)
	if !has(j.place) {
		t.Fatalf("job %s has no room", id)
	}
	j.placed = true
	return j
}

func touch(t *testing.T, path string) string {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const waits = "exec sleep 60"

func TestWhichJobGetsTheHolderThatWaits(t *testing.T) {
	for name, c := range map[string]struct {
		memory, size int64
		change       func(*Job)
		gets, stays  bool
	}{
		"one with such an input":                          {700 * warmMB, 256 * warmMB, nil, true, false},
		"with one of half the size":                       {700 * warmMB, 128 * warmMB, nil, true, false},
		"with a small one, and there is room for both":    {512 * warmMB, 10 * warmMB, nil, false, true},
		"with a small one, and there is no room for both": {700 * warmMB, 10 * warmMB, nil, false, false},
		"with less memory than it takes":                  {500 * warmMB, 256 * warmMB, nil, false, true},
		"with an input in an object store":                {700 * warmMB, 0, func(j *Job) { j.spec.Inputs[0].URI = "s3://bucket/in" }, true, false},
		"with secrets alone": {512 * warmMB, 256 * warmMB, func(j *Job) {
			j.spec.Inputs = nil
			j.spec.Secrets = []jobspec.Secret{{Name: "s", Asset: "a", URI: "s3://bucket/s"}}
		}, false, true},
		"that reseals":                    {512 * warmMB, 256 * warmMB, func(j *Job) { j.spec.Inputs = nil }, false, true},
		"with an input that is not there": {512 * warmMB, 256 * warmMB, func(j *Job) { j.spec.Inputs[0].URI += "x" }, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			a := warmAgent(t, waits)
			a.warmUp()
			pid := a.warmPid(t)
			j := a.warmJob(t, "a", c.memory, c.size)
			if c.change != nil {
				c.change(j)
			}
			h := a.claim(j)
			if (h != nil) != c.gets || (a.warm.standing != nil) != c.stays || alive(pid) != (c.gets || c.stays) {
				t.Errorf("given: %v, waits on: %v, alive: %v", h != nil, a.warm.standing != nil, alive(pid))
			}
			if h == nil {
				return
			}
			t.Cleanup(h.End)
			if a.claim(j) != nil {
				t.Error("it was given twice")
			}
			// No job runs when it ends, and another one is started then.
			if a.warmUp(); a.warm.standing != nil {
				t.Error("another one was started under a job")
			}
			a.giveBack(j)
			if a.warm.standing == nil || a.warm.standing == h {
				t.Error("no other one waits after the job")
			}
		})
	}
}

// nearGPUs are two, near to memory nodes.
type nearGPUs struct {
	modeGPUs
	near map[string]int
}

func (g *nearGPUs) State(_ context.Context, uuids []string) (device.State, error) {
	st := device.State{Mode: device.On, AttackerAdvantage: 50}
	for _, u := range uuids {
		st.GPUs = append(st.GPUs, device.GPU{UUID: u, UnprotectedBytes: 1 << 40, NearNode: g.near[u]})
	}
	return st, g.err
}

func TestWhereReadyMemoryLies(t *testing.T) {
	for name, c := range map[string]struct {
		near map[string]int
		want int
		gets bool
	}{
		"near to all GPUs":                           {map[string]int{"a": 2, "b": 2}, 2, true},
		"anywhere, and the job's GPU is near to one": {map[string]int{"a": 2, "b": 1}, 0, false},
		"anywhere, and no GPU is near to one":        {nil, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			a := warmAgent(t, waits)
			gpus := &nearGPUs{near: c.near}
			a.GPUs, a.uuids = gpus, []string{"a", "b"}
			var err error
			if a.warm, err = a.openWarm(t.Context()); err != nil || a.warm.near != c.want {
				t.Fatalf("node %d, %v", a.warm.near, err)
			}
			a.warmUp()
			j := a.warmJob(t, "a", 700*warmMB, 256*warmMB)
			if j.gpus, err = device.New(gpus, a.uuids, device.Defaults).Begin(t.Context(), []string{"a"}); err != nil {
				t.Fatal(err)
			}
			h := a.claim(j)
			if (h != nil) != c.gets {
				t.Errorf("given: %v", h != nil)
			}
			if h != nil {
				h.End()
			}
			gpus.err = errors.New("no answer")
			if _, err := a.openWarm(t.Context()); err == nil {
				t.Error("the driver was not asked")
			}
		})
	}
}

func TestHolderThatWaitsIsGone(t *testing.T) {
	a := warmAgent(t, "sleep 0.1; exit 1")
	a.warmUp()
	<-a.warm.standing.Lost()
	j := a.warmJob(t, "a", 700*warmMB, 256*warmMB)
	if a.claim(j) != nil || a.warm.standing != nil {
		t.Error("a job was given one that had died")
	}
	a.queue.leave(j.place)
	// An agent that was killed left one: the next ends it.
	a = warmAgent(t, waits)
	a.warmUp()
	left, pid := a.warm.standing, a.warmPid(t)
	b := warmAgent(t, waits)
	b.Cgroup = a.Cgroup
	var err error
	if b.warm, err = b.openWarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-left.Lost()
	if alive(pid) {
		t.Error("what an earlier agent left is still there")
	}
	b.warmUp()
	pid = b.warmPid(t)
	b.stop(errShutdown)
	b.coolDown()
	if alive(pid) {
		t.Error("it outlives its agent's end")
	}
	if b.warmUp(); b.warm.standing != nil {
		t.Error("one was started by an agent that ends")
	}
}

func TestHolderIsStartedIfTheOneThatWaitedFails(t *testing.T) {
	a := warmAgent(t, waits)
	a.warmUp()
	pid := a.warmPid(t)
	j := a.warmJob(t, "a", 700*warmMB, 256*warmMB)
	group, err := sandbox.CreateCgroup(sandbox.JobCgroup(a.Cgroup, "a"), j.plan.Resources)
	if err != nil {
		t.Fatal(err)
	}
	tries := 0
	_, _, err = a.startHolder(t.Context(), j, group, holder.Config{Path: a.Holder, RunDir: t.TempDir(), JobID: "a", Procs: group.Procs, Join: func(pid int) error {
		tries++
		return errors.New("no group")
	}})
	if err == nil || tries != 2 || alive(pid) || a.warm.standing != nil {
		t.Errorf("%v after %d tries", err, tries)
	}
}

func TestWarmRegionsThatAreRefused(t *testing.T) {
	a := warmAgent(t, waits)
	for _, l := range [][]int64{{0}, {-1}, {warmNode}, {warmNode / 2, warmNode / 2}, {1<<63 - 1, 1<<63 - 1}, make([]int64, 65)} {
		a.WarmRegions = l
		if _, err := a.openWarm(t.Context()); err == nil {
			t.Errorf("%v was taken", l)
		}
	}
	a.WarmRegions = nil
	w, err := a.openWarm(t.Context())
	if err != nil || w != nil {
		t.Errorf("none: %v %v", w, err)
	}
}
