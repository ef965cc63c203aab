// Package stack runs all of coffer on one machine: verifier, broker and node
// agent as daemons of their own, with a software TPM and emulated devices whose
// evidence is simulated and says so.
//
// Trusted: root on this machine, who can read every key under the stack's
// folder. Checked: that nothing is half started, that `down` ends only
// processes that are surely the stack's, that nobody but root may write to the
// stack's folder, and that only a folder which a stack made is purged. Not
// checked: who may rename the folders above it. Not done: keeping daemons alive; `coffer restart` does that
// on demand.
package stack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// Options say which stack to start, from what.
type Options struct {
	// Dir is where the stack keeps its state.
	Dir string
	// BinDir holds coffer's own binaries, ToolsDir containerd, its shim and
	// runsc; what is not in ToolsDir is looked for in PATH.
	BinDir   string
	ToolsDir string
	Ports    Ports
	// Images are OCI archives to import.
	Images []string
	// Faults lets a test or a demonstration make the emulated GPU report lie.
	Faults bool
	// Progress is told of every step. Nil tells nobody.
	Progress func(Step)
}

func (o Options) tools() tools { return tools{binDir: o.BinDir, toolsDir: o.ToolsDir} }

// Step is one step of starting or stopping: told once when it starts, with
// Done false, and once when it has ended.
type Step struct {
	Name   string
	Done   bool
	Took   time.Duration
	Detail string
	Err    error
}

// starter carries one `up` from step to step.
type starter struct {
	Layout
	o     Options
	tools tools
	env   []string
	rec   record
	// started are the daemons of this run, to be watched until all are ready.
	started []*running
}

type step struct {
	name string
	do   func(context.Context) (detail string, err error)
}

// Up starts the stack: every check first, then one daemon after the other. If
// anything fails or ctx ends, what was started is stopped again.
func Up(ctx context.Context, o Options) (Endpoint, error) {
	l, err := NewLayout(o.Dir)
	if err != nil {
		return Endpoint{}, err
	}
	t := o.tools()
	if err := failures(thisMachine().preflight(l, t, o.Ports)); err != nil {
		return Endpoint{}, err
	}
	for _, image := range o.Images {
		if _, err := os.Stat(image); err != nil {
			return Endpoint{}, fmt.Errorf("image archive: %w", err)
		}
	}
	if err := l.claim(); err != nil {
		return Endpoint{}, err
	}
	unlock, err := l.lock()
	if err != nil {
		return Endpoint{}, err
	}
	defer unlock()
	// Another `up` may have won the race to the lock.
	if err := failures([]Finding{l.checkUp(), checkPorts(o.Ports)}); err != nil {
		return Endpoint{}, err
	}
	if err := l.teardown(ctx, nil); err != nil {
		return Endpoint{}, fmt.Errorf("clean up after an earlier stack: %w", err)
	}
	s := &starter{Layout: l, o: o, tools: t}
	if err := s.start(ctx); err != nil {
		// What was started must go even if ctx is what ended.
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if terr := l.teardown(sctx, nil); terr != nil {
			return Endpoint{}, errors.Join(err, &CleanupError{Err: terr})
		}
		return Endpoint{}, err
	}
	return Endpoint{layout: l, ports: o.Ports}, nil
}

// CleanupError says that something of a failed start could not be stopped.
type CleanupError struct{ Err error }

func (e *CleanupError) Error() string {
	return fmt.Sprintf("stopping what was started: %v; run `coffer down`", e.Err)
}

func (e *CleanupError) Unwrap() error { return e.Err }

func (s *starter) start(ctx context.Context) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	s.rec = record{Version: recordVersion, Boot: boot}
	if err := writeJSON(s.infoFile(), info{Version: infoVersion, Ports: s.o.Ports, Bin: s.o.BinDir, Tools: s.o.ToolsDir}); err != nil {
		return err
	}
	s.env = s.environment()
	steps := []step{
		{"folders", s.folders},
		{"identities", s.identities},
		{"simulated devices", s.devices},
		{"tpm state", s.tpmState},
		{"keys", s.keys},
		{"key store", s.ownStore},
		{"people", s.people},
		{"configuration", s.configure},
		{"image store", s.mountImages},
	}
	services, err := s.services(s.tools, s.o.Ports)
	if err != nil {
		return err
	}
	kept, err := s.keptArchives()
	if err != nil {
		return err
	}
	for _, v := range services {
		// The agent starts last: it reads what the others have.
		if v.name == agentName && len(s.o.Images)+len(kept) > 0 {
			steps = append(steps, step{"images", s.importImages})
		}
		steps = append(steps, step{v.name, func(ctx context.Context) (string, error) { return s.launch(ctx, v) }})
	}
	for _, st := range steps {
		if err := tell(ctx, s.o.Progress, st); err != nil {
			return err
		}
	}
	for _, r := range s.started {
		select {
		case <-r.ended:
			return &DaemonError{Name: r.Name, Err: errors.New("it ended again"), Log: r.log, Tail: r.tail()}
		default:
		}
	}
	return nil
}

// tell runs one step and reports its start and end.
func tell(ctx context.Context, progress func(Step), st step) error {
	if progress == nil {
		progress = func(Step) {}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	progress(Step{Name: st.name})
	began := time.Now()
	detail, err := st.do(ctx)
	progress(Step{Name: st.name, Done: true, Took: time.Since(began), Detail: detail, Err: err})
	return err
}

// claim makes the stack's folder, or refuses one that holds something else.
func (l Layout) claim() error {
	if err := l.trusted(); err != nil {
		return err
	}
	entries, err := os.ReadDir(l.Dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.MkdirAll(l.Dir, 0o700)
	case err != nil:
		return err
	case len(entries) == 0:
		return os.Chmod(l.Dir, 0o700) // #nosec G302 -- a folder
	}
	if _, err := l.readInfo(); err != nil {
		var none *NoStackError
		if errors.As(err, &none) && !onlyLock(entries) {
			return fmt.Errorf("%s is not empty and holds no stack: choose another folder with --dir", l.Dir)
		}
		if !errors.As(err, &none) {
			return err
		}
	}
	return nil
}

func onlyLock(entries []fs.DirEntry) bool {
	return len(entries) == 1 && entries[0].Name() == "lock"
}

// environment is all that a daemon inherits. COFFER_STACK marks what belongs to
// the stack; TMPDIR keeps sockets and temporary files where `down` removes them.
func (l Layout) environmentWith(path string) []string {
	return []string{
		"PATH=" + path,
		"HOME=" + l.Dir,
		"LANG=C.UTF-8",
		"TMPDIR=" + l.run("tmp"),
		stackVariable + "=" + l.ID,
	}
}

func (s *starter) environment() []string {
	path := os.Getenv("PATH")
	if path == "" {
		path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	if s.o.ToolsDir != "" {
		if abs, err := filepath.Abs(s.o.ToolsDir); err == nil {
			path = abs + ":" + path
		}
	}
	return s.environmentWith(path)
}

func (s *starter) folders(context.Context) (string, error) {
	for _, d := range []string{s.path("verifier"), s.path("broker"), s.path("issuer"), s.path("agent"), s.path("containerd"), s.path("log"), s.path("config"), s.givenKeyStores(), s.run("tmp"), s.Jobs()} {
		if err := makeAll(d); err != nil {
			return "", err
		}
	}
	// Others may look up their own files below RUN, as the runtime does a job's root, not
	// list it.
	for _, d := range []string{runRoot, s.Run} {
		if err := os.Chmod(d, 0o711); err != nil { // #nosec G302 -- a folder
			return "", err
		}
	}
	return s.Dir, nil
}

// makeAll makes a folder and those above it. Another stack that goes down meanwhile takes
// runRoot away while it is empty.
func makeAll(dir string) error {
	for try := 1; ; try++ {
		err := os.MkdirAll(dir, 0o700)
		if !errors.Is(err, fs.ErrNotExist) || try == 10 {
			return err
		}
	}
}

// once makes dir with do, whole or anew: a folder without the mark was
// interrupted in the making.
func once(dir string, do func() error) error {
	mark := filepath.Join(dir, ".complete")
	if _, err := os.Stat(mark); err == nil {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	return keyfile.Write(mark, nil)
}
