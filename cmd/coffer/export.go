package main

import (
	"fmt"
	"net/url"
	"path/filepath"

	"github.com/spf13/cobra"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/runner/source/sink"
)

func (c *cli) checkpointsExportCmd() *cobra.Command {
	var r resealing
	var kind string
	cmd := &cobra.Command{
		Use:   "export DIR NEW --to FILE-URI",
		Short: "Register an asset, and write the job that seals a checkpoint under its key",
		Long: `export registers NEW with the policy, labels and key store of the checkpoint's
asset, under a data key that the broker makes and that no person sees, and writes
the file of the job that seals the checkpoint in DIR under that key. DIR is one
checkpoint's folder, or a copy of it with its record: its digest goes into the
plan, so that approvers see which one it is. Plan the job, grant it both assets,
and submit it. No container runs, and nobody sees the plaintext. When it has
succeeded, jobs can have NEW as an input.`,
		Example: "  coffer checkpoints export /srv/checkpoints/01JD3V8Q/000003-epoch-3 tuned --to file:///srv/sealed/tuned",
		Args:    exactly("a checkpoint's folder", "a new name"),
	}
	cmd.Flags().StringVar(&r.uri, "uri", "", "`where` the node finds the folder, as in a job file (default: DIR)")
	cmd.Flags().StringVar(&r.out, "to", "", "`file:///path` of the folder that the job makes")
	cmd.Flags().StringVar(&kind, "kind", "weights", "what the new asset is: `weights or dataset`")
	cmd.Flags().StringVar(&r.policy, "attestation-policy", "production", "`name` of the attestation policy of the job")
	cmd.Flags().StringVar(&r.file, "job", "export.yaml", "job `file` to write")
	keyFlag(cmd, &r.key)
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkAssetName(cmd, args[1]); err != nil {
			return err
		}
		switch kind {
		case "weights":
			r.kind = brokerv1.AssetKind_ASSET_KIND_WEIGHTS
		case "dataset":
			r.kind = brokerv1.AssetKind_ASSET_KIND_DATASET
		default:
			return &exitError{code: exitUsage, text: fmt.Sprintf("--kind %.40q: want weights or dataset", kind)}
		}
		dir, err := filepath.Abs(args[0])
		if err != nil {
			return err
		}
		_, record, err := sink.ReadRecord(dir)
		if err != nil {
			return &exitError{code: exitFailed, text: fmt.Sprintf("%s is no checkpoint: %v", args[0], err), err: err}
		}
		if r.uri == "" {
			r.uri = (&url.URL{Scheme: "file", Path: dir}).String()
		}
		r.from, r.to, r.checkpoint = record.Asset, args[1], record.Digest
		return c.writeReseal(cmd, r, *out)
	}
	return cmd
}
