package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/image"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// Images is who must have signed images, and where those come from that the node's
// store lacks. The zero value runs images that nobody signed, and fetches none.
type Images struct {
	// Trust is who must have signed; nil for nobody.
	Trust *image.Trust
	// Signatures is a folder of Sigstore bundles: in it, a folder for each image, by
	// the hex digits of its digest, with files *.json. What registries have is added.
	// Nothing in it is trusted before Trust has verified it.
	Signatures string
	// Hosts lists the registries, host or host:port, that images are fetched from.
	Hosts      []string
	Registries image.Registries

	pull sync.Mutex // one image is fetched at a time
}

// resolve finds the image of a job file, fetches it if it may, and verifies its
// signature. part is canonical bundle.ImageSignature, nil where nobody must sign.
func (i *Images) resolve(ctx context.Context, n *sandbox.Node, ref string, log *slog.Logger) (img sandbox.Image, part []byte, err error) {
	img, err = n.Image(ctx, ref)
	if i == nil {
		return img, nil, err
	}
	if errors.Is(err, sandbox.ErrNoImage) && i.fetches(ref) {
		return i.fetch(ctx, n, ref)
	}
	if err != nil || i.Trust == nil {
		return img, nil, err
	}
	known, err := i.kept(img.Digest)
	if err != nil {
		return sandbox.Image{}, nil, err
	}
	part, err = i.verify(img.Digest, known)
	if err == nil || !i.fetches(ref) {
		return img, part, err
	}
	// It may have been signed since it was fetched.
	remote, ferr := i.Registries.Pull(ctx, ref)
	if ferr != nil {
		log.WarnContext(ctx, "look for signatures", slog.String("image", ref), slog.Any("error", ferr))
		return sandbox.Image{}, nil, err
	}
	if part, err = i.verify(img.Digest, remote.Signatures); err != nil {
		return sandbox.Image{}, nil, err
	}
	return img, part, i.keep(img.Digest, part)
}

// fetches reports whether ref names a digest at a registry that images come from.
func (i *Images) fetches(ref string) bool {
	host, _, ok := strings.Cut(ref, "/")
	return ok && strings.Contains(ref, "@sha256:") && slices.Contains(i.Hosts, host)
}

// fetch looks at the signatures before it fetches a layer.
func (i *Images) fetch(ctx context.Context, n *sandbox.Node, ref string) (sandbox.Image, []byte, error) {
	i.pull.Lock()
	defer i.pull.Unlock()
	remote, err := i.Registries.Pull(ctx, ref)
	if err != nil {
		return sandbox.Image{}, nil, err
	}
	var part []byte
	if i.Trust != nil {
		if part, err = i.verify(remote.Digest, remote.Signatures); err != nil {
			return sandbox.Image{}, nil, err
		}
		if err := i.keep(remote.Digest, part); err != nil {
			return sandbox.Image{}, nil, err
		}
	}
	r, w := io.Pipe()
	go func() {
		_, err := remote.WriteTo(w)
		_ = w.CloseWithError(err)
	}()
	err = n.Import(ctx, remote.Name, remote.Digest, r)
	// The writer ends even if the import did not read to the end.
	_ = r.CloseWithError(errors.New("the import has ended"))
	if err != nil {
		return sandbox.Image{}, nil, err
	}
	return sandbox.Image{Name: remote.Name, Digest: remote.Digest}, part, nil
}

func (i *Images) verify(digest string, signatures [][]byte) ([]byte, error) {
	s, err := i.Trust.Verify(digest, signatures)
	if err != nil {
		return nil, err
	}
	return plan.Canonical(bundle.ImageSignature{Signer: s.Signer, Bundle: s.Bundle})
}

// kept reads the signatures of an image from the folder.
func (i *Images) kept(digest string) ([][]byte, error) {
	if i.Signatures == "" {
		return nil, nil
	}
	dir := i.dir(digest)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read image signatures: %w", err)
	}
	var out [][]byte
	for _, e := range entries {
		if !e.Type().IsRegular() || filepath.Ext(e.Name()) != ".json" || len(out) > image.MaxBundles {
			continue
		}
		b, err := readBounded(filepath.Join(dir, e.Name()), image.MaxBundle)
		if err != nil {
			return nil, fmt.Errorf("read image signatures: %w", err)
		}
		out = append(out, b)
	}
	return out, nil
}

// keptName is the file of a signature that came from a registry.
const keptName = "registry.json"

// keep writes the signature that counted into the folder.
func (i *Images) keep(digest string, part []byte) error {
	if i.Signatures == "" {
		return nil
	}
	s, err := bundle.Decode[bundle.ImageSignature](part)
	if err != nil {
		return fmt.Errorf("keep image signature: %w", err)
	}
	dir := i.dir(digest)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("keep image signature: %w", err)
	}
	whole := filepath.Join(dir, "."+keptName)
	if err := os.WriteFile(whole, s.Bundle, 0o600); err != nil {
		return fmt.Errorf("keep image signature: %w", err)
	}
	if err := os.Rename(whole, filepath.Join(dir, keptName)); err != nil {
		return fmt.Errorf("keep image signature: %w", err)
	}
	return nil
}

func (i *Images) dir(digest string) string {
	return filepath.Join(i.Signatures, strings.TrimPrefix(digest, "sha256:"))
}

// readBounded reads a file and no more than one byte beyond limit, which is then too
// large for whoever judges it.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// digestOfPart is empty for a part that is not there.
func digestOfPart(part []byte) plan.Digest {
	if len(part) == 0 {
		return ""
	}
	return plan.Sum(part)
}
