// Build makes coffer's training images from Debian packages, without a registry and with the same digest from the same packages.
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
	"slices"
	"strings"
	"syscall"

	"github.com/coffer-run/coffer/tools/step"
)

const usage = `usage: build [-cache DIR] [-out DIR] [-add SOURCE:TARGET]... IMAGE...

Images: %s.
The system layer is kept in the cache folder; files named with -add become a second layer. An image is written to
OUT/IMAGE.tar (an OCI archive, imported as coffer.local/IMAGE:latest), OUT/IMAGE (an OCI layout), OUT/IMAGE.digest,
OUT/IMAGE.packages (the Debian packages that it is made from) and OUT/IMAGE.cdx.json
(the same as CycloneDX, which names the image by its digest).
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("build", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprintf(stderr, usage, recipeNames()) }
	cache := flags.String("cache", "", "folder that keeps system layers from one run to the next")
	out := flags.String("out", "", "folder that receives the image")
	var adds []addition
	flags.Func("add", "`SOURCE:TARGET`, a file of this machine and its absolute path in the image", func(s string) error {
		source, target, found := strings.Cut(s, ":")
		if !found || source == "" || !filepath.IsAbs(target) || filepath.Clean(target) != target || target == "/" {
			return errors.New("want SOURCE:/ABSOLUTE/TARGET")
		}
		if slices.ContainsFunc(adds, func(a addition) bool { return a.target == target }) {
			return fmt.Errorf("%s is added twice", target)
		}
		adds = append(adds, addition{source: source, target: target})
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *cache == "" || *out == "" || flags.NArg() == 0 {
		flags.Usage()
		return errors.New("a cache folder, an output folder and at least one image are needed")
	}
	cacheDir, err := filepath.Abs(*cache)
	if err != nil {
		return fmt.Errorf("finding the cache folder: %w", err)
	}
	var steps []step.Step
	for _, name := range flags.Args() {
		r, ok := recipes[name]
		if !ok {
			return fmt.Errorf("unknown image %q: images are %s", name, recipeNames())
		}
		steps = append(steps, step.Step{Name: "image-" + name, Title: name + " image", Do: func(ctx context.Context, p *step.Progress) (string, error) {
			return build(ctx, p, name, r, cacheDir, *out, adds)
		}})
	}
	return step.Run(ctx, stdout, filepath.Join(cacheDir, "logs"), step.Beat, steps)
}

func build(ctx context.Context, p *step.Progress, name string, r recipe, cache, out string, adds []addition) (string, error) {
	system, reused, err := systemLayer(ctx, p, name, r, cache)
	if err != nil {
		return "", err
	}
	layers := []*layer{system.layer}
	if len(adds) > 0 {
		app, err := addedLayer(adds)
		if err != nil {
			return "", err
		}
		layers = append(layers, app)
	}
	fmt.Fprintln(p, "writing the image")
	digest, err := writeImage(out, name, layers)
	if err != nil {
		return "", err
	}
	if err := writeFile(filepath.Join(out, name+".packages"), system.packages); err != nil {
		return "", err
	}
	materials, err := bom(name, digest, system.packages)
	if err != nil {
		return "", err
	}
	if err := writeFile(filepath.Join(out, name+".cdx.json"), materials); err != nil {
		return "", err
	}
	var size int64
	for _, l := range layers {
		size += l.size
	}
	how := "built"
	if reused {
		how = "system layer in the cache"
	}
	return fmt.Sprintf("%s, %d MB, %s", digest, size>>20, how), nil
}
