package serve

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/transparency-dev/tessera/client"

	"github.com/coffer-run/coffer/attest/translog"
)

// asRole sends a role with each request, as mutual TLS would.
type asRole struct{ role string }

func (a asRole) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-Role", a.role)
	return http.DefaultTransport.RoundTrip(r)
}

func serve(t *testing.T, l *Log) (base string, as func(role string) *http.Client) {
	t.Helper()
	h, err := l.Handler(func(r *http.Request, whole bool) (string, error) {
		switch role := r.Header.Get("X-Role"); {
		case role == "":
			return "", ErrUnknownCaller
		case role == "broken":
			return role, errors.New("the policy could not be asked")
		case role == "auditor" || role == "agent" && !whole:
			return role, nil
		default:
			return role, ErrForbidden
		}
	})
	check(t, err)
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL, func(role string) *http.Client { return &http.Client{Transport: asRole{role}} }
}

func TestAnAuditorReadsTheWholeLogOverHTTP(t *testing.T) {
	m := newMemory(t, 290)
	l := open(t, config(t, m))
	start(t, l)
	published(t, l, 290)
	base, as := serve(t, l)
	u, err := url.Parse(base + Prefix)
	check(t, err)
	f, err := client.NewHTTPFetcher(u, as("auditor"))
	check(t, err)
	raw, err := f.ReadCheckpoint(t.Context())
	check(t, err)
	trust, err := translog.NewTrust(l.Key(), nil, 0)
	check(t, err)
	c, err := trust.Open(raw)
	check(t, err)
	n := 0
	head, err := translog.Audit(t.Context(), f, broker, c, nil, func(translog.Entry) error { n++; return nil })
	check(t, err)
	if n != 290 || !bytes.Equal(head.Hash, m.head.Hash) {
		t.Errorf("%d entries, head %x", n, head.Hash)
	}
}

func TestWhoMayReadWhat(t *testing.T) {
	l := open(t, config(t, newMemory(t, 3)))
	start(t, l)
	published(t, l, 3)
	check(t, os.WriteFile(filepath.Join(l.c.Dir, "private"), []byte("secret"), 0o600))
	base, as := serve(t, l)
	for _, try := range []struct {
		role, path string
		want       int
	}{
		{"", "checkpoint", 401}, {"node", "checkpoint", 403}, {"broken", "checkpoint", 403},
		{"agent", "checkpoint", 200}, {"agent", "key", 200}, {"agent", "tile/0/000.p/3", 200}, {"auditor", "tile/entries/000.p/3", 200},
		// What entries record of every job is not for everyone.
		{"agent", "tile/entries/000.p/3", 403},
		{"auditor", "tile/0/000", 404}, {"auditor", "tile/entries/x001", 404},
		// Nothing but the log's own files.
		{"auditor", "private", 404}, {"auditor", ".state/treeState", 404}, {"auditor", "tile/0/../../private", 404}, {"auditor", "tile/0/%2e%2e/%2e%2e/private", 404},
		{"auditor", "tile/entries/..%2f..%2fprivate", 404}, {"auditor", lockFile, 404},
	} {
		c := as(try.role)
		c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		resp, err := c.Get(base + Prefix + try.path)
		check(t, err)
		b, err := io.ReadAll(resp.Body)
		check(t, errors.Join(err, resp.Body.Close()))
		redirected := resp.StatusCode == http.StatusTemporaryRedirect || resp.StatusCode == http.StatusMovedPermanently
		if (resp.StatusCode != try.want && !redirected) || bytes.Contains(b, []byte("secret")) {
			t.Errorf("%s reads %s: %d %q, want %d", try.role, try.path, resp.StatusCode, b, try.want)
		}
	}
}

func TestProofsOverHTTP(t *testing.T) {
	m := newMemory(t, 4)
	l := open(t, config(t, m))
	l.maxWait = 300 * time.Millisecond
	start(t, l)
	published(t, l, 4)
	base, as := serve(t, l)
	post := func(body string) (int, []byte) {
		t.Helper()
		resp, err := as("agent").Post(base+Prefix+"proofs", "application/json", strings.NewReader(body))
		check(t, err)
		b, err := io.ReadAll(resp.Body)
		check(t, errors.Join(err, resp.Body.Close()))
		return resp.StatusCode, b
	}
	code, b := post(`{"indices":[1,3]}`)
	var p translog.Proofs
	check(t, json.Unmarshal(b, &p))
	c, err := l.trust.Open(p.Checkpoint)
	check(t, err)
	if code != http.StatusOK || len(p.Hashes) != 2 {
		t.Fatalf("%d %s", code, b)
	}
	check(t, errors.Join(c.Includes(m.entries[1], p.Hashes[0]), c.Includes(m.entries[3], p.Hashes[1])))
	for body, want := range map[string]int{
		`{}`: 400, `{"indices":[]}`: 400, `[1]`: 400, `{"indices":[-1]}`: 400, `{"indices":[1],"x":1}`: 400,
		`{"indices":[` + strings.Repeat("1,", translog.MaxProofs) + `1]}`: 400, `{"indices":[` + strings.Repeat("1, ", maxRequest) + `1]}`: 400,
		`{"indices":[9]}`: 503,
	} {
		if code, b := post(body); code != want {
			t.Errorf("%.40s: %d %s, want %d", body, code, b, want)
		}
	}
}

// Whoever waits for more proofs than one caller may keeps nobody else waiting.
func TestProofsThatOneCallerWaitsFor(t *testing.T) {
	l := open(t, config(t, newMemory(t, 4)))
	start(t, l)
	published(t, l, 4)
	base, as := serve(t, l)
	post := func(ctx context.Context, role, body string) int {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, base+Prefix+"proofs", strings.NewReader(body))
		check(t, err)
		resp, err := as(role).Do(r)
		if err != nil {
			return 0
		}
		check(t, resp.Body.Close())
		return resp.StatusCode
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	codes := make(chan int, 2*maxInWork)
	for range 2 * maxInWork {
		go func() { codes <- post(ctx, "agent", `{"indices":[9]}`) }()
	}
	for range maxInWork {
		if c := <-codes; c != http.StatusTooManyRequests {
			t.Errorf("%d", c)
		}
	}
	if c := post(t.Context(), "agent", `{"indices":[1]}`); c != http.StatusTooManyRequests {
		t.Errorf("the caller that waits: %d", c)
	}
	if c := post(t.Context(), "auditor", `{"indices":[1]}`); c != http.StatusOK {
		t.Errorf("another caller: %d", c)
	}
	cancel()
	for range maxInWork {
		<-codes
	}
	for range 6000 {
		if post(t.Context(), "agent", `{"indices":[1]}`) == http.StatusOK {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("a caller whose calls are over may not call")
}
