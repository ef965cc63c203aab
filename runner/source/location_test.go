package source

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for uri, want := range map[string]Location{
		"s3://weights/llama/v1":    {S3, "weights", "llama/v1"},
		"gs://a.b-c_1/x":           {GCS, "a.b-c_1", "x"},
		"azblob://sealed/d=1/a+b@": {AzureBlob, "sealed", "d=1/a+b@"},
	} {
		got, err := Parse(uri)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", uri, got, err)
		}
	}
	for name, uri := range map[string]string{
		"a folder":             "file:///srv/sealed",
		"another scheme":       "https://bucket/prefix",
		"memory":               "mem://bucket/prefix",
		"no scheme":            "bucket/prefix",
		"no bucket":            "s3:///prefix",
		"no prefix":            "s3://bucket",
		"an empty prefix":      "s3://bucket/",
		"a slash at the end":   "s3://bucket/prefix/",
		"two slashes":          "s3://bucket/a//b",
		"dots":                 "s3://bucket/a/../b",
		"escaped dots":         "s3://bucket/a/%2e%2e/b",
		"only dots":            "s3://bucket/..",
		"an escape":            "s3://bucket/a%20b",
		"a query":              "s3://bucket/a?endpoint=https://evil",
		"an empty query":       "s3://bucket/a?",
		"a fragment":           "s3://bucket/a#b",
		"a port":               "s3://bucket:9000/a",
		"a user":               "s3://key:secret@bucket/a",
		"a bucket with dots":   "s3://buc..ket/a",
		"a bucket in capitals": "s3://Bucket/a",
		"a long prefix":        "s3://bucket/" + strings.Repeat("a", MaxPrefix+1),
		"a line break":         "s3://bucket/a\nb",
		"nothing":              "",
	} {
		if got, err := Parse(uri); err == nil {
			t.Errorf("%s is taken as %+v", name, got)
		}
	}
}
