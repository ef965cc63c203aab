// Command coffer is the command line of coffer for everyone who uses it: it
// starts a stack, seals assets and grants their use, and submits and follows
// jobs. It is trusted with a data key while it seals, and with the token and the
// signing keys of whoever runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/printable"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
)

func main() { daemon.Main(run) }

// Exit codes, part of the interface of the command.
const (
	exitFailed   = 1
	exitUsage    = 2
	exitRefused  = 3
	exitUnknown  = 4
	dirVariable  = "COFFER_DIR"
	binVariable  = "COFFER_BIN"
	toolVariable = "COFFER_TOOLS"
)

// exitError is an error with an exit code. Its text is empty if everything was
// said already.
type exitError struct {
	code int
	text string
	err  error
}

func (e *exitError) Error() string { return e.text }
func (e *exitError) Unwrap() error { return e.err }

// ExitCode is read by daemon.Main.
func (e *exitError) ExitCode() int { return e.code }

func usagef(cmd *cobra.Command, format string, args ...any) error {
	return &exitError{code: exitUsage, text: fmt.Sprintf(format, args...) + "; see `" + cmd.CommandPath() + " --help`"}
}

// cli is one run of the command.
type cli struct {
	stdin io.Reader
	// What is written to them is printable; raw has what is behind them.
	stdout, stderr io.Writer
	dir            string
	// user is the signed-in person to act for, "" for who signed in last.
	user string
	// clients are closed at the end, so that servers need not wait for them.
	clients []*http.Client
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	c := &cli{stdin: stdin, stdout: printable.NewWriter(stdout), stderr: printable.NewWriter(stderr)}
	root := c.root() //nolint:contextcheck // commands take the context from ExecuteContext
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(c.stdout)
	root.SetErr(c.stderr)
	err := root.ExecuteContext(ctx)
	for _, h := range c.clients {
		h.CloseIdleConnections()
	}
	var coded *exitError
	if err == nil || errors.As(err, &coded) {
		return err
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return &exitError{code: exitUnknown, text: "interrupted", err: err}
	}
	return &exitError{code: exitFailed, text: err.Error(), err: err}
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "coffer",
		Short: "Run training jobs whose weights, data and checkpoints stay sealed to everyone but an attested job",
		Long: `coffer runs training jobs on confidential machines: weights, data and
checkpoints stay sealed to everyone but an attested job.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused or waiting at a gate,
4 could not tell.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				return usagef(cmd, "unknown command %q: did you mean %s?", args[0], strings.Join(s, " or "))
			}
			return usagef(cmd, "unknown command %q", args[0])
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SuggestionsMinimumDistance = 2
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usagef(cmd, "%s", err) })
	dir := os.Getenv(dirVariable)
	if dir == "" {
		dir = stack.DefaultDir
	}
	root.PersistentFlags().StringVar(&c.dir, "dir", dir, "folder of the stack; "+dirVariable+" sets the default")
	root.PersistentFlags().StringVar(&c.user, "user", os.Getenv(userVariable), "signed-in `person` to act for at the broker (default: who signed in last); "+userVariable+" sets the default")
	root.AddCommand(
		c.loginCmd(), c.logoutCmd(), c.whoamiCmd(), c.accessCmd(),
		c.upCmd(), c.downCmd(), c.restartCmd(), c.doctorCmd(), c.faultCmd(),
		c.sealCmd(), c.assetsCmd(), c.grantCmd(), c.grantsCmd(), c.revokeCmd(),
		c.initCmd(), c.validateCmd(), c.explainCmd(),
		c.planCmd(), c.submitCmd(), c.watchCmd(), c.retryCmd(), c.psCmd(), c.statusCmd(), c.whyCmd(), c.eventsCmd(), c.logsCmd(), c.cancelCmd(), c.checkpointsCmd(), c.evidenceCmd(), c.egressCmd(),
		c.imageCmd(), c.endorsementsCmd(), c.policyCmd(), c.logCmd(), c.logkeyCmd(),
		c.completionCmd(), c.versionCmd(),
	)
	c.everyCommandSpeaksJSON(root)
	return root
}

// exactly wants one argument for each name.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef(cmd, "%s is missing", names[len(args)])
		case len(args) > len(names):
			return usagef(cmd, "unexpected argument %q", args[len(names)])
		}
		return nil
	}
}

// group is a command that only has others below it.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{
		Use:   use,
		Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef(cmd, "say what to do with %s", use)
		},
	}
	g.AddCommand(sub...)
	return g
}

func (c *cli) completionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print the completion script of bash, zsh or fish",
		Long: `completion prints a script that lets a shell complete commands, flags and fields of
the job file.`,
		Example:   "  coffer completion bash > /etc/bash_completion.d/coffer\n  coffer completion zsh > ~/.zfunc/_coffer",
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args:      exactly("a shell"),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(raw(c.stdout), true)
			case "zsh":
				return cmd.Root().GenZshCompletion(raw(c.stdout))
			case "fish":
				return cmd.Root().GenFishCompletion(raw(c.stdout), true)
			}
			return usagef(cmd, "no completion for %.40q: want bash, zsh or fish", args[0])
		},
	}
}

func (c *cli) versionCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Say which build this is",
		Example: "  coffer version",
		Args:    exactly(),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		version, revision := "unknown", ""
		if bi, ok := debug.ReadBuildInfo(); ok {
			version = bi.Main.Version
			for _, s := range bi.Settings {
				if s.Key == "vcs.revision" {
					revision = s.Value
				}
			}
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, map[string]string{"version": version, "revision": revision})
		}
		_, err := fmt.Fprintln(c.stdout, strings.TrimRight("coffer "+version+" "+revision, " "))
		return err
	}
	return cmd
}
