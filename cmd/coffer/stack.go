package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/internal/doctor"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/stack"
)

// stackFlags are those of up and doctor.
func stackFlags(cmd *cobra.Command) (options func() (stack.Options, error)) {
	var bin, tools string
	var base int
	cmd.Flags().StringVar(&bin, "bin", os.Getenv(binVariable), "`folder` of coffer's binaries (default: that of this one; "+binVariable+")")
	cmd.Flags().StringVar(&tools, "tools", os.Getenv(toolVariable), "`folder` of containerd, its shim and runsc; the rest comes from PATH ("+toolVariable+")")
	cmd.Flags().IntVar(&base, "port-base", stack.DefaultPortBase, "first of four loopback `port`s: verifier, broker, node agent, issuer")
	return func() (stack.Options, error) {
		ports, err := stack.PortsFrom(base)
		if err != nil {
			return stack.Options{}, usagef(cmd, "--port-base: %s", err)
		}
		if bin == "" {
			exe, err := os.Executable()
			if err != nil {
				return stack.Options{}, fmt.Errorf("find coffer's binaries: %w; name them with --bin", err)
			}
			bin = filepath.Dir(exe)
		}
		for _, p := range []*string{&bin, &tools} {
			if *p == "" {
				continue
			}
			abs, err := filepath.Abs(*p)
			if err != nil {
				return stack.Options{}, err
			}
			*p = abs
		}
		return stack.Options{BinDir: bin, ToolsDir: tools, Ports: ports}, nil
	}
}

// steps prints one line per step: its name when it starts, the rest when it ends.
func (c *cli) steps(s stack.Step) {
	if !s.Done {
		_, _ = fmt.Fprintf(c.stdout, "  %-20s ", s.Name)
		return
	}
	outcome := "ok"
	if s.Err != nil {
		outcome = "failed"
	}
	_, _ = fmt.Fprintln(c.stdout, strings.TrimRight(fmt.Sprintf("%-6s %8s  %s", outcome, took(s.Took), s.Detail), " "))
}

func (c *cli) upCmd() *cobra.Command {
	var images []string
	var faults bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start verifier, broker and node agent on this machine, over simulated devices",
		Long: `up starts all of coffer on this machine: a software TPM, emulated SEV-SNP and
H100 devices, containerd, and verifier, broker and node agent as daemons. Its
evidence is simulated, and everything says so. State lies in --dir.

Nothing is started unless everything needed is there; if a part does not come
up, what was started is stopped again.`,
		Example: "  coffer up --image build/images/torch.tar\n  coffer up --dir /tmp/stack --port-base 17441",
		Args:    exactly(),
	}
	options := stackFlags(cmd)
	cmd.Flags().StringArrayVar(&images, "image", nil, "OCI `archive` to import; may be repeated")
	cmd.Flags().BoolVar(&faults, "faults", false, "let the emulated GPU's reports be damaged on request, for demonstrations")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		o, err := options()
		if err != nil {
			return err
		}
		o.Dir, o.Images, o.Faults, o.Progress = c.dir, images, faults, c.steps
		e, err := stack.Up(cmd.Context(), o)
		var left *stack.CleanupError
		if errors.Is(err, context.Canceled) && cmd.Context().Err() != nil && !errors.As(err, &left) {
			return &exitError{code: exitFailed, text: "interrupted; what was started has been stopped again", err: err}
		}
		if err != nil {
			return c.stackError(err)
		}
		_, err = fmt.Fprintf(c.stdout, "up in %s. Its evidence is simulated.\n  verifier  %s\n  broker    %s\n  agent     %s\n  issuer    %s\nStop it with `coffer down --dir %s`.\n", e.Dir(), e.Verifier(), e.Broker(), e.Agent(), e.Issuer(), e.Dir())
		return err
	}
	return cmd
}

// stackError shows what a person needs to see of a start that failed.
func (c *cli) stackError(err error) error {
	var pre *stack.PreflightError
	if errors.As(err, &pre) {
		if len(pre.Findings) > 1 {
			for _, f := range pre.Findings {
				_, _ = fmt.Fprintf(c.stderr, "  %-10s %s: %s\n", f.Name, f.Found, f.Advice)
			}
			return &exitError{code: exitFailed, text: "cannot start, for the reasons above; nothing was started", err: err}
		}
		return &exitError{code: exitFailed, text: err.Error() + "; nothing was started", err: err}
	}
	var d *stack.DaemonError
	if errors.As(err, &d) && d.Tail != "" {
		_, _ = fmt.Fprintf(c.stderr, "last lines of %s:\n", d.Log)
		for line := range strings.SplitSeq(d.Tail, "\n") {
			_, _ = fmt.Fprintf(c.stderr, "  %s\n", clean(line))
		}
	}
	return err
}

func (c *cli) downCmd() *cobra.Command {
	var purge bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the stack and leave no process, mount, namespace or cgroup behind",
		Long: `down stops the stack in --dir, running jobs included. State stays for the next
up: databases, keys and images. --purge removes it too, and with it every key
under which assets were sealed.`,
		Example: "  coffer down\n  coffer down --dir /tmp/stack --purge",
		Args:    exactly(),
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "remove the state folder too")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return c.stackError(stack.Down(cmd.Context(), c.dir, purge, c.steps))
	}
	return cmd
}

func (c *cli) restartCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "restart [DAEMON]...",
		Short: "Start again what has died of a stack, or the daemons named",
		Long: `restart starts again every daemon of the stack that has ended, and stops and
starts the ones named. Jobs go on meanwhile: their holders and sandboxes are
processes of their own.`,
		Example: "  coffer restart\n  coffer restart cofferd",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			done, err := stack.Restart(cmd.Context(), c.dir, args, c.steps)
			if err == nil && len(done) == 0 {
				_, err = fmt.Fprintln(c.stdout, "nothing to restart: every daemon runs")
			}
			return c.stackError(err)
		},
	}
}

func (c *cli) faultCmd() *cobra.Command {
	var bit int
	gpu := &cobra.Command{
		Use:   "gpu-report --bit N",
		Short: "Flip one bit of the next report of the emulated GPU",
		Long: `gpu-report damages the next GPU report, so that one can watch it being refused.
The stack must have been started with --faults.`,
		Example: "  coffer fault gpu-report --bit 12345",
		Args:    exactly(),
	}
	gpu.Flags().IntVar(&bit, "bit", 0, "`number` of the bit, from the report's first")
	gpu.RunE = func(cmd *cobra.Command, _ []string) error {
		if bit < 0 {
			return usagef(cmd, "--bit %d: want 0 or more", bit)
		}
		e, err := stack.OpenEndpoint(c.dir)
		if err != nil {
			return err
		}
		if _, err := emulate.Dial(e.Emulator()).Do(cmd.Context(), emulate.Request{Op: emulate.OpFlip, Bit: bit}); err != nil {
			return fmt.Errorf("fault: %w", err)
		}
		_, err = fmt.Fprintf(c.stdout, "bit %d of the next GPU report will be flipped\n", bit)
		return err
	}
	return group("fault", "Damage the evidence of the emulated machine, for demonstrations", gpu)
}

func (c *cli) doctorCmd() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check this machine: what jobs would fail on, what keeps the stack from starting, what makes it slow",
		Long: `doctor looks at the machine, and at what a node's configuration names: clock,
folders, TPM, the processor's reports, containerd, the GPUs with their driver,
verifier, broker and registries. Each finding is ok, warn or fail, and says what
to do.

The node is that of the stack in --dir if one is up. With --node it is the one of
a configuration of cofferd, and nothing of a stack is looked at.`,
		Example: "  coffer doctor\n  coffer doctor --node /etc/coffer/cofferd.json --output json",
		Args:    exactly(),
	}
	cmd.Flags().StringVar(&node, "node", "", "`FILE` with the configuration of a node's agent, cofferd")
	options := stackFlags(cmd)
	endorsements := c.folderFlag(cmd, "endorsements")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		o, err := options()
		if err != nil {
			return err
		}
		o.Dir = c.dir
		var list []stack.Finding
		lost := "jobs would fail here"
		if node != "" {
			list = stack.Machine()
		} else {
			lost = "the stack does not start here, or jobs would fail in it"
			if list, err = stack.Doctor(o); err != nil {
				return err
			}
			if node, err = stack.NodeConfig(c.dir); err != nil {
				return err
			}
		}
		if node != "" {
			config, err := doctor.ReadConfig(node)
			if err != nil {
				return err
			}
			list = append(list, doctor.Node(cmd.Context(), config, doctor.This(), endorsements())...)
		}
		failed := 0
		for _, f := range list {
			if f.Outcome == stack.Fail {
				failed++
			}
			if *out == formatJSON {
				continue
			}
			advice := ""
			if f.Advice != "" {
				advice = fmt.Sprintf("%27s%s\n", "", clean(f.Advice))
			}
			if _, err := fmt.Fprintf(c.stdout, "%-20s  %-4s %s\n%s", f.Name, f.Outcome, clean(f.Found), advice); err != nil {
				return err
			}
		}
		if *out == formatJSON {
			err = writeJSON(c.stdout, list)
		}
		if err == nil && failed > 0 {
			return &exitError{code: exitFailed, text: fmt.Sprintf("%d of %d checks failed: %s", failed, len(list), lost)}
		}
		return err
	}
	return cmd
}
