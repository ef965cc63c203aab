package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// resealJob is the job file that seals an asset anew.
const resealJob = `# Seals %[1]s under the key of %[2]s. No container runs and nobody sees the plaintext.
apiVersion: coffer.run/v1
name: reseal-%[3]s
reseal:
  asset: %[1]s
%[7]s  uri: %[4]s
  to: %[2]s
  out: %[5]s
inputs: []
resources: {cpu: 2, memory: 512Mi, gpus: 0}
retry: {limit: 3}
attestationPolicy: %[6]s
`

// resealing is an asset to register and the job that seals it.
type resealing struct {
	from, to, uri, out, policy, file, key string
	// checkpoint is which one of the checkpoints of from is sealed; empty where from
	// is no asset of checkpoints. The new asset is of kind then.
	checkpoint plan.Digest
	kind       brokerv1.AssetKind
}

// writeReseal writes the job's file and registers the asset.
func (c *cli) writeReseal(cmd *cobra.Command, r resealing, out format) error {
	which := ""
	if r.checkpoint != "" {
		which = "  checkpoint: " + string(r.checkpoint) + "\n"
	}
	// An asset's name may have 63 characters, and a job's too.
	text := fmt.Appendf(nil, resealJob, r.from, r.to, r.to[:min(len(r.to), 50)], r.uri, r.out, r.policy, which)
	if _, err := jobspec.Parse(text); err != nil {
		return &exitError{code: exitUsage, text: err.Error(), err: err}
	}
	b, err := c.broker(cmd.Context())
	if err != nil {
		return err
	}
	// The file comes first: without it nobody knows what an open asset waits for.
	f, err := os.OpenFile(r.file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) // #nosec G302 G304 -- a job file is for others to read
	if errors.Is(err, fs.ErrExist) {
		return &exitError{code: exitUsage, text: r.file + " exists: name another file with --job", err: err}
	}
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := c.registerOpen(cmd, b, r); err != nil {
		return errors.Join(err, os.Remove(r.file))
	}
	if out == formatJSON {
		return writeJSON(c.stdout, map[string]any{"asset": r.to, "from": r.from, "job": r.file})
	}
	_, err = fmt.Fprintf(c.stdout, "asset %s is open; wrote %s\nGrant its plan both assets, then submit it:\n  coffer grant create --job %s --asset %s --asset %s\n  coffer submit %s\n", r.to, r.file, r.file, r.from, r.to, r.file)
	return err
}

func (c *cli) assetsResealCmd() *cobra.Command {
	var uri, to, policy, file, key string
	cmd := &cobra.Command{
		Use:   "reseal OLD NEW --uri FILE-URI --to FILE-URI",
		Short: "Register an asset under a fresh data key, and write the job that seals another one's files under it",
		Long: `reseal registers NEW with the kind, policy, labels and key store of OLD, under a
data key that the broker makes and that no person sees. Its digest is open until
an attested job has sealed the files of OLD under that key. reseal writes the
file of that job: plan it, grant it both assets, and submit it. When it has
succeeded, jobs can name NEW, and OLD can be revoked.`,
		Example: "  coffer assets reseal weights weights-2 --uri file:///srv/sealed/weights --to file:///srv/sealed/weights-2",
		Args:    exactly("the asset that there is and the name of the new one", "a new name"),
	}
	cmd.Flags().StringVar(&uri, "uri", "", "`where` the sealed folder of OLD lies, as in a job file")
	cmd.Flags().StringVar(&to, "to", "", "`file:///path` of the folder that the job makes")
	cmd.Flags().StringVar(&policy, "attestation-policy", "production", "`name` of the attestation policy of the job")
	cmd.Flags().StringVar(&file, "job", "reseal.yaml", "job `file` to write")
	keyFlag(cmd, &key)
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		from, name := args[0], args[1]
		if err := checkAssetName(cmd, name); err != nil {
			return err
		}
		job := resealing{from: from, to: name, uri: uri, out: to, policy: policy, file: file, key: key}
		return c.writeReseal(cmd, job, *out)
	}
	return cmd
}

// registerOpen registers an asset like r.from, whose key the broker makes and whose
// digest a job sets.
func (c *cli) registerOpen(cmd *cobra.Command, b brokerClient, r resealing) error {
	ctx := cmd.Context()
	res, err := call(ctx, c, "look up asset "+r.from, serverBroker, b.GetAsset, &brokerv1.GetAssetRequest{Name: r.from})
	if err != nil {
		return err
	}
	old := res.GetAsset()
	kind, checkpoints := old.GetKind(), old.GetKind() == brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS
	switch {
	case r.checkpoint != "" && !checkpoints:
		return &exitError{code: exitFailed, text: r.from + " is no asset of checkpoints"}
	case r.checkpoint != "":
		kind = r.kind
	case checkpoints:
		return &exitError{code: exitFailed, text: r.from + " is an asset of checkpoints: see coffer checkpoints export"}
	case old.GetDigest() == "":
		return &exitError{code: exitFailed, text: r.from + " has no digest: only data sets and weights that are sealed can be sealed anew"}
	}
	asset := &brokerv1.CreateAssetRequest{Name: r.to, Kind: kind, Policy: old.GetPolicy(), Labels: old.GetLabels(), KeyStore: old.GetKeyStore()}
	if err := c.signAsset(ctx, b, asset, r.key); err != nil {
		return err
	}
	_, err = call(ctx, c, "register asset "+r.to, serverBroker, b.CreateAsset, asset)
	return err
}
