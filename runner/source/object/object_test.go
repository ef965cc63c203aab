package object

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/cache"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sealed is a sealed folder with three files.
func sealed(t *testing.T) (dir string, digest plan.Digest) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "sealed")
	key, err := keys.NewDataKey(bytes.Repeat([]byte{7}, keys.DataKeySize))
	must(t, err)
	var files []seal.Source
	for i, n := range []int{0, 10, 700_000} {
		b := bytes.Repeat([]byte{byte(i)}, n)
		files = append(files, seal.Source{Name: fmt.Sprint(i), Size: int64(n), Open: func() (seal.Reader, error) { return plainFile{bytes.NewReader(b)}, nil }})
	}
	s, err := seal.Seal(t.Context(), key, "llama", files, dir, seal.Options{ChunkSize: 64 << 10})
	must(t, err)
	return dir, s.Digest
}

type plainFile struct{ *bytes.Reader }

func (plainFile) Close() error { return nil }

func good(t *testing.T, dir string, digest plan.Digest) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	must(t, seal.Check(t.Context(), root, "llama", digest))
}

func write(t *testing.T, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	must(t, os.WriteFile(path, []byte(text), mode))
	must(t, os.Chmod(path, mode))
	return path
}

// serve starts a store behind TLS and returns its address and the file with its
// authority.
func serve(t *testing.T, h http.Handler) (endpoint, ca string) {
	t.Helper()
	s := httptest.NewTLSServer(h)
	t.Cleanup(s.Close)
	return s.URL, write(t, "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})), 0o644)
}

// hold fetches a sealed folder through a cache.
func hold(t *testing.T, c Config, prefix string, digest plan.Digest) (string, error) {
	t.Helper()
	b, err := New([]Config{c})
	must(t, err)
	k, err := cache.Open(cache.Config{Dir: t.TempDir(), MaxBytes: 1 << 30, Open: b.Open, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	t.Cleanup(func() { _ = k.Close() })
	at, err := source.Parse(c.URI + "/" + prefix)
	must(t, err)
	return k.Hold(t.Context(), "job", at, digest)
}

const s3Secret = "[default]\naws_access_key_id = AKIDFILE\naws_secret_access_key = not-a-secret\n"

// s3Store is gofakes3, an S3 server, with a sealed folder in it. It takes any
// signature, so what is signed with is looked at here.
func s3Store(t *testing.T, wrap func(http.Handler) http.Handler) (Config, plan.Digest) {
	t.Helper()
	for _, v := range []string{"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"} {
		t.Setenv(v, "")
	}
	// Of the environment, and not to be used where a file is configured.
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDENV")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
	backend := s3mem.New()
	must(t, backend.CreateBucket("weights"))
	dir, digest := sealed(t)
	files, err := os.ReadDir(dir)
	must(t, err)
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		must(t, err)
		_, err = backend.PutObject("weights", "llama/v1/"+f.Name(), nil, bytes.NewReader(b), int64(len(b)), nil)
		must(t, err)
	}
	var h http.Handler = gofakes3.New(backend).Server()
	if wrap != nil {
		h = wrap(h)
	}
	endpoint, ca := serve(t, h)
	return Config{
		URI: "s3://weights", Endpoint: endpoint, CAFile: ca, Region: "eu-test-1", PathStyle: true,
		CredentialsFile: write(t, "credentials", s3Secret, 0o600),
	}, digest
}

func TestS3(t *testing.T) {
	var signed sync.Map
	var ranges atomic.Int64
	c, digest := s3Store(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for _, f := range strings.FieldsFunc(r.Header.Get("Authorization"), func(r rune) bool { return r == ' ' || r == ',' }) {
				if v, ok := strings.CutPrefix(f, "Credential="); ok {
					p := strings.Split(v, "/")
					signed.Store(p[0]+" "+p[2], true)
				}
			}
			if r.Header.Get("Range") != "" {
				ranges.Add(1)
			}
			h.ServeHTTP(w, r)
		})
	})
	who := func() (out []string) {
		signed.Range(func(k, _ any) bool { out = append(out, k.(string)); return true })
		signed.Clear()
		return out
	}
	dir, err := hold(t, c, "llama/v1", digest)
	must(t, err)
	good(t, dir, digest)
	if got := who(); len(got) != 1 || got[0] != "AKIDFILE eu-test-1" {
		t.Errorf("signed as %q", got)
	}
	if ranges.Load() == 0 {
		t.Error("no request was for a range")
	}
	c.CredentialsFile = ""
	dir, err = hold(t, c, "llama/v1", digest)
	must(t, err)
	good(t, dir, digest)
	if got := who(); len(got) != 1 || got[0] != "AKIDENV eu-test-1" {
		t.Errorf("signed as %q", got)
	}
	if _, err := hold(t, c, "llama/v2", digest); !errors.Is(err, cache.ErrPermanent) {
		t.Errorf("a folder that is not there: %v", err)
	}
}

// The store cuts every answer short; each brings a little more.
func TestS3DropsConnections(t *testing.T) {
	var cut atomic.Int64
	c, digest := s3Store(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h.ServeHTTP(&cutter{ResponseWriter: w, left: 200_000, cut: &cut}, r)
		})
	})
	dir, err := hold(t, c, "llama/v1", digest)
	must(t, err)
	good(t, dir, digest)
	if cut.Load() < 3 {
		t.Errorf("%d connections were cut", cut.Load())
	}
}

type cutter struct {
	http.ResponseWriter
	left int
	cut  *atomic.Int64
}

func (c *cutter) Write(b []byte) (int, error) {
	if c.left -= len(b); c.left < 0 {
		c.cut.Add(1)
		panic(http.ErrAbortHandler)
	}
	return c.ResponseWriter.Write(b)
}

func TestRefusedStores(t *testing.T) {
	for name, row := range map[string]struct {
		change func(t *testing.T, c *Config)
		wrap   func(http.Handler) http.Handler
		want   string
	}{
		"an authority that is not the configured one": {func(t *testing.T, c *Config) { _, c.CAFile = serve2(t) }, nil, "certificate"},
		"the system's authorities":                    {func(_ *testing.T, c *Config) { c.CAFile = "" }, nil, "certificate"},
		"a file of authorities without one":           {func(t *testing.T, c *Config) { c.CAFile = write(t, "ca", "x", 0o600) }, nil, "no certificate in"},
		"credentials that others can read":            {func(t *testing.T, c *Config) { c.CredentialsFile = write(t, "c", s3Secret, 0o640) }, nil, "want 0600"},
		"credentials without keys":                    {func(t *testing.T, c *Config) { c.CredentialsFile = write(t, "c", "[default]\nregion = x\n", 0o600) }, nil, "no keys"},
		"no credentials where the file should be":     {func(_ *testing.T, c *Config) { c.CredentialsFile += ".none" }, nil, "no such file"},
		"a redirect": {nil, func(http.Handler) http.Handler {
			return http.RedirectHandler("https://127.0.0.1:1/elsewhere", http.StatusTemporaryRedirect)
		}, "307"},
		"a refusal": {nil, func(http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
		}, "not tried again"},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := s3Store(t, row.wrap)
			if row.change != nil {
				row.change(t, &c)
			}
			b, err := New([]Config{c})
			must(t, err)
			err = read(t.Context(), b, "s3://weights/llama/v1", "manifest.json")
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

func serve2(t *testing.T) (string, string) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return "", write(t, "other.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), 0o644)
}

// read reads one object of a location.
func read(ctx context.Context, b *Buckets, uri, file string) error {
	at, err := source.Parse(uri)
	if err != nil {
		return err
	}
	opened, err := b.Open(ctx, at)
	if err != nil {
		return err
	}
	defer opened.Close()
	r, _, err := opened.Read(ctx, at.Object(file), 0, -1)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, r)
	return err
}

func TestConfigurations(t *testing.T) {
	for name, c := range map[string][]Config{
		"nothing":                      {{}},
		"a folder":                     {{URI: "file:///srv"}},
		"a prefix":                     {{URI: "s3://weights/llama"}},
		"a slash":                      {{URI: "s3://weights/"}},
		"the same twice":               {{URI: "s3://weights"}, {URI: "s3://weights"}},
		"plain HTTP":                   {{URI: "s3://weights", Endpoint: "http://minio.example.com"}},
		"plain HTTP to a name":         {{URI: "s3://weights", Endpoint: "http://localhost:9000"}},
		"no scheme":                    {{URI: "s3://weights", Endpoint: "minio.example.com"}},
		"a user in the endpoint":       {{URI: "s3://weights", Endpoint: "https://a:b@minio.example.com"}},
		"a query in the endpoint":      {{URI: "s3://weights", Endpoint: "https://minio.example.com?x=y"}},
		"a region that has no use":     {{URI: "gs://weights", Region: "eu"}},
		"path style for Azure":         {{URI: "azblob://weights", PathStyle: true}},
		"authorities for a provider's": {{URI: "s3://weights", CAFile: "/x"}},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	b, err := New([]Config{{URI: "s3://weights"}})
	must(t, err)
	for _, uri := range []string{"s3://other/x", "gs://weights/x", "s3://weights2/x"} {
		if err := read(t.Context(), b, uri, "x"); err == nil || !strings.Contains(err.Error(), "lists no source") {
			t.Errorf("%s: %v", uri, err)
		}
	}
	var none Buckets
	if err := read(t.Context(), &none, "s3://weights/x", "x"); err == nil {
		t.Error("the zero value opens a bucket")
	}
}

func TestErrorsCarryNoSignature(t *testing.T) {
	err := clean(errors.New("Get \"https://a.blob.core.windows.net/c/o?sv=2020&sig=s3cr3t%3D\": dial tcp\n   refused " + strings.Repeat("x", 5000)))
	if s := err.Error(); strings.Contains(s, "s3cr3t") || strings.Contains(s, "\n") || len(s) > maxError+3 || !strings.Contains(s, "dial tcp refused") {
		t.Errorf("%s", s)
	}
}

// busy answers 503 to everything, and says how often it was asked since the last
// time.
func busy(t *testing.T) (c Config, asked func() int64) {
	t.Helper()
	var n atomic.Int64
	c.Endpoint, c.CAFile = serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	return c, func() int64 { return n.Swap(0) }
}

// A busy store is asked once, for package cache asks again; and its answer is not
// taken for one that lasts.
func TestLibrariesDoNotRetry(t *testing.T) {
	c, asked := busy(t)
	for uri, secret := range map[string]string{
		"s3://weights":    s3Secret,
		"gs://weights":    serviceAccount(t),
		"azblob://sealed": connectionString(c.Endpoint),
	} {
		c.URI, c.CredentialsFile = uri, write(t, "secret", secret, 0o600)
		b, err := New([]Config{c})
		must(t, err)
		err = read(t.Context(), b, uri+"/x", "manifest.json")
		if n := asked(); n != 1 || err == nil || errors.Is(err, cache.ErrPermanent) {
			t.Errorf("%s: asked %d times: %v", uri, n, err)
		}
	}
}

// objects answers as simulated Google and Azure stores: reads of whole objects
// and of ranges, as the providers document them.
func objects(t *testing.T, prefix string, authorized func(*http.Request) bool) (http.Handler, plan.Digest) {
	dir, digest := sealed(t)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, prefix)
		if !ok || !authorized(r) {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		b, err := os.ReadFile(filepath.Join(dir, filepath.Base(name)))
		if err != nil {
			http.Error(w, "no", http.StatusNotFound)
			return
		}
		if v := r.Header.Get("X-Ms-Range"); v != "" {
			r.Header.Set("Range", v)
		}
		w.Header().Set("X-Goog-Generation", "1")
		w.Header().Set("X-Goog-Stored-Content-Length", strconv.Itoa(len(b)))
		http.ServeContent(w, r, "", time.Unix(1, 0), bytes.NewReader(b))
	}), digest
}

// serviceAccount is a Google key file whose tokens a simulated server gives.
func serviceAccount(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"access_token":"a-token","token_type":"Bearer","expires_in":3600}`)
	}))
	t.Cleanup(tokens.Close)
	secret, err := json.Marshal(map[string]string{
		"type": "service_account", "client_email": "node@example.com", "private_key_id": "1", "token_uri": tokens.URL,
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	})
	must(t, err)
	return string(secret)
}

func TestGCSSimulated(t *testing.T) {
	h, digest := objects(t, "/weights/llama/", func(r *http.Request) bool { return r.Header.Get("Authorization") == "Bearer a-token" })
	endpoint, ca := serve(t, h)
	c := Config{URI: "gs://weights", Endpoint: endpoint, CAFile: ca, CredentialsFile: write(t, "key.json", serviceAccount(t), 0o600)}
	dir, err := hold(t, c, "llama", digest)
	must(t, err)
	good(t, dir, digest)
	if _, err := hold(t, c, "other", digest); !errors.Is(err, cache.ErrPermanent) {
		t.Errorf("what the store refuses: %v", err)
	}
}

func connectionString(endpoint string) string {
	return fmt.Sprintf("AccountName=account;AccountKey=%s;BlobEndpoint=%s/account", base64.StdEncoding.EncodeToString([]byte("key")), endpoint)
}

func TestAzureSimulated(t *testing.T) {
	h, digest := objects(t, "/account/sealed/llama/", func(r *http.Request) bool {
		return strings.HasPrefix(r.Header.Get("Authorization"), "SharedKey account:")
	})
	endpoint, ca := serve(t, h)
	c := Config{URI: "azblob://sealed", CAFile: ca, CredentialsFile: write(t, "connection", connectionString(endpoint), 0o600)}
	dir, err := hold(t, c, "llama", digest)
	must(t, err)
	good(t, dir, digest)
	if _, err := hold(t, c, "other", digest); !errors.Is(err, cache.ErrPermanent) {
		t.Errorf("what the store refuses: %v", err)
	}
	c.CredentialsFile = write(t, "connection", connectionString("http://blob.example.com"), 0o600)
	if _, err := hold(t, c, "llama", digest); err == nil || !strings.Contains(err.Error(), "want https://") {
		t.Errorf("plain HTTP in a connection string: %v", err)
	}
	c.CredentialsFile = ""
	t.Setenv("AZURE_STORAGE_CONNECTION_STRING", "")
	if _, err := hold(t, c, "llama", digest); err == nil || !strings.Contains(err.Error(), "want an endpoint") {
		t.Errorf("no endpoint: %v", err)
	}
}
