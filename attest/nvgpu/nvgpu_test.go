package nvgpu_test

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
)

// now is a time at which every device chain is valid; they do not expire.
var now = time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)

type vector struct {
	ev   nvgpu.Evidence
	want nvgpu.Want
}

func vectors(t testing.TB) map[string]vector {
	out := map[string]vector{}
	for _, v := range vectortest.All(t, "nvidia-gpu") {
		nonce, err := hex.DecodeString(v.Nonce)
		if err != nil {
			t.Fatal(err)
		}
		out[v.Name] = vector{
			ev:   nvgpu.Evidence{Report: vectortest.Read(t, v.Report), Chain: vectortest.Read(t, v.Chain), DriverVersion: v.Driver, VBIOSVersion: v.VBIOS},
			want: nvgpu.Want{Nonce: [32]byte(nonce)},
		}
	}
	return out
}

// onlyFails asserts that a result is a refusal by the checks given and no other.
func onlyFails(t *testing.T, res nvgpu.Result, ids ...string) {
	t.Helper()
	if res.Genuine() {
		t.Error("accepted")
	}
	var got []string
	for _, c := range res.Checks.Failed() {
		got = append(got, c.ID)
	}
	if !slices.Equal(got, ids) {
		t.Errorf("failed checks are %v, want %v: %v", got, ids, res.Checks.Failed())
	}
}

func TestRealEvidence(t *testing.T) {
	all := vectors(t)
	ueids := map[string]string{}
	for name, v := range all {
		t.Run(name, func(t *testing.T) {
			res := nvgpu.Appraise(v.ev, v.want, anchor.Vendor(), now)
			if name == "h100-560.00-badsig" {
				onlyFails(t, res, nvgpu.CheckFWID, nvgpu.CheckSignature)
				return
			}
			if !res.Genuine() {
				t.Fatalf("refused: %v", check.Refuse("appraise", res.Checks))
			}
			if res.Simulated {
				t.Error("real evidence is called simulated")
			}
			if was, ok := ueids[res.UEID]; ok {
				t.Errorf("same ueid as %s", was)
			}
			ueids[res.UEID] = name
		})
	}
	t.Logf("vectors of H100 reports: %d verified, %d refused", len(ueids), len(all)-len(ueids))
}

func TestRealEvidenceClaims(t *testing.T) {
	all := vectors(t)
	tests := map[string]map[string]any{
		"h100-550.90.07-complete": {
			nvgpu.ClaimDriver: "550.90.07", nvgpu.ClaimVBIOS: "96.00.9f.00.01", nvgpu.ClaimModel: "GH100 A01 GSP BROM",
			nvgpu.ClaimPPCIE: false, nvgpu.ClaimNVDEC0: false, nvgpu.ClaimProject: "1010_0200_882", nvgpu.ClaimFWIDOK: true,
			nvgpu.ClaimFeature: nil, nvgpu.ClaimUEID: "478176379286082186618948445787393647364802107249",
		},
		"h100-580.159.03":       {nvgpu.ClaimFeature: "SPT"},
		"h100-590.12-multi0":    {nvgpu.ClaimFeature: "PPCIE", nvgpu.ClaimPPCIE: true, nvgpu.ClaimProject: "G520_0200_885"},
		"h100-535.86.09-nofwid": {nvgpu.ClaimFWIDOK: false, nvgpu.ClaimFWID: nil, nvgpu.ClaimSigned: true},
		"h100-560.00-badsig":    {nvgpu.ClaimSigned: false, nvgpu.ClaimFWIDOK: false, nvgpu.ClaimChainOK: true, nvgpu.ClaimParsed: true},
	}
	for name, want := range tests {
		claims := nvgpu.Appraise(all[name].ev, all[name].want, anchor.Vendor(), now).Claims
		for k, w := range want {
			if claims[k] != w {
				t.Errorf("%s: %s is %v, want %v", name, k, claims[k], w)
			}
		}
	}
}

var minted = sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{GPUs: 2, Fast: true}) })
var stranger = sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{Plain: true, Fast: true}) })

func simulation(t testing.TB) *simulate.Vendor {
	t.Helper()
	v, err := minted()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

var nonce = [32]byte{4, 5, 6}

func report(t testing.TB, g *simulate.GPU, o simulate.GPUOptions) []byte {
	t.Helper()
	r, err := g.Report(nonce, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func evidence(t testing.TB, g *simulate.GPU, o simulate.GPUOptions) nvgpu.Evidence {
	return nvgpu.Evidence{Report: report(t, g, o), Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: strings.ToUpper(g.VBIOSVersion())}
}

func TestSimulatedEvidenceIsGenuineUnderItsOwnRoots(t *testing.T) {
	v := simulation(t)
	for i, o := range []simulate.GPUOptions{{}, {NVDEC0Enabled: true, FeatureFlag: 1}, {ProtectedPCIe: true, FeatureFlag: 2}, {OmitFWID: true}} {
		res := nvgpu.Appraise(evidence(t, v.GPUs()[0], o), nvgpu.Want{Nonce: nonce}, v.Anchors(), time.Now())
		if !res.Genuine() {
			t.Errorf("%d: refused: %v", i, check.Refuse("appraise", res.Checks))
		}
		if !res.Simulated {
			t.Errorf("%d: not called simulated", i)
		}
	}
}

// Each row leaves one check between the attacker and acceptance.
func TestForgedEvidence(t *testing.T) {
	v := simulation(t)
	g, other := v.GPUs()[0], v.GPUs()[1]
	s, err := stranger()
	if err != nil {
		t.Fatal(err)
	}
	good := evidence(t, g, simulate.GPUOptions{})
	with := func(edit func(*nvgpu.Evidence)) nvgpu.Evidence {
		ev := good
		edit(&ev)
		return ev
	}
	chain := func(o simulate.ChainOptions) nvgpu.Evidence {
		pem, err := g.Chain(o)
		if err != nil {
			t.Fatal(err)
		}
		return with(func(ev *nvgpu.Evidence) { ev.Chain = pem })
	}
	blocks := splitPEM(t, good.Chain)
	tests := []struct {
		name    string
		ev      nvgpu.Evidence
		anchors anchor.Set
		at      time.Time
		fails   []string
	}{
		{name: "nothing", fails: []string{nvgpu.CheckChain, nvgpu.CheckParse}},
		{name: "vendors' anchors", ev: good, anchors: anchor.Vendor(), fails: []string{nvgpu.CheckChain}},
		{name: "another simulation's anchors", ev: good, anchors: s.Anchors(), fails: []string{nvgpu.CheckChain}},
		{name: "simulation without self-description", ev: evidence(t, s.GPUs()[0], simulate.GPUOptions{}), anchors: anchor.Vendor(), fails: []string{nvgpu.CheckChain}},
		{name: "another nonce", ev: evidence(t, g, simulate.GPUOptions{Nonce: &[32]byte{4, 5, 6, 31: 1}}), fails: []string{nvgpu.CheckNonce}},
		{name: "another GPU's chain", ev: with(func(ev *nvgpu.Evidence) { ev.Chain = other.ChainPEM() }), fails: []string{nvgpu.CheckSignature}},
		{name: "another firmware in the report", ev: evidence(t, g, simulate.GPUOptions{FWID: &[48]byte{1}}), fails: []string{nvgpu.CheckFWID}},
		{name: "another firmware in the chain", ev: chain(simulate.ChainOptions{FWID: &[48]byte{1}}), fails: []string{nvgpu.CheckFWID}},
		{name: "no firmware identity in the chain", ev: chain(simulate.ChainOptions{OmitFWID: true}), fails: []string{nvgpu.CheckFWID}},
		{name: "another architecture", ev: chain(simulate.ChainOptions{Architecture: "GB100"}), fails: []string{nvgpu.CheckArchitecture}},
		{name: "leaf that is a CA", ev: chain(simulate.ChainOptions{EditLeaf: func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }}), fails: []string{nvgpu.CheckChain}},
		{name: "leaf that may not sign", ev: chain(simulate.ChainOptions{EditLeaf: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }}), fails: []string{nvgpu.CheckChain}},
		{name: "device certificate that is no CA", ev: chain(simulate.ChainOptions{EditDevice: func(c *x509.Certificate) { c.IsCA = false }}), fails: []string{nvgpu.CheckChain}},
		{name: "device certificate that may not issue", ev: chain(simulate.ChainOptions{EditDevice: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }}), fails: []string{nvgpu.CheckChain}},
		{name: "expired leaf", ev: chain(simulate.ChainOptions{EditLeaf: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }}), fails: []string{nvgpu.CheckValidity}},
		{name: "clock before the chain", ev: good, at: time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC), fails: []string{nvgpu.CheckValidity}},
		{name: "changed after signing", ev: evidence(t, g, simulate.GPUOptions{EditSigned: func(r []byte) []byte { r[200] ^= 1; return r }}), fails: []string{nvgpu.CheckSignature}},
		{name: "driver states another version", ev: with(func(ev *nvgpu.Evidence) { ev.DriverVersion = "550.90.07" }), fails: []string{nvgpu.CheckDriver}},
		{name: "driver states no version", ev: with(func(ev *nvgpu.Evidence) { ev.DriverVersion = "" }), fails: []string{nvgpu.CheckDriver}},
		{name: "driver states another VBIOS", ev: with(func(ev *nvgpu.Evidence) { ev.VBIOSVersion = "96.00.9f.00.02" }), fails: []string{nvgpu.CheckVBIOS}},
		{name: "chain without its root", ev: with(func(ev *nvgpu.Evidence) { ev.Chain = slices.Concat(blocks[:4]...) }), fails: []string{nvgpu.CheckChain}},
		{name: "chain with a sixth certificate", ev: with(func(ev *nvgpu.Evidence) { ev.Chain = slices.Concat(append(slices.Clone(blocks), blocks[4])...) }), fails: []string{nvgpu.CheckChain}},
		{name: "chain in another order", ev: with(func(ev *nvgpu.Evidence) {
			ev.Chain = slices.Concat(blocks[0], blocks[2], blocks[1], blocks[3], blocks[4])
		}), fails: []string{nvgpu.CheckChain, nvgpu.CheckArchitecture, nvgpu.CheckFWID}},
		{name: "text before the chain", ev: with(func(ev *nvgpu.Evidence) { ev.Chain = append([]byte("hello\n"), ev.Chain...) }), fails: []string{nvgpu.CheckChain}},
		{name: "chain over the limit", ev: with(func(ev *nvgpu.Evidence) {
			ev.Chain = append(slices.Clone(ev.Chain), bytes.Repeat([]byte("\n"), 64<<10)...)
		}), fails: []string{nvgpu.CheckChain}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			anchors, at := v.Anchors(), time.Now()
			if !tt.anchors.Empty() {
				anchors = tt.anchors
			}
			if !tt.at.IsZero() {
				at = tt.at
			}
			onlyFails(t, nvgpu.Appraise(tt.ev, nvgpu.Want{Nonce: nonce}, anchors, at), tt.fails...)
		})
	}
	t.Run("no anchors", func(t *testing.T) {
		onlyFails(t, nvgpu.Appraise(good, nvgpu.Want{Nonce: nonce}, anchor.Set{}, time.Now()), nvgpu.CheckChain)
	})
}

func TestRepeatedDeviceHasTheSameUEID(t *testing.T) {
	v := simulation(t)
	ueid := func(g *simulate.GPU) string {
		return nvgpu.Appraise(evidence(t, g, simulate.GPUOptions{}), nvgpu.Want{Nonce: nonce}, v.Anchors(), time.Now()).UEID
	}
	a, b := v.GPUs()[0], v.GPUs()[1]
	if ueid(a) == "" || ueid(a) != ueid(a) || ueid(a) == ueid(b) {
		t.Error("ueid does not tell GPUs apart")
	}
	chain, err := b.Chain(simulate.ChainOptions{Serial: big.NewInt(7)})
	if err != nil {
		t.Fatal(err)
	}
	ev := evidence(t, b, simulate.GPUOptions{})
	ev.Chain = chain
	if got := nvgpu.Appraise(ev, nvgpu.Want{Nonce: nonce}, v.Anchors(), time.Now()).UEID; got != "7" {
		t.Errorf("ueid is %s, want the leaf's serial number", got)
	}
}

func splitPEM(t testing.TB, b []byte) [][]byte {
	t.Helper()
	var out [][]byte
	for len(b) > 0 {
		var block *pem.Block
		block, b = pem.Decode(b)
		if block == nil {
			t.Fatal("not PEM")
		}
		out = append(out, pem.EncodeToMemory(block))
	}
	return out
}

func parseOne(t testing.TB, chain []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der(t, chain))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func der(t testing.TB, b []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatal("not PEM")
	}
	return block.Bytes
}

func field(t uint16, v ...byte) []byte {
	b := binary.LittleEndian.AppendUint16(nil, t)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(v)))
	return append(b, v...)
}

func TestMalformedReports(t *testing.T) {
	g := simulation(t).GPUs()[0]
	const opaque = 45 + 3520 + 32
	set := func(at int, v ...byte) simulate.GPUOptions {
		return simulate.GPUOptions{Edit: func(r []byte) []byte { copy(r[at:], v); return r }}
	}
	add := func(b []byte) simulate.GPUOptions { return simulate.GPUOptions{Opaque: b} }
	after := func(b ...byte) simulate.GPUOptions {
		return simulate.GPUOptions{EditSigned: func(r []byte) []byte { return append(r, b...) }}
	}
	tests := map[string]simulate.GPUOptions{
		"SPDM 1.0":                        set(0, 0x10),
		"another request":                 set(1, 0xE1),
		"request without signature":       set(2, 0),
		"request for one measurement":     set(3, 1),
		"another slot":                    set(36, 1),
		"another response":                set(38, 0x61),
		"response of SPDM 1.2":            set(37, 0x12),
		"response parameter":              set(39, 1),
		"no measurements":                 set(41, 0),
		"65 measurements":                 set(41, 65),
		"record length 0":                 set(42, 0, 0, 0),
		"record length 1":                 set(42, 1, 0, 0),
		"record length at its maximum":    set(42, 0xff, 0xff, 0xff),
		"measurement index 0":             set(45, 0),
		"measurement index twice":         set(45+55, 1),
		"measurement of another format":   set(46, 2),
		"measurement size 0":              set(47, 0, 0),
		"measurement size at its maximum": set(47, 0xff, 0xff),
		"measurement of another type":     set(49, 0x81),
		"digest of 32 bytes":              set(50, 32),
		"opaque length 0":                 set(opaque, 0, 0),
		"opaque length 1":                 set(opaque, 1, 0),
		"opaque length at its maximum":    set(opaque, 0xff, 0xff),
		"opaque field cut in its header":  add([]byte{22, 0, 8}),
		"opaque field cut in its value":   add([]byte{22, 0, 8, 0, 1, 2}),
		"driver version twice":            add(field(3, '1', 0)),
		"firmware identity twice":         add(field(20, make([]byte, 48)...)),
		"unknown opaque field":            add(field(37, 1)),
		"invalid opaque field":            add(field(255, 1)),
		"opaque field 0":                  add(field(0, 1)),
		"feature flag 3":                  {FeatureFlag: 3},
		"driver version not text":         {Driver: "580\x01"},
		"switch identifiers of 7 bytes":   add(field(22, make([]byte, 7)...)),
		"a byte after the signature":      after(1),
		"too many zeros after it":         after(make([]byte, 8)...),
		"over the limit":                  after(make([]byte, 8192)...),
	}
	for name, o := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := nvgpu.Parse(report(t, g, o)); err == nil {
				t.Error("parsed")
			}
		})
	}
	t.Run("zeros that fill up to a word", func(t *testing.T) {
		if _, err := nvgpu.Parse(report(t, g, after(0, 0, 0))); err != nil {
			t.Error(err)
		}
	})
}

// Every single-bit flip of one real report (of those that parse some, for their
// signatures' time) and every truncation of all.
func TestFlipsAndTruncations(t *testing.T) {
	all := vectors(t)
	var flips, cuts atomic.Int64
	for name, v := range all {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			anchors := anchor.Vendor()
			signed := 0
			if name == "h100-580.95.05-trailing-byte" {
				for bit := range len(v.ev.Report) * 8 {
					if at := bit/8 - 45; at >= 0 && at < 3520 && at%55 >= 7 && bit%41 != 0 {
						continue // inside a measurement, where nothing is parsed
					}
					ev := v.ev
					ev.Report = slices.Clone(ev.Report)
					ev.Report[bit/8] ^= 1 << (bit % 8)
					r, err := nvgpu.Parse(ev.Report)
					if err == nil {
						if signed++; signed%5 != 0 {
							continue
						}
						// What the flip changed is granted: only the signature is left.
						ev.DriverVersion, ev.VBIOSVersion = r.DriverVersion, r.VBIOSVersion
						flips.Add(1)
						if nvgpu.Appraise(ev, nvgpu.Want{Nonce: r.Nonce}, anchors, now).Genuine() {
							t.Fatalf("accepted with bit %d flipped", bit)
						}
						continue
					}
					flips.Add(1)
				}
			}
			for n := range v.ev.Report {
				cuts.Add(1)
				if _, err := nvgpu.Parse(v.ev.Report[:n]); err == nil && n != len(v.ev.Report)-1 {
					t.Fatalf("parsed %d bytes", n)
				}
			}
			if _, err := nvgpu.Parse(v.ev.Report[:len(v.ev.Report)-1]); (err == nil) != (name == "h100-580.95.05-trailing-byte") {
				t.Errorf("without its last byte: %v", err)
			}
		})
	}
	t.Cleanup(func() { t.Logf("%d flips and %d truncations refused", flips.Load(), cuts.Load()) })
}

func TestFlipsOfTheChain(t *testing.T) {
	v := vectors(t)["h100-550.90.07-complete"]
	anchors := anchor.Vendor()
	blocks := splitPEM(t, v.ev.Chain)
	n := 0
	for i, b := range blocks {
		block, _ := pem.Decode(b)
		for bit := i; bit < len(block.Bytes)*8; bit += 211 {
			der := slices.Clone(block.Bytes)
			der[bit/8] ^= 1 << (bit % 8)
			forged := slices.Clone(blocks)
			forged[i] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
			ev := v.ev
			ev.Chain = slices.Concat(forged...)
			n++
			if nvgpu.Appraise(ev, v.want, anchors, now).Genuine() {
				t.Fatalf("accepted with bit %d of certificate %d flipped", bit, i)
			}
		}
	}
	t.Logf("%d flips refused", n)
}

func TestZeroResultIsNotGenuine(t *testing.T) {
	if (nvgpu.Result{}).Genuine() {
		t.Error("the zero result is genuine")
	}
}

func FuzzParse(f *testing.F) {
	v := simulation(f)
	f.Add(report(f, v.GPUs()[0], simulate.GPUOptions{}))
	f.Add(report(f, v.GPUs()[0], simulate.GPUOptions{OmitFWID: true, Opaque: field(22, make([]byte, 16)...)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := nvgpu.Parse(b); (r == nil) == (err == nil) {
			t.Fatal("neither a report nor an error, or both")
		}
	})
}

func FuzzChain(f *testing.F) {
	v := simulation(f)
	ev := evidence(f, v.GPUs()[0], simulate.GPUOptions{})
	f.Add(ev.Chain)
	vendors, at := anchor.Vendor(), time.Now()
	f.Fuzz(func(t *testing.T, b []byte) {
		ev := ev
		ev.Chain = b
		if nvgpu.Appraise(ev, nvgpu.Want{Nonce: nonce}, vendors, at).Genuine() {
			t.Fatal("accepted")
		}
	})
}
