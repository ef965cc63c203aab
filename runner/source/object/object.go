// Package object reads object stores, and writes checkpoints to them: S3 and what speaks its protocol, Google
// Cloud Storage and Azure Blob Storage, by gocloud.dev/blob.
//
// Not trusted: job files, which name buckets, and the stores. Checked: that the
// node's configuration lists the bucket, for a request is made with the node's
// credentials; that an endpoint is HTTPS under the configured authority; that
// nobody else can read a file of credentials. What a store sends is not checked
// here. Errors reach whoever submitted the job, so they carry no query of a URL,
// where signatures stand.
package object

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
	"google.golang.org/api/googleapi"

	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/cache"
)

// Config is one bucket that jobs on the node may name.
type Config struct {
	// URI is "s3://bucket", "gs://bucket" or "azblob://container".
	URI string `json:"uri"`
	// Endpoint is the store's address, such as https://minio.example.com:9000. It
	// is the provider's if empty; Azure's has the account in it. HTTPS is required
	// but for a loopback address.
	Endpoint string `json:"endpoint,omitempty"`
	// CAFile has the authorities of the endpoint (PEM) in place of the system's.
	CAFile string `json:"caFile,omitempty"`
	// Region and PathStyle are S3's: most private stores want
	// https://host/bucket, not https://bucket.host.
	Region    string `json:"region,omitempty"`
	PathStyle bool   `json:"pathStyle,omitempty"`
	// CredentialsFile is readable by its owner alone. S3: an AWS shared credentials
	// file with a [default] profile; Google: a service account's key (JSON); Azure: a
	// connection string. If empty, credentials are those of the agent's environment
	// and of the machine, as the provider's library finds them.
	CredentialsFile string `json:"credentialsFile,omitempty"`
	// Checkpoints says that jobs may have their checkpoints there: the agent writes
	// and removes objects below the prefix that a job file names.
	Checkpoints bool `json:"checkpoints,omitempty"`
}

// Buckets are those that the node may use.
type Buckets struct {
	known map[string]Config
	// pause is putPause, listTime is listTime and words is maxWords, but in tests.
	pause, listTime time.Duration
	words           int
}

// New checks configurations. It reads no file: credentials may change while the
// agent runs.
func New(configs []Config) (*Buckets, error) {
	b := &Buckets{known: map[string]Config{}, pause: putPause, listTime: listTime, words: maxWords}
	for _, c := range configs {
		at, err := source.Parse(c.URI + "/x")
		if err != nil || bucketURI(at) != c.URI {
			return nil, fmt.Errorf("source %.200q: want s3://bucket, gs://bucket or azblob://container", c.URI)
		}
		if _, twice := b.known[c.URI]; twice {
			return nil, fmt.Errorf("source %s is there twice", c.URI)
		}
		if err := checkEndpoint(c.Endpoint); err != nil {
			return nil, fmt.Errorf("source %s: %w", c.URI, err)
		}
		if at.Scheme != source.S3 && (c.Region != "" || c.PathStyle) {
			return nil, fmt.Errorf("source %s: region and pathStyle are for S3", c.URI)
		}
		if c.CAFile != "" && c.Endpoint == "" && at.Scheme != source.AzureBlob {
			return nil, fmt.Errorf("source %s: caFile is for an endpoint of one's own", c.URI)
		}
		b.known[c.URI] = c
	}
	return b, nil
}

func bucketURI(at source.Location) string { return at.Scheme + "://" + at.Bucket }

func checkEndpoint(endpoint string) error {
	if endpoint == "" {
		return nil
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("endpoint %.200q: want https://host", endpoint)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme != "https" && (u.Scheme != "http" || ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("endpoint %.200q: want https://host", endpoint)
	}
	return nil
}

// Open opens the bucket of a location, if the configuration lists it. Credentials
// are read each time.
func (b *Buckets) Open(ctx context.Context, at source.Location) (cache.Bucket, error) {
	opened, err := b.open(ctx, at, 0)
	if err != nil {
		return nil, err
	}
	return bucket{opened}, nil
}

// open opens a bucket for reading, or for writing if there is a pause between two
// attempts to write.
func (b *Buckets) open(ctx context.Context, at source.Location, pause time.Duration) (*blob.Bucket, error) {
	c, ok := b.known[bucketURI(at)]
	if !ok {
		return nil, fmt.Errorf("the configuration of this node lists no source %s", bucketURI(at))
	}
	secret, err := readSecret(c.CredentialsFile)
	if err != nil {
		return nil, err
	}
	client, err := httpClient(c.CAFile, b.words)
	if err != nil {
		return nil, err
	}
	var opened *blob.Bucket
	switch at.Scheme {
	case source.S3:
		opened, err = openS3(ctx, at.Bucket, c, secret, client, pause)
	case source.GCS:
		opened, err = openGCS(ctx, at.Bucket, c, secret, client, pause)
	case source.AzureBlob:
		opened, err = openAzure(ctx, at.Bucket, c, secret, client, pause)
	default:
		err = fmt.Errorf("scheme %q", at.Scheme)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", bucketURI(at), clean(err))
	}
	return opened, nil
}

// maxSecret bounds a credentials file, in bytes.
const maxSecret = 64 << 10

// readSecret reads a file that its owner alone can read.
func readSecret(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read credentials: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read credentials: %w", err)
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read credentials: %s has mode %04o: want 0600", path, st.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return nil, fmt.Errorf("read credentials: %w", err)
	}
	if len(b) == 0 || len(b) > maxSecret {
		return nil, fmt.Errorf("read credentials: %s: want 1 to %d bytes", path, maxSecret)
	}
	return b, nil
}

const (
	dialTimeout   = 10 * time.Second
	headerTimeout = 30 * time.Second
)

// httpClient reaches a store. Redirects are not followed: they would lead the
// node's requests to a place that nobody configured.
func httpClient(caFile string, words int) (*http.Client, error) {
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: headerTimeout,
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       time.Minute,
		// Ciphertext does not compress, and ranges are of the bytes as they are.
		DisableCompression: true,
	}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("read authorities: %w", err)
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read authorities: no certificate in %s", caFile)
		}
	}
	return &http.Client{Transport: bounded{t, words}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, nil
}

// bucket is a cache.Bucket.
type bucket struct{ b *blob.Bucket }

// Read is of cache.Bucket.
func (b bucket) Read(ctx context.Context, object string, off, length int64) (_ io.ReadCloser, _ int64, err error) {
	// A panic leaves the answer's body open: its connection ends with the context.
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		if err != nil {
			cancel()
		}
	}()
	defer contain(&err)
	r, err := b.b.NewRangeReader(forContent(ctx), object, off, length, nil)
	if err != nil {
		return nil, 0, told(err)
	}
	return reader{r, cancel}, r.Size(), nil
}

// contain is deferred around calls of a provider's library. These read fields of an
// answer that a store may have left out (LastModified of S3 and Azure, for one), and
// whoever runs a store must not end the agent by that. Other panics are ours.
func contain(err *error) {
	switch p := recover().(type) {
	case nil:
	case runtime.Error:
		*err = errAnswer
	default:
		panic(p)
	}
}

var errAnswer = errors.New("the store's answer lacks what its protocol requires")

// permanent says whether a store's answer will be the same next time: it is of
// the request, and not that the store is busy.
func permanent(err error) bool {
	switch gcerrors.Code(err) {
	case gcerrors.NotFound, gcerrors.PermissionDenied, gcerrors.InvalidArgument, gcerrors.Unimplemented:
		return true
	default:
	}
	var status int
	var amazon interface{ HTTPStatusCode() int }
	var azure *azcore.ResponseError
	var google *googleapi.Error
	switch {
	case errors.As(err, &amazon):
		status = amazon.HTTPStatusCode()
	case errors.As(err, &azure):
		status = azure.StatusCode
	case errors.As(err, &google):
		status = google.Code
	}
	return status >= 300 && status < 500 && status != http.StatusRequestTimeout && status != http.StatusTooManyRequests
}

// Close is of cache.Bucket.
func (b bucket) Close() error { return b.b.Close() }

type reader struct {
	r      *blob.Reader
	cancel context.CancelFunc
}

func (r reader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = clean(err)
	}
	return n, err
}

func (r reader) Close() error {
	defer r.cancel()
	return r.r.Close()
}

const maxError = 600

var (
	query = regexp.MustCompile(`\?[^\s"']*`)
	space = regexp.MustCompile(`\s+`)
)

// clean is an error of a provider's library on one line, without the queries of
// URLs.
func clean(err error) error {
	s := space.ReplaceAllString(query.ReplaceAllString(strings.ToValidUTF8(err.Error(), "?"), "?..."), " ")
	if len(s) > maxError {
		s = strings.ToValidUTF8(s[:maxError], "") + "..."
	}
	return errors.New(s)
}
