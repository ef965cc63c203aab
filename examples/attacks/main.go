// Command attacks replays the evidence of a finished job: it sends the evidence
// in that job's bundle to the verifier once more, as the node that made it, and
// prints the refusal.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/runner/remote"
)

// exitRefused is coffer's own exit code for a refusal.
const exitRefused = 3

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	var refused *check.Refusal
	switch {
	case errors.As(err, &refused):
		os.Exit(exitRefused)
	case err != nil:
		fmt.Fprintln(os.Stderr, "attacks:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("attacks", flag.ContinueOnError)
	flags.SetOutput(stderr)
	dir := flags.String("dir", stack.DefaultDir, "folder of the stack")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("want one bundle: attacks --dir DIR BUNDLE")
	}
	f, err := os.ReadFile(flags.Arg(0))
	if err != nil {
		return err
	}
	b, err := bundle.Parse(f)
	if err != nil {
		return err
	}
	v, err := verifier(*dir)
	if err != nil {
		return err
	}
	_, _, err = v.Appraise(ctx, b.Parts[bundle.Evidence], receipt.Expect{Audience: stack.BrokerID, AnyJob: true, AllowSimulated: true})
	var refused *check.Refusal
	if errors.As(err, &refused) {
		fmt.Fprintf(stdout, "refused at %s:\n", refused.Stage)
		for _, c := range refused.Checks.Failed() {
			fmt.Fprintf(stdout, "  %s\n    expected  %s\n    found     %s\n", c.ID, c.Expected, c.Found)
		}
		return err
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, "accepted: the verifier believes old evidence")
	return nil
}

// verifier is reached as the node's agent reaches it, with the agent's identity.
func verifier(dir string) (*remote.Verifier, error) {
	e, err := stack.OpenEndpoint(dir)
	if err != nil {
		return nil, err
	}
	client, err := e.HTTPClient(daemon.RoleAgent, daemon.RoleVerifier)
	if err != nil {
		return nil, err
	}
	jwks, err := os.ReadFile(filepath.Join(e.Dir(), "verifier", "jwks.json"))
	if err != nil {
		return nil, err
	}
	return remote.NewVerifier(remote.Service{URL: e.Verifier(), ID: stack.VerifierID, HTTP: client, JWKS: jwks})
}
