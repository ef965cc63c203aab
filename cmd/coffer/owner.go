package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
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

func assetKinds() map[string]brokerv1.AssetKind {
	return map[string]brokerv1.AssetKind{
		"dataset":     brokerv1.AssetKind_ASSET_KIND_DATASET,
		"weights":     brokerv1.AssetKind_ASSET_KIND_WEIGHTS,
		"checkpoints": brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS,
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
}

func viewAsset(a *brokerv1.Asset) assetView {
	return assetView{a.GetName(), kindName(a.GetKind()), a.GetDigest(), a.GetOwner(), stamp(a.GetCreatedUnix())}
}

func (c *cli) sealCmd() *cobra.Command {
	var name, kind, out string
	cmd := &cobra.Command{
		Use:   "seal SRC --asset NAME --kind dataset|weights --out DIR",
		Short: "Seal a file or folder under a new key that the broker keeps",
		Long: `seal encrypts a file, or every file of a folder, into the new folder DIR and
registers it with the broker as the asset NAME. The key is made here, leaves
only wrapped to the broker, and never touches a disk.`,
		Example: "  coffer seal ./fashion-mnist --asset fashion-mnist --kind dataset --out sealed/fashion-mnist",
		Args:    exactly("what to seal"),
	}
	cmd.Flags().StringVar(&name, "asset", "", "`name` of the asset at the broker")
	cmd.Flags().StringVar(&kind, "kind", "", "`dataset` or weights")
	cmd.Flags().StringVar(&out, "out", "", "new `folder` for the sealed files")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case name == "":
			return usagef(cmd, "name the asset with --asset")
		case kind != "dataset" && kind != "weights":
			return usagef(cmd, "--kind %q: want dataset or weights", kind)
		case out == "":
			return usagef(cmd, "say where the sealed folder goes with --out")
		}
		if err := checkAssetName(cmd, name); err != nil {
			return err
		}
		return c.seal(cmd.Context(), args[0], name, assetKinds()[kind], out)
	}
	return cmd
}

func (c *cli) seal(ctx context.Context, src, name string, kind brokerv1.AssetKind, out string) error {
	tree, err := seal.OpenTree(src)
	if err != nil {
		return &exitError{code: exitUsage, text: err.Error(), err: err}
	}
	defer func() { _ = tree.Close() }()
	if len(tree.Sources) == 0 {
		return &exitError{code: exitUsage, text: src + " holds no files"}
	}
	if _, err := os.Lstat(out); err == nil {
		return &exitError{code: exitUsage, text: out + " exists: name a new folder with --out"}
	}
	b, err := c.broker()
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
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(out)), 0o750); err != nil {
		return err
	}
	key := keys.GenerateDataKey()
	defer key.Destroy()
	began := time.Now()
	bar := &progress{w: c.stderr, began: began, what: "sealing"}
	sealed, err := seal.Seal(ctx, key, name, tree.Sources, out, seal.Options{Progress: bar.at})
	bar.end()
	if err != nil {
		return err
	}
	spent := time.Since(began)
	if err := c.register(ctx, b, key, name, kind, string(sealed.Digest), info.GetOwnerWrapKey()); err != nil {
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
func (c *cli) register(ctx context.Context, b brokerClient, key *keys.DataKey, name string, kind brokerv1.AssetKind, digest string, public []byte) error {
	enc, ct, err := key.Wrap(public, []byte(receipt.OwnerWrapInfo), []byte(name))
	if err != nil {
		return fmt.Errorf("wrap the data key to the broker: %w", err)
	}
	_, err = call(ctx, c, "register asset "+name, serverBroker, b.CreateAsset, &brokerv1.CreateAssetRequest{Name: name, Kind: kind, Digest: digest, WrappedEnc: enc, WrappedKey: ct})
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
	return group("assets", "Register and list sealed assets", c.assetsCreateCmd(), c.assetsListCmd())
}

func (c *cli) assetsCreateCmd() *cobra.Command {
	var kind string
	cmd := &cobra.Command{
		Use:   "create NAME --kind checkpoints",
		Short: "Register an asset under whose key a job's checkpoints are sealed",
		Long: `create registers an asset whose objects come later. Only checkpoints are
created like this; datasets and weights come with coffer seal.`,
		Example: "  coffer assets create fashion-checkpoints --kind checkpoints",
		Args:    exactly("an asset name"),
	}
	cmd.Flags().StringVar(&kind, "kind", "", "must be `checkpoints`")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if kind != "checkpoints" {
			return usagef(cmd, "--kind %q: want checkpoints; datasets and weights are made by `coffer seal`", kind)
		}
		if err := checkAssetName(cmd, args[0]); err != nil {
			return err
		}
		b, err := c.broker()
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "register asset "+args[0], serverBroker, b.CreateAsset, &brokerv1.CreateAssetRequest{Name: args[0], Kind: assetKinds()[kind]})
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
		b, err := c.broker()
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

// grantView is a grant in JSON output.
type grantView struct {
	ID             string     `json:"id"`
	Assets         []string   `json:"assets"`
	PlanDigest     string     `json:"planDigest"`
	NotBefore      *time.Time `json:"notBefore,omitempty"`
	NotAfter       *time.Time `json:"notAfter,omitempty"`
	MaxReleases    int32      `json:"maxReleases"`
	Used           int32      `json:"used"`
	State          string     `json:"state"`
	Owner          string     `json:"owner"`
	AllowSimulated bool       `json:"allowSimulated"`
}

func viewGrant(g *brokerv1.Grant) grantView {
	return grantView{g.GetId(), g.GetAssets(), g.GetPlanDigest(), stamp(g.GetNotBeforeUnix()), stamp(g.GetNotAfterUnix()), g.GetMaxReleases(), g.GetUsed(), g.GetState(), g.GetOwner(), g.GetAllowSimulated()}
}

// maxGrant bounds how long a grant may last.
const maxGrant = 10 * 365 * 24 * time.Hour

func (c *cli) grantCmd() *cobra.Command {
	return group("grant", "Let a plan use assets", c.grantCreateCmd())
}

func (c *cli) grantCreateCmd() *cobra.Command {
	var digest string
	var assets []string
	var releases int32
	var lasts time.Duration
	var simulated bool
	cmd := &cobra.Command{
		Use:   "create --plan DIGEST --asset NAME [--asset NAME]...",
		Short: "Grant one plan the use of your assets",
		Long: `create lets jobs of one plan, and of no other, obtain the keys of the named
assets once a verifier has accepted their evidence. coffer plan prints the
digest of a job file. Evidence of an emulated machine counts only with
--allow-simulated.`,
		Example: "  coffer grant create --plan sha384:4f2c... --asset fashion-mnist --asset fashion-weights --releases 3 --for 24h",
		Args:    exactly(),
	}
	cmd.Flags().StringVar(&digest, "plan", "", "plan `digest`, as coffer plan prints it")
	cmd.Flags().StringArrayVar(&assets, "asset", nil, "`name` of an asset; may be repeated")
	cmd.Flags().Int32Var(&releases, "releases", 1, "`number` of attempts that may use the grant")
	cmd.Flags().DurationVar(&lasts, "for", 24*time.Hour, "how `long` the grant lasts, from now")
	cmd.Flags().BoolVar(&simulated, "allow-simulated", false, "accept evidence that is simulated")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := plan.ParseDigest(digest)
		switch {
		case digest == "":
			return usagef(cmd, "name the plan with --plan")
		case err != nil:
			return usagef(cmd, "--plan: %s", err)
		case len(assets) == 0:
			return usagef(cmd, "name at least one asset with --asset")
		case releases < 1:
			return usagef(cmd, "--releases %d: want at least 1", releases)
		case lasts < time.Second || lasts > maxGrant:
			return usagef(cmd, "--for %s: want between 1s and %s", lasts, maxGrant)
		}
		for _, a := range assets {
			if err := checkAssetName(cmd, a); err != nil {
				return err
			}
		}
		b, err := c.broker()
		if err != nil {
			return err
		}
		now := time.Now()
		res, err := call(cmd.Context(), c, "create grant", serverBroker, b.CreateGrant, &brokerv1.CreateGrantRequest{
			Assets: assets, PlanDigest: string(d), NotBeforeUnix: now.Unix(), NotAfterUnix: now.Add(lasts).Unix(), MaxReleases: releases, AllowSimulated: simulated,
		})
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, viewGrant(res.GetGrant()))
		}
		_, err = fmt.Fprintln(c.stdout, res.GetGrant().GetId())
		return err
	}
	return cmd
}

func (c *cli) grantsCmd() *cobra.Command {
	return group("grants", "List grants", c.grantsListCmd())
}

func (c *cli) grantsListCmd() *cobra.Command {
	var digest string
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List grants",
		Example: "  coffer grants ls\n  coffer grants ls --plan sha384:4f2c... --output json",
		Args:    exactly(),
	}
	cmd.Flags().StringVar(&digest, "plan", "", "only grants of this plan `digest`")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if digest != "" {
			if _, err := plan.ParseDigest(digest); err != nil {
				return usagef(cmd, "--plan: %s", err)
			}
		}
		b, err := c.broker()
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "list grants", serverBroker, b.ListGrants, &brokerv1.ListGrantsRequest{PlanDigest: digest})
		if err != nil {
			return err
		}
		list := []grantView{}
		rows := [][]string{{"GRANT", "STATE", "USED", "UNTIL", "SIMULATED", "ASSETS", "PLAN"}}
		for _, g := range res.GetGrants() {
			v := viewGrant(g)
			list = append(list, v)
			allowed := "refused"
			if v.AllowSimulated {
				allowed = "allowed"
			}
			rows = append(rows, []string{v.ID, v.State, fmt.Sprintf("%d of %d", v.Used, v.MaxReleases), clock(g.GetNotAfterUnix()), allowed, strings.Join(v.Assets, ","), short(v.PlanDigest)})
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, list)
		}
		return table(c.stdout, rows...)
	}
	return cmd
}

// short abbreviates a digest for people.
func short(digest string) string {
	const keep = len("sha384:") + 12
	if len(digest) <= keep {
		return digest
	}
	return digest[:keep] + "..."
}

func (c *cli) revokeCmd() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "revoke GRANT --reason TEXT",
		Short: "Withdraw a grant at once",
		Long: `revoke ends a grant: no key is released under it from then on. Keys that jobs
have obtained already stay with those jobs until they end.`,
		Example: "  coffer revoke g-7f31 --reason 'licence ended'",
		Args:    exactly("a grant id"),
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the log: one line of `text`")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.TrimSpace(reason) == "" {
			return usagef(cmd, "say why with --reason")
		}
		if clean(reason) != reason || len(reason) > 256 {
			return usagef(cmd, "--reason: want one line of at most 256 bytes, %s given", strconv.Itoa(len(reason)))
		}
		b, err := c.broker()
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "revoke grant "+args[0], serverBroker, b.RevokeGrant, &brokerv1.RevokeGrantRequest{Id: args[0], Reason: reason})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "grant %s is %s\n", res.GetGrant().GetId(), clean(res.GetGrant().GetState()))
		return err
	}
	return cmd
}
