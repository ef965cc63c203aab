package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/logs"
)

// maxSealedLog bounds a sealed log that is read into memory, in bytes: twice the
// largest budget, and what surrounds it.
const maxSealedLog = 1 << 30

func (c *cli) logkeyCmd() *cobra.Command {
	return group("logkey", "Make keys to which kept logs are sealed, and read such logs", c.logkeyCreateCmd(), c.logkeyReadCmd())
}

func (c *cli) logkeyCreateCmd() *cobra.Command {
	var kind string
	cmd := &cobra.Command{
		Use:   "create FILE",
		Short: "Write a new private key and print its public key",
		Long: `create writes a private key that only you can read, and prints the public key for
output.logKey of a job file. What such a job prints is then kept sealed to you.`,
		Example: "  coffer logkey create ~/coffer-logs.key",
		Args:    exactly("a file"),
	}
	cmd.Flags().StringVar(&kind, "kind", "mlkem768x25519", "`kind` of key: mlkem768x25519 or x25519")
	out := outputFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		k, err := logs.GenerateKey(kind)
		if err != nil {
			return &exitError{code: exitUsage, text: err.Error(), err: err}
		}
		b, err := k.Encode()
		if err != nil {
			return err
		}
		defer clear(b)
		if _, err := os.Lstat(args[0]); err == nil {
			return &exitError{code: exitUsage, text: args[0] + " exists: name another file"}
		}
		if err := keyfile.Write(args[0], b); err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, map[string]string{"publicKey": k.Public()})
		}
		_, err = fmt.Fprintln(c.stdout, k.Public())
		return err
	}
	return cmd
}

func (c *cli) logkeyReadCmd() *cobra.Command {
	var key string
	cmd := &cobra.Command{
		Use:     "read JOB --key FILE",
		Short:   "Print a log that is sealed to a key",
		Example: "  coffer logkey read 01JD3V8Q --key ~/coffer-logs.key",
		Args:    exactly("a job id"),
	}
	cmd.Flags().StringVar(&key, "key", "", "`file` with the private key")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if key == "" {
			return usagef(cmd, "name the private key with --key")
		}
		text, err := keyfile.Read(key)
		if err != nil {
			return err
		}
		defer clear(text)
		private, err := logs.ParsePrivateKey(text)
		if err != nil {
			return &exitError{code: exitUsage, text: key + ": " + err.Error(), err: err}
		}
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		doing := "read the log of job " + args[0]
		s, err := a.Logs(cmd.Context(), connect.NewRequest(&agentv1.LogsRequest{Id: args[0]}))
		if err != nil {
			return c.explain(doing, serverAgent, err)
		}
		defer func() { _ = s.Close() }()
		to := map[string]io.Writer{logs.Stdout: logTo(c.stdout), logs.Stderr: logTo(c.stderr)}
		show := func(e logs.Entry) error {
			w := to[e.Stream]
			if w == nil {
				return fmt.Errorf("%s: unknown stream %.20q", doing, e.Stream)
			}
			_, err := w.Write(e.Data)
			return err
		}
		var segments [][]byte
		last, size := int32(-1), 0
		for s.Receive() {
			m := s.Msg()
			// The agent still has the lines of a job that it remembers.
			if l := m.GetLog(); l != nil {
				if err := show(logs.Entry{Stream: l.GetStream(), Data: l.GetData()}); err != nil {
					return err
				}
				continue
			}
			if size += len(m.GetSealed()); size > maxSealedLog {
				return fmt.Errorf("%s: it has more than %d bytes", doing, maxSealedLog)
			}
			if m.GetSegment() != last || len(segments) == 0 {
				segments, last = append(segments, nil), m.GetSegment()
			}
			segments[len(segments)-1] = append(segments[len(segments)-1], m.GetSealed()...)
		}
		if err := s.Err(); err != nil {
			return c.explain(doing, serverAgent, err)
		}
		if len(segments) == 0 {
			return nil
		}
		err = logs.OpenSealed(args[0], private, segments, show)
		if errors.Is(err, logs.ErrCut) {
			return &exitError{code: exitFailed, text: doing + ": " + err.Error(), err: err}
		}
		return err
	}
	return cmd
}
