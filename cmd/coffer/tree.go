package main

import (
	"bytes"
	"errors"
	"strings"

	"github.com/spf13/cobra"
)

// ownOutput are commands whose standard output is a document of its own kind, which is
// for programs already, or that run until they are stopped.
var ownOutput = map[string]bool{
	"coffer completion": true, "coffer checkpoints resume-from": true, "coffer egress propose": true, "coffer logkey read": true,
	"coffer log prove": true, "coffer log witness": true, "coffer policy source": true,
}

// leaves are all commands that do something.
func leaves(cmd *cobra.Command) []*cobra.Command {
	if !cmd.HasSubCommands() {
		return []*cobra.Command{cmd}
	}
	var out []*cobra.Command
	for _, sub := range cmd.Commands() {
		out = append(out, leaves(sub)...)
	}
	return out
}

// said is what a command says in JSON that has no document of its own: the lines that
// it says in words. Whether it did what it was told is its exit code.
type said struct {
	Command string   `json:"command"`
	Said    []string `json:"said"`
}

// everyCommandSpeaksJSON gives --output to the commands that do not have it.
func (c *cli) everyCommandSpeaksJSON(root *cobra.Command) {
	for _, cmd := range leaves(root) {
		if ownOutput[cmd.CommandPath()] || cmd.Flag("output") != nil {
			continue
		}
		var out *format
		if cmd.Flags().ShorthandLookup("o") == nil {
			out = outputFlag(cmd)
		} else {
			out = plainOutputFlag(cmd)
		}
		inWords := cmd.RunE
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if *out != formatJSON {
				return inWords(cmd, args)
			}
			to := c.stdout
			var b bytes.Buffer
			c.stdout = &b
			err := inWords(cmd, args)
			c.stdout = to
			v := said{Command: cmd.CommandPath(), Said: []string{}}
			for l := range strings.Lines(b.String()) {
				v.Said = append(v.Said, strings.TrimSpace(l))
			}
			return errors.Join(err, writeJSON(to, v))
		}
	}
}
