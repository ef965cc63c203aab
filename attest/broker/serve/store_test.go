package serve_test

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	_ "modernc.org/sqlite" // database/sql's driver

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/brokertest"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/translog"
)

func open(t testing.TB, path string) *serve.Store {
	t.Helper()
	s, err := serve.OpenStore(t.Context(), path, "broker.test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestStoreConforms(t *testing.T) {
	brokertest.TestStore(t, func(t *testing.T) (broker.Store, func() broker.Store) {
		path := filepath.Join(t.TempDir(), "dir with ?&%#", "broker.db")
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		s := open(t, path)
		return s, func() broker.Store {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			return open(t, path)
		}
	})
}

func TestOpenStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broker.db")
	s := open(t, path)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if info, err := os.Stat(path + suffix); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", suffix, info.Mode(), err)
		}
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1"} {
		if got, err := serve.WriterPragma(t.Context(), s, pragma); err != nil || got != want {
			t.Errorf("%s is %q, %v", pragma, got, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := serve.OpenStore(t.Context(), path, "other.test"); err == nil || !strings.Contains(err.Error(), "belongs to broker") {
		t.Errorf("opened as another broker: %v", err)
	}
	if _, err := serve.OpenStore(t.Context(), path, ""); err == nil {
		t.Error("opened as nobody")
	}
	for _, version := range []int{1, 6} {
		db, err := sql.Open("sqlite", path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.ExecContext(t.Context(), fmt.Sprintf(`PRAGMA user_version = %d`, version)); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := serve.OpenStore(t.Context(), path, "broker.test"); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("schema version is %d and this broker reads versions 2 to 5 only", version)) {
			t.Errorf("opened another schema: %v", err)
		}
	}
	foreign := filepath.Join(t.TempDir(), "foreign.db")
	if err := os.WriteFile(foreign, []byte("not a database at all, but long enough to be looked at as one........................................"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := serve.OpenStore(t.Context(), foreign, "broker.test"); err == nil {
		t.Error("opened a file that is no database")
	}
	if _, err := serve.OpenStore(t.Context(), filepath.Join(t.TempDir(), "none", "broker.db"), "broker.test"); err == nil {
		t.Error("opened in a folder that does not exist")
	}
}

func TestDatabaseFull(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "broker.db"))
	if err := serve.LimitPages(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	var err error
	for i := 0; err == nil && i < 1000; i++ {
		err = s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
			return tx.InsertAsset(ctx, broker.Asset{Name: fmt.Sprint(i), Wrapped: make([]byte, 4096)})
		})
	}
	for _, sentinel := range []error{broker.ErrExists, broker.ErrNotFound, broker.ErrInvalid} {
		if err == nil || errors.Is(err, sentinel) {
			t.Errorf("full database: %v", err)
		}
	}
	if err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("full database: %v", err)
	}
	if err := s.View(t.Context(), func(ctx context.Context, r broker.Reader) error { _, err := r.Assets(ctx, 9); return err }); err != nil {
		t.Errorf("reading a full database: %v", err)
	}
}

const childVar = "COFFER_TEST_STORE_CHILD"

// TestKill9 kills a process that commits, and asks whether everything that it
// had reported as committed is there.
func TestKill9(t *testing.T) {
	if path := os.Getenv(childVar); path != "" {
		commitForever(t, path)
	}
	path := filepath.Join(t.TempDir(), "broker.db")
	for round := range 3 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKill9$")
		cmd.Env = append(os.Environ(), childVar+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var last uint64
		lines := bufio.NewScanner(out)
		for n := 0; n < 50 && lines.Scan(); n++ {
			var i uint64
			if _, err := fmt.Sscanf(lines.Text(), "committed %d", &i); err != nil {
				t.Fatalf("%q: %v", lines.Text(), err)
			}
			last = max(last, i)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
			var i uint64
			_, _ = fmt.Sscanf(lines.Text(), "committed %d", &i)
			last = max(last, i)
		}
		_ = cmd.Wait()
		s := open(t, path)
		if err := s.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
			all, err := r.Entries(ctx, "", 0, 1<<20)
			if err != nil {
				return err
			}
			head, err := translog.VerifyChain("broker.test", all)
			if head.Size <= last {
				t.Errorf("round %d: entry %d was committed, the log has %d", round, last, head.Size)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// commitForever has several that commit at once, so that the kill meets commits
// that they share.
func commitForever(t *testing.T, path string) {
	s := open(t, path)
	commit := func() {
		for {
			var e translog.Entry
			if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
				head, err := tx.Head(ctx)
				if err != nil {
					return err
				}
				if head.Size == 0 {
					head = translog.Genesis("broker.test")
				}
				e, _, err = translog.Append(head, translog.Body{TimeMillis: 1, Kind: translog.KindRevoke, Actor: "owner/o", Revoke: &translog.Revoke{Grant: "g", Reason: "r"}})
				if err != nil {
					return err
				}
				return tx.InsertEntry(ctx, e, "", "")
			}); err != nil {
				t.Error(err)
				return
			}
			fmt.Println("committed", e.Index)
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(commit)
	}
	wg.Wait()
	t.FailNow()
}

// TestTwoStoresOnOneFile is a second broker started on the first one's database:
// their updates must not cross.
func TestTwoStoresOnOneFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broker.db")
	one, two := open(t, path), open(t, path)
	if err := one.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
		return tx.InsertGrant(ctx, broker.Grant{ID: "g", MaxReleases: 1000, NotBefore: time.Unix(1, 0), NotAfter: time.Unix(2, 0)})
	}); err != nil {
		t.Fatal(err)
	}
	const each = 25
	var wg sync.WaitGroup
	for _, s := range []*serve.Store{one, two} {
		wg.Go(func() {
			for range each {
				if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
					g, err := tx.Grant(ctx, "g")
					if err != nil {
						return err
					}
					g.Used++
					return tx.SetGrant(ctx, g)
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := two.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
		g, err := r.Grant(ctx, "g")
		if g.Used != 2*each {
			t.Errorf("%d of %d updates counted", g.Used, 2*each)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
