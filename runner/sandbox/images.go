package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"

	"github.com/coffer-run/coffer/attest/check"
)

// ErrNoImage means that the node's store has no such image.
var ErrNoImage = errors.New("not in this node's store")

// Image is an image of the node's store, pinned by digest.
type Image struct {
	Name string
	// Digest is that of the manifest, "sha256:<hex>".
	Digest string
}

// Image finds an image by name, or by name@digest, in which case the stored
// digest must be the one asked for.
func (n *Node) Image(ctx context.Context, ref string) (Image, error) {
	name, want, pinned := strings.Cut(ref, "@")
	img, err := n.find(ctx, ref)
	if pinned && errdefs.IsNotFound(err) {
		img, err = n.find(ctx, name)
	}
	if errdefs.IsNotFound(err) {
		return Image{}, fmt.Errorf("image %q: %w: import it first (coffer image import FILE; coffer image ls says what is there)", ref, ErrNoImage)
	}
	if err != nil {
		return Image{}, fmt.Errorf("find image %q: %w", ref, err)
	}
	got := img.Target.Digest.String()
	if pinned && got != want {
		var l check.List
		l.Fail("image.digest", want, got, "the image under this name is another one")
		return Image{}, check.Refuse("admit", l)
	}
	return Image{Name: img.Name, Digest: got}, nil
}

func (n *Node) find(ctx context.Context, name string) (images.Image, error) {
	var img images.Image
	err := patient(ctx, awayForCaller, func() (err error) {
		img, err = n.client.ImageService().Get(ctx, name)
		return err
	})
	return img, err
}

// Import takes an OCI image layout in a tar stream into the node's store and unpacks
// it, as the function Import does. It must have the one image, under the name and with the
// digest that are given.
func (n *Node) Import(ctx context.Context, name, digest string, layout io.Reader) error {
	_, err := importOf(ctx, n.client, layout, n.cfg.ImageBytes, func(got []images.Image) error {
		if len(got) != 1 || got[0].Name != name || got[0].Target.Digest.String() != digest {
			return errors.New("the layout has something else")
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("import image %s: %w", name, err)
	}
	return nil
}
