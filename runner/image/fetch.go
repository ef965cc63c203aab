package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/coffer-run/coffer/attest/bundle"
)

// MaxLayers bounds the layers of an image.
const MaxLayers = 128

const (
	// maxConfig bounds an image's configuration, in bytes: it is read into memory whole.
	maxConfig = 8 << 20
	// maxReferrers bounds what a registry may have to be looked at beside an image.
	maxReferrers = 64
)

// nameAnnotation is under which name containerd's import stores an image.
const nameAnnotation = "io.containerd.image.name"

// Image is an image's content, checked against the digest it was asked for by, and
// its signatures, which Trust.Verify judges.
type Image struct {
	// Name is the whole reference, "registry/repository@sha256:<hex>" or what the caller said.
	Name string
	// Digest is that of the manifest, "sha256:<hex>".
	Digest string
	// Bytes is the size of the compressed content.
	Bytes int64
	// Signatures are Sigstore bundles, nobody having checked them: signatures, and
	// other statements about the image.
	Signatures [][]byte
	// Documents are bills of materials (CycloneDX or SPDX) that nobody signed.
	Documents [][]byte

	image v1.Image
}

// Registries is how images are fetched. The zero value fetches over HTTPS with the
// machine's certificate authorities, without signing in.
type Registries struct {
	// Transport speaks to registries; nil means remote.DefaultTransport, but to no
	// metadata service.
	Transport http.RoundTripper
	// Keychain has passwords and tokens; nil means none.
	Keychain authn.Keychain
	// MaxBytes refuses larger images; 0 refuses none.
	MaxBytes int64
}

// Pull reads the manifest of an image that is named by digest, and its signatures and
// bills of materials, which are referrers of it (OCI distribution spec 1.1, "Listing Referrers").
// Layers are fetched by WriteTo.
func (r Registries) Pull(ctx context.Context, ref string) (*Image, error) {
	digest, err := name.NewDigest(ref, name.StrictValidation)
	if err != nil {
		return nil, fmt.Errorf("image %.200q: want registry/repository@sha256:<digest>: %w", ref, err)
	}
	options := []remote.Option{remote.WithContext(ctx), remote.WithTransport(r.Transport)}
	if r.Transport == nil {
		options[1] = remote.WithTransport(toRegistries)
	}
	if r.Keychain != nil {
		options = append(options, remote.WithAuthFromKeychain(r.Keychain))
	}
	img, err := remote.Image(digest, options...)
	if err != nil {
		return nil, fmt.Errorf("fetch image %s: %w", ref, err)
	}
	out, err := r.describe(ref, img)
	if err != nil {
		return nil, err
	}
	index, err := remote.Referrers(digest, options...)
	if err != nil {
		return nil, fmt.Errorf("list signatures of %s: %w", ref, err)
	}
	fetch := func(h v1.Hash) (v1.Image, error) { return remote.Image(digest.Digest(h.String()), options...) }
	if err := out.referrers(index, nil, fetch); err != nil {
		return nil, fmt.Errorf("fetch signatures of %s: %w", ref, err)
	}
	return out, nil
}

// FromLayout reads an image from an OCI image layout on disk, with the signatures
// and bills of materials that lie in it as manifests whose subject is the image.
func (r Registries) FromLayout(dir, imageName, digest string) (*Image, error) {
	hash, err := v1.NewHash(digest)
	if err != nil {
		return nil, fmt.Errorf("image digest: %w", err)
	}
	path, err := layout.FromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("read image layout %s: %w", dir, err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		return nil, fmt.Errorf("read image layout %s: %w", dir, err)
	}
	img, err := index.Image(hash)
	if err != nil {
		return nil, fmt.Errorf("find image %s in layout %s: %w", digest, dir, err)
	}
	out, err := r.describe(imageName, img)
	if err != nil {
		return nil, err
	}
	if out.Digest != digest {
		return nil, fmt.Errorf("layout %s has %s where %s should be", dir, out.Digest, digest)
	}
	if err := out.referrers(index, &hash, index.Image); err != nil {
		return nil, fmt.Errorf("read signatures of %s in layout %s: %w", digest, dir, err)
	}
	return out, nil
}

// describe checks the sizes that a manifest states, which is what later reads are cut at.
func (r Registries) describe(ref string, img v1.Image) (*Image, error) {
	digest, err := img.Digest()
	if err != nil {
		return nil, fmt.Errorf("digest image %s: %w", ref, err)
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, fmt.Errorf("read manifest of %s: %w", ref, err)
	}
	if len(m.Layers) > MaxLayers {
		return nil, fmt.Errorf("image %s has %d layers: at most %d are allowed", ref, len(m.Layers), MaxLayers)
	}
	if m.Config.Size > maxConfig {
		return nil, fmt.Errorf("image %s has a configuration of %d bytes: at most %d are allowed", ref, m.Config.Size, maxConfig)
	}
	size := m.Config.Size
	for _, l := range m.Layers {
		if l.Size < 0 || size < 0 || size+l.Size < size {
			return nil, fmt.Errorf("image %s states sizes that cannot be", ref)
		}
		size += l.Size
	}
	if r.MaxBytes > 0 && size > r.MaxBytes {
		return nil, fmt.Errorf("image %s has %d bytes: this node takes at most %d", ref, size, r.MaxBytes)
	}
	return &Image{Name: ref, Digest: digest.String(), Bytes: size, image: img}, nil
}

// referrers reads the bundles and bills of materials that an index lists. With a
// subject, those of it alone.
func (i *Image) referrers(index v1.ImageIndex, subject *v1.Hash, fetch func(v1.Hash) (v1.Image, error)) error {
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	wanted := func(mediaType string) bool {
		return strings.HasPrefix(mediaType, BundleType) || mediaType == SBOMType || mediaType == SPDXType
	}
	looked := 0
	for _, d := range m.Manifests {
		if subject == nil && !wanted(d.ArtifactType) {
			continue
		}
		if looked++; subject == nil && looked > maxReferrers {
			return fmt.Errorf("more than %d manifests say that they are signatures", maxReferrers)
		}
		if subject != nil && d.Digest == *subject {
			continue
		}
		img, err := fetch(d.Digest)
		if err != nil {
			return err
		}
		manifest, err := img.Manifest()
		if err != nil {
			return err
		}
		if subject != nil && (manifest.Subject == nil || manifest.Subject.Digest != *subject) {
			continue
		}
		layers, err := img.Layers()
		if err != nil {
			return err
		}
		for n, l := range layers {
			mediaType := string(manifest.Layers[n].MediaType)
			if !wanted(mediaType) {
				continue
			}
			if len(i.Signatures)+len(i.Documents) == MaxBundles {
				return fmt.Errorf("more than %d signatures", MaxBundles)
			}
			b, err := readLayer(l)
			if err != nil {
				return err
			}
			if mediaType == SBOMType || mediaType == SPDXType {
				i.Documents = append(i.Documents, b)
			} else {
				i.Signatures = append(i.Signatures, b)
			}
		}
	}
	return nil
}

func readLayer(l v1.Layer) ([]byte, error) {
	rc, err := l.Compressed()
	if err != nil {
		return nil, err
	}
	defer rc.Close() //nolint:errcheck // it was read to its end, and checked there
	b, err := io.ReadAll(io.LimitReader(rc, bundle.MaxImageSBOM+1))
	if err != nil {
		return nil, err
	}
	if len(b) > bundle.MaxImageSBOM {
		return nil, fmt.Errorf("a signature of more than %d bytes", bundle.MaxImageSBOM)
	}
	return b, nil
}

// WriteTo writes the image as an OCI image layout in a tar stream, which is what
// containerd's import takes. Content that is not what the manifest says is an error.
func (i *Image) WriteTo(w io.Writer) (int64, error) {
	count := &counter{w: w}
	err := i.write(tar.NewWriter(count))
	return count.n, err
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

func (i *Image) write(t *tar.Writer) error {
	manifest, err := i.image.RawManifest()
	if err != nil {
		return fmt.Errorf("read manifest of %s: %w", i.Name, err)
	}
	config, err := i.image.RawConfigFile()
	if err != nil {
		return fmt.Errorf("read configuration of %s: %w", i.Name, err)
	}
	m, err := i.image.Manifest()
	if err != nil {
		return fmt.Errorf("read manifest of %s: %w", i.Name, err)
	}
	hash, err := v1.NewHash(i.Digest)
	if err != nil {
		return fmt.Errorf("image digest: %w", err)
	}
	index, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{{
		MediaType: m.MediaType, Digest: hash, Size: int64(len(manifest)), Annotations: map[string]string{nameAnnotation: i.Name},
	}}})
	if err != nil {
		return fmt.Errorf("encode index: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", index},
		{blob(hash), manifest}, {blob(m.Config.Digest), config},
	} {
		if err := t.WriteHeader(header(f.name, int64(len(f.data)))); err != nil {
			return fmt.Errorf("write %s: %w", f.name, err)
		}
		if _, err := t.Write(f.data); err != nil {
			return fmt.Errorf("write %s: %w", f.name, err)
		}
	}
	written := map[v1.Hash]bool{}
	for _, l := range m.Layers {
		if written[l.Digest] {
			continue
		}
		written[l.Digest] = true
		if err := i.writeLayer(t, l); err != nil {
			return fmt.Errorf("layer %s of %s: %w", l.Digest, i.Name, err)
		}
	}
	return t.Close()
}

func (i *Image) writeLayer(t *tar.Writer, d v1.Descriptor) error {
	l, err := i.image.LayerByDigest(d.Digest)
	if err != nil {
		return err
	}
	rc, err := l.Compressed()
	if err != nil {
		return err
	}
	defer rc.Close() //nolint:errcheck // the digest is checked when the last byte was read
	if err := t.WriteHeader(header(blob(d.Digest), d.Size)); err != nil {
		return err
	}
	if _, err := io.CopyN(t, rc, d.Size); err != nil {
		return err
	}
	// The reader compares the digest at its end.
	if n, err := rc.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("after %d bytes: %w", d.Size, errors.Join(err, errors.New("want the end")))
	}
	return nil
}

func header(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}
}

func blob(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }
