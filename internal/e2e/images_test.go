package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/sirupsen/logrus"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/runner/image"
	"github.com/coffer-run/coffer/runner/image/sign"
)

// registry starts a registry in memory and returns its host.
func registry(t *testing.T) string {
	t.Helper()
	logrus.SetOutput(io.Discard)
	c := &configuration.Configuration{Storage: configuration.Storage{"inmemory": nil}}
	c.HTTP.Secret = "for tests"
	s := httptest.NewServer(handlers.NewApp(context.Background(), c))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// pushImage pushes the training image under another digest, and returns its reference.
func pushImage(t *testing.T, host, label string) name.Digest {
	t.Helper()
	index, err := layout.ImageIndexFromPath(filepath.Join(os.Getenv("COFFER_IMAGES"), "numpy"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.Config(img, v1.Config{Labels: map[string]string{"for": label}}); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewDigest(host + "/team/train@" + d.String())
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref
}

const bundleType = image.BundleType + ".v0.3+json"

// pushSignature adds a signature to an image in a registry.
func pushSignature(t *testing.T, ref name.Digest, key *ecdsa.PrivateKey) {
	t.Helper()
	b, err := sign.Image(key, ref.DigestStr())
	if err != nil {
		t.Fatal(err)
	}
	pushReferrer(t, ref, bundleType, b)
}

// pushReferrer adds an artifact about an image.
func pushReferrer(t *testing.T, ref name.Digest, mediaType types.MediaType, b []byte) {
	t.Helper()
	sig, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), static.NewLayer(b, mediaType))
	if err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Head(ref)
	if err != nil {
		t.Fatal(err)
	}
	with := mutate.Subject(mutate.ConfigMediaType(sig, mediaType), *desc).(v1.Image)
	d, err := with.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref.Digest(d.String()), with); err != nil {
		t.Fatal(err)
	}
}

// imageJob is a job file without keys that runs an image.
func imageJob(t *testing.T, ref string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "job.yaml")
	file := "apiVersion: coffer.run/v1\nname: from-registry\nimage: " + ref + "\ncommand: [/usr/bin/python3, -c, 'print(6 * 7)']\n" +
		"resources: {cpu: 1, memory: 512Mi, gpus: 1}\nmaxDuration: 1m\nattestationPolicy: simulation\ninputs: []\n"
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImagesMustBeSigned(t *testing.T) {
	n := need(t)
	host := registry(t)
	n.withConfig(t, "cofferd", func(c map[string]any) { c["images"].(map[string]any)["registries"] = []string{host} })
	e, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	own, err := stack.ReadImageSigner(e.ImageSignerKey())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what, ref, word string) {
		t.Helper()
		out, err := n.coffer("submit", imageJob(t, ref))
		if exitCode(err) == 0 || !strings.Contains(out, "image.signature") || !strings.Contains(out, word) {
			t.Errorf("%s: exit %d\n%s", what, exitCode(err), out)
		}
	}
	ref := pushImage(t, host, "one")
	refused("unsigned at its registry", ref.String(), "no signature")
	pushSignature(t, ref, stranger)
	refused("signed by a stranger", ref.String(), "not by key stack")
	// The refused image is not in the node's store either: nothing of it was fetched.
	client, err := containerd.New(filepath.Join(n.layout.Run, "containerd.sock"), containerd.WithDefaultNamespace(stack.Namespace))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(t.Context(), stack.Namespace)
	if _, err := client.GetImage(ctx, ref.String()); err == nil {
		t.Error("a refused image was fetched")
	}

	// Imported by hand, and signed by nobody.
	byHand := pushImage(t, host, "two")
	pulled, err := image.Registries{}.Pull(t.Context(), byHand.String())
	if err != nil {
		t.Fatal(err)
	}
	pulled.Name = "coffer.local/by-hand:latest"
	var tar bytes.Buffer
	if _, err := pulled.WriteTo(&tar); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Import(ctx, &tar); err != nil {
		t.Fatal(err)
	}
	refused("imported by hand", pulled.Name, "no signature")

	pushSignature(t, ref, own)
	list := fmt.Appendf(nil, `{"bomFormat":"CycloneDX","specVersion":"1.6","metadata":{"component":{"type":"container","name":"train","version":%q}},"components":[{"type":"library","name":"python3"}]}`, ref.DigestStr())
	signedList, err := sign.SBOM(own, ref.DigestStr(), list)
	if err != nil {
		t.Fatal(err)
	}
	pushReferrer(t, ref, bundleType, signedList)
	out := n.must(t, "submit", imageJob(t, ref.String()), "--watch")
	if !strings.Contains(out, "42") {
		t.Errorf("the job did not run:\n%s", out)
	}
	path := filepath.Join(t.TempDir(), "bundle.json")
	n.must(t, "evidence", "get", jobID.FindString(out), "-o", path)
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := bundle.Decode[bundle.ImageSignature](b.Parts[bundle.ImageSignaturePart])
	if err != nil || s.Signer != "key stack" {
		t.Errorf("signer %q: %v", s.Signer, err)
	}
	materials, err := bundle.Decode[bundle.ImageSBOM](b.Parts[bundle.ImageSBOMPart])
	if err != nil || materials.Signer != "key stack" {
		t.Errorf("the bill of materials is by %q: %v", materials.Signer, err)
	}
	box, err := plan.ParseSandbox(b.Parts[bundle.Sandbox])
	if err != nil || box.ImageSignature != plan.Sum(b.Parts[bundle.ImageSignaturePart]) {
		t.Errorf("the evidence speaks of signature %s: %v", box.ImageSignature, err)
	}
	if box.ImageSBOM != plan.Sum(b.Parts[bundle.ImageSBOMPart]) {
		t.Errorf("the evidence speaks of bill of materials %s", box.ImageSBOM)
	}
	if verdict, err := n.verify(t, file, true); err != nil || !strings.Contains(verdict, "of this image, signed by key stack") || !strings.Contains(verdict, "VERIFIED") || !strings.Contains(verdict, "by key stack") {
		t.Errorf("the bundle does not verify: %v\n%s", err, verdict)
	}
}

// An image that a job runs stays until the job has ended.
func TestImageInUseStays(t *testing.T) {
	n := need(t)
	const image = "coffer.local/numpy:latest"
	id := n.submit(t, n.small(t, "uses-the-image", "import time; time.sleep(90)", ""))
	n.wait(t, id, "running", running)
	out, err := n.coffer("image", "rm", image)
	if exitCode(err) != 1 || !strings.Contains(out, "remove image "+image+": a job uses it: job-"+strings.ToLower(id)) {
		t.Errorf("exit code %d: %s", exitCode(err), out)
	}
	if s := n.status(t, id); s.State != "running" {
		t.Errorf("%+v", s)
	}
	if out := n.must(t, "image", "ls"); !strings.Contains(out, image) {
		t.Errorf("%s", out)
	}
	n.must(t, "cancel", id)
	n.wait(t, id, "ended", ended)
}
