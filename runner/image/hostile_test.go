package image

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// hostile answers as a registry that means harm: h has the manifest's digest, by which the
// caller asks.
func hostile(t *testing.T, manifest v1.Manifest, h http.HandlerFunc) (ref string, asked *atomic.Int64) {
	t.Helper()
	b, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	digest, _, err := v1.SHA256(strings.NewReader(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	asked = new(atomic.Int64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		switch {
		case h != nil && !strings.HasSuffix(r.URL.Path, "/v2/"):
			h(w, r)
		case strings.HasSuffix(r.URL.Path, "/manifests/"+digest.String()):
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			_, _ = w.Write(b)
		default:
			w.WriteHeader(http.StatusOK)
		}
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/a@" + digest.String(), asked
}

// Redirects to such an address the library refuses too; a name that resolves to one only
// whoever connects.
func TestPullLeadsToNoMetadataService(t *testing.T) {
	for _, to := range []string{
		"169.254.169.254", "[fe80::1%25lo]", "[fd00:ec2::254]", "[fd20:ce::254]", "[::ffff:169.254.169.254]", "168.63.129.16", "100.100.100.200", "192.0.0.192",
	} {
		t.Run(to, func(t *testing.T) {
			ref, _ := hostile(t, v1.Manifest{}, func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "http://"+to+"/latest/meta-data/iam", http.StatusTemporaryRedirect)
			})
			if _, err := (Registries{}).Pull(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "metadata service") && !strings.Contains(err.Error(), "SSRF") {
				t.Errorf("redirected there: %v", err)
			}
			res, err := (&http.Client{Transport: toRegistries}).Get("http://" + to + "/v2/")
			if err == nil {
				_ = res.Body.Close()
			}
			if err == nil || !strings.Contains(err.Error(), "metadata service") {
				t.Errorf("connected to: %v", err)
			}
		})
	}
	t.Run("for a token", func(t *testing.T) {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://169.254.169.254/latest/meta-data/iam",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		}))
		defer server.Close()
		ref := strings.TrimPrefix(server.URL, "http://") + "/a@sha256:" + strings.Repeat("a", 64)
		if _, err := (Registries{}).Pull(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "169.254.169.254") {
			t.Errorf("%v", err)
		}
	})
}

func TestPullTakesNoMoreThanItCanHold(t *testing.T) {
	ok := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("a", 64)}
	layer := func(size int64) v1.Descriptor {
		return v1.Descriptor{MediaType: types.OCILayer, Digest: ok, Size: size}
	}
	for name, tt := range map[string]struct {
		m    v1.Manifest
		want string
	}{
		"a configuration that fills the memory": {v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: ok, Size: maxConfig + 1}}, "configuration of"},
		"layers without end":                    {v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: v1.Descriptor{Digest: ok, Size: 2}, Layers: slices.Repeat([]v1.Descriptor{layer(1)}, MaxLayers+1)}, "layers"},
		"sizes that overflow":                   {v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: v1.Descriptor{Digest: ok, Size: 2}, Layers: []v1.Descriptor{layer(1 << 62), layer(1 << 62)}}, "cannot be"},
		"a size below zero":                     {v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: v1.Descriptor{Digest: ok, Size: 2}, Layers: []v1.Descriptor{layer(-1)}}, "cannot be"},
	} {
		t.Run(name, func(t *testing.T) {
			ref, _ := hostile(t, tt.m, nil)
			if _, err := (Registries{}).Pull(t.Context(), ref); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
	t.Run("a manifest that unpacks to no end", func(t *testing.T) {
		ref, _ := hostile(t, v1.Manifest{}, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			zeros := make([]byte, 1<<20)
			for { // until nobody reads
				if _, err := w.Write(zeros); err != nil {
					return
				}
			}
		})
		if _, err := (Registries{}).Pull(t.Context(), ref); err == nil {
			t.Error("taken")
		}
	})
}

// A registry that lists signatures without end is not asked for each.
func TestPullLooksAtFewReferrers(t *testing.T) {
	other := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Size: 2}}
	other.Config.Digest, _, _ = v1.SHA256(strings.NewReader("{}"))
	b, err := json.Marshal(other)
	if err != nil {
		t.Fatal(err)
	}
	digest, size, _ := v1.SHA256(strings.NewReader(string(b)))
	ref, asked := hostile(t, other, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/referrers/") {
			list := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
			for range 1000 {
				list.Manifests = append(list.Manifests, v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: digest, Size: size, ArtifactType: BundleType})
			}
			w.Header().Set("Content-Type", string(types.OCIImageIndex))
			_ = json.NewEncoder(w).Encode(list)
			return
		}
		w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
		_, _ = w.Write(b)
	})
	if _, err := (Registries{}).Pull(t.Context(), ref); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("more than %d manifests", maxReferrers)) {
		t.Errorf("%v", err)
	}
	if n := asked.Load(); n > 4*maxReferrers {
		t.Errorf("the registry was asked %d times", n)
	}
}
