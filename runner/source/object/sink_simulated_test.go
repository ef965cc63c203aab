package object

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/runner/source/sink"
)

// simulated is a store that answers as Google's and Azure's document it, as far as a
// sink asks. An object is there when all of it has come.
type simulated struct {
	t *testing.T
	// cut cuts the connection of the n-th request that writes, in the middle of its
	// body; 0: none.
	cut int

	mu      sync.Mutex
	writes  int
	objects map[string][]byte
	// parts are of uploads that are not whole, under their own names.
	parts map[string][]byte
	puts  []string
}

// body reads a request's body, if the connection is not cut.
func (s *simulated) body(r *http.Request) []byte {
	if s.writes++; s.writes == s.cut {
		_, _ = io.CopyN(io.Discard, r.Body, r.ContentLength/2)
		panic(http.ErrAbortHandler)
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return b
}

func (s *simulated) put(name string, b []byte) {
	s.objects[name] = b
	s.puts = append(s.puts, name)
}

func (s *simulated) read(w http.ResponseWriter, r *http.Request, name string) {
	b, ok := s.objects[name]
	if !ok {
		http.Error(w, "no", http.StatusNotFound)
		return
	}
	if v := r.Header.Get("X-Ms-Range"); v != "" {
		r.Header.Set("Range", v)
	}
	w.Header().Set("X-Goog-Generation", "1")
	w.Header().Set("X-Goog-Stored-Content-Length", strconv.Itoa(len(b)))
	http.ServeContent(w, r, "", time.Unix(1, 0), bytes.NewReader(b))
}

// list is what lies directly below a prefix.
func (s *simulated) list(prefix string) (names, folders []string) {
	for name := range s.objects {
		rest, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		if dir, _, deeper := strings.Cut(rest, "/"); deeper {
			folders = append(folders, prefix+dir+"/")
		} else {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	slices.Sort(folders)
	return names, slices.Compact(folders)
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

// google is the JSON API, and the XML API for reading
// (https://cloud.google.com/storage/docs/json_api, /xml-api).
func (s *simulated) google(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := r.URL.Query()
	object, isObject := strings.CutPrefix(r.URL.Path, "/storage/v1/b/ckpt/o/")
	switch {
	case r.Header.Get("Authorization") != "Bearer a-token":
		http.Error(w, "no", http.StatusUnauthorized)
	case r.URL.Path == "/upload/storage/v1/b/ckpt/o" && q.Get("uploadType") == "multipart":
		_, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
		must(s.t, err)
		m := multipart.NewReader(bytes.NewReader(s.body(r)), params["boundary"])
		var meta struct{ Name string }
		part, err := m.NextPart()
		must(s.t, err)
		must(s.t, json.NewDecoder(part).Decode(&meta))
		part, err = m.NextPart()
		must(s.t, err)
		b, err := io.ReadAll(part)
		must(s.t, err)
		s.put(meta.Name, b)
		answer(w, map[string]string{"name": meta.Name})
	case r.URL.Path == "/upload/storage/v1/b/ckpt/o" && q.Get("upload_id") == "":
		var meta struct{ Name string }
		must(s.t, json.NewDecoder(r.Body).Decode(&meta))
		w.Header().Set("Location", "https://"+r.Host+r.URL.Path+"?upload_id="+url.QueryEscape(meta.Name))
	case r.URL.Path == "/upload/storage/v1/b/ckpt/o":
		name := q.Get("upload_id")
		var from, to int
		total := ""
		if _, err := fmt.Sscanf(r.Header.Get("Content-Range"), "bytes %d-%d/%s", &from, &to, &total); err != nil {
			// Who asks what has come, or sends nothing to end with.
			from, to, total = len(s.parts[name]), len(s.parts[name])-1, strings.TrimPrefix(r.Header.Get("Content-Range"), "bytes */")
		}
		b := s.body(r)
		if from == 0 && to >= 0 {
			s.parts[name] = nil
		}
		if from != len(s.parts[name]) || len(b) != to-from+1 {
			http.Error(w, "not where it ended", http.StatusBadRequest)
			return
		}
		s.parts[name] = append(s.parts[name], b...)
		if total != strconv.Itoa(len(s.parts[name])) {
			w.Header().Set("X-Http-Status-Code-Override", "308")
			w.Header().Set("Range", fmt.Sprintf("bytes=0-%d", len(s.parts[name])-1))
			return
		}
		s.put(name, s.parts[name])
		answer(w, map[string]string{"name": name})
	case r.URL.Path == "/storage/v1/b/ckpt/o":
		names, folders := s.list(q.Get("prefix"))
		var items []map[string]string
		for _, n := range names {
			items = append(items, map[string]string{"name": n, "size": strconv.Itoa(len(s.objects[n]))})
		}
		answer(w, map[string]any{"items": items, "prefixes": folders})
	case isObject && r.Method == http.MethodDelete:
		if _, ok := s.objects[object]; !ok {
			http.Error(w, "no", http.StatusNotFound)
			return
		}
		delete(s.objects, object)
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/ckpt/"):
		s.read(w, r, strings.TrimPrefix(r.URL.Path, "/ckpt/"))
	default:
		s.t.Errorf("not of the store: %s %s", r.Method, r.URL)
		http.Error(w, "no", http.StatusBadRequest)
	}
}

// azure is the Blob service (https://learn.microsoft.com/rest/api/storageservices).
func (s *simulated) azure(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := r.URL.Query()
	name, ok := strings.CutPrefix(r.URL.Path, "/account/ckpt/")
	switch {
	case !strings.HasPrefix(r.Header.Get("Authorization"), "SharedKey account:"):
		http.Error(w, "no", http.StatusForbidden)
	case r.URL.Path == "/account/ckpt" && q.Get("comp") == "list":
		type blob struct {
			Name       string
			Properties struct {
				Size     int    `xml:"Content-Length"`
				Modified string `xml:"Last-Modified"`
				Etag     string
			}
		}
		var out struct {
			XMLName xml.Name `xml:"EnumerationResults"`
			Blobs   struct {
				Blob       []blob
				BlobPrefix []struct{ Name string }
			}
		}
		names, folders := s.list(q.Get("prefix"))
		for _, n := range names {
			b := blob{Name: n}
			b.Properties.Size, b.Properties.Modified, b.Properties.Etag = len(s.objects[n]), time.Unix(1, 0).UTC().Format(http.TimeFormat), "0x1"
			out.Blobs.Blob = append(out.Blobs.Blob, b)
		}
		for _, f := range folders {
			out.Blobs.BlobPrefix = append(out.Blobs.BlobPrefix, struct{ Name string }{f})
		}
		w.Header().Set("Content-Type", "application/xml")
		_ = xml.NewEncoder(w).Encode(out)
	case !ok:
		s.t.Errorf("not of the store: %s %s", r.Method, r.URL)
		http.Error(w, "no", http.StatusBadRequest)
	case r.Method == http.MethodPut && q.Get("comp") == "block":
		s.parts[name+" "+q.Get("blockid")] = s.body(r)
		w.WriteHeader(http.StatusCreated)
	case r.Method == http.MethodPut && q.Get("comp") == "blocklist":
		var l struct{ Latest []string }
		must(s.t, xml.Unmarshal(s.body(r), &l))
		var whole []byte
		for _, id := range l.Latest {
			b, ok := s.parts[name+" "+id]
			if _, err := base64.StdEncoding.DecodeString(id); err != nil || !ok {
				http.Error(w, "InvalidBlockList", http.StatusBadRequest)
				return
			}
			whole = append(whole, b...)
		}
		s.put(name, whole)
		w.WriteHeader(http.StatusCreated)
	case r.Method == http.MethodPut && r.Header.Get("X-Ms-Blob-Type") == "BlockBlob":
		s.put(name, s.body(r))
		w.WriteHeader(http.StatusCreated)
	case r.Method == http.MethodDelete:
		if _, ok := s.objects[name]; !ok {
			w.Header().Set("X-Ms-Error-Code", "BlobNotFound")
			w.WriteHeader(http.StatusNotFound)
			return
		}
		delete(s.objects, name)
		w.WriteHeader(http.StatusAccepted)
	default:
		s.read(w, r, name)
	}
}

// whole says whether the store has a checkpoint, and fails if it has half of one.
func (s *simulated) whole(w *s3World, folder string, digest plan.Digest) bool {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	prefix := "team/run/job-a/" + folder + "/"
	if s.objects[prefix+"manifest.json"] == nil {
		return false
	}
	dir := s.t.TempDir()
	for name, b := range s.objects {
		if base, ok := strings.CutPrefix(name, prefix); ok {
			must(s.t, os.WriteFile(filepath.Join(dir, base), b, 0o600))
		}
	}
	w.whole(dir, digest)
	return true
}

func TestSinksSimulated(t *testing.T) {
	for name, store := range map[string]struct {
		uri   string
		serve func(*simulated) http.HandlerFunc
		// secret is the node's for the store at an endpoint.
		secret func(endpoint string) string
		// inSecret: the endpoint is part of it.
		inSecret bool
	}{
		"Google": {"gs://ckpt", func(s *simulated) http.HandlerFunc { return s.google }, func(string) string { return serviceAccount(t) }, false},
		"Azure":  {"azblob://ckpt", func(s *simulated) http.HandlerFunc { return s.azure }, connectionString, true},
	} {
		// A request that is cut is sent again, whichever it is.
		for _, cut := range []int{0, 1, 2, 3} {
			t.Run(fmt.Sprintf("%s, request %d cut", name, cut), func(t *testing.T) {
				s := &simulated{t: t, cut: cut, objects: map[string][]byte{}, parts: map[string][]byte{}}
				endpoint, ca := serve(t, store.serve(s))
				w := &s3World{t: t, dir: t.TempDir()}
				w.config = Config{URI: store.uri, CAFile: ca, CredentialsFile: write(t, "secret", store.secret(endpoint), 0o600), Checkpoints: true}
				if !store.inSecret {
					w.config.Endpoint = endpoint
				}
				var err error
				w.session, err = keys.GenerateSession()
				must(t, err)
				w.key, err = keys.NewDataKey(bytes.Repeat([]byte{7}, keys.DataKeySize))
				must(t, err)
				must(t, os.Mkdir(filepath.Join(w.dir, "checkpoints"), 0o700))
				b := w.sinks()
				uri := store.uri + "/team/run"
				dir, err := b.Create(t.Context(), uri, "job-a")
				must(t, err)
				// One file is of several parts.
				folder, digest := w.commit(dir, "job-a", 1, "", 9<<20, 3)
				must(t, b.Upload(t.Context(), "job-a", folder))
				must(t, sink.WriteAnchor(filepath.Join(dir, folder), "token"))
				must(t, b.SendAnchor(t.Context(), "job-a", folder))
				if !s.whole(w, folder, digest) {
					t.Fatal("the checkpoint is not in the store")
				}
				if cut > 0 && s.writes < cut {
					t.Fatalf("%d requests wrote", s.writes)
				}
				// The manifest is the last of the checkpoint's own.
				if n := len(s.puts); n != 5 || !strings.HasSuffix(s.puts[3], "/manifest.json") {
					t.Errorf("%q", s.puts)
				}
				if cut > 0 {
					return
				}
				if _, err := b.Create(t.Context(), uri, "job-a"); err == nil {
					t.Error("a sink with checkpoints is taken")
				}
				must(t, b.TryNumber(t.Context(), uri, "job-b", "job-a", 1, digest, func(dir string) error {
					w.whole(dir, digest)
					if token, err := sink.ReadAnchor(dir); err != nil || token != "token" {
						t.Errorf("countersignature %q, %v", token, err)
					}
					return nil
				}))
				must(t, b.TryDigest(t.Context(), uri, "job-b", digest, func(string) error { return nil }))
				must(t, b.Trim(t.Context(), "job-a", folder))
				must(t, b.Trim(t.Context(), "job-a", folder))
				if left, _ := s.list("team/run/job-a/" + folder + "/"); len(left) != 2 || s.whole(w, folder, digest) {
					t.Errorf("trimmed: %q", left)
				}
				if err := b.TryNumber(t.Context(), uri, "job-b", "job-a", 2, digest, func(string) error { return nil }); !errors.Is(err, sink.ErrNotFound) {
					t.Error(err)
				}
			})
		}
	}
}
