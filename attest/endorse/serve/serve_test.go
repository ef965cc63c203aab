package serve_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/endorse/serve"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/snp"
)

var (
	start      = time.Now().UTC().Truncate(time.Second)
	simulation = sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{Fast: true, Now: start}) })
	nonce      = [32]byte{1}
	data       = [64]byte{2}
	discard    = slog.New(slog.DiscardHandler)
)

func vendor(t *testing.T) *simulate.Vendor {
	t.Helper()
	v, err := simulation()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// fake is the vendors' services over HTTPS. misbehave, if set, answers instead
// of them and says whether it did.
type fake struct {
	*httptest.Server
	services  *endorsetest.Services
	misbehave func(w http.ResponseWriter, r *http.Request) bool
	requests  atomic.Int64
	caFile    string
}

func newFake(t *testing.T, v *simulate.Vendor) *fake {
	t.Helper()
	f := &fake{services: endorsetest.New(t, v, start)}
	byStatus := map[string]endorse.Key{}
	for k := range f.services.Answers() {
		if k.Kind == endorse.OCSP {
			serial, _, _ := strings.Cut(k.ID, "@")
			byStatus[serial] = k
		}
	}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		if f.misbehave != nil && f.misbehave(w, r) {
			return
		}
		var req endorse.Request
		path := strings.TrimPrefix(r.URL.Path, "/")
		switch kind, rest, _ := strings.Cut(path, "/"); kind {
		case "kds":
			req.Key = endorse.Key{Kind: endorse.VEK, ID: rest + "?" + r.URL.RawQuery}
			if strings.HasSuffix(rest, "/cert_chain") {
				req.Key = endorse.Key{Kind: endorse.Chain, ID: rest}
			} else if strings.HasSuffix(rest, "/crl") {
				req.Key = endorse.Key{Kind: endorse.CRL, ID: rest}
			}
		case "rim":
			req.Key = endorse.Key{Kind: endorse.RIM, ID: rest}
		case "ocsp":
			body, err := io.ReadAll(r.Body)
			if err == nil {
				var o *ocsp.Request
				if o, err = ocsp.ParseRequest(body); err == nil {
					req = endorse.Request{Key: byStatus[o.SerialNumber.Text(16)], Body: body}
				}
			}
			if err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/ocsp-request" {
				http.Error(w, "no OCSP request", http.StatusBadRequest)
				return
			}
		}
		b, err := f.services.Fetch(r.Context(), req)
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		if req.Key.Kind == endorse.RIM {
			b, err = json.Marshal(map[string]any{"id": req.Key.ID, "rim": base64.StdEncoding.EncodeToString(b), "rim_format": "XML", "sha256": "", "request_id": "1"})
			if err != nil {
				t.Error(err)
			}
		}
		_, _ = w.Write(b)
	}))
	f.Config.ErrorLog = slog.NewLogLogger(discard.Handler(), slog.LevelError)
	f.StartTLS()
	t.Cleanup(f.Close)
	f.caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(f.caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fake) config(dir string) serve.Config {
	return serve.Config{Dir: dir, Fetch: true, KDS: f.URL + "/kds/", RIM: f.URL + "/rim/", OCSP: f.URL + "/ocsp/", CAFile: f.caFile}
}

func open(t *testing.T, c serve.Config, v *simulate.Vendor) *serve.Endorsements {
	t.Helper()
	e, err := serve.Open(c, v.Anchors(), discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e
}

func appraise(t *testing.T, e *serve.Endorsements, v *simulate.Vendor) check.List {
	t.Helper()
	r, err := v.Chip().Report(data, simulate.SNPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	g := v.GPUs()[0]
	gr, err := g.Report(nonce, simulate.GPUOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cpu := e.AppraiseSNP(t.Context(), snp.Evidence{Report: r}, snp.Want{ReportData: data}, v.Anchors(), start)
	gpu := e.AppraiseGPU(t.Context(), nvgpu.Evidence{Report: gr, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()},
		nvgpu.Want{Nonce: nonce}, v.Anchors(), start)
	return append(cpu.Checks, gpu.Checks...)
}

func failed(l check.List) []string {
	var out []string
	for _, c := range l.Failed() {
		out = append(out, c.ID)
	}
	return out
}

// everything is what fails if no service can be had and nothing is held.
var everything = []string{snp.CheckChain, nvgpu.CheckOCSP, nvgpu.CheckDriverRIM, nvgpu.CheckVBIOSRIM}

// What was fetched once is there for a verifier without a way to the vendors.
func TestFetchedIsKept(t *testing.T) {
	v := vendor(t)
	f := newFake(t, v)
	dir := t.TempDir()
	for _, c := range appraise(t, open(t, f.config(dir), v), v) {
		if c.Outcome != check.Pass {
			t.Errorf("%s: %s: %s", c.ID, c.Outcome, c.Found)
		}
	}
	asked := f.requests.Load()
	for _, c := range appraise(t, open(t, serve.Config{Dir: dir}, v), v) {
		if c.Outcome != check.Pass {
			t.Errorf("offline: %s: %s: %s", c.ID, c.Outcome, c.Found)
		}
	}
	if n := f.requests.Load(); n != asked {
		t.Errorf("asked %d times more", n-asked)
	}
}

// Each row is a service that misbehaves towards everyone. None is believed, and
// none keeps an appraisal waiting for long.
func TestMisbehavingServices(t *testing.T) {
	answer := func(b []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = w.Write(b)
			return true
		}
	}
	status := func(code int, header ...string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			if len(header) == 2 {
				w.Header().Set(header[0], header[1])
			}
			w.WriteHeader(code)
			return true
		}
	}
	endless := func(w http.ResponseWriter, _ *http.Request) bool {
		b := make([]byte, 64<<10)
		for range 1024 {
			if _, err := w.Write(b); err != nil {
				return true
			}
		}
		return true
	}
	for _, row := range []struct {
		situation string
		misbehave func(w http.ResponseWriter, r *http.Request) bool
		says      string
	}{
		{"throttles", status(http.StatusTooManyRequests, "Retry-After", "3600"), "429"},
		{"is down", status(http.StatusServiceUnavailable), "503"},
		{"knows nothing", status(http.StatusNotFound), "does not have it"},
		{"redirects", status(http.StatusFound, "Location", "https://localhost/"), "302"},
		{"answers garbage", answer([]byte("<html>maintenance</html>")), "cannot be had"},
		{"answers nothing", answer(nil), "cannot be had"},
		{"answers without end", endless, "more than"},
		{"closes the connection", func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }, "cannot be had"},
		{"wants a password", status(http.StatusUnauthorized), "401"},
	} {
		t.Run(row.situation, func(t *testing.T) {
			t.Parallel()
			v := vendor(t)
			f := newFake(t, v)
			f.misbehave = row.misbehave
			began := time.Now()
			e := open(t, f.config(t.TempDir()), v)
			l := appraise(t, e, v)
			if got := failed(l); !slices.Equal(got, everything) {
				t.Errorf("failed %v, want %v", got, everything)
			}
			if !slices.ContainsFunc(l, func(c check.Check) bool { return strings.Contains(c.Found, row.says) }) {
				t.Errorf("nothing says %q: %+v", row.says, l.Failed())
			}
			if took := time.Since(began); took > 2*endorse.Patience+time.Minute {
				t.Errorf("took %s", took)
			}
			if n := len(e.Folder().Library().All()); n != 0 {
				t.Errorf("%d answers were kept", n)
			}
		})
	}
}

// Who hangs is waited for as long as one device's appraisal has patience.
func TestHangingService(t *testing.T) {
	t.Parallel()
	v := vendor(t)
	f := newFake(t, v)
	f.misbehave = func(_ http.ResponseWriter, r *http.Request) bool {
		<-r.Context().Done()
		return true
	}
	e := open(t, f.config(t.TempDir()), v)
	r, err := v.Chip().Report(data, simulate.SNPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	res := e.AppraiseSNP(t.Context(), snp.Evidence{Report: r}, snp.Want{ReportData: data}, v.Anchors(), start)
	if took := time.Since(began); took < endorse.Patience-time.Second || took > endorse.Patience+time.Minute {
		t.Errorf("took %s", took)
	}
	if got := failed(res.Checks); !slices.Equal(got, []string{snp.CheckChain}) {
		t.Errorf("failed %v", got)
	}
}

// Every service answers with what belongs to another question.
func TestWrongContent(t *testing.T) {
	v := vendor(t)
	f := newFake(t, v)
	other := newFake(t, v).services.Answers()
	f.misbehave = func(w http.ResponseWriter, r *http.Request) bool {
		for k, b := range other {
			switch {
			case strings.HasPrefix(r.URL.Path, "/ocsp/") && k.Kind == endorse.CRL,
				strings.HasSuffix(r.URL.Path, "/crl") && k.Kind == endorse.Chain,
				strings.HasSuffix(r.URL.Path, "/cert_chain") && k.Kind == endorse.VEK:
				_, _ = w.Write(b)
				return true
			case strings.Contains(r.URL.Path, "/rim/NV_GPU_DRIVER") && strings.HasPrefix(k.ID, "NV_GPU_VBIOS"):
				_, _ = fmt.Fprintf(w, `{"rim":%q}`, base64.StdEncoding.EncodeToString(b))
				return true
			}
		}
		return false
	}
	e := open(t, f.config(t.TempDir()), v)
	if got := failed(appraise(t, e, v)); !slices.Equal(got, []string{snp.CheckChain, nvgpu.CheckOCSP, nvgpu.CheckDriverRIM, "gpu.vbios-rim-ocsp"}) {
		t.Errorf("failed %v", got)
	}
	for _, h := range e.Folder().Library().All() {
		if h.Key.ID != "NV_GPU_"+endorsetest.VBIOSID() {
			t.Errorf("kept %s", h.Key)
		}
	}
}

// Down for hours: the copies do, where the configuration says so, and the
// services are not hammered.
func TestDownForHours(t *testing.T) {
	v := vendor(t)
	f := newFake(t, v)
	dir := t.TempDir()
	appraise(t, open(t, f.config(dir), v), v)
	old := start.Add(-48 * time.Hour)
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Chtimes(path, old, old)
	})
	if err != nil {
		t.Fatal(err)
	}
	f.misbehave = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusInternalServerError)
		return true
	}
	f.requests.Store(0)
	c := f.config(dir)
	c.OnOutage = endorse.UseUnexpired
	e := open(t, c, v)
	for range 20 {
		if got := failed(appraise(t, e, v)); len(got) > 0 {
			t.Fatalf("failed %v", got)
		}
	}
	if n := f.requests.Load(); n > 30 {
		t.Errorf("%d requests for 20 appraisals", n)
	}
	refuse := open(t, f.config(dir), v)
	if got := failed(appraise(t, refuse, v)); !slices.Equal(got, []string{snp.CheckCRL, nvgpu.CheckOCSP, "gpu.driver-rim-ocsp", "gpu.vbios-rim-ocsp"}) {
		t.Errorf("failed %v", got)
	}
}

// flaky is a transport's other end that fails a number of times.
func TestRetryAndCircuit(t *testing.T) {
	v := vendor(t)
	key := endorse.CRLKey(v.Chip().Product(), snp.VCEK)
	client := func(f *fake) *serve.Client {
		pool := x509.NewCertPool()
		pool.AddCert(f.Certificate())
		c, err := serve.NewClient(serve.ClientOptions{KDS: f.URL + "/kds/", RIM: f.URL + "/rim/", OCSP: f.URL + "/ocsp/", Roots: pool})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	failing := func(f *fake, times int64, code int, header ...string) {
		f.misbehave = func(w http.ResponseWriter, _ *http.Request) bool {
			if f.requests.Load() > times {
				return false
			}
			if len(header) == 2 {
				w.Header().Set(header[0], header[1])
			}
			w.WriteHeader(code)
			return true
		}
	}
	t.Run("fails once", func(t *testing.T) {
		f := newFake(t, v)
		failing(f, 1, http.StatusBadGateway)
		if _, err := client(f).Fetch(t.Context(), endorse.Request{Key: key}); err != nil {
			t.Error(err)
		}
	})
	t.Run("throttles for a second", func(t *testing.T) {
		f := newFake(t, v)
		failing(f, 1, http.StatusTooManyRequests, "Retry-After", "1")
		began := time.Now()
		if _, err := client(f).Fetch(t.Context(), endorse.Request{Key: key}); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < time.Second {
			t.Errorf("asked again after %s", took)
		}
	})
	t.Run("throttles for longer than there is", func(t *testing.T) {
		f := newFake(t, v)
		failing(f, 1, http.StatusTooManyRequests, "Retry-After", "600")
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		c := client(f)
		for range 3 {
			if _, err := c.Fetch(ctx, endorse.Request{Key: key}); !errors.Is(err, endorse.ErrOutage) {
				t.Error(err)
			}
		}
		if n := f.requests.Load(); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
	t.Run("fails for good", func(t *testing.T) {
		f := newFake(t, v)
		failing(f, 1<<30, http.StatusInternalServerError)
		c := client(f)
		for range 5 {
			if _, err := c.Fetch(t.Context(), endorse.Request{Key: key}); !errors.Is(err, endorse.ErrOutage) {
				t.Error(err)
			}
		}
		if n := f.requests.Load(); n != 3 {
			t.Errorf("%d requests, want 3 and an open circuit", n)
		}
	})
	t.Run("asked without end", func(t *testing.T) {
		f := newFake(t, v)
		c := client(f)
		var last error
		for range 100 {
			_, last = c.Fetch(t.Context(), endorse.Request{Key: key})
		}
		if n := f.requests.Load(); last == nil || n > 80 {
			t.Errorf("%d requests, %v", n, last)
		}
	})
	t.Run("key that leads elsewhere", func(t *testing.T) {
		f := newFake(t, v)
		c := client(f)
		for _, id := range []string{"../x", "vcek/v1/Genoa/a b", "vcek/v1/Genoa/#", "vlek/v1/Milan/cert?blSPL=01"} {
			if _, err := c.Fetch(t.Context(), endorse.Request{Key: endorse.Key{Kind: endorse.VEK, ID: id}}); !errors.Is(err, endorse.ErrUnknown) {
				t.Errorf("%s: %v", id, err)
			}
		}
		if n := f.requests.Load(); n != 0 {
			t.Errorf("%d requests", n)
		}
	})
}

// The circuit closes by itself when the service is there again. The client is
// given addresses that nothing listens on, and time that passes at once.
func TestCircuitCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := serve.NewClient(serve.ClientOptions{KDS: "https://127.0.0.1:1/"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fetch := func() string {
			_, err := c.Fetch(t.Context(), endorse.Request{Key: endorse.CRLKey(anchor.Genoa, snp.VCEK)})
			if err == nil {
				t.Fatal("an answer from nowhere")
			}
			return err.Error()
		}
		if s := fetch(); strings.Contains(s, "left alone") {
			t.Error(s)
		}
		if s := fetch(); !strings.Contains(s, "left alone") {
			t.Error(s)
		}
		time.Sleep(15 * time.Second)
		if s := fetch(); strings.Contains(s, "left alone") {
			t.Errorf("not tried again: %s", s)
		}
	})
}

func TestServicesMustBeHTTPS(t *testing.T) {
	for _, u := range []string{"http://kds.example/", "https://kds.example", "https://user@kds.example/", "kds.example/", "https://kds.example/?a=b", "file:///etc/"} {
		if _, err := serve.NewClient(serve.ClientOptions{KDS: u}); err == nil {
			t.Errorf("%s is accepted", u)
		}
	}
	if _, err := serve.NewClient(serve.ClientOptions{}); err != nil {
		t.Error(err)
	}
}

func TestConfig(t *testing.T) {
	v := vendor(t)
	dir := t.TempDir()
	for situation, c := range map[string]serve.Config{
		"no folder":              {},
		"folder that is not":     {Dir: filepath.Join(dir, "none")},
		"unknown kind":           {Dir: dir, Kinds: []endorse.Kind{"all"}},
		"unknown outage":         {Dir: dir, OnOutage: "accept"},
		"services without fetch": {Dir: dir, KDS: "https://kds.example/"},
		"CA file that is not":    {Dir: dir, Fetch: true, CAFile: filepath.Join(dir, "none")},
		"service without TLS":    {Dir: dir, Fetch: true, RIM: "http://rim.example/"},
	} {
		if _, err := serve.Open(c, v.Anchors(), discard); err == nil {
			t.Errorf("%s: accepted", situation)
		}
	}
	if _, err := serve.Open(serve.Config{Dir: dir}, anchor.Set{}, discard); err == nil {
		t.Error("no anchors: accepted")
	}
}

// An import beside a running verifier is seen by it.
func TestImportExport(t *testing.T) {
	v := vendor(t)
	f := newFake(t, v)
	dir, src, out := t.TempDir(), t.TempDir(), t.TempDir()
	running := open(t, serve.Config{Dir: dir}, v)
	if got := failed(appraise(t, running, v)); !slices.Equal(got, everything) {
		t.Fatalf("failed %v", got)
	}

	n := 0
	for k, b := range f.services.Answers() {
		name := fmt.Sprintf("%d.bin", n)
		if k.Kind == endorse.RIM {
			name = k.ID + ".xml"
		}
		writeFile(t, filepath.Join(src, string(k.Kind), name), b)
		n++
	}
	// What answers about the device are verified by, and no endorsement itself.
	writeFile(t, filepath.Join(src, "gpu-chain.pem"), v.GPUs()[0].ChainPEM())
	s, err := simulate.New(simulate.Options{Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	vcek, ask, ark := s.Chip().Certificates()
	strangers := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ask}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ark})...)
	crl, err := s.CRL(start.Add(-time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string][]byte{"strange-vcek.der": vcek, "strange-chain.pem": strangers, "strange.crl": crl, "notes.txt": []byte("hello"), "empty": nil, "strange-gpu.pem": s.GPUs()[0].ChainPEM()}
	for what, b := range badAnswers(t, v, s) {
		bad[what+".ocsp"] = b
	}
	for name, b := range bad {
		writeFile(t, filepath.Join(src, "bad", name), b)
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(src, "bad", "link")); err != nil {
		t.Fatal(err)
	}

	folder, err := serve.OpenFolder(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := serve.Import(t.Context(), folder, src, v.Anchors(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Added) != n || len(got.Known) != 0 || len(got.Refused) != len(bad)+1 {
		t.Errorf("added %d of %d, known %d, refused %v", len(got.Added), n, len(got.Known), got.Refused)
	}
	for _, p := range got.Refused {
		if !strings.HasPrefix(p.File, "bad/") {
			t.Errorf("refused %s", p)
		}
	}
	if got, err = serve.Import(t.Context(), folder, src, v.Anchors(), time.Now()); err != nil || len(got.Known) != n || len(got.Added) != 0 {
		t.Errorf("again: added %d, known %d, %v", len(got.Added), len(got.Known), err)
	}
	for range 600 {
		if len(failed(appraise(t, running, v))) == 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if got := failed(appraise(t, running, v)); len(got) > 0 {
		t.Errorf("the running verifier: failed %v", got)
	}

	// A folder of ours is one to import from, and to verify by.
	if err := serve.Export(out, folder.Library().All()); err != nil {
		t.Fatal(err)
	}
	if got := failed(appraise(t, open(t, serve.Config{Dir: out}, v), v)); len(got) > 0 {
		t.Errorf("by the export: failed %v", got)
	}
	again, err := serve.OpenFolder(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := serve.Import(t.Context(), again, out, v.Anchors(), time.Now()); err != nil || len(got.Added) == n || !strings.Contains(fmt.Sprint(got.Refused), "put the GPU's certificate chain") {
		t.Errorf("from the export, without a GPU's chain: added %d, refused %v, %v", len(got.Added), got.Refused, err)
	}
	if again, err = serve.OpenFolder(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(out, "gpu-chain.pem"), v.GPUs()[0].ChainPEM())
	if got, err := serve.Import(t.Context(), again, out, v.Anchors(), time.Now()); err != nil || len(got.Added) != n || len(got.Refused) > 0 {
		t.Errorf("from the export: added %d, refused %v, %v", len(got.Added), got.Refused, err)
	}
}

// badAnswers are about a certificate of a vendor's GPU, and none is by its issuer
// as it stands.
func badAnswers(t *testing.T, v, stranger *simulate.Vendor) map[string][]byte {
	t.Helper()
	chain := func(v *simulate.Vendor) (out []*x509.Certificate) {
		for rest := v.GPUs()[0].ChainPEM(); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				return out
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, c)
		}
	}
	ours, theirs := chain(v), chain(stranger)
	answer := func(v *simulate.Vendor, cert, issuer *x509.Certificate) []byte {
		b, err := v.OCSPAnswer(cert, issuer, simulate.OCSPOptions{ThisUpdate: start})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := answer(v, ours[2], ours[3])
	if _, err := endorse.Parse(endorse.OCSP, "", good); err != nil {
		t.Fatal(err)
	}
	bit := slices.Clone(good)
	// The serial number that the answer is about.
	i := bytes.Index(bit, ours[2].SerialNumber.Bytes())
	if i < 0 {
		t.Fatal("the answer does not name the certificate")
	}
	bit[i+len(ours[2].SerialNumber.Bytes())-1] ^= 1
	return map[string][]byte{"about another certificate by one bit": bit, "of another vendor": answer(stranger, theirs[2], theirs[3])}
}

// Files that are not what their names say are told and not used.
func TestFolderWithForeignFiles(t *testing.T) {
	v := vendor(t)
	f := newFake(t, v)
	dir := t.TempDir()
	var crl []byte
	for k, b := range f.services.Answers() {
		if k.Kind == endorse.CRL {
			crl = b
		}
	}
	for _, name := range []string{"crl/x.crl", "ocsp/x.ocsp", "notes", "crl/a/b/c", "what/x"} {
		writeFile(t, filepath.Join(dir, name), crl)
	}
	writeFile(t, filepath.Join(dir, "crl", strings.Repeat("0", 96)+".crl"), crl)
	var problems []string
	folder, err := serve.OpenFolder(dir, func(p endorse.Problem) { problems = append(problems, p.File) })
	if err != nil {
		t.Fatal(err)
	}
	if len(problems) != 6 || len(folder.Library().All()) != 0 {
		t.Errorf("%d held, problems %v", len(folder.Library().All()), problems)
	}
}

func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRealEndorsements appraises a real H100 by what its vendor published, from
// a folder, at clocks at which that was valid. The answers about the device and
// about the manifests are of two days.
func TestRealEndorsements(t *testing.T) {
	const complete = "nvidia/h100-550.90.07-complete/"
	src, dir := t.TempDir(), t.TempDir()
	writeFile(t, filepath.Join(src, "NV_GPU_DRIVER_GH100_550.90.07.xml"), vectortest.Read(t, complete+"driver_rim.xml"))
	writeFile(t, filepath.Join(src, "NV_GPU_VBIOS_1010_0200_882_96009F0001.xml"), vectortest.Read(t, complete+"vbios_rim.xml"))
	for _, n := range []string{"certificate_l2", "certificate_l3", "certificate_l4", "driver_rim_l3", "driver_rim_l4", "rim_l2", "vbios_l4"} {
		writeFile(t, filepath.Join(src, n), vectortest.Read(t, complete+"ocsp/"+n+".der"))
	}
	writeFile(t, filepath.Join(src, "chain.pem"), vectortest.Read(t, complete+"chain.pem"))
	folder, err := serve.OpenFolder(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := serve.Import(t.Context(), folder, src, anchor.Vendor(), time.Now())
	if err != nil || len(got.Refused) > 0 || len(got.Added) != 9 {
		t.Fatalf("added %d, refused %v, %v", len(got.Added), got.Refused, err)
	}
	ev, want := realGPU(t)
	for _, row := range []struct {
		situation string
		at        time.Time
		kinds     []endorse.Kind
		fails     []string
	}{
		{"reference values", time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), []endorse.Kind{endorse.RIM}, nil},
		{"reference values after the signers' time", time.Date(2026, 6, 2, 0, 0, 0, 0, time.UTC), []endorse.Kind{endorse.RIM}, []string{"gpu.driver-rim-validity", "gpu.vbios-rim-validity"}},
		{"status of the device", time.Date(2025, 8, 21, 12, 0, 0, 0, time.UTC), []endorse.Kind{endorse.OCSP}, nil},
		{"status of the manifests, that of the device is stale", time.Date(2025, 10, 24, 18, 0, 0, 0, time.UTC), nil, []string{nvgpu.CheckOCSP}},
	} {
		t.Run(row.situation, func(t *testing.T) {
			c, err := endorse.New(endorse.Options{Store: folder, Anchors: anchor.Vendor(), Clock: func() time.Time { return row.at }, Offer: row.kinds})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			res := c.AppraiseGPU(t.Context(), ev, want, anchor.Vendor(), row.at)
			if got := failed(res.Checks); !slices.Equal(got, row.fails) {
				t.Errorf("failed %v, want %v", got, row.fails)
			}
		})
	}
}

func realGPU(t *testing.T) (nvgpu.Evidence, nvgpu.Want) {
	t.Helper()
	for _, v := range vectortest.All(t, "nvidia-gpu") {
		if v.Name != "h100-550.90.07-complete" {
			continue
		}
		nonce, err := hex.DecodeString(v.Nonce)
		if err != nil {
			t.Fatal(err)
		}
		return nvgpu.Evidence{Report: vectortest.Read(t, v.Report), Chain: vectortest.Read(t, v.Chain), DriverVersion: v.Driver, VBIOSVersion: v.VBIOS}, nvgpu.Want{Nonce: [32]byte(nonce)}
	}
	t.Fatal("the vector is missing")
	return nvgpu.Evidence{}, nvgpu.Want{}
}

// TestRealCertificates finds the certificates of real reports that came without.
func TestRealCertificates(t *testing.T) {
	dir := t.TempDir()
	folder, err := serve.OpenFolder(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	vectors := vectortest.All(t, "snp-vcek", "snp-vlek")
	for _, v := range vectors {
		src := t.TempDir()
		at := "snp/" + v.Name + "/"
		writeFile(t, filepath.Join(src, "cert_chain"), slices.Concat(vectortest.Read(t, at+"ask.pem"), vectortest.Read(t, at+"ark.pem")))
		writeFile(t, filepath.Join(src, "vek.pem"), vectortest.Read(t, at+"vek.pem"))
		got, err := serve.Import(t.Context(), folder, src, anchor.Vendor(), time.Now())
		if err != nil || len(got.Refused) > 0 {
			t.Errorf("%s: refused %v, %v", v.Name, got.Refused, err)
		}
	}
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			raw := vectortest.Read(t, v.Report)
			r, err := snp.Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			vek, err := x509.ParseCertificate(vectortest.ReadPEM(t, "snp/"+v.Name+"/vek.pem"))
			if err != nil {
				t.Fatal(err)
			}
			at := vek.NotAfter.Add(-time.Hour)
			c, err := endorse.New(endorse.Options{Store: folder, Anchors: anchor.Vendor(), Clock: func() time.Time { return at }, Offer: []endorse.Kind{endorse.VEK, endorse.Chain}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			res := c.AppraiseSNP(t.Context(), snp.Evidence{Report: raw}, snp.Want{ReportData: r.ReportData}, anchor.Vendor(), at)
			if !res.Genuine() {
				t.Errorf("refused: %+v", res.Checks.Failed())
			}
		})
	}
}
