package object

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/sink"
)

var providers = map[string]string{"S3": "s3://ckpt", "Google": "gs://ckpt", "Azure": "azblob://ckpt"}

// hostile opens a bucket of a store that answers as h does.
func hostile(t *testing.T, uri string, h http.Handler) sink.Bucket {
	t.Helper()
	endpoint, ca := serve(t, h)
	c := Config{URI: uri, CAFile: ca, Checkpoints: true}
	switch uri {
	case providers["Azure"]:
		c.CredentialsFile = write(t, "secret", connectionString(endpoint), 0o600)
	case providers["Google"]:
		c.Endpoint, c.CredentialsFile = endpoint, write(t, "secret", serviceAccount(t), 0o600)
	default:
		c.Endpoint, c.PathStyle, c.CredentialsFile = endpoint, true, write(t, "secret", s3Secret, 0o600)
	}
	buckets, err := New([]Config{c})
	must(t, err)
	buckets.pause, buckets.listTime, buckets.words = time.Millisecond, 30*time.Second, 64<<10
	at, err := source.Parse(uri + "/team")
	must(t, err)
	b, err := buckets.OpenSink(t.Context(), at)
	must(t, err)
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// calls are what the agent asks of a store.
var calls = map[string]func(t *testing.T, b sink.Bucket) error{
	"list": func(t *testing.T, b sink.Bucket) error { _, err := b.List(t.Context(), "", 10); return err },
	"read": func(t *testing.T, b sink.Bucket) error { _, err := readAll(t, b); return err },
	"put": func(t *testing.T, b sink.Bucket) error {
		return b.Put(t.Context(), "a", bytes.NewReader(make([]byte, 10)), 10)
	},
	"put in parts": func(t *testing.T, b sink.Bucket) error {
		return b.Put(t.Context(), "a", bytes.NewReader(make([]byte, partSize+1)), partSize+1)
	},
	"delete": func(t *testing.T, b sink.Bucket) error { return b.Delete(t.Context(), "a") },
}

// readAll reads an object as long as its reader goes on, but no further than 64 bytes
// more than were asked for.
func readAll(t *testing.T, b sink.Bucket) ([]byte, error) {
	r, _, err := b.Read(t.Context(), "a", 0, 4)
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(io.LimitReader(r, 4+64))
	return got, errors.Join(err, r.Close())
}

// TestAnswersWithoutEnd: a store whose listing or refusal has no end takes no more of the
// agent's memory than its bound for each request.
func TestAnswersWithoutEnd(t *testing.T) {
	beginnings := map[string]map[string]string{
		"S3":     {"list": "<ListBucketResult>", "error": "<Error><Code>", "entry": "<Contents><Key>a</Key><LastModified>1970-01-01T00:00:01Z</LastModified><Size>4</Size></Contents>"},
		"Google": {"list": `{"items":[`, "error": `{"error":{"message":"`, "entry": `{"name":"a","size":"4","updated":"1970-01-01T00:00:01Z"},`},
		"Azure":  {"list": "<EnumerationResults><Blobs>", "error": "<Error><Code>", "entry": "<Blob><Name>a</Name></Blob>"},
	}
	const most = 16 << 20 // of which most is in the kernel's buffers
	for provider, uri := range providers {
		t.Run(provider, func(t *testing.T) {
			words := beginnings[provider]
			var status, taken atomic.Int64
			b := hostile(t, uri, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				w.Header().Set("Content-Type", "application/xml")
				w.WriteHeader(int(status.Load()))
				if r.Method == http.MethodHead {
					return // it has no body
				}
				begin, more := words["error"], "x"
				if status.Load() == http.StatusOK {
					begin, more = words["list"], words["entry"]
				}
				more = strings.Repeat(more, 64<<10/len(more))
				n, err := io.WriteString(w, begin)
				for sent := int64(n); err == nil && sent < 2*most; {
					n, err = io.WriteString(w, more)
					sent += int64(n)
					taken.Store(max(taken.Load(), sent))
				}
			}))
			tried := func(code int64, what string) {
				t.Helper()
				status.Store(code)
				taken.Store(0)
				if err := calls[what](t, b); err == nil {
					t.Errorf("%s, %d: it is an answer", what, code)
				}
				if taken.Load() > most {
					t.Errorf("%s, %d: %d bytes of one answer were taken", what, code, taken.Load())
				}
			}
			tried(http.StatusOK, "list")
			for what := range calls {
				tried(http.StatusForbidden, what)
			}
		})
	}
}

// TestNoRedirectIsFollowed: requests carry the node's credentials, and the node can reach
// addresses that a store cannot, as that of a cloud's metadata.
func TestNoRedirectIsFollowed(t *testing.T) {
	var asked atomic.Int64
	metadata := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer metadata.Close()
	for provider, uri := range providers {
		for _, status := range []int{http.StatusFound, http.StatusTemporaryRedirect} {
			t.Run(provider+", "+strconv.Itoa(status), func(t *testing.T) {
				b := hostile(t, uri, http.RedirectHandler(metadata.URL, status))
				for what, call := range calls {
					if err := call(t, b); err == nil {
						t.Errorf("%s: it is an answer", what)
					}
				}
			})
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("the other address was asked %d times", n)
	}
}

// TestNothingIsDecompressed: what a store calls compressed is read as it came.
func TestNothingIsDecompressed(t *testing.T) {
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, err := z.Write(make([]byte, 1<<20))
	must(t, errors.Join(err, z.Close()))
	for provider, uri := range providers {
		t.Run(provider, func(t *testing.T) {
			b := hostile(t, uri, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Encoding", "gzip")
				w.Header().Set("Last-Modified", "Thu, 01 Jan 1970 00:00:01 GMT")
				w.Header().Set("Content-Range", "bytes 0-3/4")
				w.Header().Set("Content-Length", "4")
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(bomb.Bytes()[:4])
			}))
			got, err := readAll(t, b)
			if err != nil || !bytes.Equal(got, bomb.Bytes()[:4]) {
				t.Errorf("%x, %v", got, err)
			}
		})
	}
}

// TestAnsweredBeforeAllIsTaken: a store that answers an upload without reading it does
// not end the agent, whose memory of that part the provider's library gives back at once.
func TestAnsweredBeforeAllIsTaken(t *testing.T) {
	for provider, uri := range providers {
		t.Run(provider, func(t *testing.T) {
			b := hostile(t, uri, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }))
			for range 10 {
				if err := calls["put in parts"](t, b); err == nil {
					t.Error("it is an answer")
				}
			}
		})
	}
}

// late is a transport that goes on reading a body after it has an answer.
type late struct{ read chan error }

func (l late) RoundTrip(r *http.Request) (*http.Response, error) {
	go func() {
		<-r.Context().Done()
		_, err := r.Body.Read(make([]byte, 1))
		l.read <- err
	}()
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
}

// lentOut fails where it is read after its owner has it back.
type lentOut struct{ back atomic.Bool }

func (l *lentOut) Read(p []byte) (int, error) {
	if l.back.Load() {
		panic("it was given back")
	}
	return len(p), nil
}

func TestBodyIsTakenBack(t *testing.T) {
	for name, row := range map[string]struct {
		length int64
		want   error
	}{"all of it was taken": {0, io.EOF}, "some of it was not": {3, errAnswered}, "nobody knows how much it is": {-1, errAnswered}} {
		t.Run(name, func(t *testing.T) {
			ctx, answered := context.WithCancel(t.Context())
			body, l := &lentOut{}, late{make(chan error)}
			r, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://store.test", io.NopCloser(body))
			must(t, err)
			r.ContentLength = row.length
			resp, err := lending{l}.RoundTrip(r)
			must(t, errors.Join(err, resp.Body.Close()))
			body.back.Store(true)
			answered()
			if err := <-l.read; !errors.Is(err, row.want) {
				t.Errorf("%v, want %v", err, row.want)
			}
		})
	}
}
