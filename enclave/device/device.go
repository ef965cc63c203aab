// Package device takes a machine's GPUs from one job to the next: cleared before
// and after, prepared before anyone may use them, ready only when evidence was
// verified.
//
// Trusted: the driver behind Driver. Checked: the order, that the driver has what
// it was told, and that a GPU which was not cleared goes to no job. Not checked:
// whether what the driver says is true; that is what the GPU's evidence is for.
package device

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/coffer-run/coffer/attest/receipt"
)

// Mode is the state of confidential computing on the machine's GPUs.
type Mode string

// Modes in which there is a way for a job's data. Every other one refuses.
const (
	On  Mode = "on"
	Off Mode = "off"
)

// Path is how a job's program brings memory to a GPU.
type Path string

const (
	// Registered: the program registers its inputs' memory with the driver, which
	// then copies from where it lies. Regions are aligned to pages and locked, as
	// cudaHostRegister asks; they are read-only, so the flag for that is needed.
	Registered Path = "registered"
	// Staged: memory of the program's own cannot be registered. It copies through
	// memory that the driver allocates, and the driver encrypts on the way.
	Staged Path = "staged"
)

// PathOf is the path that a mode leaves.
func PathOf(m Mode) (Path, error) {
	switch m {
	case On:
		return Staged, nil
	case Off:
		return Registered, nil
	default:
		return "", fmt.Errorf("confidential computing is %.40q: want on or off", m)
	}
}

// Settings are what a machine's driver is told before a job's GPUs are ready.
type Settings struct {
	// UnprotectedBytes of each GPU's memory are for staged copies.
	UnprotectedBytes int64
	// AttackerAdvantage is the exponent of two at which the driver changes the keys
	// of its copies: an attacker's advantage stays below that.
	AttackerAdvantage uint64
}

// Defaults leave room for several copies at a time, and change keys earlier than
// the driver does by itself, which is at 2^60 (nvml.h).
var Defaults = Settings{UnprotectedBytes: 1 << 30, AttackerAdvantage: 58}

// State is how driver and GPUs stand, as the driver says.
type State struct {
	Mode  Mode
	Ready bool
	// Driver is the version of the driver that runs.
	Driver string
	// AttackerAdvantage is 0 where the driver does not say.
	AttackerAdvantage uint64
	GPUs              []GPU
}

// GPU is what one of them holds, in bytes.
type GPU struct {
	UUID             string
	UsedBytes        int64
	ProtectedBytes   int64
	UnprotectedBytes int64
	Processes        int
	// NearNode is 1 more than the number of the memory node near to it; 0: none is.
	NearNode int
	// Faults counts the GPU's critical errors (XID) since the driver is listened to,
	// and LastFault is the number of the newest.
	Faults, LastFault uint64
}

// Driver is what a GPU plugin does. State answers for each of uuids, in order.
// Prepare MUST fail while GPUs are ready, Clear while somebody uses one.
type Driver interface {
	State(ctx context.Context, uuids []string) (State, error)
	Prepare(ctx context.Context, uuids []string, s Settings) error
	SetReady(ctx context.Context, ready bool) error
	Clear(ctx context.Context, uuids []string) error
}

// Machine has all GPUs of a machine. The driver knows one ready state for all of
// them.
type Machine struct {
	drv Driver
	all []string
	set Settings

	// mu is held over calls of the driver, and guards what follows.
	mu sync.Mutex
	// ready counts the uses that are.
	ready int
	// used and clean are of GPUs: in a job's hands, and cleared since.
	used, clean map[string]bool
}

// New returns the machine with the GPUs all, of which none is taken to be clear.
func New(drv Driver, all []string, set Settings) *Machine {
	return &Machine{drv: drv, all: slices.Clone(all), set: set, used: map[string]bool{}, clean: map[string]bool{}}
}

// Use is one job's use of its GPUs. Its methods are for one goroutine.
type Use struct {
	m     *Machine
	uuids []string
	path  Path
	near  int
	ready bool
	over  bool
	// Launch and End are what the driver said when the job could begin, and after
	// its GPUs were cleared. nil: it was not so far.
	Launch, End *State
	// Cleared: nothing of the job is left on its GPUs.
	Cleared bool
}

// Begin takes GPUs for a job: clears those that were not, and has the driver
// prepared. Nobody may use them before Ready.
func (m *Machine) Begin(ctx context.Context, uuids []string) (*Use, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.free(uuids); err != nil {
		return nil, err
	}
	for _, u := range uuids {
		if m.clean[u] {
			continue
		}
		if err := m.drv.Clear(ctx, []string{u}); err != nil {
			return nil, fmt.Errorf("clear GPU %s before a job: %w", u, err)
		}
		m.clean[u] = true
	}
	st, err := m.drv.State(ctx, uuids)
	if err != nil {
		return nil, err
	}
	path, err := PathOf(st.Mode)
	if err != nil {
		return nil, err
	}
	if st.Mode == On {
		if m.ready == 0 {
			// For all of them: while one job has its GPUs the driver takes no settings.
			if err := errors.Join(m.drv.SetReady(ctx, false), m.drv.Prepare(ctx, m.all, m.set)); err != nil {
				return nil, fmt.Errorf("prepare GPUs: %w", err)
			}
		}
		if st, err = m.drv.State(ctx, uuids); err != nil {
			return nil, err
		}
		if err := m.prepared(st); err != nil {
			return nil, err
		}
	}
	for _, u := range uuids {
		m.used[u], m.clean[u] = true, false
	}
	return &Use{m: m, uuids: slices.Clone(uuids), path: path, near: Near(st.GPUs)}, nil
}

// Near is where all of gpus are near to: 1 more than the number of the memory node,
// or 0.
func Near(gpus []GPU) int {
	if len(gpus) == 0 {
		return 0
	}
	for _, g := range gpus[1:] {
		if g.NearNode != gpus[0].NearNode {
			return 0
		}
	}
	return gpus[0].NearNode
}

// Resume takes GPUs that a job has already, from before a restart.
func (m *Machine) Resume(uuids []string) (*Use, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.free(uuids); err != nil {
		return nil, err
	}
	for _, u := range uuids {
		m.used[u] = true
	}
	return &Use{m: m, uuids: slices.Clone(uuids)}, nil
}

// free is called with m.mu held.
func (m *Machine) free(uuids []string) error {
	if len(uuids) == 0 {
		return errors.New("no GPU is named")
	}
	for i, u := range uuids {
		if !slices.Contains(m.all, u) || slices.Contains(uuids[:i], u) {
			return fmt.Errorf("GPU %.80q is none of this machine's, or named twice", u)
		}
		if m.used[u] {
			return fmt.Errorf("GPU %s is in use", u)
		}
	}
	return nil
}

// prepared holds what the driver says against what it was told.
func (m *Machine) prepared(st State) error {
	if st.AttackerAdvantage == 0 || st.AttackerAdvantage > m.set.AttackerAdvantage {
		return fmt.Errorf("the driver changes keys at 2^%d, want at most 2^%d", st.AttackerAdvantage, m.set.AttackerAdvantage)
	}
	for _, g := range st.GPUs {
		if g.UnprotectedBytes < m.set.UnprotectedBytes {
			return fmt.Errorf("GPU %s has %d bytes for staged copies, want %d", g.UUID, g.UnprotectedBytes, m.set.UnprotectedBytes)
		}
	}
	return nil
}

// Path is how the job's program brings memory to its GPUs; empty if the use was
// resumed.
func (u *Use) Path() Path { return u.path }

// NearNode is 1 more than the number of the memory node that is near to all of the
// job's GPUs; 0: none is, or nobody knows.
func (u *Use) NearNode() int { return u.near }

// Ready lets the job use its GPUs. Only a signature that was checked makes a
// Verified; it panics on the zero value, as Verified's own methods do.
func (u *Use) Ready(ctx context.Context, v receipt.Verified) error {
	_ = v.Token()
	if u.ready || u.over {
		return errors.New("set GPUs ready: they are, or the job is over")
	}
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	if err := u.m.drv.SetReady(ctx, true); err != nil {
		return fmt.Errorf("set GPUs ready: %w", err)
	}
	u.ready = true
	u.m.ready++
	st, err := u.m.drv.State(ctx, u.uuids)
	if err != nil {
		return err
	}
	u.Launch = &st
	if st.Mode == On {
		return u.m.prepared(st)
	}
	return nil
}

// Finish takes the GPUs back: not ready if no other job's are, and cleared. If
// they cannot be cleared now they are before their next job, or there is none. A
// second call does nothing.
func (u *Use) Finish(ctx context.Context) error {
	if u.over {
		return nil
	}
	u.over = true
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	var errs []error
	if u.ready {
		if u.m.ready--; u.m.ready == 0 {
			if err := u.m.drv.SetReady(ctx, false); err != nil {
				errs = append(errs, fmt.Errorf("set GPUs not ready: %w", err))
			}
		}
	}
	if err := u.m.drv.Clear(ctx, u.uuids); err != nil {
		errs = append(errs, fmt.Errorf("clear GPUs after a job: %w", err))
	} else {
		u.Cleared = true
	}
	for _, g := range u.uuids {
		delete(u.m.used, g)
		u.m.clean[g] = u.Cleared
	}
	if st, err := u.m.drv.State(ctx, u.uuids); err != nil {
		errs = append(errs, err)
	} else {
		u.End = &st
	}
	return errors.Join(errs...)
}
