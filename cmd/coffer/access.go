package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker/access"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

func (c *cli) accessCmd() *cobra.Command {
	return group("access", "Make, sign and check the policies of who may do what", c.accessInitCmd(), c.accessPackCmd(), c.accessSignCmd(), c.accessCheckCmd())
}

func (c *cli) accessInitCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "init DIR",
		Short:   "Write the policies that coffer comes with, to begin from",
		Example: "  coffer access init policies",
		Args:    exactly("a new folder"),
		RunE: func(_ *cobra.Command, args []string) error {
			files, err := access.DefaultPolicies()
			if err != nil {
				return err
			}
			files[access.PeopleFile] = []byte("{\n  \"groups\": [],\n  \"users\": []\n}\n")
			if err := os.Mkdir(args[0], 0o750); err != nil {
				return err
			}
			for name, b := range files {
				if err := keyfile.Write(filepath.Join(args[0], name), b); err != nil {
					return err
				}
			}
			_, err = fmt.Fprintf(c.stdout, "%s: say in %s who is who, then `coffer access pack`\n", args[0], access.PeopleFile)
			return err
		},
	}
}

func (c *cli) accessPackCmd() *cobra.Command {
	var broker string
	var serial uint64
	cmd := &cobra.Command{
		Use:   "pack DIR --broker ID --serial N",
		Short: "Write the manifest that maintainers sign",
		Long: `pack writes the digests of a folder's policies into its manifest.json, for one
broker and under a serial number that is higher than that of the set before. It
removes the signatures of the manifest before.`,
		Example: "  coffer access pack policies --broker broker.example.org --serial 7",
		Args:    exactly("the folder of a policy set"),
	}
	cmd.Flags().StringVar(&broker, "broker", "", "`id` of the broker that the set is for")
	cmd.Flags().Uint64Var(&serial, "serial", 0, "serial `number` of the set")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if broker == "" || serial == 0 {
			return usagef(cmd, "name the broker with --broker and the set's number with --serial")
		}
		files, err := access.ReadFiles(os.DirFS(args[0]))
		if err != nil {
			return err
		}
		manifest, err := access.Manifest(broker, serial, files)
		if err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(args[0], access.SignatureDir)); err != nil {
			return err
		}
		if err := keyfile.Write(filepath.Join(args[0], access.ManifestFile), manifest); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "packed set %d for %s: sign it with `coffer access sign`, or with ssh-keygen\n", serial, broker)
		return err
	}
	return cmd
}

var maintainerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func (c *cli) accessSignCmd() *cobra.Command {
	var keyFile, name string
	cmd := &cobra.Command{
		Use:   "sign DIR --key FILE --name NAME",
		Short: "Sign a manifest with an SSH key that is in a file",
		Long: `sign adds one maintainer's signature. A key in an agent, a token or a security
key signs by ssh-keygen -Y sign -n ` + access.Namespace + ` instead: move what it
writes to signatures/NAME.sig.`,
		Example: "  coffer access sign policies --key ~/.ssh/id_ed25519 --name ada",
		Args:    exactly("the folder of a policy set"),
	}
	cmd.Flags().StringVar(&keyFile, "key", "", "`file` of an SSH private key without a passphrase")
	cmd.Flags().StringVar(&name, "name", "", "maintainer's `name`, for the signature's file")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if keyFile == "" || !maintainerName.MatchString(name) {
			return usagef(cmd, "name the key with --key and its maintainer with --name")
		}
		b, err := keyfile.Read(keyFile)
		if err != nil {
			return err
		}
		defer clear(b)
		key, err := ssh.ParsePrivateKey(b)
		if err != nil {
			return fmt.Errorf("key %s: %w", keyFile, err)
		}
		manifest, err := os.ReadFile(filepath.Join(args[0], access.ManifestFile))
		if err != nil {
			return err
		}
		sig, err := access.Sign(key, manifest)
		if err != nil {
			return err
		}
		folder := filepath.Join(args[0], access.SignatureDir)
		if err := os.MkdirAll(folder, 0o750); err != nil {
			return err
		}
		return keyfile.Write(filepath.Join(folder, name+".sig"), sig)
	}
	return cmd
}

func (c *cli) accessCheckCmd() *cobra.Command {
	var trust access.Trust
	var maintainers string
	cmd := &cobra.Command{
		Use:   "check DIR --broker ID --maintainers FILE --threshold N",
		Short: "Check a signed set as a broker would",
		Long: `check says whether a broker with these maintainers would take the set. Each line
of the file of maintainers is a name and an SSH public key.`,
		Example: "  coffer access check policies --broker broker.example.org --maintainers maintainers --threshold 2",
		Args:    exactly("the folder of a policy set"),
	}
	cmd.Flags().StringVar(&trust.Broker, "broker", "", "`id` of the broker")
	cmd.Flags().StringVar(&maintainers, "maintainers", "", "`file` of maintainers")
	cmd.Flags().IntVar(&trust.Threshold, "threshold", 0, "`number` of maintainers who must have signed")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if trust.Broker == "" || maintainers == "" || trust.Threshold == 0 {
			return usagef(cmd, "say whom the broker trusts with --broker, --maintainers and --threshold")
		}
		var err error
		if trust.Maintainers, err = readMaintainers(maintainers); err != nil {
			return err
		}
		files, err := access.ReadFiles(os.DirFS(args[0]))
		if err != nil {
			return err
		}
		set, err := access.Open(files, trust)
		var refused *check.Refusal
		if errors.As(err, &refused) {
			return c.refused("check "+args[0], refused)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "set %d of %s holds, signed by %s\n%s\n", set.Serial(), trust.Broker, strings.Join(set.Signers(), ", "), set.Digest())
		return err
	}
	return cmd
}

func readMaintainers(path string) ([]access.Maintainer, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var out []access.Maintainer
	for line := range bytes.Lines(b) {
		name, key, ok := strings.Cut(strings.TrimSpace(string(line)), " ")
		if name == "" || strings.HasPrefix(name, "#") {
			continue
		}
		keys, err := sshsig.ParseKeys([]byte(key))
		if err != nil || !ok || len(keys) != 1 {
			return nil, errors.Join(fmt.Errorf("%s: %.60q: want a name and an SSH public key", path, strings.TrimSpace(string(line))), err)
		}
		out = append(out, access.Maintainer{Name: name, Key: keys[0]})
	}
	return out, nil
}
