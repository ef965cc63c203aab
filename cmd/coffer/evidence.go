package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/facts"
	"github.com/coffer-run/coffer/attest/printable"
	"github.com/coffer-run/coffer/attest/statement"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

func (c *cli) evidenceCmd() *cobra.Command {
	return group("evidence", "Fetch, read, verify and compare evidence of jobs",
		c.evidenceGet(), c.evidenceShow(), c.evidenceVerify(), c.evidenceDiff(), c.evidenceReport(), c.evidenceExport())
}

// asFlag is whose identity asks the agent for a bundle.
func asFlag(cmd *cobra.Command) *string {
	as := daemon.RoleEngineer
	cmd.Flags().StringVar(&as, "as", as, "`role` that asks: engineer or auditor")
	return &as
}

// plainOutputFlag is --output for commands whose -o names a file.
func plainOutputFlag(cmd *cobra.Command) *format {
	f := formatText
	cmd.Flags().Var(&f, "output", "`text` or json")
	return &f
}

func (c *cli) evidenceGet() *cobra.Command {
	var file string
	get := &cobra.Command{
		Use:   "get JOB --file FILE",
		Short: "Fetch the evidence bundle of a job that has ended",
		Long: `get fetches the evidence bundle of a job, which coffer-verify checks on any
machine, without a network.`,
		Example: "  coffer evidence get 01JD3V8Q -o bundle.json\n  coffer-verify --verifier-keys verifier.jwks --broker-keys broker.jwks bundle.json",
		Args:    exactly("a job id"),
	}
	get.Flags().StringVarP(&file, "file", "o", "", "`FILE` to write; must not exist")
	as, out := asFlag(get), plainOutputFlag(get)
	get.RunE = func(cmd *cobra.Command, args []string) error {
		if file == "" {
			return usagef(cmd, "say where to write the bundle with -o FILE")
		}
		if err := absent(file); err != nil {
			return err
		}
		b, err := c.bundleOf(cmd, args[0], *as)
		if err != nil {
			return err
		}
		if err := create(file, b); err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, map[string]any{"file": file, "bytes": len(b)})
		}
		_, err = fmt.Fprintf(c.stdout, "%s: %d bytes\n", file, len(b))
		return err
	}
	return get
}

func absent(file string) error {
	if _, err := os.Lstat(file); err == nil {
		return &exitError{code: exitUsage, text: file + " exists: name another file"}
	}
	return nil
}

// bundleOf fetches a job's bundle from the agent.
func (c *cli) bundleOf(cmd *cobra.Command, id, as string) ([]byte, error) {
	if as != daemon.RoleEngineer && as != daemon.RoleAuditor {
		return nil, usagef(cmd, "--as %q: want engineer or auditor", as)
	}
	a, err := c.agent(as)
	if err != nil {
		return nil, err
	}
	res, err := call(cmd.Context(), c, "get the evidence of job "+id, serverAgent, a.Bundle, &agentv1.BundleRequest{Id: id})
	if err != nil {
		return nil, err
	}
	return res.GetBundle(), nil
}

// given returns the bundle that an argument names: a file, standard input for "-",
// or else a job.
func (c *cli) given(cmd *cobra.Command, arg, as string) ([]byte, error) {
	var from io.Reader = c.stdin
	if arg != "-" {
		f, err := os.Open(arg) // #nosec G304 -- the user names the file
		switch {
		case errors.Is(err, os.ErrNotExist) && !strings.ContainsAny(arg, "./"):
			return c.bundleOf(cmd, arg, as)
		case err != nil:
			return nil, &exitError{code: exitUsage, text: err.Error(), err: err}
		}
		defer func() { _ = f.Close() }()
		from = f
	}
	b, err := io.ReadAll(io.LimitReader(from, bundle.MaxSize+1))
	if err != nil {
		return nil, &exitError{code: exitUnknown, text: fmt.Sprintf("read %s: %s", arg, err), err: err}
	}
	if len(b) > bundle.MaxSize {
		return nil, &exitError{code: exitFailed, text: fmt.Sprintf("%s has more than %d bytes: it is no bundle", arg, bundle.MaxSize)}
	}
	return b, nil
}

// factsOf reads what the bundle that an argument names says.
func (c *cli) factsOf(cmd *cobra.Command, arg, as string) ([]facts.Section, error) {
	file, err := c.given(cmd, arg, as)
	if err != nil {
		return nil, err
	}
	b, err := bundle.Parse(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", arg, err)
	}
	s, err := facts.Of(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", arg, err)
	}
	return s, nil
}

// maxShown bounds the lines of a section for a terminal: a list of what an image is
// made from can be long.
const maxShown = 100

func (c *cli) evidenceShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show JOB|FILE",
		Short: "Say in words what a bundle records",
		Long: `show says what a bundle records: how the job ended, its plan, machine,
approvals, released keys, connections and outputs. It checks nothing: whether the
record is true says coffer evidence verify.`,
		Example: "  coffer evidence show 01JD3V8Q\n  coffer evidence show bundle.json --output json",
		Args:    exactly("a job id or a file"),
	}
	as, out := asFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		sections, err := c.factsOf(cmd, args[0], *as)
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, sections)
		}
		w := bufio.NewWriter(c.stdout)
		for _, s := range sections {
			if len(s.Facts) == 0 {
				continue
			}
			_, _ = fmt.Fprintln(w, s.Title)
			for _, f := range s.Facts[:min(len(s.Facts), maxShown)] {
				_, _ = fmt.Fprintf(w, "  %-28s  %s\n", clean(f.Name), clean(f.Value))
			}
			if more := len(s.Facts) - maxShown; more > 0 {
				_, _ = fmt.Fprintf(w, "  and %d more, which --output json has\n", more)
			}
			_, _ = fmt.Fprintln(w)
		}
		_, _ = fmt.Fprintln(w, "This is what the record says. Whether it is true: coffer evidence verify "+args[0])
		return w.Flush()
	}
	return cmd
}

func (c *cli) evidenceDiff() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff JOB|FILE JOB|FILE",
		Short: "Say what differs between the records of two jobs",
		Long: `diff says what differs between the records of two jobs: plan, image, policy,
firmware, approvals, connections and outputs. What every job has of its own, such
as its id and its times, is left out. It checks nothing of either record.`,
		Example: "  coffer evidence diff 01JD3V8Q 01JD3W2M\n  coffer evidence diff before.json after.json --output json",
		Args:    exactly("a job id or a file", "another job id or file"),
	}
	as, out := asFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		before, err := c.factsOf(cmd, args[0], *as)
		if err != nil {
			return err
		}
		after, err := c.factsOf(cmd, args[1], *as)
		if err != nil {
			return err
		}
		changes := facts.Diff(before, after)
		if *out == formatJSON {
			if changes == nil {
				changes = []facts.Change{}
			}
			return writeJSON(c.stdout, changes)
		}
		if len(changes) == 0 {
			_, err := fmt.Fprintln(c.stdout, "no difference but what every job has of its own")
			return err
		}
		w := bufio.NewWriter(c.stdout)
		last := ""
		for _, ch := range changes {
			if ch.Section != last {
				_, _ = fmt.Fprintln(w, clean(ch.Section))
				last = ch.Section
			}
			_, _ = fmt.Fprintf(w, "  %s\n", clean(ch.Name))
			before, after := printable.Apart(ch.Before, ch.After)
			if ch.Before != "" {
				_, _ = fmt.Fprintf(w, "    - %s\n", before)
			}
			if ch.After != "" {
				_, _ = fmt.Fprintf(w, "    + %s\n", after)
			}
		}
		return w.Flush()
	}
	return cmd
}

// pins are the flags with which coffer-verify believes what this stack believes.
func (c *cli) pins() []string {
	e, err := stack.OpenEndpoint(c.dir)
	if err != nil {
		return nil
	}
	return []string{"--verifier-keys", e.VerifierKeys(), "--broker-keys", e.BrokerKeys(), "--simulation-roots", e.SimulationRoots()}
}

// aboutTrust is said by every command that runs coffer-verify.
const aboutTrust = `
It runs coffer-verify, which lies beside this program or in ` + binVariable + `. Flags after
-- go to it, and say whom you trust: --verifier-keys, --broker-keys, --approvers and
those that coffer-verify --help lists. Without any, the keys and roots of the stack
in --dir are trusted, if there is one: that is its own word for itself.`

// split returns what stands before --, and the flags for coffer-verify after it.
func split(cmd *cobra.Command, args []string) (own, trust []string) {
	if n := cmd.ArgsLenAtDash(); n >= 0 {
		return args[:n], args[n:]
	}
	return args, nil
}

func oneBundle(cmd *cobra.Command, args []string) error {
	own, _ := split(cmd, args)
	return exactly("a job id or a file")(cmd, own)
}

// verify runs coffer-verify over the bundle that args name, with flags before what
// says whom to trust. Its verdict is its exit code, which becomes this program's.
func (c *cli) verify(cmd *cobra.Command, args []string, as string, stdout io.Writer, flags ...string) error {
	own, trust := split(cmd, args)
	file, err := c.given(cmd, own[0], as)
	if err != nil {
		return err
	}
	if len(trust) == 0 {
		trust = c.pins()
		if len(trust) > 0 {
			_, _ = fmt.Fprintf(c.stderr, "trusting the keys and roots of the stack in %s\n", c.dir)
		}
	}
	program, err := verifier()
	if err != nil {
		return err
	}
	// #nosec G204 -- the program lies beside this one; a shell has no part in it
	v := exec.CommandContext(cmd.Context(), program, append(append(flags, trust...), "-")...)
	v.Stdin, v.Stdout, v.Stderr = bytes.NewReader(file), raw(stdout), raw(c.stderr)
	err = v.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		return &exitError{code: exit.ExitCode(), err: err}
	case errors.Is(cmd.Context().Err(), context.Canceled):
		return &exitError{code: exitUnknown, text: "interrupted", err: err}
	case err != nil:
		return &exitError{code: exitUnknown, text: fmt.Sprintf("run %s: %s", program, err), err: err}
	}
	return nil
}

// verifier returns the path of coffer-verify.
func verifier() (string, error) {
	dir := os.Getenv(binVariable)
	if dir == "" {
		exe, err := os.Executable()
		if err != nil {
			return "", err
		}
		dir = filepath.Dir(exe)
	}
	path := filepath.Join(dir, "coffer-verify")
	if _, err := os.Stat(path); err != nil { //nolint:gosec // the user's own folder, as for every program of coffer's
		return "", &exitError{code: exitUnknown, text: fmt.Sprintf("%s is missing: `make build` makes it; %s names the folder it is in", path, binVariable), err: err}
	}
	return path, nil
}

func (c *cli) evidenceVerify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify JOB|FILE [-- FLAGS OF COFFER-VERIFY]",
		Short: "Check whether the record of a job is true",
		Long: `verify checks everything in a bundle again, from the raw evidence, and says what
passed, what failed, what was not checked and what no bundle proves.
` + aboutTrust + `

Exit codes: 0 verified, 1 failed, 2 wrong usage, 4 could not tell.`,
		Example: "  coffer evidence verify 01JD3V8Q\n  coffer evidence verify bundle.json -- --verifier-keys verifier.jwks --broker-keys broker.jwks",
		Args:    oneBundle,
	}
	as, out := asFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return c.verify(cmd, args, *as, c.stdout, "--output", string(*out))
	}
	return cmd
}

// judged is what coffer-verify says as JSON, as far as it is told on.
type judged struct {
	File    string `json:"file"`
	Verdict string `json:"verdict"`
	Summary string `json:"summary"`
}

// tell says the verdict that coffer-verify gave as JSON, and which file was written,
// if any was.
func (c *cli) tell(said []byte, file string, out format) error {
	var j judged
	if err := json.Unmarshal(said, &j); err != nil {
		return err
	}
	j.File = file
	if out == formatJSON {
		return writeJSON(c.stdout, j)
	}
	if file != "" {
		if _, err := fmt.Fprintf(c.stdout, "%s: ", file); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(c.stdout, "%s: %s\n", clean(j.Verdict), clean(j.Summary))
	return err
}

func (c *cli) evidenceReport() *cobra.Command {
	var file string
	var controls []string
	cmd := &cobra.Command{
		Use:   "report JOB|FILE -o FILE [-- FLAGS OF COFFER-VERIFY]",
		Short: "Write a page about a job for people who were not there",
		Long: `report verifies a bundle and writes one HTML page: the verdict, the way of the
job, who approved what, what was checked of each device, what left the machine, and
how that stands to published controls. The page needs no server, no network and no
script. It is written whatever the verdict is, and says it first.
` + aboutTrust + `

Exit codes: 0 verified, 1 failed, 2 wrong usage, 4 could not tell.`,
		Example: "  coffer evidence report 01JD3V8Q -o report.html\n  coffer evidence report bundle.json -o report.html --controls ours.yaml -- --verifier-keys verifier.jwks",
		Args:    oneBundle,
	}
	cmd.Flags().StringVarP(&file, "file", "o", "", "`FILE` to write; must not exist")
	cmd.Flags().StringArrayVar(&controls, "controls", nil, "`FILE` of controls in place of those that come with coffer; may be repeated")
	as, out := asFlag(cmd), plainOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if file == "" {
			return usagef(cmd, "say where to write the page with -o FILE")
		}
		if err := absent(file); err != nil {
			return err
		}
		flags := []string{"--report", file}
		for _, f := range controls {
			flags = append(flags, "--controls", f)
		}
		var said bytes.Buffer
		verdict := c.verify(cmd, args, *as, &said, append(flags, "--output", "json")...)
		if said.Len() == 0 {
			return verdict
		}
		return errors.Join(verdict, c.tell(said.Bytes(), file, *out))
	}
	return cmd
}

func (c *cli) evidenceExport() *cobra.Command {
	var file, kind, key string
	cmd := &cobra.Command{
		Use:   "export JOB|FILE --format FORMAT -o FILE [-- FLAGS OF COFFER-VERIFY]",
		Short: "Write what a verified bundle shows in the formats of other tools",
		Long: `export verifies a bundle and writes what it shows in a format that other tools
read: vsa (in-toto verification summary), slsa (SLSA provenance), training (a
statement of coffer's own about the training run) or cyclonedx (an ML-BOM). Nothing
is written of a bundle that does not verify, but a verification summary says so.
With --key, statements are signed in a DSSE envelope by whoever exports them; the
job's key is gone by then.
` + aboutTrust + `

Exit codes: 0 verified, 1 failed, 2 wrong usage, 4 could not tell.`,
		Example: "  coffer evidence export 01JD3V8Q --format vsa -o vsa.json --key ~/.ssh/id_ed25519\n  coffer evidence export bundle.json --format cyclonedx -o bom.json -- --verifier-keys verifier.jwks",
		Args:    oneBundle,
	}
	cmd.Flags().StringVarP(&file, "file", "o", "", "`FILE` to write; must not exist")
	cmd.Flags().StringVar(&kind, "format", "", "vsa, slsa, training or cyclonedx")
	cmd.Flags().StringVar(&key, "key", "", "private key `FILE` that signs statements (SSH or PEM; ed25519 or ECDSA)")
	as, out := asFlag(cmd), plainOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if file == "" || kind == "" {
			return usagef(cmd, "say what to write with --format FORMAT and where with -o FILE")
		}
		if err := absent(file); err != nil {
			return err
		}
		if !slices.Contains(statement.Formats(), statement.Format(kind)) {
			return usagef(cmd, "--format %q: want vsa, slsa, training or cyclonedx", kind)
		}
		var signer crypto.Signer
		if key != "" {
			if kind == string(statement.CycloneDX) {
				return usagef(cmd, "--key signs in-toto statements: a CycloneDX document is none")
			}
			var err error
			if signer, err = rawKey(key); err != nil {
				return &exitError{code: exitUsage, text: err.Error(), err: err}
			}
		}
		return c.export(cmd, args, *as, file, kind, signer, *out)
	}
	return cmd
}

// export has coffer-verify write beside the file, and puts it in place, signed if
// there is a signer.
func (c *cli) export(cmd *cobra.Command, args []string, as, file, kind string, signer crypto.Signer, out format) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(file), ".export-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	unsigned := filepath.Join(dir, "export")
	var said bytes.Buffer
	verdict := c.verify(cmd, args, as, &said, "--output", "json", "--export", kind+"="+unsigned)
	if said.Len() == 0 {
		return verdict
	}
	b, err := os.ReadFile(unsigned) // #nosec G304 -- it was made a moment ago
	switch {
	case errors.Is(err, os.ErrNotExist):
		file = ""
	case err != nil:
		return err
	default:
		if signer != nil {
			if b, err = statement.Sign(cmd.Context(), b, signer); err != nil {
				return err
			}
		}
		if err := create(file, b); err != nil {
			return err
		}
	}
	return errors.Join(verdict, c.tell(said.Bytes(), file, out))
}

// rawKey reads a private key as OpenSSH or PKCS #8 has it.
func rawKey(path string) (crypto.Signer, error) {
	b, err := os.ReadFile(path) // #nosec G304 -- the user names the file
	if err != nil {
		return nil, err
	}
	k, err := ssh.ParseRawPrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", path, err)
	}
	if e, ok := k.(*ed25519.PrivateKey); ok {
		k = *e
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("key %s: of a kind that cannot sign", path)
	}
	return s, nil
}
