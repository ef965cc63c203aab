package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
)

func (c *cli) assetsRewrapCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rewrap",
		Short: "Move data keys to the newest versions of their key-encryption keys",
		Long: `rewrap asks the broker to have every data key wrapped again under the newest
version of its key-encryption key. It is an operator's call; nobody sees a key,
and sealed files stay as they are. The broker does the same every 24 hours.

A command that was interrupted is given again: what is done is left out.`,
		Example: "  coffer assets rewrap",
		Args:    exactly(),
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		var looked, changed int64
		var failed []string
		for after := ""; ; {
			res, err := call(cmd.Context(), c, "rewrap data keys", serverBroker, b.RewrapKeys, &brokerv1.RewrapKeysRequest{After: after})
			if err != nil {
				return err
			}
			looked, changed, failed = looked+res.GetLooked(), changed+res.GetChanged(), append(failed, res.GetFailed()...)
			if res.GetDone() {
				break
			}
			if res.GetLast() <= after {
				return &exitError{code: exitFailed, text: "the broker does not get on with rewrapping: its log says why"}
			}
			after = res.GetLast()
		}
		if _, err := fmt.Fprintf(c.stdout, "%d keys in key stores, %d moved to a newer version\n", looked, changed); err != nil {
			return err
		}
		if len(failed) > 0 {
			return &exitError{code: exitFailed, text: fmt.Sprintf("the keys of %d assets stay as they were (the broker's log says why): %s", len(failed), clean(strings.Join(failed, ", ")))}
		}
		return nil
	}
	return cmd
}
