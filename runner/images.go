package runner

import (
	"context"
	"crypto/sha256"
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
	"sync/atomic"

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
	// the hex digits of its digest, with files *.json; bills of materials that nobody
	// signed are *.cdx.json and *.spdx.json. What registries have is added. Nothing in it is trusted
	// before Trust has verified it.
	Signatures string
	// Hosts lists the registries, host or host:port, that images are fetched from.
	Hosts      []string
	Registries image.Registries

	pull sync.Mutex // one image is fetched at a time
	// pulled is the image that is being fetched; nil for none.
	pulled atomic.Pointer[pulling]

	chosen sync.Mutex // guards sboms
	// sboms has what was chosen, by the digest of what there was to choose from.
	sboms map[[sha256.Size]byte][]byte
}

// admitted is an image that may run, and what came with it.
type admitted struct {
	image sandbox.Image
	// signature is canonical bundle.ImageSignature, nil where nobody must sign, and sbom
	// canonical bundle.ImageSBOM, nil where the image came without.
	signature, sbom []byte
}

// resolve finds the image of a job file, fetches it if it may, and verifies its
// signature.
func (i *Images) resolve(ctx context.Context, n *sandbox.Node, ref string, log *slog.Logger) (admitted, error) {
	img, err := n.Image(ctx, ref)
	switch {
	case i == nil:
		return admitted{image: img}, err
	case errors.Is(err, sandbox.ErrNoImage) && i.fetches(ref):
		return i.fetch(ctx, n, ref)
	case err != nil:
		return admitted{}, err
	}
	known, err := i.kept(img.Digest)
	if err != nil {
		return admitted{}, err
	}
	out, err := i.admit(img, known)
	if err == nil || !i.fetches(ref) {
		return out, err
	}
	// It may have been signed since it was fetched.
	remote, ferr := i.Registries.Pull(ctx, ref)
	if ferr != nil {
		log.WarnContext(ctx, "look for signatures", slog.String("image", ref), slog.Any("error", ferr))
		return admitted{}, err
	}
	if out, err = i.admit(img, found{remote.Signatures, remote.Documents}); err != nil {
		return admitted{}, err
	}
	return out, i.keep(out)
}

// found is what lies beside an image, nobody having checked it.
type found struct{ bundles, documents [][]byte }

// admit verifies an image's signature, where somebody must have signed, and chooses
// its bill of materials.
func (i *Images) admit(img sandbox.Image, f found) (admitted, error) {
	out := admitted{image: img}
	if i.Trust != nil {
		s, err := i.Trust.Verify(img.Digest, f.bundles)
		if err != nil {
			return admitted{}, err
		}
		if out.signature, err = plan.Canonical(bundle.ImageSignature{Signer: s.Signer, Bundle: s.Bundle}); err != nil {
			return admitted{}, err
		}
	}
	var err error
	out.sbom, err = i.sbom(img.Digest, f)
	return out, err
}

// maxSBOMs bounds how many bills of materials are remembered.
const maxSBOMs = 8

// sbom chooses an image's bill of materials. To check the signature of a long one takes
// tens of milliseconds, so that what was chosen of the same bytes is remembered.
func (i *Images) sbom(digest string, f found) ([]byte, error) {
	h := sha256.New()
	for _, b := range slices.Concat([][]byte{[]byte(digest)}, f.bundles, [][]byte{nil}, f.documents) {
		sum := sha256.Sum256(b)
		h.Write(sum[:])
	}
	key := [sha256.Size]byte(h.Sum(nil))
	i.chosen.Lock()
	defer i.chosen.Unlock()
	if part, ok := i.sboms[key]; ok {
		return part, nil
	}
	s, err := i.Trust.SBOM(digest, f.bundles, f.documents)
	if err != nil {
		return nil, err
	}
	var part []byte
	if s != nil {
		if part, err = plan.Canonical(s); err != nil {
			return nil, err
		}
	}
	if len(i.sboms) >= maxSBOMs || i.sboms == nil {
		i.sboms = map[[sha256.Size]byte][]byte{}
	}
	i.sboms[key] = part
	return part, nil
}

// fetches reports whether ref names a digest at a registry that images come from.
func (i *Images) fetches(ref string) bool {
	host, _, ok := strings.Cut(ref, "/")
	return ok && strings.Contains(ref, "@sha256:") && slices.Contains(i.Hosts, host)
}

// fetch looks at the signatures before it fetches a layer.
func (i *Images) fetch(ctx context.Context, n *sandbox.Node, ref string) (admitted, error) {
	i.pull.Lock()
	defer i.pull.Unlock()
	remote, err := i.Registries.Pull(ctx, ref)
	if err != nil {
		return admitted{}, err
	}
	out, err := i.admit(sandbox.Image{Name: remote.Name, Digest: remote.Digest}, found{remote.Signatures, remote.Documents})
	if err != nil {
		return admitted{}, err
	}
	if err := i.keep(out); err != nil {
		return admitted{}, err
	}
	if err := n.Room(ctx, remote.Bytes); err != nil {
		return admitted{}, err
	}
	if err := i.hand(ref, remote, func(layout io.Reader) error { return n.Import(ctx, remote.Name, remote.Digest, layout) }); err != nil {
		return admitted{}, err
	}
	return out, nil
}

// The suffixes of files with bills of materials that nobody signed.
const (
	sbomSuffix = ".cdx.json"
	spdxSuffix = ".spdx.json"
)

// kept reads what the folder has of an image.
func (i *Images) kept(digest string) (found, error) {
	var out found
	if i.Signatures == "" {
		return out, nil
	}
	dir := i.dir(digest)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return out, fmt.Errorf("read image signatures: %w", err)
	}
	for _, e := range entries {
		into := &out.bundles
		if strings.HasSuffix(e.Name(), sbomSuffix) || strings.HasSuffix(e.Name(), spdxSuffix) {
			into = &out.documents
		}
		if !e.Type().IsRegular() || filepath.Ext(e.Name()) != ".json" || len(*into) > image.MaxBundles {
			continue
		}
		b, err := readBounded(filepath.Join(dir, e.Name()), bundle.MaxImageSBOM)
		if err != nil {
			return found{}, fmt.Errorf("read image signatures: %w", err)
		}
		*into = append(*into, b)
	}
	return out, nil
}

// keptName begins the files of what came from a registry.
const keptName = "registry"

// keep writes what counted into the folder.
func (i *Images) keep(a admitted) error {
	if i.Signatures == "" {
		return nil
	}
	files := map[string][]byte{}
	if len(a.signature) > 0 {
		s, err := bundle.Decode[bundle.ImageSignature](a.signature)
		if err != nil {
			return fmt.Errorf("keep image signature: %w", err)
		}
		files[keptName+".json"] = s.Bundle
	}
	if len(a.sbom) > 0 {
		s, err := bundle.Decode[bundle.ImageSBOM](a.sbom)
		if err != nil {
			return fmt.Errorf("keep bill of materials: %w", err)
		}
		list, err := s.SBOM()
		switch {
		case err != nil:
			return fmt.Errorf("keep bill of materials: %w", err)
		case len(s.Bundle) > 0:
			files[keptName+".sbom.json"] = s.Bundle
		case list.Predicate == bundle.SPDXPredicate:
			files[keptName+spdxSuffix] = s.Document
		default:
			files[keptName+sbomSuffix] = s.Document
		}
	}
	dir := i.dir(a.image.Digest)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("keep image signature: %w", err)
	}
	for name, body := range files {
		whole := filepath.Join(dir, "."+name+".new")
		if err := os.WriteFile(whole, body, 0o600); err != nil {
			return fmt.Errorf("keep image signature: %w", err)
		}
		if err := os.Rename(whole, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("keep image signature: %w", err)
		}
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
