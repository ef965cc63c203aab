package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/spf13/cobra"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/internal/stack"
)

// serverBroker is what messages call the broker.
const serverBroker = "broker"

var assetName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

func checkAssetName(cmd *cobra.Command, name string) error {
	if !assetName.MatchString(name) {
		return usagef(cmd, "asset name %.80q: want lower-case letters, digits, '-' and '.', at most 63", name)
	}
	return nil
}

// kindSecret is an asset of one small file, for the secrets of job files.
const kindSecret = "secret"

func assetKinds() map[string]brokerv1.AssetKind {
	return map[string]brokerv1.AssetKind{
		"dataset":     brokerv1.AssetKind_ASSET_KIND_DATASET,
		"weights":     brokerv1.AssetKind_ASSET_KIND_WEIGHTS,
		"checkpoints": brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS,
		kindSecret:    brokerv1.AssetKind_ASSET_KIND_SECRET,
	}
}

func kindName(k brokerv1.AssetKind) string {
	for n, v := range assetKinds() {
		if v == k {
			return n
		}
	}
	return "unknown"
}

// assetView is an asset in JSON output.
type assetView struct {
	Name    string     `json:"name"`
	Kind    string     `json:"kind"`
	Digest  string     `json:"digest,omitempty"`
	Owner   string     `json:"owner"`
	Created *time.Time `json:"created,omitempty"`
	// Approvals are the rules of the asset's policy, "COUNT of GROUP" each.
	Approvals    []string          `json:"approvals,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	KeyStore     string            `json:"keyStore,omitempty"`
	LeaseSeconds int64             `json:"leaseSeconds,omitempty"`
	GraceSeconds int64             `json:"graceSeconds,omitempty"`
	Revision     int64             `json:"revision,omitempty"`
}

func viewAsset(a *brokerv1.Asset) assetView {
	v := assetView{
		Name: a.GetName(), Kind: kindName(a.GetKind()), Digest: a.GetDigest(), Owner: a.GetOwner(), Created: stamp(a.GetCreatedUnix()),
		Approvals: ruleTexts(a.GetPolicy()), KeyStore: a.GetKeyStore(), LeaseSeconds: a.GetPolicy().GetLeaseSeconds(), GraceSeconds: a.GetPolicy().GetGraceSeconds(),
		Revision: a.GetRevision(), Labels: map[string]string{},
	}
	for k, s := range map[string]string{"sensitivity": a.GetLabels().GetSensitivity(), "region": a.GetLabels().GetRegion(), "project": a.GetLabels().GetProject()} {
		if s != "" {
			v.Labels[k] = s
		}
	}
	return v
}

func (c *cli) sealCmd() *cobra.Command {
	var name, kind, out string
	var f policyFlags
	cmd := &cobra.Command{
		Use:   "seal SRC --asset NAME --kind dataset|weights|secret --out DIR",
		Short: "Seal a file or folder under a new key that the broker keeps",
		Long: `seal encrypts a file, or every file of a folder, into the new folder DIR and
registers it with the broker as the asset NAME. The key is made here, leaves
only wrapped to the broker, and never touches a disk.`,
		Example: "  coffer seal ./fashion-mnist --asset fashion-mnist --kind dataset --out sealed/fashion-mnist",
		Args:    exactly("what to seal"),
	}
	cmd.Flags().StringVar(&name, "asset", "", "`name` of the asset at the broker")
	cmd.Flags().StringVar(&kind, "kind", "", "`dataset`, weights or secret")
	cmd.Flags().StringVar(&out, "out", "", "new `folder` for the sealed files")
	cmd.Flags().StringVar(&f.keyStore, "key-store", "", "`name` of the key store that wraps the key (default: the broker's)")
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case name == "":
			return usagef(cmd, "name the asset with --asset")
		case kind != "dataset" && kind != "weights" && kind != kindSecret:
			return usagef(cmd, "--kind %q: want dataset, weights or secret", kind)
		case out == "":
			return usagef(cmd, "say where the sealed folder goes with --out")
		}
		if err := checkAssetName(cmd, name); err != nil {
			return err
		}
		policy, labels, err := f.fresh(cmd)
		if err != nil {
			return err
		}
		asset := &brokerv1.CreateAssetRequest{Name: name, Kind: assetKinds()[kind], Policy: policy, Labels: labels, KeyStore: f.keyStore}
		return c.seal(cmd.Context(), args[0], asset, out, f.key)
	}
	return cmd
}

func (c *cli) seal(ctx context.Context, src string, asset *brokerv1.CreateAssetRequest, out, signWith string) error {
	name := asset.GetName()
	tree, err := seal.OpenTree(src)
	if err != nil {
		return &exitError{code: exitUsage, text: err.Error(), err: err}
	}
	defer func() { _ = tree.Close() }()
	if len(tree.Sources) == 0 {
		return &exitError{code: exitUsage, text: src + " holds no files"}
	}
	if asset.GetKind() == brokerv1.AssetKind_ASSET_KIND_SECRET && (len(tree.Sources) != 1 || tree.Sources[0].Size < 1 || tree.Sources[0].Size > plan.MaxSecretBytes) {
		return &exitError{code: exitUsage, text: fmt.Sprintf("%s: a secret is one file of 1 to %d bytes", src, plan.MaxSecretBytes)}
	}
	if _, err := os.Lstat(out); err == nil {
		return &exitError{code: exitUsage, text: out + " exists: name a new folder with --out"}
	}
	b, err := c.broker(ctx)
	if err != nil {
		return err
	}
	// The broker is asked before the work, so that nothing is sealed in vain.
	info, err := call(ctx, c, "ask the broker for its key", serverBroker, b.Info, &brokerv1.InfoRequest{})
	if err != nil {
		return err
	}
	assets, err := call(ctx, c, "list assets", serverBroker, b.ListAssets, &brokerv1.ListAssetsRequest{})
	if err != nil {
		return err
	}
	for _, a := range assets.GetAssets() {
		if a.GetName() == name {
			return &exitError{code: exitFailed, text: fmt.Sprintf("asset %s exists already: choose another name", name)}
		}
	}
	if err := c.signAsset(ctx, b, asset, signWith); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(out)), 0o750); err != nil {
		return err
	}
	key := keys.GenerateDataKey()
	defer key.Destroy()
	began := time.Now()
	bar := &progress{w: raw(c.stderr), began: began, what: "sealing"}
	sealed, err := seal.Seal(ctx, key, name, tree.Sources, out, seal.Options{Progress: bar.at})
	bar.end()
	if err != nil {
		return err
	}
	spent := time.Since(began)
	if err := c.register(ctx, b, key, asset, string(sealed.Digest), info.GetOwnerWrapKey()); err != nil {
		var coded *exitError
		if errors.As(err, &coded) && coded.code == exitUnknown {
			return &exitError{code: exitUnknown, err: err, text: fmt.Sprintf("%s; if `coffer assets ls` does not show %s with digest %s, delete %s and seal again", coded.text, name, sealed.Digest, out)}
		}
		// Without its key at the broker nothing ever opens the folder again.
		return errors.Join(err, os.RemoveAll(out))
	}
	files := "files"
	if sealed.Files == 1 {
		files = "file"
	}
	_, err = fmt.Fprintf(c.stdout, "sealed %d %s, %s in %s, as %s\ndigest %s\n", sealed.Files, files, stack.Bytes(sealed.Bytes), took(spent), name, sealed.Digest)
	return err
}

// register hands the wrapped key over. If the answer is lost it asks whether
// the asset arrived: removing the ciphertext of a registered asset would lose it.
func (c *cli) register(ctx context.Context, b brokerClient, key *keys.DataKey, asset *brokerv1.CreateAssetRequest, digest string, public []byte) error {
	name := asset.GetName()
	enc, ct, err := key.Wrap(public, []byte(receipt.OwnerWrapInfo), []byte(name))
	if err != nil {
		return fmt.Errorf("wrap the data key to the broker: %w", err)
	}
	asset.Digest, asset.WrappedEnc, asset.WrappedKey = digest, enc, ct
	_, err = call(ctx, c, "register asset "+name, serverBroker, b.CreateAsset, asset)
	var coded *exitError
	if err == nil || !errors.As(err, &coded) || coded.code != exitUnknown {
		return err
	}
	actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	got, gerr := call(actx, c, "look up asset "+name, serverBroker, b.GetAsset, &brokerv1.GetAssetRequest{Name: name})
	if gerr == nil && got.GetAsset().GetDigest() == digest {
		return nil
	}
	return err
}

// progress shows how far a long piece of work is, from its third second on.
type progress struct {
	mu    sync.Mutex
	w     interface{ Write([]byte) (int, error) }
	what  string
	began time.Time
	last  time.Time
	shown bool
}

const (
	progressAfter = 2 * time.Second
	progressEvery = time.Second
)

func (p *progress) at(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if now.Sub(p.began) < progressAfter || now.Sub(p.last) < progressEvery || total <= 0 {
		return
	}
	p.last = now
	rate := float64(done) / now.Sub(p.began).Seconds()
	left := time.Duration(0)
	if rate > 0 {
		left = time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second)
	}
	p.print(fmt.Sprintf("%s %s of %s (%d%%), %s/s, %s left", p.what, stack.Bytes(done), stack.Bytes(total), done*100/total, stack.Bytes(int64(rate)), left))
}

// print rewrites one line of a terminal, and writes lines elsewhere.
func (p *progress) print(s string) {
	if f, ok := p.w.(interface {
		Write([]byte) (int, error)
		Fd() uintptr
	}); ok && terminal(f) {
		p.shown = true
		_, _ = fmt.Fprintf(p.w, "\r%-78s", s)
		return
	}
	_, _ = fmt.Fprintln(p.w, s)
}

func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown {
		_, _ = fmt.Fprintf(p.w, "\r%-78s\r", "")
	}
}

func (c *cli) assetsCmd() *cobra.Command {
	return group("assets", "Register, list and guard sealed assets", c.assetsCreateCmd(), c.assetsListCmd(), c.assetsShowCmd(), c.assetsPolicyCmd(), c.assetsRewrapCmd(), c.assetsResealCmd())
}

func (c *cli) assetsCreateCmd() *cobra.Command {
	var kind string
	var f policyFlags
	cmd := &cobra.Command{
		Use:   "create NAME --kind checkpoints",
		Short: "Register an asset under whose key a job's checkpoints are sealed",
		Long: `create registers an asset whose objects come later. Only checkpoints are
created like this; datasets and weights come with coffer seal.`,
		Example: "  coffer assets create fashion-checkpoints --kind checkpoints",
		Args:    exactly("an asset name"),
	}
	cmd.Flags().StringVar(&kind, "kind", "", "must be `checkpoints`")
	cmd.Flags().StringVar(&f.keyStore, "key-store", "", "`name` of the key store that wraps the key (default: the broker's)")
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if kind != "checkpoints" {
			return usagef(cmd, "--kind %q: want checkpoints; datasets and weights are made by `coffer seal`", kind)
		}
		if err := checkAssetName(cmd, args[0]); err != nil {
			return err
		}
		policy, labels, err := f.fresh(cmd)
		if err != nil {
			return err
		}
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		asset := &brokerv1.CreateAssetRequest{Name: args[0], Kind: assetKinds()[kind], Policy: policy, Labels: labels, KeyStore: f.keyStore}
		if err := c.signAsset(cmd.Context(), b, asset, f.key); err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "register asset "+args[0], serverBroker, b.CreateAsset, asset)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "asset %s (%s) of %s\n", res.GetAsset().GetName(), kind, clean(res.GetAsset().GetOwner()))
		return err
	}
	return cmd
}

func (c *cli) assetsListCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List assets",
		Example: "  coffer assets ls --output json",
		Args:    exactly(),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "list assets", serverBroker, b.ListAssets, &brokerv1.ListAssetsRequest{})
		if err != nil {
			return err
		}
		list := []assetView{}
		rows := [][]string{{"ASSET", "KIND", "OWNER", "CREATED", "DIGEST"}}
		for _, a := range res.GetAssets() {
			v := viewAsset(a)
			list = append(list, v)
			rows = append(rows, []string{v.Name, v.Kind, v.Owner, clock(a.GetCreatedUnix()), orDash(v.Digest)})
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, list)
		}
		return table(c.stdout, rows...)
	}
	return cmd
}
