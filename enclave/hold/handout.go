package hold

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// maxHandoutConns bounds the connections of a job's programs.
const maxHandoutConns = 64

// handout gives the job's own programs read-only descriptors of its regions
// (docs/formats/regions.md). Whoever may reach the socket and is not in this
// process's control group, which is the job's, is refused.
type handout struct {
	l   *net.UnixListener
	log *slog.Logger
	// wait returns an error while the gate is shut, for a container that has not
	// started.
	wait func(done <-chan struct{}) error

	wg sync.WaitGroup
	mu sync.Mutex
	// files are by path below inputs/; conns are open. over: the job is.
	files map[string]*residentFile
	conns map[*net.UnixConn]bool
	over  bool
}

func listenHandout(path string, wait func(<-chan struct{}) error, log *slog.Logger) (*handout, error) {
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("hand out regions: %w", err)
	}
	// The job's user may connect. Nobody else comes through the run folder.
	if err := os.Chmod(path, 0o666); err != nil { // #nosec G302 -- as it says
		_ = l.Close()
		return nil, fmt.Errorf("hand out regions: %w", err)
	}
	h := &handout{l: l, log: log, wait: wait, files: map[string]*residentFile{}, conns: map[*net.UnixConn]bool{}}
	h.wg.Go(h.accept)
	return h, nil
}

// add makes a file known by its path below inputs/.
func (h *handout) add(path string, f *residentFile) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.files[path] = f
}

// close ends all connections. Descriptors that were handed out stay with whom
// they were given to, and read zeros once the region is scrubbed.
func (h *handout) close() error {
	h.mu.Lock()
	h.over = true
	err := h.l.Close()
	for c := range h.conns {
		_ = c.Close()
	}
	h.mu.Unlock()
	h.wg.Wait()
	return err
}

func (h *handout) accept() {
	for {
		c, err := h.l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				h.log.Error("regions are no longer handed out", "error", err)
			}
			return
		}
		if err := h.admit(c); err != nil {
			h.log.Warn("region was not handed out", "error", err)
			_ = c.Close()
			continue
		}
		h.wg.Go(func() {
			defer func() {
				h.mu.Lock()
				defer h.mu.Unlock()
				delete(h.conns, c)
				_ = c.Close()
			}()
			h.serve(c)
		})
	}
}

func (h *handout) admit(c *net.UnixConn) error {
	cred, err := peer(c)
	if err != nil {
		return err
	}
	group, err := controlGroup(int(cred.Pid))
	if err != nil {
		return err
	}
	// Asked each time: the agent moves the holder to its group after it has begun.
	own, err := controlGroup(os.Getpid())
	if err != nil {
		return err
	}
	if group != own {
		return fmt.Errorf("process %d is not of this job", cred.Pid)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.over || len(h.conns) == maxHandoutConns {
		return errors.New("too many connections, or the job is over")
	}
	h.conns[c] = true
	return nil
}

func (h *handout) serve(c *net.UnixConn) {
	buf := make([]byte, holdapi.MaxRegionRequest)
	for {
		// Descriptors from a job are nobody's to use.
		n, _, err := holdapi.Receive(c, buf, 0)
		if err != nil {
			return
		}
		res, fd := h.answer(buf[:n])
		b, err := json.Marshal(res)
		if err == nil {
			var rights []byte
			if fd >= 0 {
				rights = unix.UnixRights(fd)
			}
			_, _, err = c.WriteMsgUnix(b, rights, nil)
		}
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		if err != nil {
			return
		}
	}
}

// answer returns a descriptor that the caller closes, or -1.
func (h *handout) answer(b []byte) (holdapi.RegionReply, int) {
	refuse := func(why string) (holdapi.RegionReply, int) { return holdapi.RegionReply{Error: why}, -1 }
	var q holdapi.RegionRequest
	if err := plan.Decode(b, holdapi.MaxRegionRequest, &q); err != nil || q.Version != holdapi.RegionsVersion {
		return refuse("not a request of " + holdapi.RegionsVersion)
	}
	if err := h.wait(nil); err != nil {
		return refuse("the job has not started, or is over")
	}
	h.mu.Lock()
	f := h.files[q.Open]
	h.mu.Unlock()
	if f == nil {
		return refuse("no file of this name lies in memory: read it by its path, if it is there")
	}
	r, err := f.wait(nil)
	if err != nil {
		return refuse("the file could not be opened")
	}
	// Who waited may do so no longer.
	if err := h.wait(nil); err != nil {
		return refuse("the job is over")
	}
	fd, err := r.ReadOnlyFD()
	if err != nil {
		h.log.WarnContext(context.Background(), "region was not handed out", "error", err)
		return refuse("the file is gone")
	}
	return holdapi.RegionReply{Size: r.Size()}, fd
}

// controlGroup is where a process stands: in the hierarchy that accounts memory,
// or in the only one there is (cgroups(7)).
func controlGroup(pid int) (string, error) {
	if pid <= 0 {
		return "", errors.New("no process")
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return "", fmt.Errorf("control group of process %d: %w", pid, err)
	}
	unified := ""
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		if slices.Contains(strings.Split(f[1], ","), "memory") {
			return f[2], nil
		}
		if f[0] == "0" && f[1] == "" {
			unified = f[2]
		}
	}
	if unified == "" {
		return "", fmt.Errorf("process %d is in no control group", pid)
	}
	return unified, nil
}
