package image

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/sigstore/sigstore-go/pkg/sign"

	"github.com/coffer-run/coffer/attest/bundle"
)

// listOf is a bill of materials of an image.
func listOf(image string) []byte {
	return []byte(`{"bomFormat":"CycloneDX","metadata":{"component":{"version":"` + image + `"}},"components":[{"name":"python3"}]}`)
}

// list signs a bill of materials as a statement about an image.
func (s signer) list(t *testing.T, image string, list []byte) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "predicateType": bundle.SBOMPredicate, "predicate": json.RawMessage(list),
		"subject": []any{map[string]any{"name": "", "digest": map[string]string{"sha256": strings.TrimPrefix(image, "sha256:")}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.bundle(t, &sign.DSSEData{Data: b, PayloadType: payloadType})
}

func TestSBOM(t *testing.T) {
	releases, stranger := newSigner(t), newSigner(t)
	image, other := sum("manifest"), sum("another")
	trusted := trust(t, releases.key(t, "releases"))
	signed := releases.list(t, image, listOf(image))
	nobody := [][]byte{listOf(other), listOf(image), listOf(image + " ")}
	for name, row := range map[string]struct {
		trust              *Trust
		bundles, documents [][]byte
		// want is who signed, "nobody", or "" for no list at all.
		want string
	}{
		"signed":                         {trusted, [][]byte{releases.sign(t, image), signed}, nobody, "key releases"},
		"signed by a stranger":           {trusted, [][]byte{stranger.list(t, image, listOf(image))}, nil, ""},
		"by a stranger, and by nobody":   {trusted, [][]byte{stranger.list(t, image, listOf(image))}, nobody, "nobody"},
		"by a stranger, and by releases": {trusted, [][]byte{stranger.list(t, image, listOf(image)), signed}, nil, "key releases"},
		"signed, and nobody is trusted":  {nil, [][]byte{signed}, nil, ""},
		"a statement about another":      {trusted, [][]byte{releases.list(t, other, listOf(other))}, nil, ""},
		"a list of another":              {trusted, [][]byte{releases.list(t, image, listOf(other))}, nil, ""},
		"a signature alone":              {trusted, [][]byte{releases.sign(t, image)}, nil, ""},
		"no list in the statement":       {trusted, [][]byte{releases.list(t, image, []byte(`{}`))}, nil, ""},
		"too large":                      {trusted, [][]byte{append(bytes.Repeat([]byte(" "), bundle.MaxImageSBOM), signed...)}, nil, ""},
		"after too many":                 {trusted, append(make([][]byte, MaxBundles), signed), nil, ""},
		"by nobody":                      {trusted, nil, nobody, "nobody"},
		"by nobody, of another":          {trusted, nil, nobody[:1], ""},
		"nothing":                        {trusted, nil, nil, ""},
	} {
		got, err := row.trust.SBOM(image, row.bundles, row.documents)
		who := ""
		if got != nil {
			if who = got.Signer; who == "" {
				who = "nobody"
			}
			if s, err := got.SBOM(); err != nil || !s.Of(image) || len(s.Components) != 1 {
				t.Errorf("%s: of %v: %v", name, s.Images, err)
			}
		}
		if err != nil || who != row.want {
			t.Errorf("%s: signed by %q, want %q: %v", name, who, row.want, err)
		}
	}
	if _, err := trusted.SBOM("sha256:00", nil, nil); err == nil {
		t.Error("a list of no image")
	}
	// A list of what is in an image says nothing of whether it may run.
	if _, err := trusted.Verify(image, [][]byte{signed}); err == nil {
		t.Error("a bill of materials admits an image")
	}
}

func TestPullSBOM(t *testing.T) {
	img, digest := randomImage(t)
	releases := newSigner(t)
	host := registry(t, nil)
	ref := push(t, host, img, releases.sign(t, digest), releases.list(t, digest, listOf(digest)))
	pushReferrer(t, ref, referrer(t, img, SBOMType, listOf(digest)))
	got, err := Registries{}.Pull(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Signatures) != 2 || len(got.Documents) != 1 || !bytes.Equal(got.Documents[0], listOf(digest)) {
		t.Fatalf("%d bundles and %d documents, want 2 and 1", len(got.Signatures), len(got.Documents))
	}
	s, err := trust(t, releases.key(t, "releases")).SBOM(digest, got.Signatures, got.Documents)
	if err != nil || s == nil || s.Signer != "key releases" {
		t.Errorf("%+v: %v", s, err)
	}
}
