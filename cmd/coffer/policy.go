package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// defaultLifetime is that of signed reference values: a leaked key or a bad list
// ends by itself.
const defaultLifetime = 30 * 24 * time.Hour

func (c *cli) policyCmd() *cobra.Command {
	return group("policy", "Show and pack appraisal policies, and sign reference values for them", c.policyShow(), c.policyPack(), c.policySource(), c.policySign())
}

func (c *cli) policyShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show POLICY",
		Short: "Say what a policy demands, and its digest",
		Long: `show reads a policy: one that ships with coffer, by name, a document, or a folder
with policy.json and its rules. Its digest is what plans and results pin. Rules
that do not compile, or use a function that a verifier does not let them use, are
an error.`,
		Example: "  coffer policy show production\n  coffer policy show ./my-policy --output json",
		Args:    exactly("a policy"),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		p, err := readPolicy(args[0])
		if err != nil {
			return err
		}
		d, err := p.Digest()
		if err != nil {
			return err
		}
		if *output == formatJSON {
			return writeJSON(c.stdout, struct {
				Digest plan.Digest   `json:"digest"`
				Policy policy.Policy `json:"policy"`
			}{d, p})
		}
		return table(c.stdout, append([][]string{{"POLICY", p.Name}, {"digest", string(d)}}, demands(p)...)...)
	}
	return cmd
}

// demands lists what a policy asks for, for people.
func demands(p policy.Policy) [][]string {
	rows := [][]string{{"simulated devices", yes(p.AllowSimulated, "accepted", "refused")}}
	add := func(name, v string) { rows = append(rows, []string{name, v}) }
	add("snp requires", strings.Join(p.SNP.Require, " "))
	add("snp measurements", listed(len(p.SNP.Measurements), p.SNP.RequireMeasurement))
	if t := p.TPM; t == nil {
		add("tpm", "not asked for")
	} else {
		add("tpm requires", strings.Join(t.Require, " "))
		classes := make([]string, len(t.Classes))
		for i, c := range t.Classes {
			classes[i] = string(c)
		}
		add("tpm classes", strings.Join(classes, " "))
		add("tpm PCRs to be listed", orDash(strings.Join(t.RequirePCRs, " ")))
		add("tpm self-measured logs", yes(t.AllowSelfMeasured, "accepted", "refused"))
	}
	if g := p.GPU; g == nil {
		add("gpu", "plans with GPUs are refused")
	} else {
		add("gpu requires", strings.Join(g.Require, " "))
		add("gpu modes", strings.Join(g.FeatureFlags, " "))
	}
	sources := make([]string, len(p.Sources))
	for i, s := range p.Sources {
		sources[i] = s.Issuer
	}
	add("reference values signed by", orDash(strings.Join(sources, " ")))
	add("rules", strings.Join(slices.Sorted(maps.Keys(p.Rules)), " "))
	return rows
}

func yes(v bool, is, isNot string) string {
	if v {
		return is
	}
	return isNot
}

func listed(n int, required bool) string {
	s := "not listed here"
	if n > 0 {
		s = strconv.Itoa(n) + " listed here"
	}
	if required {
		s += ", refused while nobody lists any"
	}
	return s
}

// readPolicy reads a policy by name, from a folder or from a document, and
// compiles its rules as a verifier does. A file of a shipped policy's name is named
// with a slash.
func readPolicy(where string) (policy.Policy, error) {
	p, err := findPolicy(where)
	if err != nil {
		return policy.Policy{}, err
	}
	if _, err := rego.Compile(p); err != nil {
		return policy.Policy{}, fmt.Errorf("%s: %w", where, err)
	}
	return p, nil
}

func findPolicy(where string) (policy.Policy, error) {
	if slices.Contains(policy.Names(), where) {
		return policy.Named(where)
	}
	info, err := os.Stat(where)
	if errors.Is(err, os.ErrNotExist) {
		return policy.Policy{}, fmt.Errorf("no policy %s: there are %s, and no such file", where, strings.Join(policy.Names(), ", "))
	}
	if err != nil {
		return policy.Policy{}, err
	}
	if info.IsDir() {
		return policy.ParseFolder(os.DirFS(where))
	}
	b, err := readFile(where, policy.MaxSize)
	if err != nil {
		return policy.Policy{}, err
	}
	return policy.Parse(b)
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path) // #nosec G304 -- the user names the file
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes", path, limit)
	}
	return b, nil
}

func (c *cli) policyPack() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "pack POLICY --out FILE",
		Short: "Write a policy as one document, with its rules in it",
		Long: `pack writes a policy in canonical form into one new file, which a verifier reads
as it is. The digest is that of the folder or document that it was packed from. A
policy whose rules a verifier would refuse is not packed.`,
		Example: "  coffer policy pack ./my-policy --out my-policy.json",
		Args:    exactly("a policy"),
	}
	cmd.Flags().StringVar(&out, "out", "", "new `file` for the document")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if out == "" {
			return usagef(cmd, "say where the document goes with --out")
		}
		p, err := readPolicy(args[0])
		if err != nil {
			return err
		}
		d, err := p.Digest()
		if err != nil {
			return err
		}
		b, err := plan.Canonical(p)
		if err != nil {
			return err
		}
		if err := writeNew(out, b); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "%s: policy %s, %s\n", out, p.Name, d)
		return err
	}
	return cmd
}

// writeNew writes a public file that was not there before.
func writeNew(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) // #nosec G302 G304 -- public, and the user names the file
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// signerFlags are the key that signs reference values and the name that it does
// so under.
func signerFlags(cmd *cobra.Command) func() (*receipt.Signer, error) {
	var key, issuer string
	cmd.Flags().StringVar(&key, "key", "", "`file` with the P-384 key that signs, PKCS#8 in PEM; made if it is not there")
	cmd.Flags().StringVar(&issuer, "issuer", "", "`name` of who signs, as policies name it")
	return func() (*receipt.Signer, error) {
		if key == "" || issuer == "" {
			return nil, usagef(cmd, "say who signs with --key and --issuer")
		}
		if _, err := os.Lstat(key); errors.Is(err, os.ErrNotExist) {
			if err := keyfile.CreateP384(key); err != nil {
				return nil, err
			}
		}
		k, err := keyfile.ReadP384(key)
		if err != nil {
			return nil, err
		}
		return receipt.NewSigner(issuer, k)
	}
}

func (c *cli) policySource() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "source --key FILE --issuer NAME",
		Short: "Print who signs reference values, as a policy names it",
		Long: `source prints an entry of a policy's "sources": the name and the public key of
who signs reference values. The key is made if it is not there.`,
		Example: "  coffer policy source --key values-key.pem --issuer values.example",
		Args:    exactly(),
	}
	signer := signerFlags(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		s, err := signer()
		if err != nil {
			return err
		}
		jwks, err := s.JWKS()
		if err != nil {
			return err
		}
		return writeJSON(c.stdout, policy.Source{Issuer: s.Issuer(), Keys: jwks})
	}
	return cmd
}

func (c *cli) policySign() *cobra.Command {
	var out string
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "sign VALUES --key FILE --issuer NAME --out FILE",
		Short: "Sign reference values",
		Long: `sign reads reference values and signs them for a verifier: launch measurements,
PCRs, versions that policies with this source then accept, and no others. VALUES
is JSON with "snp", "tpm" and "gpu", of which each may be left out; who signs, and
from when and until when the values hold, are put in here.`,
		Example: "  coffer policy sign values.json --key values-key.pem --issuer values.example --out values.jwt",
		Args:    exactly("a file of reference values"),
	}
	signer := signerFlags(cmd)
	cmd.Flags().StringVar(&out, "out", "", "new `file` for the signed values")
	cmd.Flags().DurationVar(&lifetime, "valid", defaultLifetime, "how long the values hold")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case out == "":
			return usagef(cmd, "say where the signed values go with --out")
		case lifetime < time.Minute:
			return usagef(cmd, "--valid %s: want a minute or more", lifetime)
		}
		b, err := readFile(args[0], receipt.MaxToken)
		if err != nil {
			return err
		}
		var given struct {
			SNP json.RawMessage `json:"snp"`
			TPM json.RawMessage `json:"tpm"`
			GPU json.RawMessage `json:"gpu"`
		}
		if err := plan.Decode(b, receipt.MaxToken, &given); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		var v policy.Values
		if err := plan.Decode(b, receipt.MaxToken, &v); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		now := time.Now()
		v.IssuedAt, v.Expires = now.Unix(), now.Add(lifetime).Unix()
		s, err := signer()
		if err != nil {
			return err
		}
		token, err := policy.SignValues(s, v)
		if err != nil {
			return err
		}
		if err := writeNew(out, []byte(token)); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "%s: signed by %s until %s, %s\n", out, s.Issuer(), time.Unix(v.Expires, 0).UTC().Format(time.RFC3339), plan.Sum([]byte(token)))
		return err
	}
	return cmd
}
