package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/sirupsen/logrus"

	"github.com/coffer-run/coffer/attest/bundle"
)

// registry starts a real registry in memory; spoil may change what it answers.
func registry(t *testing.T, spoil func(path string, body []byte) []byte) string {
	t.Helper()
	logrus.SetOutput(io.Discard)
	config := &configuration.Configuration{Storage: configuration.Storage{"inmemory": nil}}
	config.HTTP.Secret = "for tests"
	app := handlers.NewApp(context.Background(), config)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if spoil == nil || r.Method != http.MethodGet {
			app.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		app.ServeHTTP(rec, r)
		body := spoil(r.URL.Path, rec.Body.Bytes())
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		_, _ = w.Write(body)
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// push puts an image into a registry, signed by each signer, and returns its reference.
func push(t *testing.T, host string, img v1.Image, signatures ...[]byte) string {
	t.Helper()
	repo, err := name.NewRepository(host + "/team/train")
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref := repo.Digest(digest.String())
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	for _, s := range signatures {
		pushReferrer(t, ref.String(), signatureOf(t, img, s))
	}
	return ref.String()
}

// pushReferrer puts an artifact into the repository of an image.
func pushReferrer(t *testing.T, ref string, artifact v1.Image) {
	t.Helper()
	image, err := name.NewDigest(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := artifact.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(image.Digest(d.String()), artifact); err != nil {
		t.Fatal(err)
	}
}

// signatureOf is a referrer of an image that has a Sigstore bundle as its one layer.
func signatureOf(t *testing.T, img v1.Image, bundle []byte) v1.Image {
	t.Helper()
	return referrer(t, img, BundleType+".v0.3+json", bundle)
}

// referrer is an artifact about an image with one layer.
func referrer(t *testing.T, img v1.Image, mediaType types.MediaType, body []byte) v1.Image {
	t.Helper()
	sig, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), static.NewLayer(body, mediaType))
	if err != nil {
		t.Fatal(err)
	}
	sig = mutate.ConfigMediaType(sig, mediaType)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	size, err := img.Size()
	if err != nil {
		t.Fatal(err)
	}
	mt, err := img.MediaType()
	if err != nil {
		t.Fatal(err)
	}
	with, ok := mutate.Subject(sig, v1.Descriptor{MediaType: mt, Digest: digest, Size: size}).(v1.Image)
	if !ok {
		t.Fatal("a signature is no image")
	}
	return with
}

func randomImage(t *testing.T) (v1.Image, string) {
	t.Helper()
	img, err := random.Image(10_000, 3)
	if err != nil {
		t.Fatal(err)
	}
	img = mutate.MediaType(img, types.OCIManifestSchema1)
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return img, d.String()
}

func TestPull(t *testing.T) {
	img, digest := randomImage(t)
	releases, stranger := newSigner(t), newSigner(t)
	ref := push(t, registry(t, nil), img, stranger.sign(t, digest), releases.sign(t, digest))
	got, err := Registries{}.Pull(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != digest || got.Name != ref || len(got.Signatures) != 2 {
		t.Fatalf("got %s with %d signatures, want %s with 2", got.Digest, len(got.Signatures), digest)
	}
	if _, err := trust(t, releases.key(t, "releases")).Verify(got.Digest, got.Signatures); err != nil {
		t.Fatal(err)
	}
	_, err = trust(t, newSigner(t).key(t, "another")).Verify(got.Digest, got.Signatures)
	wantRefusal(t, err, "not by key another")
	wantWhole(t, got)
}

// wantWhole reads the tar and digests every blob anew.
func wantWhole(t *testing.T, img *Image) {
	t.Helper()
	var b bytes.Buffer
	n, err := img.WriteTo(&b)
	if err != nil {
		t.Fatal(err)
	}
	if n != int64(b.Len()) || n < img.Bytes {
		t.Errorf("WriteTo says %d bytes of %d", n, b.Len())
	}
	names := map[string]bool{}
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		names[h.Name] = true
		if hash, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok {
			if s := sha256.Sum256(data); hex.EncodeToString(s[:]) != hash {
				t.Errorf("blob %s has other content", hash)
			}
		}
		if h.Name == "index.json" {
			var index v1.IndexManifest
			if err := json.Unmarshal(data, &index); err != nil || len(index.Manifests) != 1 || index.Manifests[0].Digest.String() != img.Digest {
				t.Errorf("index %s does not name %s: %v", data, img.Digest, err)
			}
		}
	}
	// Three layers, configuration, manifest, and the two files of a layout.
	if len(names) != 7 {
		t.Errorf("%d files in the layout, want 7", len(names))
	}
}

func TestPullRefusesWhatIsNotTheImage(t *testing.T) {
	img, digest := randomImage(t)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	first, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]func(path string, body []byte) []byte{
		"a manifest with one byte more": func(path string, b []byte) []byte {
			if strings.HasSuffix(path, "/manifests/"+digest) {
				return append(bytes.Clone(b), ' ')
			}
			return b
		},
		"a layer with a byte changed": func(path string, b []byte) []byte {
			if strings.HasSuffix(path, first.Hex) {
				b = bytes.Clone(b)
				b[len(b)/2] ^= 1
			}
			return b
		},
		"a layer cut short": func(path string, b []byte) []byte {
			if strings.HasSuffix(path, first.Hex) {
				return b[:len(b)-1]
			}
			return b
		},
	}
	for name, spoil := range tests {
		t.Run(name, func(t *testing.T) {
			ref := push(t, registry(t, spoil), img)
			got, err := Registries{}.Pull(t.Context(), ref)
			if err == nil {
				_, err = got.WriteTo(io.Discard)
			}
			if err == nil {
				t.Fatal("taken")
			}
		})
	}
}

func TestPullBounds(t *testing.T) {
	img, digest := randomImage(t)
	host := registry(t, nil)
	releases := newSigner(t)
	ref := push(t, host, img)
	if _, err := (Registries{MaxBytes: 20_000}).Pull(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "at most 20000") {
		t.Errorf("an image of 30 kB where 20 are allowed: %v", err)
	}
	for _, ref := range []string{"team/train", host + "/team/train:latest", host + "/team/train@sha256:00", ""} {
		if _, err := (Registries{}).Pull(t.Context(), ref); err == nil {
			t.Errorf("%q: taken without a digest", ref)
		}
	}
	push(t, host, img, bytes.Repeat([]byte(" "), bundle.MaxImageSBOM+1))
	if _, err := (Registries{}).Pull(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a signature without end: %v", err)
	}
	other, _ := randomImage(t)
	var many [][]byte
	for range MaxBundles + 1 {
		many = append(many, releases.sign(t, digest))
	}
	if _, err := (Registries{}).Pull(t.Context(), push(t, host, other, many...)); err == nil || !strings.Contains(err.Error(), "more than 16") {
		t.Errorf("signatures without end: %v", err)
	}
}

func TestLayout(t *testing.T) {
	img, digest := randomImage(t)
	other, otherDigest := randomImage(t)
	releases := newSigner(t)
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []v1.Image{img, other, signatureOf(t, img, releases.sign(t, digest)), signatureOf(t, other, releases.sign(t, otherDigest))} {
		if err := path.AppendImage(i); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Registries{}.FromLayout(dir, "train", digest)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Signatures) != 1 {
		t.Fatalf("%d signatures, want the one of this image", len(got.Signatures))
	}
	if _, err := trust(t, releases.key(t, "releases")).Verify(got.Digest, got.Signatures); err != nil {
		t.Fatal(err)
	}
	wantWhole(t, got)

	if _, err := (Registries{}).FromLayout(dir, "train", sum("none")); err == nil {
		t.Error("an image that is not in the layout: found")
	}
	blobs := filepath.Join(dir, "blobs", "sha256")
	file := filepath.Join(blobs, strings.TrimPrefix(digest, "sha256:"))
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(b, ' '), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (Registries{}).FromLayout(dir, "train", digest); err == nil {
		t.Error("a manifest with one byte more: taken")
	}
}
