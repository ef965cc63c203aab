package hold

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// clocked is a holder on a clock of the test's own. Nothing happens when its
// lease ends: no alarm rings and nobody takes anything back, so that nothing but
// the look at the clock stands between the job and its keys.
type clocked struct {
	*Holder
	t     *testing.T
	clock atomic.Int64
	jwks  []byte
	sign  *receipt.Signer
	sink  string
}

func newClocked(t *testing.T) *clocked {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("mounting a FUSE file system needs root")
		}
		t.Skip("mounting a FUSE file system needs root")
	}
	run, err := os.MkdirTemp("/tmp", "coffer-run-")
	ok(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	h, err := Create(t.Context(), Config{RunDir: run, JobID: "job-1", UID: 65532, GID: 65532, LogBytes: 1000, RegionBytes: 4 << 20, Procs: procsOf(t), Log: slog.New(slog.DiscardHandler)})
	ok(t, err)
	c := &clocked{Holder: h, t: t, sign: newSigner(t, "broker.test"), sink: t.TempDir()}
	c.clock.Store(int64(1000 * time.Hour))
	h.lease.now = func() time.Duration { return time.Duration(c.clock.Load()) }
	h.lease.arm = func(time.Duration) error { return nil }
	h.lease.over = func(holdapi.Lease) {}
	c.jwks, err = c.sign.JWKS()
	ok(t, err)
	t.Cleanup(func() {
		if _, err := h.finish(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	// The container has started, and its trace is there.
	h.trace.conn = new(net.UnixConn)
	close(h.trace.started)
	return c
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (c *clocked) request(asset string) error {
	c.t.Helper()
	b, err := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker.test", Grant: "g", Attempt: 1, ResultID: "r", Asset: asset}.Canonical()
	ok(c.t, err)
	_, err = c.signRelease(b)
	return err
}

func (c *clocked) give(key *keys.DataKey, asset string) error {
	c.t.Helper()
	info, err := receipt.WrapInfo("g", leasePlan, asset, "r", c.sign.LeaseTerms(60))
	ok(c.t, err)
	enc, ct, err := key.Wrap(c.recipient.Public(), info, []byte(asset))
	ok(c.t, err)
	return c.deliver(holdapi.Deliver{Asset: asset, Info: info, Enc: enc, Ciphertext: ct, LeaseKeys: c.jwks})
}

type plainReader struct{ *bytes.Reader }

func (plainReader) Close() error { return nil }

func sourceOf(name string, b []byte) seal.Source {
	return seal.Source{Name: name, Size: int64(len(b)), Open: func() (seal.Reader, error) { return plainReader{bytes.NewReader(b)}, nil }}
}

// opened gives the holder keys, one input with a file that fits into memory and
// one that does not, and a sink.
func (c *clocked) opened(decrypt bool) {
	c.t.Helper()
	key := keys.GenerateDataKey()
	dir := filepath.Join(c.t.TempDir(), "sealed")
	s, err := seal.Seal(c.t.Context(), key, "a", []seal.Source{sourceOf("big", make([]byte, 9<<20)), sourceOf("small", make([]byte, 1<<20))}, dir, seal.Options{ChunkSize: seal.MinChunkSize})
	ok(c.t, err)
	root, err := os.OpenRoot(dir)
	ok(c.t, err)
	ok(c.t, c.input(c.t.Context(), holdapi.Input{Name: "in", Asset: "a", Digest: s.Digest}, root))
	for _, asset := range []string{"a", "ckpt"} {
		ok(c.t, c.request(asset))
		ok(c.t, c.give(key, asset))
	}
	sink, err := os.OpenRoot(c.sink)
	ok(c.t, err)
	ok(c.t, c.setSink(holdapi.Sink{Asset: "ckpt", Plan: leasePlan, MaxBytes: 1 << 20}, sink))
	if decrypt {
		_, err := c.decrypt(c.t.Context())
		ok(c.t, err)
	}
}

func (c *clocked) file(size int64) *demandFile {
	c.t.Helper()
	for _, f := range c.demand.files {
		if f.entry.Size == size {
			return f
		}
	}
	c.t.Fatal("no such file")
	return nil
}

func (c *clocked) lapse() { c.clock.Add(int64(time.Minute)) }

// lapsing is a file during whose sealing the lease ends.
type lapsing struct {
	seal.Reader
	c *clocked
}

func (l lapsing) ReadAt(p []byte, off int64) (int, error) {
	if off > 0 {
		l.c.lapse()
	}
	return l.Reader.ReadAt(p, off)
}

func readSome(s source, off int64) error {
	r, err := s.read(make([]byte, 4096), off)
	if err == nil {
		r.Done()
	}
	return err
}

// Every use of a key looks at the clock.
func TestEveryUseOfAKeyAsksForTheLease(t *testing.T) {
	read := func(f *demandFile, off int64) error {
		s, err := f.open(nil)
		if err != nil {
			return err
		}
		defer s.close()
		return readSome(s, off)
	}
	for _, tt := range []struct {
		name   string
		sealed bool // before the inputs are decrypted
		use    func(c *clocked) (lapsed func() error)
	}{
		{"release request", false, func(c *clocked) func() error { return func() error { return c.request("b") } }},
		{"delivery", false, func(c *clocked) func() error {
			ok(c.t, c.request("b"))
			return func() error { return c.give(keys.GenerateDataKey(), "b") }
		}},
		{"decryption", true, func(c *clocked) func() error {
			return func() error { _, err := c.decrypt(c.t.Context()); return err }
		}},
		{"path", false, func(c *clocked) func() error {
			if e := c.inputFS.gate(c.t.Context()); e != 0 {
				c.t.Fatal(e)
			}
			return func() error {
				if e := c.inputFS.gate(c.t.Context()); e != 0 {
					return e
				}
				return nil
			}
		}},
		{"file that is decrypted when it opens", false, func(c *clocked) func() error { return func() error { return read(c.file(1<<20), 0) } }},
		{"file that is read by chunks", false, func(c *clocked) func() error { return func() error { return read(c.file(9<<20), 0) } }},
		{"chunk of an open file", false, func(c *clocked) func() error {
			s, err := c.file(9 << 20).open(nil)
			ok(c.t, err)
			c.t.Cleanup(s.close)
			ok(c.t, readSome(s, 0))
			return func() error { return readSome(s, 8<<20) }
		}},
		{"chunk of a region", false, func(c *clocked) func() error {
			f := c.file(9 << 20)
			o, err := f.folder.Open(f.key, f.entry)
			ok(c.t, err)
			c.t.Cleanup(func() { _ = o.Close() })
			pool := dma.NewPool(0)
			c.t.Cleanup(func() { _ = pool.Close() })
			r, err := pool.Get("test", f.entry.Size)
			ok(c.t, err)
			return func() error { return fillRegion(c.t.Context(), c.lease.use, o, r) }
		}},
		{"checkpoint", false, func(c *clocked) func() error {
			ok(c.t, c.commit("one", []seal.Source{sourceOf("f", make([]byte, 100))}))
			return func() error { return c.commit("two", []seal.Source{sourceOf("f", make([]byte, 100))}) }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClocked(t)
			c.opened(!tt.sealed)
			use := tt.use(c)
			c.lapse()
			if err := use(); err == nil {
				t.Error("it went on without a lease")
			}
		})
	}
	t.Run("checkpoint that takes long", func(t *testing.T) {
		c := newClocked(t)
		c.opened(true)
		big := sourceOf("f", make([]byte, 64<<20))
		open := big.Open
		big.Open = func() (seal.Reader, error) {
			r, err := open()
			return lapsing{r, c}, err
		}
		if err := c.commit("one", []seal.Source{big}); err == nil {
			t.Error("a checkpoint was sealed past the lease")
		}
		left, err := os.ReadDir(c.sink)
		if err != nil || len(left) > 0 {
			t.Errorf("it left %v %v", left, err)
		}
	})
}
