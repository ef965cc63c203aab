package sandbox

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What the machine sees of a job: no process of it is the machine's root, none is in the
// machine's namespaces, and none has rights beyond those over its own two users' files.
func processesOf(t *testing.T, j *job) {
	t.Helper()
	f, err := OpenCgroup(JobCgroup(testCgroup, j.job)).Procs()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(string(b))
	if len(pids) < 2 {
		t.Fatalf("the job has processes %v: want the sandbox and the one that opens its files, at least", pids)
	}
	// CAP_CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SYS_CHROOT and SYS_PTRACE, as of
	// capability.h, and what runsc's gofer has beside: KILL, SETGID, SETUID and MKNOD.
	kernel, gofer := uint64(0x8001f), uint64(0x400df)
	roles := map[string]int{}
	for _, pid := range pids {
		at := fmt.Sprintf("/proc/%s/", pid)
		cmdline, err := os.ReadFile(at + "cmdline")
		if err != nil {
			t.Fatal(err)
		}
		role, _, _ := strings.Cut(string(cmdline), "\x00")
		roles[role]++
		allowed := kernel
		if strings.HasPrefix(role, "runsc-gofer") {
			allowed = gofer
		}
		st := statusOf(t, at)
		for _, of := range []struct{ field, as string }{{"Uid", strconv.Itoa(RootUID)}, {"Gid", strconv.Itoa(RootGID)}} {
			for _, id := range strings.Fields(st[of.field]) {
				if id != of.as {
					t.Errorf("%s has %s %s, want %s only", role, of.field, st[of.field], of.as)
				}
			}
		}
		for _, field := range []string{"CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if caps, err := strconv.ParseUint(st[field], 16, 64); err != nil || caps&^allowed != 0 {
				t.Errorf("%s has capabilities %s %s, want none but %x", role, field, st[field], allowed)
			}
		}
		if st["NoNewPrivs"] != "1" || st["Seccomp"] != "2" || st["Groups"] != "" {
			t.Errorf("%s has NoNewPrivs %q, Seccomp %q, groups %q: want 1, 2 and none", role, st["NoNewPrivs"], st["Seccomp"], st["Groups"])
		}
		for name, id := range map[string]int{"uid_map": UID, "gid_map": GID} {
			b, err := os.ReadFile(at + name)
			if want := fmt.Sprintf("0 %d 1 %d %d 1", RootUID, id, id); err != nil || strings.Join(strings.Fields(string(b)), " ") != want {
				t.Errorf("%s has %s %q, %v, want %q", role, name, b, err, want)
			}
		}
		for _, ns := range []string{"user", "mnt", "pid", "net", "ipc", "uts"} {
			mine, theirs := inode(t, "/proc/self/ns/"+ns), inode(t, at+"ns/"+ns)
			if mine == theirs {
				t.Errorf("%s is in the machine's %s namespace", role, ns)
			}
		}
	}
	t.Log(roles)
}

func statusOf(t *testing.T, at string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(at, "status"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.TrimSpace(value)
	}
	return out
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestMountPointsStayInTheRoot(t *testing.T) {
	for _, tt := range []struct {
		name, link, to, at string
		dir                bool
		made               string // below the root
	}{
		{name: "a folder that is missing", at: "/a/b", dir: true, made: "a/b"},
		{name: "a file that is missing", at: "/a/b.so", made: "a/b.so"},
		{name: "an absolute link of the image's", link: "run", to: "/var/run", at: "/run/coffer", dir: true, made: "var/run/coffer"},
		{name: "a link out of the image", link: "inputs", to: "../../../../out", at: "/inputs/w", dir: true, made: "out/w"},
		{name: "an absolute link out of the image", link: "inputs", to: "OUTSIDE", at: "/inputs/w", dir: true},
		{name: "a link in the place of the file", link: "b.so", to: "OUTSIDE/evil", at: "/b.so"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root, outside := t.TempDir(), t.TempDir()
			if tt.link != "" {
				if err := os.Symlink(strings.ReplaceAll(tt.to, "OUTSIDE", outside), filepath.Join(root, tt.link)); err != nil {
					t.Fatal(err)
				}
			}
			if tt.made == "" {
				tt.made = filepath.Join(outside, strings.TrimPrefix(tt.at, "/"+tt.link))
				if !tt.dir {
					tt.made = filepath.Join(outside, "evil")
				}
			}
			for range 2 { // what is there already is no error
				if err := makeMountPoint(root, tt.at, tt.dir); err != nil {
					t.Fatal(err)
				}
			}
			fi, err := os.Lstat(filepath.Join(root, tt.made))
			if err != nil || fi.IsDir() != tt.dir {
				t.Errorf("%s below the root: %v, %v", tt.made, fi, err)
			}
			if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
				t.Errorf("outside of the root there is %v, %v", left, err)
			}
		})
	}
}

func pathsOf(t *testing.T, paths []string) string {
	t.Helper()
	b, err := json.Marshal(paths)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
