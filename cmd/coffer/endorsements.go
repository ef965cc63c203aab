package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/serve"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/stack"
)

func (c *cli) endorsementsCmd() *cobra.Command {
	return group("endorsements", "Move what vendors publish about devices in and out of the verifier's folder", c.endorsementsImport(), c.endorsementsExport(), c.endorsementsLs())
}

// folderFlag is the verifier's folder, as its configuration has it.
func (c *cli) folderFlag(cmd *cobra.Command, name string) func() string {
	var dir string
	cmd.Flags().StringVar(&dir, name, "", "the verifier's `folder` of endorsements (default: verifier/endorsements in the stack's)")
	return func() string {
		if dir != "" {
			return dir
		}
		return filepath.Join(c.dir, "verifier", "endorsements")
	}
}

func (c *cli) endorsementsImport() *cobra.Command {
	var roots string
	cmd := &cobra.Command{
		Use:   "import DIR",
		Short: "Take the endorsements in DIR into the verifier's folder",
		Long: `import reads every file in DIR and below: certificates of chips (VCEK, VLEK),
their issuers' chains and revocation lists from AMD, certificate statuses (OCSP)
and reference manifests (RIM) from NVIDIA, in DER, PEM, XML or the manifest
service's JSON. A manifest in XML is named by its id, NV_GPU_....xml.

Each file is validated; what is refused is named, and the rest is taken. All must
lead to the pinned root keys: AMD's certificates and lists by the chain, NVIDIA's
manifests by the chain in them, and a certificate's status by the manifest or the
GPU's chain (PEM) in DIR that it is about. A list in a path with "vlek" in it is
about the issuers of VLEKs.
A verifier that runs sees the import by itself, and verifies all of it again
whenever it uses it.`,
		Example: "  coffer endorsements import /media/usb/endorsements --into /etc/coffer/endorsements",
		Args:    exactly("a folder"),
	}
	into := c.folderFlag(cmd, "into")
	cmd.Flags().StringVar(&roots, "simulation-roots", "", "`folder` of a simulation whose roots count instead of the vendors'")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if info, err := os.Stat(args[0]); err != nil || !info.IsDir() {
			return usagef(cmd, "%s is not a folder", args[0])
		}
		anchors := anchor.Vendor()
		if roots != "" {
			var err error
			if anchors, err = simulate.LoadRoots(roots); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(into(), 0o755); err != nil { // #nosec G301 -- endorsements are public
			return fmt.Errorf("import endorsements: %w", err)
		}
		folder, err := serve.OpenFolder(into(), c.unused)
		if err != nil {
			return err
		}
		now := time.Now()
		got, err := serve.Import(cmd.Context(), folder, args[0], anchors, now)
		for _, i := range got.Added {
			note := ""
			if !i.ValidAt(now) {
				note = ", not valid now"
			}
			if _, err := fmt.Fprintf(c.stdout, "added %s, until %s%s\n", clean(i.Key.String()), i.Until.UTC().Format(time.RFC3339), note); err != nil {
				return err
			}
		}
		for _, p := range got.Refused {
			_, _ = fmt.Fprintf(c.stderr, "refused %s\n", clean(p.String()))
		}
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(c.stdout, "%s: %d added, %d there already, %d refused\n", into(), len(got.Added), len(got.Known), len(got.Refused)); err != nil {
			return err
		}
		if len(got.Refused) > 0 {
			return &exitError{code: exitRefused}
		}
		return nil
	}
	return cmd
}

func (c *cli) unused(p endorse.Problem) {
	_, _ = fmt.Fprintf(c.stderr, "not used: %s\n", clean(p.String()))
}

func (c *cli) endorsementsExport() *cobra.Command {
	var file, out string
	var all bool
	cmd := &cobra.Command{
		Use:   "export (--bundle FILE | --all) -o DIR",
		Short: "Write the endorsements that an appraisal used into DIR",
		Long: `export writes the endorsements that the verifier used for the job of a bundle,
as its result lists them by digest, for a bundle that does not carry them itself.
It writes nothing if one is no longer there. With --all it writes everything in
the folder.

DIR can be a verifier's folder, and be imported.`,
		Example: "  coffer endorsements export --bundle bundle.json -o endorsements",
		Args:    exactly(),
	}
	from := c.folderFlag(cmd, "from")
	cmd.Flags().StringVar(&file, "bundle", "", "bundle `FILE` of a job")
	cmd.Flags().BoolVar(&all, "all", false, "everything in the folder")
	cmd.Flags().StringVarP(&out, "out", "o", "", "`DIR` to write into")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case out == "":
			return usagef(cmd, "say where to write with -o DIR")
		case (file == "") == !all:
			return usagef(cmd, "say what to write: either --bundle FILE or --all")
		}
		var used []endorse.Used
		if file != "" {
			var err error
			if used, err = usedInBundle(file); err != nil {
				return err
			}
		}
		folder, err := serve.OpenFolder(from(), c.unused)
		if err != nil {
			return err
		}
		items := folder.Library().All()
		if !all {
			if items, err = find(folder, used); err != nil {
				return err
			}
		}
		if err := serve.Export(out, items); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "%s: %d endorsements\n", out, len(items))
		return err
	}
	return cmd
}

// find returns what was used, or says what of it is gone.
func find(folder *serve.Folder, used []endorse.Used) ([]endorse.Held, error) {
	out := make([]endorse.Held, 0, len(used))
	var gone []string
	for _, u := range used {
		h, ok := folder.Library().ByDigest(u.Key, u.Digest)
		if !ok {
			gone = append(gone, clean(u.Key.String())+" "+string(u.Digest))
			continue
		}
		out = append(out, h)
	}
	if len(gone) > 0 {
		return nil, errors.New("the folder no longer has " + strings.Join(gone, ", "))
	}
	return out, nil
}

// usedInBundle reads the list in a bundle's result. Nothing of the bundle is
// verified: the list only says which files to copy.
func usedInBundle(path string) ([]endorse.Used, error) {
	f, err := os.Open(path) // #nosec G304 -- the user names the file
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	body, err := io.ReadAll(io.LimitReader(f, bundle.MaxSize+1))
	if err != nil {
		return nil, err
	}
	b, err := bundle.Parse(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	token, ok := b.Parts[bundle.Result]
	if !ok || len(token) > receipt.MaxToken {
		return nil, fmt.Errorf("%s: the bundle has no attestation result: the job was not appraised", path)
	}
	jws, err := jose.ParseSignedCompact(string(token), []jose.SignatureAlgorithm{jose.ES384})
	if err != nil {
		return nil, fmt.Errorf("%s: attestation result: %w", path, err)
	}
	var r receipt.Result
	if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &r); err != nil {
		return nil, fmt.Errorf("%s: attestation result: %w", path, err)
	}
	used, err := endorse.UsedIn(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(used) == 0 {
		return nil, fmt.Errorf("%s: the appraisal used no endorsements but those in the evidence, which the bundle has", path)
	}
	return used, nil
}

func (c *cli) endorsementsLs() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the verifier's endorsements",
		Example: "  coffer endorsements ls",
		Args:    exactly(),
	}
	from := c.folderFlag(cmd, "from")
	output := outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		folder, err := serve.OpenFolder(from(), c.unused)
		if err != nil {
			if _, serr := stack.OpenEndpoint(c.dir); serr == nil && errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(from(), filepath.Clean(c.dir)+"/") {
				return fmt.Errorf("the verifier of the stack in %s has no endorsements: `coffer endorsements import DIR` gives it some; simulated devices need none", c.dir)
			}
			return c.orNoStack(from(), err)
		}
		type row struct {
			endorse.Key
			Digest  string    `json:"digest"`
			From    time.Time `json:"from"`
			Until   time.Time `json:"until"`
			Checked time.Time `json:"checked"`
		}
		rows := []row{}
		text := [][]string{{"KIND", "FROM", "UNTIL", "CHECKED", "ID"}}
		for _, h := range folder.Library().All() {
			rows = append(rows, row{h.Key, string(h.Digest), h.From.UTC(), h.Until.UTC(), h.Checked.UTC()})
			text = append(text, []string{string(h.Key.Kind), clock(h.From.Unix()), clock(h.Until.Unix()), clock(h.Checked.Unix()), h.Key.ID})
		}
		if *output == formatJSON {
			return writeJSON(c.stdout, rows)
		}
		return table(c.stdout, text...)
	}
	return cmd
}
