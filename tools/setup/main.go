// Setup installs and builds what coffer's builds and tests run on: Debian packages and pinned tools from the Go module proxy.
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

	"github.com/coffer-run/coffer/tools/step"
)

const usage = `usage: setup -cache DIR -link DIR ITEM...

Items: packages, %s.
Built tools stay in the cache folder, named by what determines them, and are linked into the link folder.
It runs in the repository's root.`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "setup:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("setup", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprintf(stderr, usage+"\n", toolNames()) }
	cache := flags.String("cache", "", "folder that keeps built tools from one run to the next")
	link := flags.String("link", "", "folder that receives a link to each built program")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *cache == "" || *link == "" || flags.NArg() == 0 {
		flags.Usage()
		return errors.New("a cache folder, a link folder and at least one item are needed")
	}
	cacheDir, err := filepath.Abs(*cache)
	if err != nil {
		return fmt.Errorf("finding the cache folder: %w", err)
	}
	steps, err := plan(flags.Args(), cacheDir, *link)
	if err != nil {
		return err
	}
	return step.Run(ctx, stdout, filepath.Join(cacheDir, "logs"), step.Beat, steps)
}

func plan(items []string, cache, link string) ([]step.Step, error) {
	var steps []step.Step
	for _, item := range items {
		if item == "packages" {
			steps = append(steps, step.Step{Name: item, Title: "Debian packages", Do: installPackages})
			continue
		}
		t, ok := tools[item]
		if !ok {
			return nil, fmt.Errorf("unknown item %q: items are packages, %s", item, toolNames())
		}
		version, err := t.version()
		if err != nil {
			return nil, err
		}
		steps = append(steps, step.Step{Name: item, Title: item + " " + version, Do: func(ctx context.Context, p *step.Progress) (string, error) {
			return t.ensure(ctx, p, version, cache, link)
		}})
	}
	return steps, nil
}
