// Package step runs the long steps of a build: it says what each is doing and how far it is, keeps its log, and ends its children with it.
package step

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// Beat is how often a running step says that it runs.
	Beat = 10 * time.Second
	// tailLines is how much of a failed step's log is shown: enough for a compiler's or apt's last words.
	tailLines = 30
	// maxLine bounds one shown line of a program's output.
	maxLine = 100
)

// Step is a piece of work with a name for its log and a title for people.
type Step struct {
	Name  string
	Title string
	// Do writes its output to p and returns what to say on success.
	Do func(ctx context.Context, p *Progress) (outcome string, err error)
}

// Run runs steps in turn until one fails, with each one's output in logs/NAME.log.
func Run(ctx context.Context, out io.Writer, logs string, beat time.Duration, steps []Step) error {
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return fmt.Errorf("creating the log folder: %w", err)
	}
	for i, s := range steps {
		prefix := fmt.Sprintf("[%d/%d] %s", i+1, len(steps), s.Title)
		if err := run(ctx, out, prefix, filepath.Join(logs, s.Name+".log"), beat, s.Do); err != nil {
			return err
		}
	}
	return nil
}

func run(ctx context.Context, out io.Writer, prefix, logPath string, beat time.Duration, do func(context.Context, *Progress) (string, error)) error {
	log, err := os.Create(logPath)
	if err != nil {
		return fmt.Errorf("creating a log: %w", err)
	}
	defer log.Close()
	p := &Progress{log: log}
	start := time.Now()
	type result struct {
		outcome string
		err     error
	}
	done := make(chan result, 1)
	go func() {
		outcome, err := do(ctx, p)
		done <- result{outcome, err}
	}()
	ticker := time.NewTicker(beat)
	defer ticker.Stop()
	for {
		select {
		case r := <-done:
			took := time.Since(start).Seconds()
			if r.err == nil {
				fmt.Fprintf(out, "%s: %s, %.1f s\n", prefix, r.outcome, took)
				return nil
			}
			fmt.Fprintf(out, "%s: failed after %.1f s\n", prefix, took)
			if tail := tailOf(logPath); tail != "" {
				fmt.Fprintf(out, "%s\nfull log: %s\n", tail, logPath)
			}
			return r.err
		case <-ticker.C:
			fmt.Fprintf(out, "%s: %.0f s ... %s\n", prefix, time.Since(start).Seconds(), p.describe())
		}
	}
}

func tailOf(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	var lines []string
	scanner := bufio.NewScanner(f)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		if lines = append(lines, "  | "+scanner.Text()); len(lines) > tailLines {
			lines = lines[1:]
		}
	}
	return strings.Join(lines, "\n")
}

// Progress receives a step's output. mu guards every field below it.
type Progress struct {
	log io.Writer

	mu      sync.Mutex
	partial []byte
	last    string
	unit    string
	units   int
	total   int
	isUnit  func(line string) bool
}

// Write takes a program's output; its last whole line is what the heartbeat shows.
func (p *Progress) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.partial = append(p.partial, b...)
	for {
		line, rest, found := bytes.Cut(p.partial, []byte("\n"))
		if !found {
			break
		}
		p.partial = rest
		text := strings.TrimSpace(string(line))
		if text == "" {
			continue
		}
		p.last = text
		if p.isUnit != nil && p.isUnit(text) {
			p.units++
		}
	}
	return p.log.Write(b)
}

// Expect makes the heartbeat count the output lines that isUnit accepts, of total.
func (p *Progress) Expect(total int, unit string, isUnit func(line string) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.units, p.total, p.unit, p.isUnit = 0, total, unit, isUnit
}

func (p *Progress) describe() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.total > 0 && p.units > 0 {
		return fmt.Sprintf("%d of %d %s", min(p.units, p.total), p.total, p.unit)
	}
	if r := []rune(p.last); len(r) > maxLine {
		return string(r[:maxLine]) + "..."
	}
	return p.last
}

// Command runs a program in a process group of its own, so that an interrupt ends its children too; apt, go and mmdebstrap clean up on SIGTERM.
func Command(ctx context.Context, out io.Writer, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// Cached returns the folder parent/name, filled by fill unless usable accepts what is there. The folder appears by one rename, complete;
// two runs, of two clones perhaps, do not fill it at once.
func Cached(ctx context.Context, p *Progress, parent, name string, usable func(dir string) error, fill func(dir string) error) (dir string, reused bool, err error) {
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", false, fmt.Errorf("creating the cache: %w", err)
	}
	final := filepath.Join(parent, name)
	unlock, err := lock(ctx, p, final+".lock")
	if err != nil {
		return "", false, err
	}
	defer unlock()
	if _, err := os.Stat(final); err == nil {
		why := usable(final)
		if why == nil {
			return final, true, nil
		}
		fmt.Fprintf(p, "building again: %v\n", why)
	}
	// A partial folder under a lock we hold is what an interrupted run left.
	partial := final + ".partial"
	if err := errors.Join(os.RemoveAll(partial), os.RemoveAll(final), os.Mkdir(partial, 0o755)); err != nil {
		return "", false, fmt.Errorf("clearing a place in the cache: %w", err)
	}
	if err := fill(partial); err != nil {
		return "", false, err
	}
	if err := usable(partial); err != nil {
		return "", false, fmt.Errorf("checking what was built: %w", err)
	}
	if err := os.Rename(partial, final); err != nil {
		return "", false, fmt.Errorf("keeping what was built: %w", err)
	}
	return final, false, nil
}

func lock(ctx context.Context, p *Progress, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening a cache lock: %w", err)
	}
	for waiting := false; ; waiting = true {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("taking a cache lock: %w", err)
		}
		if !waiting {
			fmt.Fprintln(p, "waiting for another run that builds the same")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
