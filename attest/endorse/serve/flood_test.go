package serve_test

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/serve"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

// chipID is the offset of the chip's id in a report (SEV-SNP ABI specification).
const chipID = 0x1A0

// Evidence names its chip before anything of it is believed. Whoever makes up
// chips without end is stopped after a few fetches, and takes nothing from others.
func TestMadeUpChips(t *testing.T) {
	t.Parallel()
	v := vendor(t)
	f := newFake(t, v)
	e := open(t, f.config(t.TempDir()), v)
	good, err := v.Chip().Report(data, simulate.SNPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	found := func(caller string, report []byte) (out string) {
		r := e.AppraiseSNP(endorse.WithCaller(t.Context(), caller), snp.Evidence{Report: report}, snp.Want{ReportData: data}, v.Anchors(), start)
		for _, c := range r.Checks {
			if c.ID == snp.CheckChain && c.Outcome == check.Fail {
				out = c.Found
			}
		}
		return out
	}
	chips := uint64(0)
	madeUp := func() []byte {
		r := append([]byte(nil), good...)
		chips++
		binary.BigEndian.PutUint64(r[chipID:], chips)
		return r
	}
	var last string
	began := time.Now()
	// Accounts fill again while the test runs.
	within := func(n, limit int64, perMinute float64) bool {
		return n <= limit+2+int64(time.Since(began).Minutes()*perMinute)
	}
	for range 2 * serve.CallerBurst {
		last = found("agent/hostile", madeUp())
	}
	asked := f.requests.Load()
	if asked < serve.CallerBurst/2 || !within(asked, serve.CallerBurst, serve.CallerPerMinute) {
		t.Errorf("%d requests on one caller's account, want at most %d", asked, serve.CallerBurst)
	}
	if !strings.Contains(last, "agent/hostile") || !strings.Contains(last, "asks for too much") {
		t.Errorf("it is told %q", last)
	}
	if s := found("agent/honest", good); s != "" {
		t.Errorf("another caller is refused: %s", s)
	}
	if n := e.Failures(endorse.VEK); n < serve.CallerBurst {
		t.Errorf("%d failures are counted", n)
	}

	// Many callers together are bounded by what the service is asked at all.
	f.requests.Store(0)
	began = time.Now()
	told := false
	for caller := range 8 {
		for range serve.CallerBurst {
			last = found(fmt.Sprintf("agent/hostile-%d", caller), madeUp())
			told = told || strings.Contains(last, "is asked too much")
		}
	}
	if n := f.requests.Load(); !within(n, serve.Burst, serve.PerMinute) {
		t.Errorf("%d requests for all callers, want at most %d", n, serve.Burst)
	}
	if !told {
		t.Errorf("the last is told %q", last)
	}
	// What is held needs nobody.
	if s := found("agent/hostile", good); s != "" {
		t.Errorf("an endorsement that is held: %s", s)
	}
}

// Accounts are bounded in number, too.
func TestCallersAreBounded(t *testing.T) {
	c, err := serve.NewClient(serve.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range serve.MaxCallers {
		if err := c.Charge(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Charge("one more"); err == nil {
		t.Error("accounts without end")
	}
	if err := c.Charge("1"); err != nil {
		t.Errorf("a caller that has an account: %v", err)
	}
	if err := c.Charge(""); err != nil {
		t.Errorf("on nobody's account: %v", err)
	}
}
