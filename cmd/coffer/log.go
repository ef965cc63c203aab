package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	tiles "github.com/transparency-dev/tessera/client"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
	logserve "github.com/coffer-run/coffer/attest/translog/serve"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

func (c *cli) logCmd() *cobra.Command {
	return group("log", "Check the evidence log, and witness it", c.logVerify(), c.logShow(), c.logProve(), c.logWitness(), c.logKeygen())
}

// maxLogFile bounds a file of the log, of keys or of a checkpoint, in bytes: an
// entry bundle has 256 entries of at most 64 KiB.
const maxLogFile = 17 << 20

// logReader reads a log over HTTPS or from a copy of its folder.
type logReader interface {
	translog.Tiles
	ReadCheckpoint(ctx context.Context) ([]byte, error)
}

// logFlags say which log, and whose signatures count.
type logFlags struct {
	from, key, witnessKeys string
	witnesses              int
}

func (f *logFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.from, "from", "", "`folder` with a copy of the log (default: ask the stack's broker, as its auditor)")
	cmd.Flags().StringVar(&f.key, "log-key", "", "`file` with the log's key (default: broker/log.vkey in the stack's folder)")
	cmd.Flags().StringVar(&f.witnessKeys, "witness-keys", "", "`file` with the keys of witnesses, one a line, who must have cosigned the log")
	cmd.Flags().IntVar(&f.witnesses, "witnesses", 0, "how many of them (default all)")
}

// open returns the log, its broker's id and its newest checkpoint.
func (f *logFlags) open(ctx context.Context, c *cli) (logReader, string, translog.Trust, []byte, error) {
	fail := func(err error) (logReader, string, translog.Trust, []byte, error) {
		return nil, "", translog.Trust{}, nil, err
	}
	if f.key == "" {
		f.key = filepath.Join(c.dir, "broker", "log.vkey")
	}
	key, err := readBounded(f.key)
	if err != nil {
		return fail(c.orNoStack(f.key, err))
	}
	var witnesses []string
	if f.witnessKeys != "" {
		b, err := readBounded(f.witnessKeys)
		if err != nil {
			return fail(err)
		}
		if witnesses = strings.Fields(string(b)); len(witnesses) == 0 {
			return fail(fmt.Errorf("%s names no witness", f.witnessKeys))
		}
	}
	if f.witnesses == 0 {
		f.witnesses = len(witnesses)
	}
	trust, err := translog.NewTrust(string(key), witnesses, f.witnesses)
	if err != nil {
		return fail(err)
	}
	broker, ok := strings.CutSuffix(trust.Origin(), translog.KeyName(""))
	if !ok || broker == "" {
		return fail(fmt.Errorf("%s is named %q, and is not the key of a broker's log", f.key, trust.Origin()))
	}
	r, err := f.reader(c)
	if err != nil {
		return fail(err)
	}
	raw, err := r.ReadCheckpoint(ctx)
	if err != nil {
		return fail(&exitError{code: exitUnknown, text: "read checkpoint: " + err.Error(), err: err})
	}
	return r, broker, trust, raw, nil
}

func (f *logFlags) reader(c *cli) (logReader, error) {
	if f.from != "" {
		if info, err := os.Stat(f.from); err != nil || !info.IsDir() {
			return nil, &exitError{code: exitUsage, text: f.from + " is not a folder"}
		}
		return tiles.FileFetcher{Root: f.from}, nil
	}
	h, e, err := c.dial(daemon.RoleAuditor, daemon.RoleBroker)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(e.Broker() + logserve.Prefix)
	if err != nil {
		return nil, err
	}
	return tiles.NewHTTPFetcher(u, logserve.Bounded(h, maxLogFile))
}

func readBounded(path string) (_ []byte, err error) {
	f, err := os.Open(path) // #nosec G304 -- the caller names the file to read
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := io.ReadAll(io.LimitReader(f, maxLogFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) > maxLogFile {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, maxLogFile)
	}
	return b, nil
}

func (c *cli) logVerify() *cobra.Command {
	var f logFlags
	var kept string
	var bundles []string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Read the whole log and check that nothing in it was changed",
		Long: `verify reads every entry of the log and checks the log's signature on its
checkpoint, that the entries are a chain from the first on, that every tile has the
hashes of what is below it, and that the tree over the entries is the one signed.

With --checkpoint it also checks that the log begins with all that it had when that
checkpoint was kept, and keeps the new one there: run it so from time to time, and
a history that is rewritten in between is found. With --bundle it checks that the
log has each entry that the bundle shows.`,
		Example: `  coffer log verify
  coffer log verify --checkpoint kept.checkpoint --bundle job.bundle
  coffer log verify --from copy-of-log --log-key log.vkey`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.verifyLog(cmd.Context(), &f, kept, bundles)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&kept, "checkpoint", "", "`file` with the checkpoint kept last; the new one is kept there")
	cmd.Flags().StringArrayVar(&bundles, "bundle", nil, "`bundle` whose entries the log must have; may be repeated")
	return cmd
}

func (c *cli) verifyLog(ctx context.Context, f *logFlags, kept string, bundles []string) error {
	wanted := map[uint64][][]byte{}
	asked := 0
	for _, path := range bundles {
		entries, err := bundleEntries(path)
		if err != nil {
			return err
		}
		for _, e := range entries {
			wanted[e.Index] = append(wanted[e.Index], e.Body)
			asked++
		}
	}
	r, broker, trust, raw, err := f.open(ctx, c)
	if err != nil {
		return err
	}
	cp, err := trust.Open(raw)
	if err != nil {
		return err
	}
	var earlier []translog.Checkpoint
	if kept != "" {
		b, err := readBounded(kept)
		switch {
		case err == nil:
			old, err := trust.Open(b)
			if err != nil {
				return fmt.Errorf("%s: %w", kept, err)
			}
			earlier = append(earlier, old)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	found := 0
	head, err := translog.Audit(ctx, r, broker, cp, earlier, func(e translog.Entry) error {
		for _, body := range wanted[e.Index] {
			if !bytes.Equal(body, e.Body) {
				return fmt.Errorf("entry %d of the log is not the one in the bundle", e.Index)
			}
			found++
		}
		return nil
	})
	if err != nil {
		return err
	}
	if found != asked {
		return fmt.Errorf("%d of %d entries in bundles are not in the log of %d entries", asked-found, asked, cp.Size)
	}
	w := &strings.Builder{}
	fmt.Fprintf(w, "log %s: %d entries, chained and in the tree that the log signed\n", clean(trust.Origin()), cp.Size)
	fmt.Fprintf(w, "  root   %s\n  chain  %s\n", hex.EncodeToString(cp.Root), hex.EncodeToString(head.Hash))
	if len(earlier) > 0 {
		fmt.Fprintf(w, "  begins with the %d entries of the checkpoint in %s\n", earlier[0].Size, kept)
	}
	if asked > 0 {
		fmt.Fprintf(w, "  has all %d entries of the bundles\n", asked)
	}
	for _, s := range cp.Cosigned {
		fmt.Fprintf(w, "  cosigned by %s at %s\n", clean(s.Witness), s.Time.Format(time.RFC3339))
	}
	quorum, named := trust.Quorum()
	switch {
	case named == 0:
		fmt.Fprintln(w, "  not witnessed: no witness is named")
	case !cp.Witnessed:
		fmt.Fprintf(w, "  not witnessed: %d of %d named cosigned, %d wanted\n", len(cp.Cosigned), named, quorum)
	}
	if _, err := io.WriteString(c.stdout, w.String()); err != nil {
		return err
	}
	if kept != "" {
		if err := keyfile.Write(kept, raw); err != nil {
			return err
		}
	}
	if named > 0 && !cp.Witnessed {
		return &exitError{code: exitUnknown}
	}
	return nil
}

// bundleEntries are the log entries that a bundle shows.
func bundleEntries(path string) ([]translog.Entry, error) {
	b, err := openBundle(path)
	if err != nil {
		return nil, err
	}
	return b.Log.Entries, nil
}

func openBundle(path string) (*bundle.Bundle, error) {
	raw, err := os.ReadFile(path) // #nosec G304 -- the caller names the file to read
	if err != nil {
		return nil, err
	}
	b, err := bundle.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if b.Log == nil || len(b.Log.Entries) == 0 {
		return nil, fmt.Errorf("%s was not logged", path)
	}
	return b, nil
}

func (c *cli) logShow() *cobra.Command {
	var f logFlags
	var job string
	var output *format
	cmd := &cobra.Command{
		Use:     "show",
		Short:   "List the entries of the log, checking it as verify does",
		Example: "  coffer log show --job JOB --output json",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, broker, trust, raw, err := f.open(cmd.Context(), c)
			if err != nil {
				return err
			}
			cp, err := trust.Open(raw)
			if err != nil {
				return err
			}
			list := []translog.Body{}
			if _, err := translog.Audit(cmd.Context(), r, broker, cp, nil, func(e translog.Entry) error {
				b, err := e.Open()
				if err == nil && (job == "" || b.Job == job) {
					list = append(list, b)
				}
				return err
			}); err != nil {
				return err
			}
			if *output == formatJSON {
				return writeJSON(c.stdout, list)
			}
			rows := [][]string{{"INDEX", "TIME", "KIND", "ACTOR", "JOB"}}
			for _, b := range list {
				rows = append(rows, []string{strconv.FormatUint(b.Index, 10), time.UnixMilli(b.TimeMillis).UTC().Format(time.RFC3339), string(b.Kind), b.Actor, b.Job})
			}
			return table(c.stdout, rows...)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&job, "job", "", "only entries of this `job`")
	output = outputFlag(cmd)
	return cmd
}

func (c *cli) logProve() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "prove BUNDLE",
		Short: "Put the log's newest checkpoint and proofs into a bundle",
		Long: `prove asks the broker for a checkpoint of its log with the cosignatures that it has,
and for proofs that the log has the bundle's entries, and writes the bundle with
them: for a bundle that was made before they were published. It checks nothing;
coffer-verify does.`,
		Example: "  coffer log prove job.bundle -o proven.bundle",
		Args:    exactly("a bundle"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return usagef(cmd, "say where to write with -o FILE")
			}
			b, err := openBundle(args[0])
			if err != nil {
				return err
			}
			p, err := c.proofs(cmd.Context(), b.Log.Entries)
			if err != nil {
				return err
			}
			enc, err := b.WithProofs(p)
			if err != nil {
				return err
			}
			return keyfile.Write(out, enc)
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "`file` to write")
	return cmd
}

// proofs asks the stack's broker.
func (c *cli) proofs(ctx context.Context, entries []translog.Entry) (p translog.Proofs, err error) {
	var req translog.ProofRequest
	for _, e := range entries {
		req.Indices = append(req.Indices, e.Index)
	}
	body, err := json.Marshal(req)
	if err != nil {
		return p, err
	}
	h, e, err := c.dial(daemon.RoleAuditor, daemon.RoleBroker)
	if err != nil {
		return p, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, e.Broker()+logserve.Prefix+"proofs", bytes.NewReader(body))
	if err != nil {
		return p, err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := logserve.Bounded(h, maxLogFile).Do(r)
	if err != nil {
		return p, &exitError{code: exitUnknown, text: "ask for proofs: " + err.Error(), err: err}
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return p, fmt.Errorf("ask for proofs: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return p, &exitError{code: exitUnknown, text: fmt.Sprintf("ask for proofs: %s: %s", resp.Status, clean(strings.TrimSpace(string(answer))))}
	}
	return p, plan.Decode(answer, maxLogFile, &p)
}

func (c *cli) logWitness() *cobra.Command {
	var key, folder, listen string
	var logKeys []string
	cmd := &cobra.Command{
		Use:   "witness",
		Short: "Cosign the checkpoints of other people's logs",
		Long: `witness answers add-checkpoint (C2SP tlog-witness): it cosigns a checkpoint of a log
only if it follows the one that it cosigned last, which it keeps in --folder. Run it
where the broker's operator has no say. It speaks HTTP; signatures protect what it
says, and a proxy in front of it can add TLS. It runs until it is interrupted.`,
		Example: `  coffer log keygen witness.example.org witness.key
  coffer log witness --key witness.key --log-key log.vkey --folder seen --listen 127.0.0.1:7450`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if key == "" || folder == "" || listen == "" || len(logKeys) == 0 {
				return usagef(cmd, "--key, --folder, --listen and --log-key are required")
			}
			private, err := keyfile.ReadNote(key)
			if err != nil {
				return err
			}
			var keys []string
			for _, p := range logKeys {
				b, err := readBounded(p)
				if err != nil {
					return err
				}
				keys = append(keys, string(b))
			}
			if err := os.MkdirAll(folder, 0o700); err != nil {
				return fmt.Errorf("witness: %w", err)
			}
			o, err := logserve.NewObserver(folder, private, keys, slog.New(slog.NewTextHandler(c.stderr, nil)))
			if err != nil {
				return err
			}
			return c.serveWitness(cmd.Context(), o, listen)
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "`file` with the witness's private key, as keygen makes it")
	cmd.Flags().StringArrayVar(&logKeys, "log-key", nil, "`file` with the key of a log to follow; may be repeated")
	cmd.Flags().StringVar(&folder, "folder", "", "`folder` for the last checkpoint of each log")
	cmd.Flags().StringVar(&listen, "listen", "", "`address` to answer on")
	return cmd
}

// witnessTimeout bounds the headers of a request to the witness, and the wait for
// requests at the end.
const witnessTimeout = 10 * time.Second

func (c *cli) serveWitness(ctx context.Context, h http.Handler, listen string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", listen)
	if err != nil {
		return fmt.Errorf("witness: %w", err)
	}
	if _, err := fmt.Fprintf(c.stdout, "witness at http://%s\n", l.Addr()); err != nil {
		return errors.Join(err, l.Close())
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: witnessTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), witnessTimeout)
	defer cancel()
	return srv.Shutdown(stop)
}

func (c *cli) logKeygen() *cobra.Command {
	return &cobra.Command{
		Use:     "keygen NAME FILE",
		Short:   "Make a key for a witness and print its public half",
		Example: "  coffer log keygen witness.example.org witness.key",
		Args:    exactly("the witness's name", "a file"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := keyfile.CreateNote(args[1], args[0]); err != nil {
				return err
			}
			private, err := keyfile.ReadNote(args[1])
			if err != nil {
				return err
			}
			public, err := translog.PublicKey(private)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(c.stdout, public)
			return err
		},
	}
}
