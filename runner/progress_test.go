package runner

import (
	"errors"
	"io"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/image"
)

func TestDecrypting(t *testing.T) {
	of := func(bytes, total int64) holdapi.Status {
		return holdapi.Status{Opened: &holdapi.Opened{Bytes: bytes, Total: total}}
	}
	for name, row := range map[string]struct {
		status holdapi.Status
		err    error
		bytes  int64 // -1 for nothing to tell
		over   bool
	}{
		"not begun":                  {bytes: -1},
		"begun":                      {status: of(0, 10)},
		"on its way":                 {status: of(3, 10), bytes: 3},
		"whole":                      {status: of(10, 10), bytes: -1, over: true},
		"a holder that is not there": {status: of(10, 10), err: errors.New("gone"), bytes: -1},
	} {
		p, over := decrypting(row.status, row.err)
		if over != row.over || (p == nil) != (row.bytes < 0) || p != nil && (p.GetBytes() != row.bytes || p.GetTotal() != 10) {
			t.Errorf("%s: %v, over %t", name, p, over)
		}
	}
	// Of a job that is not there, or has not come so far, there is nothing to tell.
	a := &Agent{live: map[string]*Job{"early": newJob("early", "")}}
	for _, id := range []string{"early", "none"} {
		if p := a.Progress(t.Context(), id); p != nil {
			t.Errorf("%s: %v", id, p)
		}
	}
}

// An image on its way is counted as the runtime takes it, for who knows its name.
func TestFetching(t *testing.T) {
	content, err := random.Image(100_000, 2)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := content.Digest()
	if err != nil {
		t.Fatal(err)
	}
	path, err := layout.Write(t.TempDir(), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(v1.Image(content)); err != nil {
		t.Fatal(err)
	}
	ref := "registry.example/train@" + digest.String()
	img, err := image.Registries{}.FromLayout(string(path), ref, digest.String())
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{Deps: Deps{Images: &Images{}}, live: map[string]*Job{}}
	for id, ref := range map[string]string{"mine": ref, "other": "registry.example/other@" + digest.String(), "unread": ""} {
		j := newJob(id, "")
		if ref != "" {
			j.redacted = []byte("apiVersion: coffer.run/v1\nname: demo\nimage: " + ref + "\ncommand: [/x]\nattestationPolicy: simulation\nresources: {cpu: 1, memory: 1Gi}\n")
		}
		a.live[id] = j
	}
	none := func(when string) {
		t.Helper()
		if p := a.Fetching(ref); p != nil {
			t.Errorf("%s: %v", when, p)
		}
		if p := a.Progress(t.Context(), "mine"); p != nil {
			t.Errorf("%s: %v", when, p)
		}
	}
	none("before")
	for name, end := range map[string]error{"whole": nil, "given up": errors.New("no room")} {
		err := a.Images.hand(ref, img, func(r io.Reader) error {
			if _, err := io.CopyN(io.Discard, r, 50_000); err != nil {
				return err
			}
			p := a.Fetching(ref)
			if p.GetWhat() != progressImage || p.GetName() != ref || p.GetBytes() < 10_000 || p.GetBytes() >= p.GetTotal() || p.GetTotal() != img.Bytes {
				t.Errorf("%s: %v, want half of %d", name, p, img.Bytes)
			}
			for id, want := range map[string]int{"mine": 1, "other": 0, "unread": 0} {
				if got := a.Progress(t.Context(), id); len(got) != want {
					t.Errorf("%s: job %s: %v", name, id, got)
				}
			}
			if p := a.Fetching("registry.example/train"); p != nil {
				t.Errorf("%s: by another name: %v", name, p)
			}
			if end != nil {
				return end
			}
			_, err := io.Copy(io.Discard, r)
			if p := a.Fetching(ref); p.GetBytes() != p.GetTotal() {
				t.Errorf("%s: %v", name, p) // what is left is to unpack it
			}
			return err
		})
		if !errors.Is(err, end) {
			t.Errorf("%s: %v", name, err)
		}
		none(name)
	}
	if p := (&Agent{}).Fetching(ref); p != nil {
		t.Errorf("an agent that fetches none: %v", p)
	}
}
