package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/parser"
	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/internal/daemon"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/source/sink"
)

func (c *cli) checkpointsCmd() *cobra.Command {
	return group("checkpoints", "List, check, resume from and export sealed checkpoints", c.checkpointsLsCmd(), c.checkpointsVerifyCmd(), c.resumeFromCmd(), c.checkpointsExportCmd())
}

type checkpointView struct {
	Sequence uint64 `json:"sequence"`
	Name     string `json:"name"`
	Digest   string `json:"digest"`
	Bytes    int64  `json:"bytes"`
	// Anchored says that the broker has countersigned it.
	Anchored bool      `json:"anchored"`
	Sealed   time.Time `json:"sealed"`
}

func (c *cli) checkpointsLsCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls JOB",
		Short:   "List the checkpoints that a job has sealed",
		Example: "  coffer checkpoints ls 01JD3V8Q --output json",
		Args:    exactly("a job id"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		list := []checkpointView{}
		err = c.events(cmd.Context(), a, args[0], false, func(e *agentv1.WatchResponse) error {
			k := e.GetCheckpoint()
			if k == nil {
				return nil
			}
			// It comes once more when it is countersigned.
			if i := slices.IndexFunc(list, func(v checkpointView) bool { return v.Sequence == k.GetSequence() }); i >= 0 {
				list[i].Anchored = list[i].Anchored || k.GetAnchored()
				return nil
			}
			list = append(list, checkpointView{k.GetSequence(), k.GetName(), k.GetDigest(), k.GetBytes(), k.GetAnchored(), time.Unix(0, e.GetTimeUnixNano()).UTC()})
			return nil
		})
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, list)
		}
		rows := [][]string{{"SEQUENCE", "NAME", "BYTES", "SEALED", "COUNTERSIGNED", "DIGEST"}}
		for _, k := range list {
			rows = append(rows, []string{strconv.FormatUint(k.Sequence, 10), k.Name, strconv.FormatInt(k.Bytes, 10), clock(k.Sealed.Unix()), yesNo(k.Anchored), k.Digest})
		}
		return table(c.stdout, rows...)
	}
	return cmd
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// checkedCheckpoint is what verify finds of one checkpoint.
type checkedCheckpoint struct {
	Folder   string      `json:"folder"`
	Job      string      `json:"job,omitempty"`
	Plan     plan.Digest `json:"plan,omitempty"`
	Sequence uint64      `json:"sequence,omitempty"`
	Digest   plan.Digest `json:"digest,omitempty"`
	// Content is "whole", "removed" (the keep rules let the sealed files go, the
	// record is there) or "damaged".
	Content string `json:"content"`
	// Anchored is "yes", "no" (unanchored), "unknown" (there is no key to check the
	// countersignature by) or "forged".
	Anchored string   `json:"anchored"`
	Problems []string `json:"problems,omitempty"`
}

func (c *cli) checkpointsVerifyCmd() *cobra.Command {
	var keysFile string
	cmd := &cobra.Command{
		Use:   "verify DIR",
		Short: "Check a job's sealed checkpoints, offline and without a key",
		Long: `verify reads a folder of one job's sealed checkpoints, below the URI in its job
file, and asks nobody. It checks the signature of every record, that the line of
checkpoints has no gap and no fork, the broker's countersignatures, and every byte
of ciphertext against the manifest. It needs no data key and opens nothing.

Whose session key signed the records, the job's bundle says (coffer-verify); a
countersignature is the broker's word that it was the attested job's.`,
		Example: "  coffer checkpoints verify /srv/checkpoints/01JD3V8Q --broker-keys broker.jwks",
		Args:    exactly("a folder"),
	}
	cmd.Flags().StringVar(&keysFile, "broker-keys", "", "the broker's public keys, a JWKS `FILE` (default: this stack's)")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		jwks, err := c.brokerKeys(keysFile)
		if err != nil {
			return err
		}
		list, err := verifyCheckpoints(cmd.Context(), args[0], jwks)
		if err != nil {
			return err
		}
		bad := 0
		rows := [][]string{{"FOLDER", "CONTENT", "COUNTERSIGNED", "DIGEST"}}
		for _, k := range list {
			rows = append(rows, []string{k.Folder, k.Content, k.Anchored, orDash(string(k.Digest))})
			if len(k.Problems) > 0 {
				bad++
			}
		}
		if *out == formatJSON {
			err = writeJSON(c.stdout, list)
		} else {
			err = table(c.stdout, rows...)
		}
		for _, k := range list {
			for _, p := range k.Problems {
				_, perr := fmt.Fprintf(c.stderr, "%s: %s\n", clean(k.Folder), clean(p))
				err = errors.Join(err, perr)
			}
		}
		if err == nil && bad > 0 {
			err = &exitError{code: exitFailed, text: fmt.Sprintf("%d of %d checkpoints do not hold", bad, len(list))}
		}
		return err
	}
	return cmd
}

// brokerKeys reads a key set; the stack's own may be missing.
func (c *cli) brokerKeys(file string) ([]byte, error) {
	name := file
	if name == "" {
		name = filepath.Join(c.dir, "broker", "jwks.json")
	}
	b, err := os.ReadFile(name) // #nosec G304 -- the user names the file
	if file == "" && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &exitError{code: exitUsage, text: "broker's keys: " + err.Error(), err: err}
	}
	return b, nil
}

// verifyCheckpoints checks the line of checkpoints in dir. jwks may be nil.
func verifyCheckpoints(ctx context.Context, dir string, jwks []byte) ([]checkedCheckpoint, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, &exitError{code: exitUsage, text: err.Error(), err: err}
	}
	var out []checkedCheckpoint
	var last *receipt.CheckpointRecord
	var session []byte
	for _, n := range names {
		number, ok := sink.Sequence(n.Name())
		if !ok {
			if strings.HasSuffix(n.Name(), ".tmp") {
				continue // a commit that was cut off: it never was one
			}
			out = append(out, checkedCheckpoint{Folder: n.Name(), Content: "damaged", Anchored: "no", Problems: []string{"no checkpoint is called so"}})
			continue
		}
		k, signed, r := verifyCheckpoint(ctx, filepath.Join(dir, n.Name()), jwks)
		if r != nil {
			bad := func(ok bool, format string, args ...any) {
				if !ok {
					k.Problems = append(k.Problems, fmt.Sprintf(format, args...))
				}
			}
			bad(r.Sequence == number, "the record has number %d", r.Sequence)
			if last != nil {
				bad(r.Sequence == last.Sequence+1, "number %d follows number %d: some were taken away or put in", r.Sequence, last.Sequence)
				bad(r.Sequence != last.Sequence+1 || r.Parent == last.Digest, "it does not follow the one before: its parent is %s", r.Parent)
				bad(r.JobID == last.JobID && r.Plan == last.Plan && r.Asset == last.Asset, "it is of another job, plan or asset than the one before")
				bad(bytes.Equal(signed.SessionKey, session), "another session key signed it than the one before")
			}
			last, session = r, signed.SessionKey
		}
		out = append(out, k)
	}
	if len(out) == 0 {
		return nil, &exitError{code: exitUsage, text: dir + " has no checkpoints"}
	}
	// What the broker was shown it was shown in order.
	for i := range out {
		if i > 0 && out[i].Anchored == "yes" && out[i-1].Anchored == "no" {
			out[i-1].Problems = append(out[i-1].Problems, "a later one is countersigned and this one is not: its countersignature was taken away or lost")
		}
	}
	return out, nil
}

func verifyCheckpoint(ctx context.Context, dir string, jwks []byte) (checkedCheckpoint, receipt.SignedCheckpoint, *receipt.CheckpointRecord) {
	k := checkedCheckpoint{Folder: filepath.Base(dir), Content: "damaged", Anchored: "no"}
	bad := func(err error) { k.Problems = append(k.Problems, err.Error()) }
	signed, r, err := sink.ReadRecord(dir)
	if err != nil {
		bad(err)
		return k, signed, nil
	}
	k.Job, k.Plan, k.Sequence, k.Digest = r.JobID, r.Plan, r.Sequence, r.Digest
	switch token, err := sink.ReadAnchor(dir); {
	case err != nil:
		bad(err)
	case token == "":
	case jwks == nil:
		k.Anchored = "unknown"
	default:
		k.Anchored = "yes"
		if err := verifyAnchor(token, jwks, signed, r); err != nil {
			k.Anchored = "forged"
			bad(err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		bad(err)
		return k, signed, &r
	}
	defer root.Close()
	if _, err := root.Lstat(seal.ManifestName); errors.Is(err, fs.ErrNotExist) {
		// Without its manifest nothing can be opened; with its record the line is whole.
		k.Content = "removed"
		return k, signed, &r
	}
	if err := seal.Check(ctx, root, r.Asset, r.Digest); err != nil {
		bad(err)
		return k, signed, &r
	}
	k.Content = "whole"
	return k, signed, &r
}

// verifyAnchor checks a countersignature under the broker's keys, whatever the
// broker is called.
func verifyAnchor(token string, jwks []byte, signed receipt.SignedCheckpoint, r receipt.CheckpointRecord) error {
	parts := strings.Split(token, ".")
	var who struct {
		Issuer string `json:"iss"`
	}
	if len(parts) != 3 {
		return errors.New("the countersignature is no token")
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(body, &who)
	}
	if err != nil {
		return fmt.Errorf("the countersignature is no token: %w", err)
	}
	keys, err := receipt.ParseKeys(who.Issuer, jwks)
	if err != nil {
		return err
	}
	_, err = receipt.VerifyCheckpointHead(keys, token, signed.Record, r)
	return err
}

func (c *cli) resumeFromCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "resume-from DIGEST JOB.yaml",
		Short: "Print a job file that goes on from one named checkpoint",
		Long: `resume-from prints the job file with "resume: DIGEST" among its checkpoints. That
is another plan: who approves it sees the digest, and it needs a grant of its own.
It is the way back to an older checkpoint, to one that the broker has not
countersigned, and to one of another plan. For the newest checkpoint of the same
plan write "resume: latest" once.`,
		Example: "  coffer checkpoints resume-from sha384:... job.yaml > resumed.yaml\n  coffer plan resumed.yaml",
		Args:    exactly("the digest of a checkpoint", "a job file"),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		digest, err := plan.ParseDigest(args[0])
		if err != nil {
			return usagef(cmd, "%s", err)
		}
		file, err := c.readJobFile(args[1])
		if err != nil {
			return err
		}
		out, err := resumeFrom(file, digest)
		if err != nil {
			return &exitError{code: exitUsage, text: args[1] + ": " + err.Error(), err: err}
		}
		_, err = raw(c.stdout).Write(out)
		return err
	}
	return cmd
}

// resumeFrom sets checkpoints.resume and leaves the rest of the file as it is.
func resumeFrom(file []byte, digest plan.Digest) ([]byte, error) {
	spec, err := jobspec.Parse(file)
	if err != nil {
		return nil, err
	}
	if spec.Checkpoints == nil {
		return nil, errors.New("the job makes no checkpoints, so there is no place to resume from")
	}
	tree, err := parser.ParseBytes(file, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	at, err := yaml.PathString("$.checkpoints")
	if err != nil {
		return nil, err
	}
	if err := at.MergeFromReader(tree, strings.NewReader("resume: "+string(digest)+"\n")); err != nil {
		return nil, err
	}
	out := []byte(strings.TrimSuffix(tree.String(), "\n") + "\n")
	// What is printed is what was meant, or nothing is.
	changed, err := jobspec.Parse(out)
	if err != nil {
		return nil, err
	}
	spec.Checkpoints.Resume = string(digest)
	want, err := spec.Redacted()
	if err != nil {
		return nil, err
	}
	got, err := changed.Redacted()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(want, got) {
		return nil, errors.New("it cannot be changed safely: add the line \"resume: " + string(digest) + "\" to its checkpoints by hand")
	}
	return out, nil
}
