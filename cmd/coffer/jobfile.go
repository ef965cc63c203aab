package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/runner/jobspec"
)

// settingsFlag adds --set to commands that take a job file.
func settingsFlag(cmd *cobra.Command) *[]string {
	var set []string
	cmd.Flags().StringArrayVar(&set, "set", nil, "`FIELD=VALUE` in place of what the job file has, as env.EPOCHS=3; may be repeated")
	return &set
}

// jobFile reads a job file and makes the settings.
func (c *cli) jobFile(path string, settings []string) ([]byte, error) {
	file, err := c.readJobFile(path)
	if err != nil || len(settings) == 0 {
		return file, err
	}
	if file, err = jobspec.Set(file, settings); err != nil {
		return nil, &exitError{code: exitUsage, text: "--set: " + err.Error(), err: err}
	}
	return file, nil
}

func (c *cli) initCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "init [FILE]",
		Short: "Write a job file with every field in it and what each is for",
		Long: `init writes a job file to start from. Fields that a job can do without are
comments: take the # away.`,
		Example: "  coffer init\n  coffer init train.yaml",
		Args:    cobra.MaximumNArgs(1),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		path := "job.yaml"
		if len(args) > 0 {
			path = args[0]
		}
		text := jobspec.Example()
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) // #nosec G302 -- a job file is for others to read
		if errors.Is(err, fs.ErrExist) {
			return &exitError{code: exitUsage, text: path + " exists: name another file", err: err}
		}
		if err != nil {
			return err
		}
		_, err = f.WriteString(text)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, map[string]any{"file": path, "bytes": len(text)})
		}
		_, err = fmt.Fprintf(c.stdout, "wrote %s. Change it, then `coffer validate %s`\n", path, path)
		return err
	}
	return cmd
}

func (c *cli) validateCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate JOB.yaml",
		Short: "Find everything that is wrong with a job file, without a stack",
		Long: `validate makes the checks that the node agent makes of a job file, and names every
problem with its line and field. What only a node knows, such as whether it has the
image, coffer plan says.`,
		Example: "  coffer validate job.yaml\n  coffer validate job.yaml --set env.EPOCHS=3 --output json",
		Args:    exactly("a job file"),
	}
	set, out := settingsFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		file, err := c.jobFile(args[0], *set)
		if err != nil {
			return err
		}
		_, err = jobspec.Parse(file)
		problems := jobspec.Problems(err)
		if err != nil && len(problems) == 0 {
			return err
		}
		if *out == formatJSON {
			view := struct {
				Valid    bool             `json:"valid"`
				Problems []*jobspec.Error `json:"problems"`
			}{err == nil, append([]*jobspec.Error{}, problems...)}
			if err := writeJSON(c.stdout, view); err != nil {
				return err
			}
		} else if err := c.sayProblems(args[0], problems); err != nil {
			return err
		}
		if err != nil {
			return &exitError{code: exitUsage, err: err}
		}
		return nil
	}
	return cmd
}

// sayProblems writes a line for each problem as compilers do, so that editors find
// the place.
func (c *cli) sayProblems(file string, problems []*jobspec.Error) error {
	if len(problems) == 0 {
		_, err := fmt.Fprintf(c.stdout, "%s is a job file. Next: `coffer plan %s`\n", file, file)
		return err
	}
	for _, p := range problems {
		at := file
		if p.Line > 0 {
			at = fmt.Sprintf("%s:%d", file, p.Line)
		}
		if p.Field != "" {
			at += ": " + p.Field
		}
		if _, err := fmt.Fprintf(c.stdout, "%s: %s\n", clean(at), clean(p.Problem)); err != nil {
			return err
		}
	}
	what := "problems"
	if len(problems) == 1 {
		what = "problem"
	}
	_, err := fmt.Fprintf(c.stdout, "%d %s. `coffer explain FIELD` says what a field is for\n", len(problems), what)
	return err
}

// fieldView is a field of a job file in JSON output.
type fieldView struct {
	Field    string `json:"field"`
	Doc      string `json:"doc"`
	Want     string `json:"want"`
	Default  string `json:"default,omitempty"`
	Example  string `json:"example,omitempty"`
	Required bool   `json:"required"`
	// Planned fields are part of what people approve.
	Planned bool `json:"planned"`
}

func (c *cli) explainCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain [FIELD]",
		Short: "Say what a field of the job file is for and what it may be",
		Long: `explain describes a field of the job file and those below it, or, without one,
lists them all.`,
		Example: "  coffer explain\n  coffer explain checkpoints.resume\n  coffer explain egress",
		Args:    cobra.MaximumNArgs(1),
	}
	out := outputFlag(cmd)
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var names []string
		for _, f := range jobspec.Fields() {
			names = append(names, f.Path+"\t"+f.Doc)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var found []fieldView
		whole := false
		for _, f := range jobspec.Fields() {
			if len(args) > 0 {
				want := strings.NewReplacer("[]", "", ".*", "").Replace(args[0])
				have := strings.NewReplacer("[]", "", ".*", "").Replace(f.Path)
				if have != want && !strings.HasPrefix(have, want+".") {
					continue
				}
				whole = whole || have == want
			}
			found = append(found, fieldView{f.Path, f.Doc, f.Want, f.Default, f.Example, f.Required, f.Planned})
		}
		if len(args) > 0 && !whole {
			return usagef(cmd, "%.80q: %s", args[0], jobspec.Suggest(args[0]))
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, found)
		}
		if len(args) == 0 {
			rows := [][]string{{"FIELD", "WANT"}}
			for _, f := range found {
				name := f.Field
				if f.Required {
					name += " *"
				}
				rows = append(rows, []string{name, f.Want})
			}
			if err := table(c.stdout, rows...); err != nil {
				return err
			}
			_, err := fmt.Fprintln(c.stdout, "\n* required in what it is a part of. `coffer explain FIELD` says more")
			return err
		}
		for i, f := range found {
			if i > 0 {
				if _, err := fmt.Fprintln(c.stdout); err != nil {
					return err
				}
			}
			if err := c.sayField(f); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

func (c *cli) sayField(f fieldView) error {
	rows := [][]string{{"  want", f.Want}}
	switch {
	case f.Required:
		rows = append(rows, []string{"  required", "yes"})
	case f.Default != "":
		rows = append(rows, []string{"  without it", f.Default})
	}
	if f.Example != "" {
		rows = append(rows, []string{"  example", f.Example})
	}
	plan := "no: it may change without a new approval"
	if f.Planned {
		plan = "yes: people approve it"
	}
	rows = append(rows, []string{"  in the plan", plan})
	if _, err := fmt.Fprintf(c.stdout, "%s\n  %s\n", f.Field, f.Doc); err != nil {
		return err
	}
	return table(c.stdout, rows...)
}
