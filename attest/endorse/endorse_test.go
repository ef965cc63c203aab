package endorse_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

var (
	start = time.Now().UTC().Truncate(time.Second)
	// vendors are minted once.
	simulation = sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{Fast: true, Now: start}) })
	stranger   = sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{Fast: true, Now: start}) })

	nonce = [32]byte{1}
	data  = [64]byte{2}
)

// world is a machine, the vendors' services, and a verifier's cache.
type world struct {
	*testing.T
	v        *simulate.Vendor
	services *endorsetest.Services
	lib      *endorse.Library
	now      time.Time
	// evidence changes what the machine shows.
	evidence func(*snp.Evidence)
	opts     simulate.SNPOptions
}

func newWorld(t *testing.T) *world {
	t.Helper()
	v, err := simulation()
	if err != nil {
		t.Fatal(err)
	}
	return &world{T: t, v: v, services: endorsetest.New(t, v, start), lib: endorse.NewLibrary(), now: start, evidence: func(*snp.Evidence) {}, opts: simulate.SNPOptions{}}
}

// held puts all that the services know into the library, as if got at a time.
func (w *world) held(at time.Time) {
	w.Helper()
	for k, b := range w.services.Answers() {
		i, err := endorse.Parse(k.Kind, k.ID, b)
		if err != nil {
			w.Fatal(err)
		}
		if _, err := w.lib.Add(i, at); err != nil {
			w.Fatal(err)
		}
	}
}

func (w *world) cache(o endorse.Options) *endorse.Cache {
	w.Helper()
	if o.Store == nil {
		o.Store = w.lib
	}
	o.Anchors, o.Clock = w.v.Anchors(), func() time.Time { return w.now }
	c, err := endorse.New(o)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(c.Close)
	return c
}

// appraise has the machine attest: a report without certificates, and a GPU.
func (w *world) appraise(c *endorse.Cache) (snp.Result, nvgpu.Result) {
	w.Helper()
	r, err := w.v.Chip().Report(data, w.opts)
	if err != nil {
		w.Fatal(err)
	}
	ev := snp.Evidence{Report: r}
	w.evidence(&ev)
	g := w.v.GPUs()[0]
	gr, err := g.Report(nonce, simulate.GPUOptions{})
	if err != nil {
		w.Fatal(err)
	}
	return c.AppraiseSNP(w.Context(), ev, snp.Want{ReportData: data}, w.v.Anchors(), w.now),
		c.AppraiseGPU(w.Context(), nvgpu.Evidence{Report: gr, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()},
			nvgpu.Want{Nonce: nonce}, w.v.Anchors(), w.now)
}

// want wants the appraisal to fail by the checks given and no others.
func (w *world) want(c *endorse.Cache, fails ...string) {
	w.Helper()
	cpu, gpu := w.appraise(c)
	var ids []string
	for _, f := range append(cpu.Checks.Failed(), gpu.Checks.Failed()...) {
		ids = append(ids, f.ID)
	}
	slices.Sort(ids)
	slices.Sort(fails)
	if !slices.Equal(ids, fails) {
		w.Errorf("failed %v, want %v", ids, fails)
		for _, f := range append(cpu.Checks.Failed(), gpu.Checks.Failed()...) {
			w.Logf("%s: %s", f.ID, f.Found)
		}
	}
}

// TestAllCached leaves nothing unchecked that a policy could require: each check
// is made, and passes, from what is held.
func TestAllCached(t *testing.T) {
	for name, versions := range map[string]uint32{"report that names its product": 3, "report that does not": 2} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.opts.Version = versions
			online := w.cache(endorse.Options{Fetch: w.services})
			w.want(online)
			asked := w.services.Asked(endorse.Key{})
			if asked == 0 {
				t.Fatal("nobody was asked")
			}
			w.want(online)
			if n := w.services.Asked(endorse.Key{}); n != asked {
				t.Errorf("asked %d times more for what is held", n-asked)
			}
			offline := w.cache(endorse.Options{})
			cpu, gpu := w.appraise(offline)
			for _, k := range append(slices.Clone(cpu.Checks), gpu.Checks...) {
				if k.Outcome != check.Pass {
					t.Errorf("%s: %s: %s", k.ID, k.Outcome, k.Found)
				}
			}
			used, err := endorse.UsedIn(receipt.Result{Submods: map[string]receipt.Appraisal{"cpu0": {Claims: cpu.Claims}, "gpu0": {Claims: gpu.Claims}}})
			if err != nil {
				t.Fatal(err)
			}
			kinds := map[endorse.Kind]int{}
			for _, u := range used {
				kinds[u.Key.Kind]++
				if h, ok := w.lib.ByDigest(u.Key, u.Digest); !ok || h.Key != u.Key {
					t.Errorf("%s %s is not held", u.Key, u.Digest)
				}
			}
			// Three certificates of the device, and of each manifest signer, CA
			// and, once, root of which there is none to ask.
			if kinds[endorse.VEK] != 1 || kinds[endorse.Chain] != 1 || kinds[endorse.CRL] != 1 || kinds[endorse.RIM] != 2 || kinds[endorse.OCSP] != 6 {
				t.Errorf("used %v", kinds)
			}
		})
	}
}

// Each row is one departure, held in the verifier's folder or told by a service,
// and the check that must refuse it.
func TestRefused(t *testing.T) {
	serials := func(w *world) (vcek, ask *x509.Certificate) {
		v, a, _ := w.v.Chip().Certificates()
		vc, err := x509.ParseCertificate(v)
		if err != nil {
			w.Fatal(err)
		}
		ac, err := x509.ParseCertificate(a)
		if err != nil {
			w.Fatal(err)
		}
		return vc, ac
	}
	crl := func(w *world, from time.Time, revoked ...*big.Int) {
		b, err := w.v.CRL(from, revoked...)
		if err != nil {
			w.Fatal(err)
		}
		w.services.Set(endorse.CRLKey(w.v.Chip().Product(), snp.VCEK), b)
	}
	for _, row := range []struct {
		situation string
		change    func(w *world)
		// offline are the checks that fail if the folder has it, online if a
		// service says so: an answer that is none is never kept.
		offline, online []string
	}{
		{"revoked VCEK: its issuer is on the list", func(w *world) {
			_, ask := serials(w)
			crl(w, start.Add(-time.Hour), ask.SerialNumber)
		}, []string{snp.CheckCRL}, []string{snp.CheckCRL}},
		{"revoked signer of the driver's manifest", func(w *world) {
			s := w.services.Signer()
			w.services.Status(s.Cert, s.Issuer, simulate.OCSPOptions{Status: ocsp.Revoked, ThisUpdate: start.Add(-time.Minute)})
		}, []string{"gpu.driver-rim-ocsp"}, []string{"gpu.driver-rim-ocsp"}},
		{"device's issuer on hold", func(w *world) {
			p := w.services.Find("Provisioner")
			w.services.Status(p.Cert, p.Issuer, simulate.OCSPOptions{Status: ocsp.Revoked, Reason: ocsp.CertificateHold, ThisUpdate: start.Add(-time.Minute)})
		}, []string{nvgpu.CheckOCSP}, []string{nvgpu.CheckOCSP}},
		{"status of another certificate", func(w *world) {
			p := w.services.Find("Provisioner")
			w.services.Status(p.Cert, p.Issuer, simulate.OCSPOptions{Serial: big.NewInt(7), ThisUpdate: start.Add(-time.Minute)})
		}, []string{nvgpu.CheckOCSP}, []string{nvgpu.CheckOCSP}},
		{"status by a responder without the right", func(w *world) {
			p := w.services.Find("Provisioner")
			w.services.Status(p.Cert, p.Issuer, simulate.OCSPOptions{ThisUpdate: start.Add(-time.Minute), EditResponder: func(c *x509.Certificate) { c.ExtKeyUsage = nil }})
		}, []string{nvgpu.CheckOCSP}, []string{nvgpu.CheckOCSP}},
		{"stale list", func(w *world) { crl(w, start.AddDate(0, -2, 0)) }, []string{snp.CheckCRL}, []string{snp.CheckCRL}},
		{"list of another root of that name", func(w *world) {
			s, err := stranger()
			if err != nil {
				w.Fatal(err)
			}
			b, err := s.CRL(start.Add(-time.Hour))
			if err != nil {
				w.Fatal(err)
			}
			w.services.Set(endorse.CRLKey(w.v.Chip().Product(), snp.VCEK), b)
		}, []string{snp.CheckCRL}, []string{snp.CheckCRL}},
		{"no list", func(w *world) { w.services.Set(endorse.CRLKey(w.v.Chip().Product(), snp.VCEK), nil) }, []string{snp.CheckCRL}, []string{snp.CheckCRL}},
		{"no manifest of the driver", func(w *world) {
			w.services.Set(endorse.Key{Kind: endorse.RIM, ID: "NV_GPU_DRIVER_GH100_" + simulate.DefaultDriver}, nil)
		}, []string{nvgpu.CheckDriverRIM}, []string{nvgpu.CheckDriverRIM}},
		{"manifest of another simulation", func(w *world) {
			s, err := stranger()
			if err != nil {
				w.Fatal(err)
			}
			b, err := s.DriverRIM(simulate.RIMOptions{})
			if err != nil {
				w.Fatal(err)
			}
			w.services.Set(endorse.Key{Kind: endorse.RIM, ID: "NV_GPU_DRIVER_GH100_" + simulate.DefaultDriver}, b)
		}, []string{"gpu.driver-rim-chain"}, []string{"gpu.driver-rim-chain"}},
		{"no certificate of the chip", func(w *world) {
			vcek, _ := serials(w)
			i, err := endorse.Parse(endorse.VEK, "", vcek.Raw)
			if err != nil {
				w.Fatal(err)
			}
			w.services.Set(i.Key, nil)
		}, []string{snp.CheckChain}, []string{snp.CheckChain}},
	} {
		t.Run(row.situation, func(t *testing.T) {
			t.Run("folder", func(t *testing.T) {
				w := newWorld(t)
				row.change(w)
				// As whoever fills the folder by hand might: under the wrong key too.
				w.want(w.cache(endorse.Options{Store: asAnswered{w.services.Answers(), w.lib}}), row.offline...)
			})
			t.Run("service", func(t *testing.T) {
				w := newWorld(t)
				row.change(w)
				w.want(w.cache(endorse.Options{Fetch: w.services}), row.online...)
			})
		})
	}
}

// asAnswered is a store that believes whatever it was given.
type asAnswered struct {
	answers map[endorse.Key][]byte
	*endorse.Library
}

func (s asAnswered) Get(k endorse.Key, _ time.Time) (endorse.Held, bool) {
	b, ok := s.answers[k]
	return endorse.Held{Item: endorse.Item{Key: k, Bytes: b}}, ok
}

// What a list in the evidence counts for: its owner may be the attacker.
func TestListInTheEvidence(t *testing.T) {
	table := func(w *world) {
		crl, err := w.v.CRL(start.Add(-24 * time.Hour))
		if err != nil {
			w.Fatal(err)
		}
		vcek, ask, ark := w.v.Chip().Certificates()
		w.evidence = func(ev *snp.Evidence) {
			ev.Certificates = simulate.Table(simulate.Entry{GUID: simulate.VCEKGUID, DER: vcek}, simulate.Entry{GUID: simulate.CRLGUID, DER: crl})
			ev.Chain = [][]byte{nil, ask, ark}
		}
		_ = ark
	}
	t.Run("does not pass though there is no other", func(t *testing.T) {
		w := newWorld(t)
		w.held(start)
		lib := endorse.NewLibrary()
		for _, h := range w.lib.All() {
			if h.Key.Kind != endorse.CRL {
				if _, err := lib.Add(h.Item, start); err != nil {
					t.Fatal(err)
				}
			}
		}
		w.lib = lib
		table(w)
		w.want(w.cache(endorse.Options{}), snp.CheckCRL)
	})
	t.Run("does not stand in for one that revokes", func(t *testing.T) {
		w := newWorld(t)
		_, ask, _ := w.v.Chip().Certificates()
		c, err := x509.ParseCertificate(ask)
		if err != nil {
			t.Fatal(err)
		}
		b, err := w.v.CRL(start.Add(-time.Hour), c.SerialNumber)
		if err != nil {
			t.Fatal(err)
		}
		w.services.Set(endorse.CRLKey(w.v.Chip().Product(), snp.VCEK), b)
		w.held(start)
		table(w)
		w.want(w.cache(endorse.Options{}), snp.CheckCRL)
	})
	t.Run("does not stand in during an outage", func(t *testing.T) {
		for _, version := range []uint32{2, 3} {
			w := newWorld(t)
			w.opts.Version = version
			table(w)
			w.services.Away(errors.New("down"))
			w.want(w.cache(endorse.Options{Fetch: w.services, OnOutage: endorse.UseUnexpired, Offer: []endorse.Kind{endorse.VEK, endorse.Chain, endorse.CRL}}), snp.CheckCRL)
		}
	})
}

// An outage never turns into acceptance; whether it refuses what was accepted
// before is configured.
func TestOutage(t *testing.T) {
	down := errors.New("connection refused")
	all := []string{snp.CheckCRL, nvgpu.CheckOCSP, "gpu.driver-rim-ocsp", "gpu.vbios-rim-ocsp"}
	for _, row := range []struct {
		situation string
		on        endorse.Outage
		held      time.Duration // how long ago; 0 is not at all
		after     time.Duration // how long after the answers were made
		fails     []string
	}{
		{"nothing held, refuse", endorse.Refuse, 0, 0, []string{snp.CheckChain, nvgpu.CheckOCSP, nvgpu.CheckDriverRIM, nvgpu.CheckVBIOSRIM}},
		{"nothing held, unexpired", endorse.UseUnexpired, 0, 0, []string{snp.CheckChain, nvgpu.CheckOCSP, nvgpu.CheckDriverRIM, nvgpu.CheckVBIOSRIM}},
		{"nothing said is refuse", "", 48 * time.Hour, 0, all},
		{"fresh copies, refuse", endorse.Refuse, time.Minute, 0, nil},
		{"copies due, refuse", endorse.Refuse, 48 * time.Hour, 0, all},
		{"copies due, unexpired", endorse.UseUnexpired, 48 * time.Hour, 0, nil},
		{"copies expired, unexpired", endorse.UseUnexpired, 48 * time.Hour, 40 * 24 * time.Hour, all},
	} {
		t.Run(row.situation, func(t *testing.T) {
			w := newWorld(t)
			if row.held > 0 {
				w.held(start.Add(-row.held))
			}
			w.now = start.Add(row.after)
			w.services.Away(down)
			w.want(w.cache(endorse.Options{Fetch: w.services, OnOutage: row.on}), row.fails...)
		})
	}
}

// While a copy is used, a newer one is got behind the caller's back.
func TestStaleWhileRevalidate(t *testing.T) {
	w := newWorld(t)
	w.held(start.Add(-48 * time.Hour))
	key := endorse.CRLKey(w.v.Chip().Product(), snp.VCEK)
	newer, err := w.v.CRL(start.Add(-time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	w.services.Set(key, newer)
	c := w.cache(endorse.Options{Fetch: w.services, OnOutage: endorse.UseUnexpired})
	cpu, _ := w.appraise(c)
	if f := cpu.Checks.Failed(); len(f) > 0 {
		t.Fatal(f)
	}
	for range 6000 {
		if h, ok := w.lib.Newest(key); ok && string(h.Bytes) == string(newer) && h.Checked.Equal(start) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the copy is the old one")
}

// A service, or who sits in front of it, cannot take back a revocation by an
// older answer that is still current.
func TestOlderAnswerIsNotTaken(t *testing.T) {
	w := newWorld(t)
	_, ask, _ := w.v.Chip().Certificates()
	c, err := x509.ParseCertificate(ask)
	if err != nil {
		t.Fatal(err)
	}
	key := endorse.CRLKey(w.v.Chip().Product(), snp.VCEK)
	older := w.services.Answers()[key]
	revoking, err := w.v.CRL(start.Add(-time.Minute), c.SerialNumber)
	if err != nil {
		t.Fatal(err)
	}
	w.services.Set(key, revoking)
	w.want(w.cache(endorse.Options{Fetch: w.services}), snp.CheckCRL)
	w.services.Set(key, older)
	w.now = start.Add(25 * time.Hour)
	cpu, _ := w.appraise(w.cache(endorse.Options{Fetch: w.services}))
	if f := cpu.Checks.Failed(); len(f) != 1 || f[0].ID != snp.CheckCRL {
		t.Errorf("failed %v", f)
	}
	cpu, _ = w.appraise(w.cache(endorse.Options{Fetch: w.services, OnOutage: endorse.UseUnexpired}))
	if f := cpu.Checks.Failed(); len(f) != 1 || f[0].ID != snp.CheckCRL {
		t.Errorf("failed %v", f)
	}
}

// An answer that led to a refusal is asked for again, not believed for a week.
func TestBadAnswerHeals(t *testing.T) {
	w := newWorld(t)
	key := endorse.Key{Kind: endorse.RIM, ID: "NV_GPU_DRIVER_GH100_" + simulate.DefaultDriver}
	good := w.services.Answers()[key]
	bad, err := w.v.DriverRIM(simulate.RIMOptions{EditSigned: func(s string) string { return strings.Replace(s, "Measurement_7", "Measurement_8", 1) }})
	if err != nil {
		t.Fatal(err)
	}
	w.services.Set(key, bad)
	c := w.cache(endorse.Options{Fetch: w.services})
	w.want(c, "gpu.driver-rim-signature")
	w.services.Set(key, good)
	w.now = w.now.Add(2 * time.Minute)
	w.appraise(c)
	for range 6000 {
		if _, gpu := w.appraise(c); len(gpu.Checks.Failed()) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the bad answer is still believed")
}

// Many at once make one request.
func TestSingleFlight(t *testing.T) {
	w := newWorld(t)
	slow := &slowly{Services: w.services, gate: make(chan struct{})}
	c := w.cache(endorse.Options{Fetch: slow})
	r, err := w.v.Chip().Report(data, simulate.SNPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			res := c.AppraiseSNP(t.Context(), snp.Evidence{Report: r}, snp.Want{ReportData: data}, w.v.Anchors(), w.now)
			if f := res.Checks.Failed(); len(f) > 0 {
				t.Errorf("%+v", f)
			}
		})
	}
	close(slow.gate)
	wg.Wait()
	for k := range w.services.Answers() {
		if n := w.services.Asked(k); n > 1 {
			t.Errorf("%s was asked for %d times", k, n)
		}
	}
}

type slowly struct {
	*endorsetest.Services
	gate chan struct{}
}

func (s *slowly) Fetch(ctx context.Context, r endorse.Request) ([]byte, error) {
	<-s.gate
	time.Sleep(20 * time.Millisecond)
	return s.Services.Fetch(ctx, r)
}

// Who hangs is waited for a while, by the caller's clock, and never longer.
func TestHangingService(t *testing.T) {
	w := newWorld(t)
	c := w.cache(endorse.Options{Fetch: hanging{}})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	r, err := w.v.Chip().Report(data, simulate.SNPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	res := c.AppraiseSNP(ctx, snp.Evidence{Report: r}, snp.Want{ReportData: data}, w.v.Anchors(), w.now)
	if res.Genuine() {
		t.Error("accepted")
	}
}

type hanging struct{}

func (hanging) Fetch(ctx context.Context, _ endorse.Request) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestRecognize(t *testing.T) {
	w := newWorld(t)
	vcek, ask, ark := w.v.Chip().Certificates()
	block := func(kind string, der ...[]byte) []byte {
		var out []byte
		for _, d := range der {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: d})...)
		}
		return out
	}
	all := w.services.Answers()
	rimID := "NV_GPU_DRIVER_GH100_" + simulate.DefaultDriver
	rim := all[endorse.Key{Kind: endorse.RIM, ID: rimID}]
	crl := all[endorse.CRLKey(w.v.Chip().Product(), snp.VCEK)]
	var status []byte
	for k, b := range all {
		if k.Kind == endorse.OCSP {
			status = b
		}
	}
	for _, row := range []struct {
		name string
		b    []byte
		want []endorse.Kind // nil is an error
	}{
		{"vcek.der", vcek, []endorse.Kind{endorse.VEK}},
		{"vcek.pem", block("CERTIFICATE", vcek), []endorse.Kind{endorse.VEK}},
		{"all.pem", block("CERTIFICATE", vcek, ask, ark), []endorse.Kind{endorse.VEK, endorse.Chain}},
		{"cert_chain", block("CERTIFICATE", ask, ark), []endorse.Kind{endorse.Chain}},
		{"crl", crl, []endorse.Kind{endorse.CRL}},
		{"crl.pem", block("X509 CRL", crl), []endorse.Kind{endorse.CRL}},
		{"status", status, []endorse.Kind{endorse.OCSP}},
		{rimID + ".xml", rim, []endorse.Kind{endorse.RIM}},
		{"a manifest without its id", rim, nil},
		{"NV_GPU_DRIVER_GH100_1.2.3.xml", rim, nil},
		{"NV_GPU_DRIVER_GH100_../../x.xml", rim, nil},
		{"root alone", block("CERTIFICATE", ark), nil},
		{"chain upside down", block("CERTIFICATE", ark, ask), nil},
		{"key", block("PRIVATE KEY", vcek), nil},
		{"text between", append(block("CERTIFICATE", vcek), "and more"...), nil},
		{"byte behind", append(slices.Clone(vcek), 0), nil},
		{"OCSP error", ocsp.TryLaterErrorResponse, nil},
		{"empty", nil, nil},
		{"garbage", []byte("garbage"), nil},
		{"over the limit", make([]byte, endorse.MaxFile+1), nil},
		{"json without manifest", []byte(`{}`), nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			items, err := endorse.Recognize(row.name, row.b)
			var kinds []endorse.Kind
			for _, i := range items {
				kinds = append(kinds, i.Key.Kind)
			}
			if (err != nil) != (row.want == nil) || !slices.Equal(kinds, row.want) {
				t.Errorf("%v, %v", kinds, err)
			}
		})
	}
}

func TestLibraryKeepsVersions(t *testing.T) {
	w := newWorld(t)
	key := endorse.CRLKey(w.v.Chip().Product(), snp.VCEK)
	for days := range 70 {
		b, err := w.v.CRL(start.AddDate(0, 0, days))
		if err != nil {
			t.Fatal(err)
		}
		i, err := endorse.Parse(endorse.CRL, "", b)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.lib.Put(i, start); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(w.lib.All()); n != 64 {
		t.Errorf("%d versions", n)
	}
	at := start.AddDate(0, 0, 20)
	if h, ok := w.lib.Get(key, at.Add(time.Hour)); !ok || !h.From.Equal(at) {
		t.Errorf("of %s: want the last one before %s", h.From, at)
	}
	if h, _ := w.lib.Newest(key); !h.From.Equal(start.AddDate(0, 0, 69)) {
		t.Errorf("newest is of %s", h.From)
	}
}

func TestZeroCacheOffersNothing(t *testing.T) {
	if _, err := endorse.New(endorse.Options{}); err == nil {
		t.Error("a cache of nothing")
	}
	w := newWorld(t)
	cpu, gpu := w.appraise(nil)
	for _, id := range []string{nvgpu.CheckOCSP, nvgpu.CheckMeasurements} {
		if !slices.ContainsFunc(gpu.Checks, func(c check.Check) bool { return c.ID == id && c.Outcome == check.NotChecked }) {
			t.Errorf("%s was checked", id)
		}
	}
	if cpu.Genuine() {
		t.Error("genuine without a chain")
	}
}
