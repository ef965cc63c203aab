package source

import (
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
)

// Schemes of object stores.
const (
	S3        = "s3"
	GCS       = "gs"
	AzureBlob = "azblob"
)

// MaxPrefix bounds the prefix of a Location, in bytes. A store's limit for a
// whole name is 1024.
const MaxPrefix = 900

// MaxSinkPrefix bounds the prefix of a place for checkpoints, in bytes: below it lie
// names of at most 200 bytes more.
const MaxSinkPrefix = 800

// Location is a sealed folder in an object store: the objects whose names are
// Prefix, a slash, and the name of a file in the folder.
type Location struct {
	// Scheme is S3, GCS or AzureBlob.
	Scheme string
	// Bucket is a bucket's name, or an Azure container's.
	Bucket string
	// Prefix has no slash at either end and is not empty.
	Prefix string
}

var (
	bucketForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{1,220}[a-z0-9])$`)
	prefixForm = regexp.MustCompile(`^[A-Za-z0-9._=+@/-]+$`)
)

// Parse reads "s3://bucket/prefix", "gs://bucket/prefix" or
// "azblob://container/prefix". Endpoint, region and credentials are the node's to
// configure: a URI that has a query, a port or a user is an error.
func Parse(uri string) (Location, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Location{}, fmt.Errorf("parse source %.200q: not a URI", uri)
	}
	at := Location{Scheme: u.Scheme, Bucket: u.Host, Prefix: strings.TrimPrefix(u.Path, "/")}
	if at.Scheme != S3 && at.Scheme != GCS && at.Scheme != AzureBlob {
		return Location{}, fmt.Errorf("parse source %.200q: want %s://, %s:// or %s://", uri, S3, GCS, AzureBlob)
	}
	if !bucketForm.MatchString(at.Bucket) || strings.Contains(at.Bucket, "..") {
		return Location{}, fmt.Errorf("parse source %.200q: %.80q is not the name of a bucket", uri, at.Bucket)
	}
	// A store takes ".." for a name like any other; what lies between it and the
	// store may not.
	if len(at.Prefix) > MaxPrefix || !prefixForm.MatchString(at.Prefix) || path.Clean("/"+at.Prefix) != "/"+at.Prefix {
		return Location{}, fmt.Errorf("parse source %.200q: want a clean prefix of at most %d letters, digits and any of ._=+@/-", uri, MaxPrefix)
	}
	if at.String() != uri {
		return Location{}, fmt.Errorf("parse source %.200q: want %s and nothing else", uri, at)
	}
	return at, nil
}

// ParseSink is Parse for a place into which checkpoints go.
func ParseSink(uri string) (Location, error) {
	at, err := Parse(uri)
	if err == nil && len(at.Prefix) > MaxSinkPrefix {
		return Location{}, fmt.Errorf("parse sink %.200q: a prefix of %d bytes, at most %d are allowed", uri, len(at.Prefix), MaxSinkPrefix)
	}
	return at, err
}

// InBucket reports whether a URI is one that ParseSink reads.
func InBucket(uri string) bool {
	_, err := ParseSink(uri)
	return err == nil
}

// String is the URI.
func (l Location) String() string { return l.Scheme + "://" + l.Bucket + "/" + l.Prefix }

// Object is the name of the object that has a file of the folder.
func (l Location) Object(file string) string { return l.Prefix + "/" + file }
