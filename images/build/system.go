package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/coffer-run/coffer/tools/step"
)

//go:embed *.go
var sources embed.FS

type system struct {
	layer    *layer
	packages []byte
}

// systemKey names what determines a system layer on this machine, short of the mirror's package versions: this program's
// sources, and the compressor, whose output is part of the digest.
func systemKey(name string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, name)
	entries, err := fs.ReadDir(sources, ".")
	if err != nil {
		return "", fmt.Errorf("hashing the recipe: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		b, err := fs.ReadFile(sources, e.Name())
		if err != nil {
			return "", fmt.Errorf("hashing the recipe: %w", err)
		}
		fmt.Fprintln(h, e.Name(), len(b))
		h.Write(b)
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", errors.New("hashing the recipe: this program was built without module information")
	}
	for _, m := range info.Deps {
		if m.Path == "github.com/klauspost/compress" {
			fmt.Fprintln(h, m.Path, m.Version, m.Sum)
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// systemLayer returns the image's system layer, from the cache if a sound one is there.
func systemLayer(ctx context.Context, p *step.Progress, name string, r recipe, cache string) (s *system, reused bool, err error) {
	key, err := systemKey(name)
	if err != nil {
		return nil, false, err
	}
	usable := func(dir string) error {
		_, err := loadSystem(dir)
		return err
	}
	fill := func(dir string) error { return buildSystem(ctx, p, r, dir) }
	dir, reused, err := step.Cached(ctx, p, filepath.Join(cache, "images"), name+"-"+key, usable, fill)
	if err != nil {
		return nil, false, err
	}
	s, err = loadSystem(dir)
	return s, reused, err
}

// description is layer.json: what the OCI manifest needs to know of a layer without decompressing it.
type description struct {
	Digest string `json:"digest"`
	DiffID string `json:"diffID"`
	Size   int64  `json:"size"`
}

// loadSystem reads a layer from the cache and checks its digest: a damaged file would otherwise be found only by containerd.
func loadSystem(dir string) (*system, error) {
	raw, err := os.ReadFile(filepath.Join(dir, "layer.json"))
	if err != nil {
		return nil, fmt.Errorf("reading a cached layer: %w", err)
	}
	var d description
	if err := json.Unmarshal(raw, &d); err != nil {
		return nil, fmt.Errorf("reading %s: %w", filepath.Join(dir, "layer.json"), err)
	}
	packages, err := os.ReadFile(filepath.Join(dir, "packages"))
	if err != nil {
		return nil, fmt.Errorf("reading a cached layer: %w", err)
	}
	path := filepath.Join(dir, "layer.tar.zst")
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading a cached layer: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, fmt.Errorf("reading a cached layer: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != d.Digest {
		return nil, fmt.Errorf("%s is damaged: its digest is %s", path, got)
	}
	l, err := newLayer(d, func() (io.ReadCloser, error) { return os.Open(path) })
	if err != nil {
		return nil, err
	}
	return &system{layer: l, packages: packages}, nil
}

func buildSystem(ctx context.Context, p *step.Progress, r recipe, dir string) error {
	raw := filepath.Join(dir, "debian.tar")
	if err := debianTar(ctx, p, r, dir, raw); err != nil {
		return err
	}
	fmt.Fprintln(p, "choosing files")
	f, err := os.Open(raw)
	if err != nil {
		return fmt.Errorf("reading the packages' files: %w", err)
	}
	defer f.Close()
	tree, err := readTree(f)
	if err != nil {
		return err
	}
	kept, err := slim(tree, r)
	if err != nil {
		return err
	}
	fmt.Fprintf(p, "compressing %d files\n", len(kept))
	out, err := os.Create(filepath.Join(dir, "layer.tar.zst"))
	if err != nil {
		return fmt.Errorf("creating a layer: %w", err)
	}
	defer out.Close()
	d, err := compress(out, func(w io.Writer) error { return writeTar(w, kept) })
	if err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("writing a layer: %w", err)
	}
	if err := writeFile(filepath.Join(dir, "packages"), tree.packages); err != nil {
		return err
	}
	described, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("describing a layer: %w", err)
	}
	if err := writeFile(filepath.Join(dir, "layer.json"), described); err != nil {
		return err
	}
	if err := os.Remove(raw); err != nil {
		return fmt.Errorf("removing the packages' files: %w", err)
	}
	return nil
}

// debianTar writes the recipe's packages, extracted and not configured, to path: no maintainer script runs, as root or otherwise.
func debianTar(ctx context.Context, p *step.Progress, r recipe, tmp, path string) error {
	archives, err := aptArchives(ctx)
	if err != nil {
		return err
	}
	args := []string{
		"--variant=extract", "--format=tar",
		"--include=" + strings.Join(r.Packages, ","),
		"--keyring=/usr/share/keyrings/debian-archive-keyring.gpg",
		// The archives stay in the tar: their names and digests are the image's package list.
		"--skip=cleanup/apt/cache",
		`--aptopt=Acquire::Languages "none"`,
		`--aptopt=APT::Install-Recommends "false"`,
	}
	options, err := aptOptions(ctx)
	if err != nil {
		return err
	}
	for _, o := range options {
		args = append(args, "--aptopt="+o)
	}
	cmd := step.Command(ctx, p, "mmdebstrap", append(args, suite, path, "-")...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch), "TMPDIR="+tmp, "LC_ALL=C.UTF-8")
	cmd.Stdin = strings.NewReader(archives)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("fetching and extracting %s: mmdebstrap: %w", strings.Join(r.Packages, ", "), err)
	}
	return nil
}

// aptArchives returns the Debian archives that this machine's apt uses for the suite, as lines of a sources.list.
func aptArchives(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(CODENAME) deb $(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages", "Origin: Debian").Output()
	if err != nil {
		return "", fmt.Errorf("asking apt for its archives: %w", err)
	}
	lines := suiteLines(string(out))
	if lines == "" {
		return "", fmt.Errorf("apt has no package lists of Debian %s main: run apt-get update on a Debian 12 machine", suite)
	}
	return lines, nil
}

func suiteLines(targets string) string {
	var lines strings.Builder
	for line := range strings.Lines(targets) {
		codename, source, _ := strings.Cut(strings.TrimSpace(line), " ")
		if (codename == suite || strings.HasPrefix(codename, suite+"-")) && strings.HasSuffix(source, " main") {
			fmt.Fprintln(&lines, source)
		}
	}
	return lines.String()
}

// aptOptions returns the settings by which this machine reaches its archives (proxies, clock checks).
func aptOptions(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return nil, fmt.Errorf("asking apt for its settings: %w", err)
	}
	return reachOptions(string(out)), nil
}

func reachOptions(dump string) []string {
	var options []string
	for line := range strings.Lines(dump) {
		name, value, _ := strings.Cut(strings.TrimSuffix(strings.TrimSpace(line), ";"), " ")
		for _, prefix := range []string{"Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries"} {
			if strings.HasPrefix(name, prefix) && value != `""` {
				options = append(options, name+" "+value)
			}
		}
	}
	return options
}

// writeFile replaces path in one step.
func writeFile(path string, content []byte) error {
	fresh := path + ".new"
	f, err := os.Create(fresh)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	w := bufio.NewWriter(f)
	_, copyErr := io.Copy(w, bytes.NewReader(content))
	if err := errors.Join(copyErr, w.Flush(), f.Close(), os.Rename(fresh, path)); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
