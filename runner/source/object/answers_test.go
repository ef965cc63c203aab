package object

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/sink"
)

// A store that leaves out of an answer what its protocol requires is an error, and the
// agent goes on.
func TestAnswersWithHoles(t *testing.T) {
	const azure, amazon, google = "azblob://ckpt", "s3://ckpt", "gs://ckpt"
	blobs := func(properties string) string {
		return `<EnumerationResults><Blobs><Blob><Name>a</Name>` + properties + `</Blob></Blobs></EnumerationResults>`
	}
	const modified = "Thu, 01 Jan 1970 00:00:01 GMT"
	list := func(b sink.Bucket) error { _, err := b.List(t.Context(), "", 10); return err }
	read := func(b sink.Bucket) error {
		r, _, err := b.Read(t.Context(), "a", 0, 4)
		if err != nil {
			return err
		}
		_, err = io.ReadAll(r)
		return errors.Join(err, r.Close())
	}
	// As large as several parts.
	put := func(b sink.Bucket) error {
		return b.Put(t.Context(), "a", bytes.NewReader(make([]byte, 2*partSize+1)), 2*partSize+1)
	}
	for name, c := range map[string]struct {
		uri    string
		header map[string]string
		body   string
		call   func(sink.Bucket) error
		// ok says that the same call with these headers and this body is whole.
		ok bool
	}{
		"Azure, list":                       {azure, nil, blobs("<Properties><Last-Modified>" + modified + "</Last-Modified><Content-Length>4</Content-Length></Properties>"), list, true},
		"Azure, list without a time":        {azure, nil, blobs("<Properties><Content-Length>4</Content-Length></Properties>"), list, false},
		"Azure, list without a size":        {azure, nil, blobs("<Properties><Last-Modified>" + modified + "</Last-Modified></Properties>"), list, false},
		"Azure, list without properties":    {azure, nil, blobs(""), list, false},
		"Azure, list without a list":        {azure, nil, "<EnumerationResults></EnumerationResults>", list, false},
		"Azure, list that says nothing":     {azure, nil, "", list, false},
		"Azure, read":                       {azure, map[string]string{"Last-Modified": modified}, "1234", read, true},
		"Azure, read without a time":        {azure, nil, "1234", read, false},
		"S3, list":                          {amazon, nil, "<ListBucketResult><Contents><Key>a</Key><LastModified>1970-01-01T00:00:01Z</LastModified><Size>4</Size></Contents></ListBucketResult>", list, true},
		"S3, list without a time":           {amazon, nil, "<ListBucketResult><Contents><Key>a</Key><Size>4</Size></Contents></ListBucketResult>", list, false},
		"S3, list without an end":           {amazon, nil, "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken></ListBucketResult>", list, false},
		"Google, list without an end":       {google, nil, `{"nextPageToken":"t"}`, list, false},
		"S3, upload of parts without an ID": {amazon, nil, "<InitiateMultipartUploadResult></InitiateMultipartUploadResult>", put, false},
		"Google, list":                      {google, nil, `{"items":[{"name":"a","size":"4","updated":"1970-01-01T00:00:01Z"}]}`, list, true},
		"Google, list that says nothing":    {google, nil, "", list, false},
		"Google, upload without a place":    {google, nil, "{}", put, false},
	} {
		t.Run(name, func(t *testing.T) {
			gone := make(chan struct{}, 1)
			endpoint, ca := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				w.Header().Set("Content-Type", "application/xml")
				for k, v := range c.header {
					w.Header().Set(k, v)
				}
				_, _ = io.WriteString(w, c.body)
				if c.ok || r.Method != http.MethodGet || c.body != "1234" {
					return
				}
				// The body does not end by itself.
				_ = http.NewResponseController(w).Flush()
				select {
				case <-r.Context().Done():
					gone <- struct{}{}
				case <-time.After(time.Minute):
				}
			}))
			config := Config{URI: c.uri, CAFile: ca, Checkpoints: true}
			switch c.uri {
			case azure:
				config.CredentialsFile = write(t, "secret", connectionString(endpoint), 0o600)
			case google:
				config.Endpoint = endpoint
				config.CredentialsFile = write(t, "secret", serviceAccount(t), 0o600)
			case amazon:
				config.Endpoint, config.PathStyle = endpoint, true
				config.CredentialsFile = write(t, "secret", s3Secret, 0o600)
			}
			buckets, err := New([]Config{config})
			must(t, err)
			buckets.pause = time.Millisecond
			if strings.HasSuffix(name, "without an end") {
				buckets.listTime = 100 * time.Millisecond
			}
			at, err := source.Parse(c.uri + "/team")
			must(t, err)
			b, err := buckets.OpenSink(t.Context(), at)
			must(t, err)
			defer b.Close() //nolint:errcheck // nothing was written
			if err := c.call(b); (err == nil) != c.ok {
				t.Error(err)
			}
			if !c.ok && c.body == "1234" {
				select {
				case <-gone:
				case <-time.After(time.Minute):
					t.Error("the connection of an answer that nobody reads stays open")
				}
			}
		})
	}
}

// A panic that no store caused is not hidden.
func TestOwnPanics(t *testing.T) {
	defer func() {
		if p := recover(); p != "ours" {
			t.Errorf("recovered %v", p)
		}
	}()
	var err error
	defer contain(&err)
	panic("ours")
}
