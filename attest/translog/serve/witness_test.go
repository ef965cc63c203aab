package serve

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"

	"github.com/coffer-run/coffer/attest/translog"
)

func silent() *slog.Logger { return slog.New(slog.DiscardHandler) }

func observer(t *testing.T, name string, logKey string) (o *Observer, url, public string) {
	t.Helper()
	private, public := newKey(t, name)
	o, err := NewObserver(t.TempDir(), private, []string{logKey}, silent())
	check(t, err)
	srv := httptest.NewServer(o)
	t.Cleanup(srv.Close)
	return o, srv.URL, public
}

func TestWitnessesCosignWhatTheLogPublishes(t *testing.T) {
	m := newMemory(t, 3)
	c := config(t, m)
	own, err := translog.PublicKey(c.Key)
	check(t, err)
	_, url1, key1 := observer(t, "one.test", own)
	_, url2, key2 := observer(t, "two.test", own)
	_, gone, key3 := observer(t, "gone.test", own)
	c.Witnesses = []Witness{{key1, url1}, {key2, url2}}
	l := open(t, c)
	stop := start(t, l)
	cp := published(t, l, 3)
	if !cp.Witnessed || len(cp.Cosigned) != 2 || time.Since(cp.Cosigned[0].Time) > time.Minute {
		t.Errorf("cosigned by %v", cp.Cosigned)
	}
	m.grow(t, 2)
	l.Wake()
	if cp = published(t, l, 5); !cp.Witnessed {
		t.Errorf("the second checkpoint is cosigned by %v", cp.Cosigned)
	}
	check(t, stop())

	// One witness that does not answer keeps nobody waiting, and what the other
	// said is kept.
	c.Witnesses = []Witness{{key1, url1}, {key3, strings.Replace(gone, "127.0.0.1", "127.255.255.254", 1)}}
	l = open(t, c)
	start(t, l)
	m.grow(t, 1)
	l.Wake()
	cp = published(t, l, 6)
	if cp.Witnessed || len(cp.Cosigned) != 1 || cp.Cosigned[0].Witness != "one.test" {
		t.Errorf("cosigned by %v, witnessed %t", cp.Cosigned, cp.Witnessed)
	}
	raw, err := l.files.ReadCheckpoint(t.Context())
	check(t, err)
	for name, try := range map[string]struct {
		witnesses []string
		quorum    int
		want      bool
	}{
		"no witness is asked for": {nil, 0, false},
		"the one that cosigned":   {[]string{key1}, 1, true},
		"one of two":              {[]string{key1, key3}, 1, true},
		"two of two":              {[]string{key1, key3}, 2, false},
		"one that did not":        {[]string{key3}, 1, false},
	} {
		trust, err := translog.NewTrust(own, try.witnesses, try.quorum)
		check(t, err)
		got, err := trust.Open(raw)
		check(t, err)
		if got.Witnessed != try.want {
			t.Errorf("%s: witnessed %t", name, got.Witnessed)
		}
	}
}

// fork makes a second log under the same key with another history.
func fork(t *testing.T, c Config, entries int) *Log {
	t.Helper()
	c.Dir = t.TempDir()
	m := newMemory(t, 1)
	for i := 1; i < entries; i++ {
		e, h, err := translog.Append(m.head, translog.Body{TimeMillis: 7, Kind: translog.KindAsset, Actor: "owner/mallory", Asset: &translog.Asset{Name: fmt.Sprint(i), Kind: "weights"}})
		check(t, err)
		m.entries, m.head = append(m.entries, e), h
	}
	c.Source = m
	l := open(t, c)
	start(t, l)
	published(t, l, entries)
	return l
}

func TestAWitnessRefuses(t *testing.T) {
	m := newMemory(t, 3)
	c := config(t, m)
	own, err := translog.PublicKey(c.Key)
	check(t, err)
	l := open(t, c)
	stop := start(t, l)
	published(t, l, 3)
	first, err := l.files.ReadCheckpoint(t.Context())
	check(t, err)
	m.grow(t, 2)
	l.Wake()
	published(t, l, 5)
	check(t, stop())
	second, err := l.files.ReadCheckpoint(t.Context())
	check(t, err)
	pb, err := client.NewProofBuilder(t.Context(), 5, l.files.ReadTile)
	check(t, err)
	proof, err := pb.ConsistencyProof(t.Context(), 3, 5)
	check(t, err)
	forked := fork(t, c, 5)
	forkedCP, err := forked.files.ReadCheckpoint(t.Context())
	check(t, err)
	fb, err := client.NewProofBuilder(t.Context(), 5, forked.files.ReadTile)
	check(t, err)
	forkedProof, err := fb.ConsistencyProof(t.Context(), 3, 5)
	check(t, err)
	forked3 := fork(t, c, 3)
	forkedCP3, err := forked3.files.ReadCheckpoint(t.Context())
	check(t, err)
	otherKey, _ := newKey(t, translog.KeyName(broker))
	stranger, err := note.NewSigner(otherKey)
	check(t, err)
	foreign, err := note.Sign(&note.Note{Text: text(second)}, stranger)
	check(t, err)

	o, url, public := observer(t, "witness.test", own)
	post := func(old uint64, proof [][]byte, cp []byte) (int, string, string) {
		t.Helper()
		body := fmt.Sprintf("old %d\n", old)
		for _, h := range proof {
			body += base64.StdEncoding.EncodeToString(h) + "\n"
		}
		resp, err := http.Post(url+"/add-checkpoint", "text/plain", strings.NewReader(body+"\n"+string(cp)))
		check(t, err)
		b, err := io.ReadAll(resp.Body)
		check(t, errors.Join(err, resp.Body.Close()))
		return resp.StatusCode, string(b), resp.Header.Get("Content-Type")
	}
	trust, err := translog.NewTrust(own, []string{public}, 1)
	check(t, err)
	code, line, _ := post(0, nil, first)
	if got, err := trust.Open(append(append([]byte(nil), first...), line...)); code != 200 || err != nil || !got.Witnessed {
		t.Fatalf("first: %d %q %v", code, line, err)
	}
	for name, try := range map[string]struct {
		old   uint64
		proof [][]byte
		cp    []byte
		want  int
	}{
		"another history":               {3, forkedProof, forkedCP, 422},
		"another history of one size":   {3, nil, forkedCP3, 409},
		"no proof":                      {3, nil, second, 422},
		"a wrong proof":                 {3, [][]byte{proof[0]}, second, 422},
		"from the beginning again":      {0, nil, second, 409},
		"from another size":             {2, proof, second, 409},
		"older than the last":           {5, nil, first, 400},
		"signed by a stranger":          {3, proof, foreign, 403},
		"of a log that is not followed": {0, nil, []byte("other/log\n1\nAAAA\n\n— x y\n"), 404},
		"edited":                        {3, proof, []byte(strings.Replace(string(second), "\n5\n", "\n6\n", 1)), 403},
	} {
		code, text, contentType := post(try.old, try.proof, try.cp)
		if code != try.want || strings.Contains(text, "— ") {
			t.Errorf("%s: %d %q, want %d", name, code, text, try.want)
		}
		if name == "from the beginning again" && (text != "3\n" || contentType != "text/x.tlog.size") {
			t.Errorf("%s: %q of type %q", name, text, contentType)
		}
	}
	// Two processes over one folder, each asked for its own history at once: what the
	// first keeps while it has the lock, the second sees.
	busy, err := NewObserver(t.TempDir(), mustKey(t), []string{own}, silent())
	check(t, err)
	lock, err := os.Create(filepath.Join(busy.dir, witnessLock))
	check(t, err)
	check(t, syscall.Flock(int(lock.Fd()), syscall.LOCK_EX))
	asked := make(chan error, 1)
	go func() {
		_, err := busy.Cosign(t.Context(), translog.WitnessRequest{Checkpoint: forkedCP3})
		asked <- err
	}()
	time.Sleep(20 * time.Millisecond)
	check(t, writeFile(busy.file(trust.Origin()), first))
	check(t, lock.Close())
	if err := <-asked; !errors.As(err, &conflict{}) {
		t.Errorf("beside another process: %v", err)
	}
	// A second observer over the same folder remembers.
	again, err := NewObserver(o.dir, mustKey(t), []string{own}, silent())
	check(t, err)
	if _, err := again.Cosign(t.Context(), translog.WitnessRequest{Checkpoint: forkedCP}); !errors.As(err, &conflict{}) {
		t.Errorf("after a restart: %v", err)
	}
	if code, _, _ := post(3, proof, second); code != 200 {
		t.Errorf("what follows: %d", code)
	}
	if code, _, _ := post(5, nil, second); code != 200 {
		t.Errorf("the same again: %d", code)
	}
}

func mustKey(t *testing.T) string {
	t.Helper()
	private, _ := newKey(t, "witness.test")
	return private
}
