package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/internal/stack"
)

// ruleForm is "COUNT of GROUP".
var ruleForm = regexp.MustCompile(`^([1-9][0-9]{0,2}) of ([A-Za-z0-9][A-Za-z0-9._-]{0,62})$`)

// policyFlags are the labels and the policy of an asset, as flags.
type policyFlags struct {
	approvals, verifiers, protocols, kems []string
	threshold                             int32
	lease, grace, maxDuration, resultAge  time.Duration
	maxReleases                           int32
	stopAtExpiry, stopAtDisabled          bool
	sensitivity, region, project          string
	keyStore                              string
	key                                   string
}

func (f *policyFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.approvals, "approvals", nil, "`'COUNT of GROUP'` that must approve every grant, as '2 of weights-approvers'; may be repeated")
	cmd.Flags().StringArrayVar(&f.verifiers, "verifier", nil, "`name` of a verifier whose results count; may be repeated (default: all that the broker trusts)")
	cmd.Flags().Int32Var(&f.threshold, "verifier-threshold", 1, "`number` of verifiers that must have judged a job")
	cmd.Flags().StringArrayVar(&f.protocols, "protocol", nil, "`coffer` or kbs; may be repeated (default: coffer)")
	cmd.Flags().StringArrayVar(&f.kems, "kem", nil, "`mlkem768-x25519` or x25519; may be repeated (default: mlkem768-x25519)")
	cmd.Flags().DurationVar(&f.lease, "lease", time.Minute, "how `long` a job runs on while its node cannot reach the broker")
	cmd.Flags().DurationVar(&f.grace, "grace", 10*time.Second, "how `long` a job that is told to stop has for a last checkpoint")
	cmd.Flags().Int32Var(&f.maxReleases, "max-releases", 0, "most `attempts` that one grant may allow (default: the broker's bound)")
	cmd.Flags().DurationVar(&f.maxDuration, "max-duration", 0, "`longest` that one grant may last (default: the broker's bound)")
	cmd.Flags().DurationVar(&f.resultAge, "max-result-age", 0, "how `old` a running job's newest attestation result may become before the job is stopped (default: any age)")
	cmd.Flags().BoolVar(&f.stopAtExpiry, "stop-at-expiry", false, "stop jobs when their grant ends, not only when it is revoked")
	cmd.Flags().BoolVar(&f.stopAtDisabled, "stop-at-key-disabled", false, "stop jobs when the key-encryption key is disabled at its store")
	keyFlag(cmd, &f.key)
	cmd.Flags().StringVar(&f.sensitivity, "sensitivity", "", "`label` that access policies look at")
	cmd.Flags().StringVar(&f.region, "region", "", "`label` that access policies look at")
	cmd.Flags().StringVar(&f.project, "project", "", "`label` that access policies look at")
}

// apply puts the flags that were given over p and l.
func (f *policyFlags) apply(cmd *cobra.Command, p *brokerv1.AssetPolicy, l *brokerv1.Labels) error {
	given := cmd.Flags().Changed
	if given("approvals") {
		p.Approvals = nil
		for _, s := range f.approvals {
			m := ruleForm.FindStringSubmatch(s)
			if m == nil {
				return usagef(cmd, "--approvals %.80q: want COUNT of GROUP, as '2 of weights-approvers'", s)
			}
			n, err := strconv.ParseInt(m[1], 10, 32)
			if err != nil {
				return usagef(cmd, "--approvals %.80q: %s", s, err)
			}
			p.Approvals = append(p.Approvals, &brokerv1.ApprovalRule{Group: m[2], Count: int32(n)})
		}
	}
	for name, set := range map[string]func(){
		"verifier":             func() { p.Verifiers = f.verifiers },
		"verifier-threshold":   func() { p.VerifierThreshold = f.threshold },
		"protocol":             func() { p.Protocols = f.protocols },
		"kem":                  func() { p.Kems = f.kems },
		"lease":                func() { p.LeaseSeconds = int64(f.lease / time.Second) },
		"grace":                func() { p.GraceSeconds = int64(f.grace / time.Second) },
		"max-releases":         func() { p.MaxReleases = f.maxReleases },
		"max-duration":         func() { p.MaxDurationSeconds = int64(f.maxDuration / time.Second) },
		"max-result-age":       func() { p.MaxResultAgeSeconds = int64(f.resultAge / time.Second) },
		"stop-at-expiry":       func() { p.StopAtExpiry = f.stopAtExpiry },
		"stop-at-key-disabled": func() { p.StopAtKeyDisabled = f.stopAtDisabled },
		"sensitivity":          func() { l.Sensitivity = f.sensitivity },
		"region":               func() { l.Region = f.region },
		"project":              func() { l.Project = f.project },
	} {
		if given(name) {
			set()
		}
	}
	return nil
}

// fresh returns the policy and labels of a new asset, nil where no flag sets any.
func (f *policyFlags) fresh(cmd *cobra.Command) (*brokerv1.AssetPolicy, *brokerv1.Labels, error) {
	// A policy that is given has no default of its own for the grace.
	p, l := &brokerv1.AssetPolicy{GraceSeconds: int64(f.grace / time.Second)}, &brokerv1.Labels{}
	return p, l, f.apply(cmd, p, l)
}

func (c *cli) assetsPolicyCmd() *cobra.Command {
	var f policyFlags
	cmd := &cobra.Command{
		Use:   "policy NAME [flags]",
		Short: "Change who must approve the use of an asset, and how it is released",
		Long: `policy changes what its flags name and leaves the rest as it is. It holds from
the next release on, also for grants that were approved before. An owner whose
key is in the broker's policy set signs it; without other flags the policy is
signed as it is.`,
		Example: "  coffer assets policy frontier-weights --approvals '2 of weights-approvers' --lease 30s",
		Args:    exactly("an asset name"),
	}
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkAssetName(cmd, args[0]); err != nil {
			return err
		}
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		got, err := call(cmd.Context(), c, "look up asset "+args[0], serverBroker, b.GetAsset, &brokerv1.GetAssetRequest{Name: args[0]})
		if err != nil {
			return err
		}
		p, l := got.GetAsset().GetPolicy(), got.GetAsset().GetLabels()
		if p == nil {
			p = &brokerv1.AssetPolicy{GraceSeconds: int64(f.grace / time.Second)}
		}
		if l == nil {
			l = &brokerv1.Labels{}
		}
		if err := f.apply(cmd, p, l); err != nil {
			return err
		}
		req := &brokerv1.UpdateAssetPolicyRequest{Name: args[0], Policy: p, Labels: l, Revision: got.GetAsset().GetRevision()}
		h, err := c.hand(cmd.Context(), f.key)
		if err != nil {
			return err
		}
		defer h.close()
		if h.signer != nil {
			settle(p)
			if req.Statement, req.StatementSignature, err = h.policy(cmd.Context(), c, b, args[0], req.GetRevision()+1, p, l); err != nil {
				return err
			}
		}
		res, err := call(cmd.Context(), c, "change the policy of asset "+args[0], serverBroker, b.UpdateAssetPolicy, req)
		if err != nil {
			return err
		}
		return table(c.stdout, assetRows(res.GetAsset())...)
	}
	return cmd
}

func (c *cli) assetsShowCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show NAME",
		Short:   "Show an asset and its policy",
		Example: "  coffer assets show frontier-weights",
		Args:    exactly("an asset name"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "look up asset "+args[0], serverBroker, b.GetAsset, &brokerv1.GetAssetRequest{Name: args[0]})
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, viewAsset(res.GetAsset()))
		}
		return table(c.stdout, assetRows(res.GetAsset())...)
	}
	return cmd
}

func assetRows(a *brokerv1.Asset) [][]string {
	p, l := a.GetPolicy(), a.GetLabels()
	approvals := "the owner's consent"
	if rules := ruleTexts(p); len(rules) > 0 {
		approvals = strings.Join(rules, " and ")
	}
	return [][]string{
		{"asset", a.GetName()}, {"kind", kindName(a.GetKind())}, {"owner", a.GetOwner()}, {"digest", orDash(a.GetDigest())}, {"created", clock(a.GetCreatedUnix())},
		{"revision", strconv.FormatInt(a.GetRevision(), 10)}, {"key store", orDash(a.GetKeyStore())},
		{"policy signed", signedBy(a)}, {"approvals", approvals}, {"verifiers", orDash(strings.Join(p.GetVerifiers(), ", "))}, {"protocols", orDash(strings.Join(p.GetProtocols(), ", "))},
		{"lease", seconds(p.GetLeaseSeconds())}, {"grace", seconds(p.GetGraceSeconds())}, {"result age", resultAge(p)},
		{"sensitivity", orDash(l.GetSensitivity())}, {"region", orDash(l.GetRegion())}, {"project", orDash(l.GetProject())},
	}
}

func resultAge(p *brokerv1.AssetPolicy) string {
	if p.GetMaxResultAgeSeconds() == 0 {
		return "any"
	}
	return "at most " + seconds(p.GetMaxResultAgeSeconds())
}

// signedBy names the key that signed the policy, as the signature has it.
func signedBy(a *brokerv1.Asset) string {
	key, err := sshsig.Key(a.GetStatementSignature())
	if len(a.GetStatement()) == 0 || err != nil {
		return "no"
	}
	return ssh.FingerprintSHA256(key)
}

func ruleTexts(p *brokerv1.AssetPolicy) []string {
	var out []string
	for _, r := range p.GetApprovals() {
		out = append(out, fmt.Sprintf("%d of %s", r.GetCount(), r.GetGroup()))
	}
	return out
}

func seconds(n int64) string { return (time.Duration(n) * time.Second).String() }

// me is the name of who signed in; nobody is an error.
func (c *cli) me(ctx context.Context) (string, error) {
	e, err := stack.OpenEndpoint(c.dir)
	if err != nil {
		return "", err
	}
	name, _, err := c.signedIn(ctx, e)
	if err != nil {
		return "", err
	}
	if name == "" {
		return "", &exitError{code: exitRefused, text: "nobody is signed in: run `coffer login`"}
	}
	return name, nil
}
