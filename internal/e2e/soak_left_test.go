package e2e

import (
	"database/sql"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	_ "modernc.org/sqlite" // the broker's database

	"github.com/coffer-run/coffer/runner/egress/netns"
)

// leftOver looks for what jobs that have ended still have on the machine, besides what
// was there before. Another stack's job has links, and numbers of file servers, too: what
// is gone a moment later is its.
func (s *soak) leftOver(before map[string][]string) {
	left := s.onMachine()
	for range 50 {
		found := 0
		for name := range left {
			left[name] = slices.DeleteFunc(left[name], func(f string) bool { return slices.Contains(before[name], f) })
			found += len(left[name])
		}
		if found == 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
		again := s.onMachine()
		for name := range left {
			left[name] = slices.DeleteFunc(left[name], func(f string) bool { return !slices.Contains(again[name], f) })
		}
	}
	for name, found := range left {
		s.mu.Lock()
		s.counts["left over: "+name] = len(found)
		s.mu.Unlock()
		if len(found) > 0 {
			s.t.Errorf("left over: %s: %v", name, found)
		}
	}
}

// onMachine lists what jobs have on the machine.
func (s *soak) onMachine() map[string][]string {
	namespaces, descriptors, mounts := s.ofProcesses()
	return map[string][]string{
		"run folders":          names(s.layout.Jobs()),
		"control groups":       s.groups(),
		"mounts":               mounts,
		"file servers":         s.fuse(),
		"network namespaces":   namespaces,
		"links and filters":    s.network(),
		"descriptors of jobs'": descriptors,
		"containers":           s.containers("containers", "ls", "-q"),
		"snapshots":            s.containers("snapshots", "--snapshotter", "overlayfs", "ls"),
		"holders":              s.holders(),
		"processes":            s.processes(),
		"values":               names(filepath.Join(s.dir, "agent", "values")),
		"leases":               s.leases(),
	}
}

func names(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		return []string{err.Error()}
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// groups are the control groups below the stack's that are a job's.
func (s *soak) groups() []string {
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup/*%s/*", "/sys/fs/cgroup%s/*"} {
		found, err := filepath.Glob(fmt.Sprintf(pattern, s.layout.Cgroup()))
		if err != nil {
			return []string{err.Error()}
		}
		for _, f := range found {
			if st, err := os.Stat(f); err == nil && st.IsDir() && len(filepath.Base(f)) >= 26 {
				out = append(out, f)
			}
		}
	}
	return out
}

// mounted returns the mount points below a prefix that a process sees, by device.
func mounted(pid, prefix string) map[string]string {
	b, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil {
		return nil // the process has ended
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], prefix) {
			out[f[2]+" "+f[4]] = f[4]
		}
	}
	return out
}

// ofProcesses are the network namespaces that the stack's processes are in or keep, what
// they have open of jobs' folders, and what is mounted there, in their own namespaces too.
func (s *soak) ofProcesses() (namespaces, descriptors, mounts []string) {
	in, open, at := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, pid := range names("/proc") {
		line, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		own := pid == strconv.Itoa(os.Getpid())
		if err != nil || !own && !strings.Contains(string(line), s.dir) && !strings.Contains(string(line), s.layout.Run) {
			continue
		}
		for m := range mounted(pid, s.layout.Jobs()) {
			at[m] = true
		}
		if own {
			continue // it has the world's
		}
		links := []string{filepath.Join("/proc", pid, "ns", "net")}
		for _, fd := range names(filepath.Join("/proc", pid, "fd")) {
			links = append(links, filepath.Join("/proc", pid, "fd", fd))
		}
		for _, l := range links {
			to, err := os.Readlink(l)
			switch {
			case err != nil:
			case strings.HasPrefix(to, "net:["):
				in[to] = true
			case strings.HasPrefix(to, s.layout.Jobs()+"/"):
				open[strings.ReplaceAll(string(line), "\x00", " ")+" has "+to] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(in)), slices.Sorted(maps.Keys(open)), slices.Sorted(maps.Keys(at))
}

// seeFUSE notes the file servers of jobs that run, by the kernel's number.
func (s *soak) seeFUSE() {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		s.t.Error(err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], s.layout.Jobs()+"/") && strings.Contains(line, " - fuse") {
			if _, minor, ok := strings.Cut(f[2], ":"); ok {
				s.servers[minor] = true
			}
		}
	}
}

// fuse are the file servers that the kernel still knows: one that is unmounted stays as
// long as anybody has a file of it. A number that is mounted elsewhere is another's.
func (s *soak) fuse() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	elsewhere := map[string]bool{}
	for _, pid := range names("/proc") {
		if _, err := strconv.Atoi(pid); err != nil {
			continue
		}
		for device, at := range mounted(pid, "/") {
			if !strings.HasPrefix(at, s.layout.Jobs()+"/") {
				minor, _, _ := strings.Cut(strings.TrimPrefix(device, "0:"), " ")
				elsewhere[minor] = true
			}
		}
	}
	return slices.DeleteFunc(names("/sys/fs/fuse/connections"), func(minor string) bool { return !s.servers[minor] || elsewhere[minor] })
}

// network are links and packet filters in the agent's namespace and in the one that
// gateways connect from. A job's own go with its namespaces.
func (s *soak) network() []string {
	var out []string
	for _, at := range []string{"/proc/self/ns/net", s.world.Uplink} {
		err := netns.Inside(at, func() error {
			links, err := netlink.LinkList()
			if err != nil {
				return err
			}
			for _, l := range links {
				out = append(out, at+" link "+l.Attrs().Name)
			}
			c, err := nftables.New()
			if err != nil {
				return err
			}
			tables, err := c.ListTables()
			if err != nil {
				return err
			}
			for _, table := range tables {
				out = append(out, fmt.Sprintf("%s table %s of family %d", at, table.Name, table.Family))
			}
			return nil
		})
		if err != nil {
			return []string{err.Error()}
		}
	}
	return out
}

// tried says that there was something to be left over.
func (s *soak) tried() {
	s.mu.Lock()
	servers := len(s.servers)
	s.mu.Unlock()
	if servers == 0 || len(s.world.Reached()) == 0 || len(s.leasesWhere("ended IS NOT NULL")) == 0 {
		s.t.Errorf("%d file servers were seen, connections %v, leases that ended %v", servers, s.world.Reached(), s.leasesWhere("ended IS NOT NULL"))
	}
}

// leases are jobs that the broker counts as holding keys.
func (s *soak) leases() []string { return s.leasesWhere("ended IS NULL") }

func (s *soak) leasesWhere(condition string) []string {
	db, err := sql.Open("sqlite", "file:"+filepath.Join(s.dir, "broker", "broker.db")+"?mode=ro&_pragma=busy_timeout(5000)")
	if err != nil {
		return []string{err.Error()}
	}
	defer db.Close()
	rows, err := db.QueryContext(s.t.Context(), "SELECT job, stop FROM leases WHERE "+condition)
	if err != nil {
		return []string{err.Error()}
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var job, stop string
		if err := rows.Scan(&job, &stop); err != nil {
			return []string{err.Error()}
		}
		out = append(out, job+" "+stop)
	}
	if err := rows.Err(); err != nil {
		return []string{err.Error()}
	}
	return out
}

// containers asks containerd for what is a job's.
func (s *soak) containers(args ...string) []string {
	out, err := ctr(s.node, args...)
	if err != nil {
		return []string{err.Error() + out}
	}
	var jobs []string
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "job-") {
			jobs = append(jobs, strings.TrimSpace(line))
		}
	}
	return jobs
}

// holders are processes that hold a job's keys and regions.
func (s *soak) holders() []string {
	var out []string
	for _, pid := range names("/proc") {
		exe, err := os.Readlink(filepath.Join("/proc", pid, "exe"))
		if err != nil || exe != filepath.Join(s.bin, "coffer-holder") {
			continue
		}
		if b, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline")); err == nil && strings.Contains(string(b), s.layout.Jobs()) {
			out = append(out, pid)
		}
	}
	return out
}

// processes are shims of the stack's containerd, and whatever was started with a folder
// of a job: runtimes, gateways.
func (s *soak) processes() []string {
	var out []string
	for _, pid := range names("/proc") {
		b, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		if err != nil {
			continue
		}
		args := strings.Split(string(b), "\x00")
		shim := strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") && slices.Contains(args, filepath.Join(filepath.Dir(s.layout.Jobs()), "containerd.sock"))
		if shim || strings.Contains(string(b), s.layout.Jobs()) {
			out = append(out, pid+" "+strings.Join(args, " "))
		}
	}
	return out
}
