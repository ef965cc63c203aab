package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/internal/stack"
)

func (c *cli) imageCmd() *cobra.Command {
	return group("image", "List, import and remove the images of a stack's node", c.imageListCmd(), c.imageImportCmd(), c.imageRemoveCmd())
}

// imageView is an image in JSON output.
type imageView struct {
	Name   string    `json:"name"`
	Digest string    `json:"digest"`
	Bytes  int64     `json:"bytes"`
	Added  time.Time `json:"added"`
	Signed bool      `json:"signed"`
}

func (c *cli) imageListCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the images of a stack's node",
		Long: `ls lists what job files can name: images that were imported, and those that the
node fetched from a registry. A job file names one as NAME, or as NAME@DIGEST. An image
without a file of a signature is refused when a job is planned, unless its registry has
one.`,
		Example: "  coffer image ls",
		Args:    exactly(),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		e, err := stack.OpenEndpoint(c.dir)
		if err != nil {
			return err
		}
		list, err := e.Images(cmd.Context())
		if err != nil {
			return err
		}
		views, rows := []imageView{}, [][]string{{"IMAGE", "DIGEST", "SIZE", "ADDED", "SIGNED"}}
		for _, i := range list {
			views = append(views, imageView{i.Name, i.Digest, i.Bytes, i.Added.UTC(), i.Signed})
			signed := "no"
			if i.Signed {
				signed = "yes"
			}
			rows = append(rows, []string{clean(i.Name), i.Digest, size(i.Bytes), clock(i.Added.Unix()), signed})
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, views)
		}
		return table(c.stdout, rows...)
	}
	return cmd
}

func (c *cli) imageImportCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import ARCHIVE",
		Short: "Bring an OCI archive into a stack that is up, signed with the stack's key",
		Long: `import brings the images of an archive, an OCI layout or what "docker save" writes,
into the stack, as "coffer up --image" does. The stack signs them: it plays whoever
publishes them. The next "coffer up" has them too.`,
		Example: "  coffer image import build/images/torch.tar",
		Args:    exactly("an archive"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		e, err := stack.OpenEndpoint(c.dir)
		if err != nil {
			return err
		}
		names, err := e.ImportImages(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, map[string][]string{"imported": names})
		}
		_, err = fmt.Fprintf(c.stdout, "imported %s\n", clean(strings.Join(names, ", ")))
		return err
	}
	return cmd
}

func (c *cli) imageRemoveCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rm IMAGE...",
		Short: "Remove images from a stack that is up",
		Long: `rm removes images, and the archives that the stack kept of them. It removes none if a
job uses one of them. Records of jobs that ran them stay.`,
		Example: "  coffer image rm coffer.local/torch:latest",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef(cmd, "an image is missing")
			}
			return nil
		},
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		e, err := stack.OpenEndpoint(c.dir)
		if err != nil {
			return err
		}
		if err := e.RemoveImages(cmd.Context(), args...); err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, map[string][]string{"removed": args})
		}
		_, err = fmt.Fprintf(c.stdout, "removed %s\n", clean(strings.Join(args, ", ")))
		return err
	}
	return cmd
}
