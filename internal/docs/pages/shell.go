package pages

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// typing bounds one command: what waits for somebody who never comes fails.
const typing = 2 * time.Minute

// Shell types commands of documents with bash, each in a shell of its own, as a
// reader would who is in one folder and has one set of variables. Who types is
// root already: sudo is left away.
type Shell struct {
	// Dir is the folder that commands are typed in.
	Dir string
	// Env is the environment, in which Path stands before what PATH has.
	Env  []string
	Path string
	// Here puts what this machine has in the place of what a page names: folders,
	// names of assets, placeholders.
	Here *strings.Replacer
	// Vars are the shell's variables. A command that begins with NAME= sets one.
	Vars map[string]string
	// Within, if it is not empty, is a program that runs the shell, as ssh-agent does.
	Within []string

	t      testing.TB
	script *Script
}

// NewShell makes a shell for what a test has to type. Programs are those of the
// folder bin.
func NewShell(t testing.TB, s *Script, bin string) *Shell {
	return &Shell{Dir: t.TempDir(), Env: os.Environ(), Path: bin, Here: strings.NewReplacer(), Vars: map[string]string{}, t: t, script: s}
}

var assignment = regexp.MustCompile(`^([A-Z]+)=`)

// Running is a command that has been typed and may not have ended.
type Running struct {
	shell *Shell
	c     Command
	cmd   *exec.Cmd
	stop  context.CancelFunc
	ctx   context.Context
	out   output
	// set is the file that has the variable which the command sets.
	set string
	// ended is closed when the command has ended, and err is how.
	ended chan struct{}
	err   error
}

// output is what a command has printed so far.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

// Start types a command, and does not wait for its end. Somebody must call End.
func (s *Shell) Start(c Command) *Running {
	s.t.Helper()
	r := &Running{shell: s, c: c, ended: make(chan struct{})}
	// A test's own context ends before its cleanup, which may end what was started.
	r.ctx, r.stop = context.WithTimeout(context.WithoutCancel(s.t.Context()), typing)
	text := s.Here.Replace(c.Text)
	if m := assignment.FindStringSubmatch(c.Text); m != nil {
		r.set = filepath.Join(s.t.TempDir(), m[1])
		text += "\nprintf %s \"$" + m[1] + "\" > '" + r.set + "'"
	}
	args := append(slices.Clone(s.Within), "bash", "-euo", "pipefail", "-c", "sudo() { \"$@\"; }\n"+text)
	r.cmd = exec.CommandContext(r.ctx, args[0], args[1:]...)
	r.cmd.Dir, r.cmd.Stdout, r.cmd.Stderr, r.cmd.WaitDelay = s.Dir, &r.out, &r.out, 5*time.Second
	// What is typed gets Ctrl-C by its group, as from a terminal.
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r.cmd.Env = append(slices.Clone(s.Env), "PATH="+s.Path+":"+os.Getenv("PATH"))
	for name, value := range s.Vars {
		r.cmd.Env = append(r.cmd.Env, name+"="+value)
	}
	if err := r.cmd.Start(); err != nil {
		r.stop()
		s.t.Fatalf("%s: %q: %v", c.At(), c.Text, err)
	}
	go func() {
		r.err = r.cmd.Wait()
		close(r.ended)
	}()
	s.script.Typed(c)
	return r
}

// Says waits until a command has printed what a pattern matches, and returns the
// match and its groups.
func (r *Running) Says(pattern string) []string {
	r.shell.t.Helper()
	for form := regexp.MustCompile(pattern); ; time.Sleep(5 * time.Millisecond) {
		over := false
		select {
		case <-r.ended:
			over = true
		default:
		}
		r.out.mu.Lock()
		text := r.out.text.String()
		r.out.mu.Unlock()
		if m := form.FindStringSubmatch(text); m != nil {
			return m
		}
		if over {
			r.shell.t.Fatalf("%s: %q does not say %q: %s", r.c.At(), r.c.Text, pattern, text)
		}
	}
}

// Interrupt is Ctrl-C.
func (r *Running) Interrupt() {
	r.shell.t.Helper()
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGINT); err != nil {
		r.shell.t.Errorf("%s: %q: interrupt: %v", r.c.At(), r.c.Text, err)
	}
}

// End waits for the end of a command, and returns what it has printed and its exit
// code, -1 after a signal.
func (r *Running) End() (out string, code int) {
	t := r.shell.t
	t.Helper()
	defer r.stop()
	<-r.ended
	err := r.err
	out = r.out.text.String()
	var exit *exec.ExitError
	switch {
	case r.ctx.Err() != nil:
		t.Fatalf("%s: %q has not ended after %s:\n%s", r.c.At(), r.c.Text, typing, out)
	case errors.As(err, &exit):
		return out, exit.ExitCode()
	case err != nil:
		t.Fatalf("%s: %q: %v", r.c.At(), r.c.Text, err)
	}
	if r.set != "" {
		b, err := os.ReadFile(r.set)
		if err != nil {
			t.Fatalf("%s: %q: %v", r.c.At(), r.c.Text, err)
		}
		name, _, _ := strings.Cut(r.c.Text, "=")
		r.shell.Vars[name] = string(b)
	}
	return out, 0
}

// Type types a command, and returns what it printed and its exit code.
func (s *Shell) Type(c Command) (out string, code int) {
	s.t.Helper()
	return s.Start(c).End()
}

// Must types a command that ends with an exit code and prints what a pattern matches.
func (s *Shell) Must(c Command, code int, says string) string {
	s.t.Helper()
	out, got := s.Type(c)
	if got != code || !regexp.MustCompile("(?m)"+says).MatchString(out) {
		s.t.Fatalf("%s: %q: exit code %d, want %d and %q:\n%s", c.At(), c.Text, got, code, says, out)
	}
	return out
}
