package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
	"github.com/coffer-run/coffer/runner/egress/egresstest"
)

const (
	// soakDisk is the room on the agent's disk, in bytes.
	soakDisk = 64 << 20
	// soakMemory is by how much the agent's memory may grow, in bytes.
	soakMemory = 64 << 20
	// soakReleases is how many releases a grant allows: enough for jobs that begin anew.
	soakReleases = 1000
)

// soakPlan is how large a soak is.
type soakPlan struct {
	// jobs are run, and as many more as it takes until each fault has happened.
	jobs, atOnce int
	// pause is the least time between two faults, and up to as much is added.
	pause time.Duration
	// full is how long the disk is full.
	full time.Duration
	// onlyOnce has each fault happen once, and none after that.
	onlyOnce bool
}

var (
	shortSoak = soakPlan{jobs: 16, atOnce: 4, pause: 300 * time.Millisecond, full: time.Second, onlyOnce: true}
	wholeSoak = soakPlan{atOnce: 8, pause: time.Second, full: 2 * time.Second}
)

// soakFaults are the processes that are killed. A job may end for their sake with
// one of these reasons, and for no other.
var (
	soakFaults  = []string{"cofferd", "coffer-verifier", "coffer-broker", "containerd"}
	soakReasons = []string{"verifier-unavailable", "broker-unavailable", "containerd-unavailable", "agent-restarted", "lease-lapsed", "gang-failed"}
)

// soak is one run.
type soak struct {
	*node
	soakPlan
	t      *testing.T
	agent  agentv1connect.AgentServiceClient
	faults sync.Mutex    // held while a process is down
	broken chan struct{} // closed when each fault has happened
	kinds  []*soakKind
	world  *egresstest.World
	trust  verify.Trust

	mu      sync.Mutex // guards what follows
	counts  map[string]int
	memory  []uint64
	filled  bool
	servers map[string]bool // of files, by the kernel's number
}

// soakWork is a job to run, or a gang.
type soakWork struct {
	kind   *soakKind
	number int
}

// TestSoak runs jobs through one agent while the processes around them are killed and
// the agent's disk fills once, and looks for anything that is untrue, missing, doubled or
// left over. COFFER_SOAK is the number of jobs of the whole one, which takes minutes.
func TestSoak(t *testing.T) {
	n, size := need(t), shortSoak
	if v := os.Getenv("COFFER_SOAK"); v != "" {
		size = wholeSoak
		var err error
		if size.jobs, err = strconv.Atoi(v); err != nil || size.jobs < 1 {
			t.Fatalf("COFFER_SOAK: %q is no number of jobs", v)
		}
	}
	s := &soak{node: n, soakPlan: size, t: t, agent: n.agent(t), broken: make(chan struct{}), counts: map[string]int{}, servers: map[string]bool{}}
	s.prepare()
	s.smallDisk()
	before := s.onMachine()
	began := time.Now()
	ctx, done := context.WithCancel(t.Context())
	var around sync.WaitGroup
	around.Go(func() { s.breakThings(ctx) })
	around.Go(func() { s.sample(ctx) })
	var work sync.WaitGroup
	next := make(chan soakWork)
	for range s.atOnce {
		work.Go(func() {
			for w := range next {
				s.unit(w.kind, w.number)
			}
		})
	}
	ran := 0
	for i := 0; ran < s.jobs || !s.allBroken(); i++ {
		k := s.kinds[i%len(s.kinds)]
		next <- soakWork{k, i}
		ran += max(1, k.members)
	}
	s.jobs = ran
	close(next)
	work.Wait()
	done()
	around.Wait()
	s.must(t, "restart")
	s.leftOver(before)
	s.reached()
	s.tried()
	s.table(time.Since(began))
}

func (s *soak) allBroken() bool {
	select {
	case <-s.broken:
		return true
	default:
		return false
	}
}

func (s *soak) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
}

// smallDisk gives the agent a disk of its own, which can be filled.
func (s *soak) smallDisk() {
	t, dir := s.t, filepath.Join(s.dir, "agent")
	kill(t, s.pid(t, "cofferd"))
	size, err := folderSize(dir)
	if err != nil {
		t.Fatal(err)
	}
	swap := func(mount bool) error {
		kept := t.TempDir()
		if err := os.CopyFS(filepath.Join(kept, "agent"), os.DirFS(dir)); err != nil {
			return err
		}
		if mount {
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("mode=700,size=%d", size+soakDisk)); err != nil {
				return err
			}
		} else {
			// What the agent had started ends when it notices that the agent is gone.
			err := unix.Unmount(dir, 0)
			for deadline := time.Now().Add(time.Minute); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = unix.Unmount(dir, 0) {
				time.Sleep(50 * time.Millisecond)
			}
			if err != nil {
				return err
			}
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
		return copyOver(filepath.Join(kept, "agent"), dir)
	}
	if err := swap(true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		kill(t, s.pid(t, "cofferd"))
		if err := swap(false); err != nil {
			t.Error(err)
		}
		s.must(t, "restart")
	})
	s.must(t, "restart")
}

// folderSize is what the files of a folder have, in bytes.
func folderSize(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			size += fi.Size()
		}
		return err
	})
	return size, err
}

// copyOver copies the files of a folder with their modes.
func copyOver(from, to string) error {
	return filepath.WalkDir(from, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o600)
	})
}

// breakThings kills one process after another, in an order of chance, and fills the
// disk once, until the jobs are done or, in a short soak, each fault has happened.
func (s *soak) breakThings(ctx context.Context) {
	order := append(rand.Perm(len(soakFaults)), -1)
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-time.After(s.pause + rand.N(s.pause)): //nolint:gosec // chance, no secret
		}
		which := rand.IntN(len(soakFaults)) //nolint:gosec // chance, no secret
		if i < len(order) {
			which = order[i]
		}
		s.breakOne(which)
		if i == len(order)-1 {
			close(s.broken)
			if s.onlyOnce {
				return
			}
		}
	}
}

// breakOne kills a process and starts it again, or fills the disk.
func (s *soak) breakOne(which int) {
	s.faults.Lock()
	defer s.faults.Unlock()
	if which < 0 {
		s.fillDisk()
		return
	}
	kill(s.t, s.pid(s.t, soakFaults[which]))
	time.Sleep(rand.N(time.Second)) //nolint:gosec // chance, no secret
	if out, err := s.coffer("restart"); err != nil {
		s.t.Errorf("restart: %v\n%s", err, out)
	}
	s.count("killed " + soakFaults[which])
}

func (s *soak) fillDisk() {
	path := filepath.Join(s.dir, "agent", "filler")
	f, err := os.Create(path)
	if err != nil {
		s.t.Error(err)
		return
	}
	piece := make([]byte, 64<<10)
	for err == nil {
		_, err = f.Write(piece)
	}
	if !errors.Is(err, unix.ENOSPC) {
		s.t.Error(err)
	}
	time.Sleep(s.full)
	if err := errors.Join(f.Close(), os.Remove(path)); err != nil {
		s.t.Error(err)
	}
	s.count("disk full")
	s.mu.Lock()
	s.filled = true
	s.mu.Unlock()
}

// sample reads the agent's resident memory, and sees which jobs have file servers.
func (s *soak) sample(ctx context.Context) {
	for {
		s.seeFUSE()
		select {
		case <-ctx.Done():
			return
		case <-time.After(250 * time.Millisecond):
		}
		s.faults.Lock()
		pid := s.pid(s.t, "cofferd")
		s.faults.Unlock()
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			continue
		}
		pages, err := strconv.ParseUint(strings.Fields(string(b))[1], 10, 64)
		if err != nil {
			continue
		}
		s.mu.Lock()
		s.memory = append(s.memory, pages*uint64(os.Getpagesize()))
		s.mu.Unlock()
	}
}

// patiently calls until the agent answers; keys keep it from doing a thing twice.
func (s *soak) patiently(what string, call func(context.Context) error) error {
	var err error
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
		err = call(ctx)
		cancel()
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// job submits one and holds its end, its events, its output and its bundle against
// each other. It is nil for a job that did not end.
func (s *soak) job(kind *soakKind, file []byte, key string) *soakEnd {
	t := s.t
	var j *agentv1.Job
	if err := s.patiently("submit", func(ctx context.Context) error {
		res, err := s.agent.Submit(ctx, connect.NewRequest(&agentv1.SubmitRequest{JobFile: file, IdempotencyKey: fmt.Sprintf("soak-%d-%s", os.Getpid(), key)}))
		if err == nil {
			j = res.Msg.GetJob()
		}
		return err
	}); err != nil {
		t.Error(err)
		return nil
	}
	id := j.GetId()
	for deadline := time.Now().Add(3 * time.Minute); j.GetEndedUnix() == 0; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("job %s (%s) does not end: %v", id, kind.name, j)
			return nil
		}
		if res, err := s.agent.Get(t.Context(), connect.NewRequest(&agentv1.GetRequest{Id: id})); err == nil {
			j = res.Msg.GetJob()
		}
	}
	s.count("ended " + strings.TrimSpace(j.GetState()+" "+j.GetReason()))
	asMeant := j.GetState() == kind.state && j.GetReason() == kind.reason
	s.mu.Lock()
	full := s.filled
	s.mu.Unlock()
	if !asMeant && (j.GetState() != "failed" || !slices.Contains(soakReasons, j.GetReason()) && !(full && j.GetReason() == "no-space")) {
		t.Errorf("job %s (%s) ended %s, %s: %s", id, kind.name, j.GetState(), j.GetReason(), j.GetMessage())
	}
	s.events(id, kind, asMeant)
	s.output(id, kind, asMeant)
	end := &soakEnd{job: j}
	end.ready, end.started = s.record(id, kind, j, asMeant)
	return end
}

// events reads the job's events from the beginning: each has a number of its own,
// and the last one says how the job ended.
func (s *soak) events(id string, kind *soakKind, asMeant bool) {
	var last uint64
	alerts, sealed, anchored := map[string]int{}, map[uint64]int{}, map[uint64]int{}
	final := false
	err := s.patiently("watch", func(ctx context.Context) error {
		last, final = 0, false
		clear(alerts)
		clear(sealed)
		clear(anchored)
		st, err := s.agent.Watch(ctx, connect.NewRequest(&agentv1.WatchRequest{Id: id}))
		if err != nil {
			return err
		}
		defer st.Close()
		for st.Receive() {
			e := st.Msg()
			if e.GetSequence() <= last {
				s.t.Errorf("job %s: event %d after %d", id, e.GetSequence(), last)
			}
			last = e.GetSequence()
			if a := e.GetAlert(); a != nil {
				alerts[a.GetRule()]++
			}
			if c := e.GetCheckpoint(); c != nil {
				of := sealed
				if c.GetAnchored() {
					of = anchored
				}
				of[c.GetSequence()]++
			}
			final = e.GetJob().GetEndedUnix() != 0
		}
		return st.Err()
	})
	if err != nil {
		s.t.Errorf("job %s: %v", id, err)
		return
	}
	if !final {
		s.t.Errorf("job %s: its events do not end with its end", id)
	}
	for rule, n := range alerts {
		if n != 1 {
			s.t.Errorf("job %s: %d events of rule %s, want 1", id, n, rule)
		}
	}
	if !once(sealed) || !once(anchored) || asMeant && len(sealed) != kind.checkpoints {
		s.t.Errorf("job %s: events of checkpoints %v, countersigned %v, want %d once", id, sealed, anchored, kind.checkpoints)
	}
	if asMeant && !slices.Equal(slices.Sorted(maps.Keys(alerts)), kind.alerts) {
		s.t.Errorf("job %s: events of rules %v, want %v", id, alerts, kind.alerts)
	}
}

func once(m map[uint64]int) bool {
	return !slices.ContainsFunc(slices.Collect(maps.Values(m)), func(n int) bool { return n != 1 })
}

// output reads what the job printed: whole, in order and once.
func (s *soak) output(id string, kind *soakKind, asMeant bool) {
	var out strings.Builder
	err := s.patiently("logs", func(ctx context.Context) error {
		out.Reset()
		st, err := s.agent.Logs(ctx, connect.NewRequest(&agentv1.LogsRequest{Id: id}))
		if err != nil {
			return err
		}
		defer st.Close()
		for st.Receive() {
			out.Write(st.Msg().GetLog().GetData())
		}
		s.mu.Lock()
		filled := s.filled
		s.mu.Unlock()
		// A full disk leaves a segment of the log without its end. The lines are held
		// against what was printed all the same.
		if filled && connect.CodeOf(st.Err()) == connect.CodeDataLoss {
			s.count("log with a cut segment")
			return nil
		}
		// A job that a full disk ended may have ended before there was room to begin its log.
		if filled && !asMeant && connect.CodeOf(st.Err()) == connect.CodeNotFound {
			s.count("without a log")
			return nil
		}
		return st.Err()
	})
	if err != nil {
		s.t.Errorf("job %s: %v", id, err)
		return
	}
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if out.Len() == 0 {
		lines = nil
	}
	for k, l := range lines {
		if l != fmt.Sprintf("line %d", k) {
			s.t.Errorf("job %s: line %d is %q", id, k, l)
			return
		}
	}
	if asMeant && len(lines) != kind.lines {
		s.t.Errorf("job %s printed %d lines, want %d", id, len(lines), kind.lines)
	}
}

// record holds the job's bundle against what the agent says, and returns when by it the
// job was ready to start and when it started.
func (s *soak) record(id string, kind *soakKind, j *agentv1.Job, asMeant bool) (ready, started int64) {
	var file []byte
	err := s.patiently("bundle", func(ctx context.Context) error {
		res, err := s.agent.Bundle(ctx, connect.NewRequest(&agentv1.BundleRequest{Id: id}))
		if err == nil {
			file = res.Msg.GetBundle()
		}
		if connect.CodeOf(err) == connect.CodeNotFound {
			return nil
		}
		return err
	})
	if err != nil || len(file) == 0 {
		if err != nil || asMeant {
			s.t.Errorf("job %s has no bundle: %v", id, err)
		}
		s.count("without a bundle")
		return 0, 0
	}
	b, err := bundle.Parse(file)
	if err != nil {
		s.t.Errorf("job %s: %v", id, err)
		return 0, 0
	}
	st, err := bundle.ParseStatement(b.Statement)
	if err != nil {
		s.t.Errorf("job %s: %v", id, err)
		return 0, 0
	}
	s.holds(id, file, j, asMeant)
	if string(st.Outcome.State) != j.GetState() || st.Outcome.Reason != j.GetReason() {
		s.t.Errorf("job %s: the bundle says %s %s, the agent %s %s", id, st.Outcome.State, st.Outcome.Reason, j.GetState(), j.GetReason())
	}
	if !asMeant {
		return 0, 0
	}
	a, err := bundle.Decode[bundle.Alerts](b.Parts[bundle.AlertsPart])
	if err != nil || !slices.Equal(rulesOf(a), kind.alerts) || len(a.Findings) != len(kind.alerts) {
		s.t.Errorf("job %s: %v, findings %+v, want %v", id, err, a.Findings, kind.alerts)
	}
	s.work(id, kind, b)
	return stepsOf(st)
}

// table prints what happened, and holds the agent's memory against its bound.
func (s *soak) table(took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Printf("\n%-44s %10s\n", "soak", "")
	fmt.Printf("%-44s %10d\n", "jobs", s.jobs)
	fmt.Printf("%-44s %9.0fs\n", "time", took.Seconds())
	for _, k := range slices.Sorted(maps.Keys(s.counts)) {
		fmt.Printf("%-44s %10d\n", k, s.counts[k])
	}
	if len(s.memory) < 4 {
		return
	}
	// A quarter at each end, by its median: agents that were killed begin small.
	q := len(s.memory) / 4
	middle := func(m []uint64) uint64 { return slices.Sorted(slices.Values(m))[len(m)/2] }
	first, last := middle(s.memory[:q]), middle(s.memory[len(s.memory)-q:])
	fmt.Printf("%-44s %7d MiB\n%-44s %7d MiB\n%-44s %7d MiB\n", "agent's memory, first quarter", first>>20, "agent's memory, last quarter", last>>20, "agent's memory, most", slices.Max(s.memory)>>20)
	if last > first+soakMemory {
		s.t.Errorf("the agent's memory grew from %d to %d MiB", first>>20, last>>20)
	}
}
