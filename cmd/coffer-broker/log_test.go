package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	tiles "github.com/transparency-dev/tessera/client"
	_ "modernc.org/sqlite"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/translog"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
)

// lines is a log that a test reads while a daemon writes it.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// started runs a broker until stop is called.
func started(t *testing.T, dir string, c Config) (stop func() error, log *lines) {
	t.Helper()
	path := write(t, dir, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	log = &lines{}
	go func() { done <- run(ctx, []string{"--config", path}, nil, nil, log) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = stop() })
	h := as(t, dir, "owner", "alice")
	for range 6000 {
		if resp, err := h.Get("https://" + c.Listen + daemon.Health); err == nil {
			check(t, resp.Body.Close())
			return stop, log
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not ready: %v\n%s", stop(), log)
	return nil, nil
}

func as(t *testing.T, dir, role, name string) *http.Client {
	t.Helper()
	h, err := pki.Files(dir, role, name).HTTPClient(daemon.RoleBroker)
	check(t, err)
	t.Cleanup(h.CloseIdleConnections)
	return h
}

// proven asks for a proof of an entry, as an agent.
func proven(t *testing.T, dir string, c Config, index uint64) (int, translog.Proofs) {
	t.Helper()
	body, err := json.Marshal(translog.ProofRequest{Indices: []uint64{index}})
	check(t, err)
	resp, err := as(t, dir, "agent", "node-1").Post("https://"+c.Listen+"/log/proofs", "application/json", bytes.NewReader(body))
	check(t, err)
	b, err := io.ReadAll(resp.Body)
	check(t, err)
	check(t, resp.Body.Close())
	var p translog.Proofs
	if resp.StatusCode == http.StatusOK {
		check(t, json.Unmarshal(b, &p))
	}
	return resp.StatusCode, p
}

func create(t *testing.T, dir string, c Config, name string) {
	t.Helper()
	_, err := brokerv1connect.NewBrokerServiceClient(as(t, dir, "owner", "alice"), "https://"+c.Listen).CreateAsset(t.Context(),
		connect.NewRequest(&brokerv1.CreateAssetRequest{Name: name, Kind: brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS}))
	check(t, err)
}

func TestTheLogIsPublishedAndAudited(t *testing.T) {
	dir, c := state(t)
	stop, log := started(t, dir, c)
	for i := range 3 {
		create(t, dir, c, fmt.Sprint("a", i))
	}
	code, p := proven(t, dir, c, 2)
	if code != http.StatusOK {
		t.Fatalf("%d\n%s", code, log)
	}
	key, err := keyfile.ReadNote(c.Log.KeyFile)
	check(t, err)
	public, err := translog.PublicKey(key)
	check(t, err)
	trust, err := translog.NewTrust(public, nil, 0)
	check(t, err)
	cp, err := trust.Open(p.Checkpoint)
	check(t, err)
	fetch := func(role, name string) *tiles.HTTPFetcher {
		u, err := url.Parse("https://" + c.Listen + "/log/")
		check(t, err)
		f, err := tiles.NewHTTPFetcher(u, as(t, dir, role, name))
		check(t, err)
		return f
	}
	var third translog.Entry
	_, err = translog.Audit(t.Context(), fetch("auditor", "vera"), c.ID, cp, nil, func(e translog.Entry) error { third = e; return nil })
	check(t, err)
	check(t, cp.Includes(third, p.Hashes[0]))
	// An agent gets proofs, and not what other jobs did.
	if _, err := translog.Audit(t.Context(), fetch("agent", "node-1"), c.ID, cp, nil, nil); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("an agent read the whole log: %v", err)
	}
	check(t, stop())

	stop, _ = started(t, dir, c)
	create(t, dir, c, "late")
	if code, p = proven(t, dir, c, 3); code != http.StatusOK {
		t.Fatal(code)
	}
	later, err := trust.Open(p.Checkpoint)
	check(t, err)
	_, err = translog.Audit(t.Context(), fetch("auditor", "vera"), c.ID, later, []translog.Checkpoint{cp}, nil)
	check(t, err)
	check(t, stop())
}

// rewrite changes the log in the database as someone with the file in hand can.
func rewrite(t *testing.T, path string, change func(l []translog.Entry) []translog.Entry) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	check(t, err)
	rows, err := db.QueryContext(t.Context(), `SELECT idx, body, hash FROM log ORDER BY idx`)
	check(t, err)
	var l []translog.Entry
	for rows.Next() {
		var e translog.Entry
		check(t, rows.Scan(&e.Index, &e.Body, &e.Hash))
		l = append(l, e)
	}
	check(t, rows.Err())
	check(t, rows.Close())
	for _, q := range []string{`DROP TRIGGER log_update`, `DROP TRIGGER log_delete`, `DELETE FROM log`} {
		_, err := db.ExecContext(t.Context(), q)
		check(t, err)
	}
	for _, e := range change(l) {
		_, err := db.ExecContext(t.Context(), `INSERT INTO log (idx, job, bundle, body, hash) VALUES (?, '', '', ?, ?)`, int64(e.Index), e.Body, e.Hash)
		check(t, err)
	}
	check(t, db.Close())
}

// rechained makes a chain of the given entries' content that holds by itself.
func rechained(t *testing.T, id string, l []translog.Entry) []translog.Entry {
	t.Helper()
	head := translog.Genesis(id)
	var out []translog.Entry
	for _, e := range l {
		b, err := translog.Entry{Index: e.Index, Body: e.Body, Hash: e.Hash}.Open()
		check(t, err)
		n, h, err := translog.Append(head, b)
		check(t, err)
		out, head = append(out, n), h
	}
	return out
}

func TestADatabaseThatWasEdited(t *testing.T) {
	dir, c := state(t)
	stop, _ := started(t, dir, c)
	for i := range 4 {
		create(t, dir, c, fmt.Sprint("a", i))
	}
	if code, _ := proven(t, dir, c, 3); code != http.StatusOK {
		t.Fatal(code)
	}
	check(t, stop())
	honest := filepath.Join(t.TempDir(), "honest")
	check(t, exec.Command("cp", "-a", dir, honest).Run())
	for name, try := range map[string]struct {
		change func(t *testing.T, l []translog.Entry) []translog.Entry
		want   string
	}{
		"a row edited": {func(_ *testing.T, l []translog.Entry) []translog.Entry {
			l[1].Body = bytes.Replace(l[1].Body, []byte("alice"), []byte("mallo"), 1)
			return l
		}, "evidence log in"},
		"a row dropped": {func(_ *testing.T, l []translog.Entry) []translog.Entry { return append(l[:1:1], l[2:]...) }, "evidence log in"},
		"rows reordered": {func(_ *testing.T, l []translog.Entry) []translog.Entry {
			l[1].Body, l[2].Body = l[2].Body, l[1].Body
			return l
		}, "evidence log in"},
		// The chain shows nothing of what follows.
		"an old copy":  {func(_ *testing.T, l []translog.Entry) []translog.Entry { return l[:2] }, "lacks what the log has"},
		"an empty one": {func(*testing.T, []translog.Entry) []translog.Entry { return nil }, "lacks what the log has"},
		"an old copy that went on": {func(t *testing.T, l []translog.Entry) []translog.Entry {
			return rechained(t, "broker.test", append(l[:2:2], l[1], l[0], l[2]))
		}, "lacks what the log has"},
		"a row dropped and the chain made anew": {func(t *testing.T, l []translog.Entry) []translog.Entry {
			return rechained(t, "broker.test", append(l[:1:1], l[2:]...))
		}, "lacks what the log has"},
		"rows reordered and the chain made anew": {func(t *testing.T, l []translog.Entry) []translog.Entry {
			return rechained(t, "broker.test", []translog.Entry{l[0], l[2], l[1], l[3]})
		}, "lacks what the log has"},
	} {
		t.Run(name, func(t *testing.T) {
			// Not in parallel: a process has one broker, and Tessera's library one logger.
			check(t, os.RemoveAll(dir))
			check(t, exec.Command("cp", "-a", honest, dir).Run())
			before, err := os.ReadFile(c.Log.Dir + "/checkpoint")
			check(t, err)
			rewrite(t, c.DB, func(l []translog.Entry) []translog.Entry { return try.change(t, l) })
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := run(ctx, []string{"--config", write(t, dir, c)}, nil, nil, io.Discard); err == nil || !strings.Contains(err.Error(), try.want) {
				t.Errorf("got %v, want %q", err, try.want)
			}
			if after, err := os.ReadFile(c.Log.Dir + "/checkpoint"); err != nil || !bytes.Equal(before, after) {
				t.Errorf("signed %q after %q, %v", after, before, err)
			}
		})
	}
	t.Run("an old copy put in while the broker runs", func(t *testing.T) {
		check(t, os.RemoveAll(dir))
		check(t, exec.Command("cp", "-a", honest, dir).Run())
		stop, log := started(t, dir, c)
		rewrite(t, c.DB, func(l []translog.Entry) []translog.Entry { return l[:2] })
		waitFor(t, log, "nothing is answered any more")
		if err := stop(); err == nil || !strings.Contains(err.Error(), "lacks what the log has") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another broker has the folder", func(t *testing.T) {
		check(t, os.RemoveAll(dir))
		check(t, exec.Command("cp", "-a", honest, dir).Run())
		stop, _ := started(t, dir, c)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := run(ctx, []string{"--config", write(t, dir, c)}, nil, nil, io.Discard); err == nil || !strings.Contains(err.Error(), "another sequencer has this log") {
			t.Errorf("got %v", err)
		}
		check(t, stop())
	})
	t.Run("the folder damaged", func(t *testing.T) {
		check(t, os.RemoveAll(dir))
		check(t, exec.Command("cp", "-a", honest, dir).Run())
		check(t, os.Remove(c.Log.Dir+"/tile/0/000.p/4"))
		stop, log := started(t, dir, c)
		// The database has everything: the broker goes on, and signs no tree.
		create(t, dir, c, "after")
		waitFor(t, log, "grows no more")
		check(t, stop())
	})
}

func waitFor(t *testing.T, log *lines, text string) {
	t.Helper()
	for range 6000 {
		if strings.Contains(log.String(), text) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%q is not in the log:\n%s", text, log)
}

// TestKBSIsOffUnlessConfigured has a client without a certificate.
func TestKBSIsOffUnlessConfigured(t *testing.T) {
	for name, try := range map[string]struct {
		kbs  *KBS
		want int
	}{"off": {nil, 0}, "on": {&KBS{VerifierURL: "https://127.0.0.1:1/appraise"}, http.StatusOK}} {
		t.Run(name, func(t *testing.T) {
			dir, c := state(t)
			c.KBS = try.kbs
			stop, log := started(t, dir, c)
			h, err := daemon.HTTPClientForPeople(c.TLS.CA, daemon.RoleBroker)
			check(t, err)
			t.Cleanup(h.CloseIdleConnections)
			got := func(path string) int {
				resp, err := h.Post("https://"+c.Listen+path, "application/json", strings.NewReader(`{"version":"0.4.0","tee":"snp"}`))
				if err != nil {
					return 0
				}
				check(t, resp.Body.Close())
				return resp.StatusCode
			}
			if code := got("/kbs/v0/auth"); code != try.want {
				t.Errorf("auth: %d, want %d\n%s", code, try.want, log)
			}
			// Nothing else is open to whoever has no certificate.
			for _, path := range []string{"/log/proofs", brokerv1connect.BrokerServiceInfoProcedure} {
				if code := got(path); code != 0 && code != http.StatusUnauthorized {
					t.Errorf("%s without a certificate: %d", path, code)
				}
			}
			check(t, stop())
		})
	}
}
