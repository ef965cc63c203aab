package snp_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"math/big"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/snp"
)

// now is a time at which every vector but the VLEK is valid.
var now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

// vlekTime is within the VLEK vector's year.
var vlekTime = time.Date(2025, 6, 1, 0, 0, 0, 0, time.UTC)

type vector struct {
	ev   snp.Evidence
	data [64]byte
	at   time.Time
}

func load(t testing.TB, v vectortest.Vector) vector {
	dir := path.Dir(v.Report)
	report := vectortest.Read(t, v.Report)
	out := vector{at: now}
	switch v.Kind {
	case "azure-hcl+tpm-quote":
		report = report[32 : 32+snp.ReportSize]
		chain := "snp/genoa-v3-vcek"
		if strings.Contains(v.Name, "milan") {
			chain = "snp/milan-v2-vcek"
		}
		out.ev.Chain = [][]byte{vectortest.ReadPEM(t, dir+"/vcek.pem"), vectortest.ReadPEM(t, chain+"/ask.pem"), vectortest.ReadPEM(t, chain+"/ark.pem")}
	case "snp-vlek":
		out.at = vlekTime
		fallthrough
	default:
		for _, f := range []string{"vek", "ask", "ark"} {
			out.ev.Chain = append(out.ev.Chain, vectortest.ReadPEM(t, dir+"/"+f+".pem"))
		}
	}
	out.ev.Report = report
	out.data = [64]byte(report[0x50:])
	return out
}

func vectors(t testing.TB) map[string]vector {
	out := map[string]vector{}
	for _, v := range vectortest.All(t, "snp-vcek", "snp-vlek", "azure-hcl+tpm-quote") {
		out[v.Name] = load(t, v)
	}
	return out
}

func TestRealEvidenceIsGenuine(t *testing.T) {
	all := vectors(t)
	for name, v := range all {
		t.Run(name, func(t *testing.T) {
			res := snp.Appraise(v.ev, snp.Want{ReportData: v.data}, anchor.Vendor(), v.at)
			if !res.Genuine() {
				t.Fatalf("refused: %v", check.Refuse("appraise", res.Checks))
			}
			if res.Simulated {
				t.Error("real evidence is called simulated")
			}
			if got := res.Claims["snp.product"]; !strings.Contains(strings.ToLower(name), strings.ToLower(got.(string))) {
				t.Errorf("product is %v", got)
			}
		})
	}
	t.Logf("vectors of SEV-SNP reports: %d verified, 0 to be refused", len(all))
}

func TestRealEvidenceClaims(t *testing.T) {
	all := vectors(t)
	appraise := func(name string) map[string]any {
		v := all[name]
		return snp.Appraise(v.ev, snp.Want{ReportData: v.data}, anchor.Vendor(), v.at).Claims
	}
	turin := appraise("turin-v5-vcek")
	for k, want := range map[string]any{
		"snp.version": 5, "snp.product": "Turin", "snp.guest-svn": 2, "snp.vmpl": 0, "snp.signing-key": "VCEK",
		"snp.policy.debug": false, "snp.policy.smt": true, "snp.policy.abi-minor": 31,
		"snp.platform.alias-check-complete": true, "snp.current-firmware": "1.55.65",
		"snp.reported-tcb":        map[string]any{"fmc": 1, "bootloader": 1, "tee": 1, "snp": 4, "microcode": 0x51},
		"snp.current-mitigations": "0x3f",
	} {
		if fmt.Sprint(turin[k]) != fmt.Sprint(want) {
			t.Errorf("Turin: %s is %v, want %v", k, turin[k], want)
		}
	}
	vlek := appraise("milan-v3-vlek-aws")
	for k, want := range map[string]any{"snp.vmpl": 1, "snp.signing-key": "VLEK", "snp.csp": "CN=cc-us-east-2.amazonaws.com"} {
		if vlek[k] != want {
			t.Errorf("VLEK: %s is %v, want %v", k, vlek[k], want)
		}
	}
}

func TestExpiredVLEKIsRefused(t *testing.T) {
	v := vectors(t)["milan-v3-vlek-aws"]
	for _, at := range []time.Time{now, vlekTime.AddDate(-2, 0, 0)} {
		onlyFails(t, snp.Appraise(v.ev, snp.Want{ReportData: v.data}, anchor.Vendor(), at), snp.CheckValidity)
	}
}

// onlyFails asserts that a result is a refusal by the checks given and no other.
func onlyFails(t *testing.T, res snp.Result, ids ...string) {
	t.Helper()
	if res.Genuine() {
		t.Error("accepted")
	}
	var got []string
	for _, c := range res.Checks.Failed() {
		got = append(got, c.ID)
	}
	if !slices.Equal(got, ids) {
		t.Errorf("failed checks are %v, want %v", got, ids)
	}
}

// One simulation per product, minted on first use: RSA keys take a second.
var simulations = map[anchor.Product]func() (*simulate.Vendor, error){
	anchor.Milan: sync.OnceValues(func() (*simulate.Vendor, error) {
		return simulate.New(simulate.Options{Product: anchor.Milan, Fast: true})
	}),
	anchor.Genoa: sync.OnceValues(func() (*simulate.Vendor, error) {
		return simulate.New(simulate.Options{Product: anchor.Genoa, Fast: true})
	}),
	anchor.Turin: sync.OnceValues(func() (*simulate.Vendor, error) {
		return simulate.New(simulate.Options{Product: anchor.Turin, Fast: true})
	}),
	"another": sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{Plain: true, Fast: true}) }),
}

func simulation(t testing.TB, p anchor.Product) *simulate.Vendor {
	t.Helper()
	v, err := simulations[p]()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

var data = [64]byte{1, 2, 3}

func report(t testing.TB, c *simulate.Chip, o simulate.SNPOptions) []byte {
	t.Helper()
	r, err := c.Report(data, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSimulatedEvidenceIsGenuineUnderItsOwnRoots(t *testing.T) {
	for _, p := range anchor.Products() {
		for _, version := range []uint32{2, 3, 5} {
			if p == anchor.Turin && version == 2 {
				continue // there was none
			}
			t.Run(fmt.Sprintf("%s v%d", p, version), func(t *testing.T) {
				v := simulation(t, p)
				ev := snp.Evidence{Report: report(t, v.Chip(), simulate.SNPOptions{Version: version}), Certificates: v.Chip().CertTable()}
				res := snp.Appraise(ev, snp.Want{ReportData: data}, v.Anchors(), time.Now())
				if !res.Genuine() {
					t.Fatalf("refused: %v", check.Refuse("appraise", res.Checks))
				}
				if !res.Simulated {
					t.Error("not called simulated")
				}
			})
		}
	}
	t.Run("VLEK", func(t *testing.T) {
		v := simulation(t, anchor.Genoa)
		c, err := v.NewChip()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.LoadVLEK(); err != nil {
			t.Fatal(err)
		}
		ev := snp.Evidence{Report: report(t, c, simulate.SNPOptions{VLEK: true}), Certificates: c.CertTable()}
		if res := snp.Appraise(ev, snp.Want{ReportData: data}, v.Anchors(), time.Now()); !res.Genuine() {
			t.Fatalf("refused: %v", check.Refuse("appraise", res.Checks))
		}
	})
}

// Each row leaves one check, or the few that look at one thing, between the
// attacker and acceptance.
func TestForgedEvidence(t *testing.T) {
	v := simulation(t, anchor.Genoa)
	chip := v.Chip()
	other, err := v.NewChip()
	if err != nil {
		t.Fatal(err)
	}
	vlekChip, err := v.NewChip()
	if err != nil {
		t.Fatal(err)
	}
	if err := vlekChip.LoadVLEK(); err != nil {
		t.Fatal(err)
	}
	vcek, ask, ark := chip.Certificates()
	good := snp.Evidence{Report: report(t, chip, simulate.SNPOptions{}), Chain: [][]byte{vcek, ask, ark}}
	mint := func(o simulate.VCEKOptions) [][]byte {
		der, err := chip.VCEK(o)
		if err != nil {
			t.Fatal(err)
		}
		return [][]byte{der, ask, ark}
	}
	at := time.Now()
	tests := []struct {
		name    string
		ev      snp.Evidence
		want    *[64]byte
		anchors *anchor.Set
		at      time.Time
		fails   []string
	}{
		{name: "nothing", ev: snp.Evidence{}, fails: []string{snp.CheckParse}},
		{name: "no certificates", ev: snp.Evidence{Report: good.Report}, fails: []string{snp.CheckChain}},
		{name: "no root certificate", ev: snp.Evidence{Report: good.Report, Chain: good.Chain[:2]}, fails: []string{snp.CheckChain}},
		{name: "four certificates", ev: snp.Evidence{Report: good.Report, Chain: append(slices.Clone(good.Chain), ark)}, fails: []string{snp.CheckChain}},
		{name: "one bit of other report data", ev: good, want: &[64]byte{1, 2, 3, 63: 1}, fails: []string{snp.CheckReportData}},
		{name: "vendors' anchors", ev: good, anchors: ptr(anchor.Vendor()), fails: []string{snp.CheckChain}},
		{name: "no anchors", ev: good, anchors: ptr(anchor.Set{}), fails: []string{snp.CheckChain}},
		{name: "another simulation's anchors", ev: good, anchors: ptr(simulation(t, "another").Anchors()), fails: []string{snp.CheckChain}},
		{name: "another product's anchors", ev: good, anchors: ptr(simulation(t, anchor.Milan).Anchors()), fails: []string{snp.CheckChain}},
		{name: "another chip's report", ev: snp.Evidence{Report: report(t, other, simulate.SNPOptions{}), Chain: good.Chain}, fails: []string{snp.CheckHWID, snp.CheckSignature}},
		{name: "VCEK for another TCB", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{TCB: &simulate.TCB{Bootloader: 11, SNP: 0x17, Microcode: 0x54}})}, fails: []string{snp.CheckTCB}},
		{name: "report of a TCB below the VCEK's", ev: snp.Evidence{Report: report(t, chip, simulate.SNPOptions{ReportedTCB: &simulate.TCB{Bootloader: 9, SNP: 0x17, Microcode: 0x54}}), Chain: good.Chain}, fails: []string{snp.CheckTCB}},
		{name: "VCEK of another chip id", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{ChipID: make([]byte, 64)})}, fails: []string{snp.CheckHWID}},
		{name: "masked chip id under a VCEK", ev: snp.Evidence{Report: report(t, chip, simulate.SNPOptions{Edit: func(r []byte) { clear(r[0x1A0:0x1E0]) }}), Chain: good.Chain}, fails: []string{snp.CheckHWID}},
		{name: "report of another product than the VCEK's", ev: snp.Evidence{Report: report(t, chip, simulate.SNPOptions{Edit: func(r []byte) { r[0x189] = 0x01 }}), Chain: good.Chain}, fails: []string{snp.CheckProduct}},
		{name: "expired VCEK", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{NotAfter: at.Add(-time.Minute)})}, fails: []string{snp.CheckValidity}},
		{name: "clock before the VCEK", ev: good, at: at.AddDate(-1, 0, 0), fails: []string{snp.CheckValidity}},
		{name: "changed after signing", ev: snp.Evidence{Report: report(t, chip, simulate.SNPOptions{Debug: true, EditSigned: func(r []byte) []byte { r[0x0A] &^= 0x08; return r }}), Chain: good.Chain}, fails: []string{snp.CheckSignature}},
		{name: "VCEK in the place of the ASK", ev: snp.Evidence{Report: good.Report, Chain: [][]byte{vcek, vcek, ark}}, fails: []string{snp.CheckChain}},
		{name: "VCEK named otherwise", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{Edit: func(c *x509.Certificate) { c.Subject.CommonName = "SEV-VLEK" }})}, fails: []string{snp.CheckChain}},
		{name: "VCEK that is a CA", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{Edit: func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }})}, fails: []string{snp.CheckChain}},
		{name: "VCEK with a critical extension", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{Edit: func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		}})}, fails: []string{snp.CheckChain}},
		{name: "VCEK with an unknown vendor extension", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{Edit: func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1, 6}, Value: []byte{5, 0}})
		}})}, fails: []string{snp.CheckChain}},
		{name: "VCEK without a TCB component", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{Edit: func(c *x509.Certificate) {
			c.ExtraExtensions = slices.DeleteFunc(c.ExtraExtensions, func(e pkix.Extension) bool { return strings.HasSuffix(e.Id.String(), ".3.8") })
		}})}, fails: []string{snp.CheckChain}},
		{name: "VCEK without hardware id", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{Edit: func(c *x509.Certificate) {
			c.ExtraExtensions = slices.DeleteFunc(c.ExtraExtensions, func(e pkix.Extension) bool { return strings.HasSuffix(e.Id.String(), "3704.1.4") })
		}})}, fails: []string{snp.CheckChain}},
		{name: "VCEK of eight bytes' hardware id", ev: snp.Evidence{Report: good.Report, Chain: mint(simulate.VCEKOptions{ChipID: make([]byte, 8)})}, fails: []string{snp.CheckChain}},
		{name: "VCEK signed by a stranger of the ASK's name", ev: snp.Evidence{Report: good.Report, Chain: strangersChain(t, chip, ark)}, fails: []string{snp.CheckChain}},
		{name: "VLEK report with the VCEK's chain", ev: snp.Evidence{Report: report(t, vlekChip, simulate.SNPOptions{VLEK: true}), Chain: good.Chain}, fails: []string{snp.CheckChain}},
		{name: "VCEK report that claims a VLEK", ev: snp.Evidence{Report: report(t, vlekChip, simulate.SNPOptions{Edit: func(r []byte) { r[0x48] = 4 }}), Certificates: vlekChip.CertTable()}, fails: []string{snp.CheckSignature}},
		{name: "revocation list that is not one", ev: snp.Evidence{Report: good.Report, Chain: good.Chain, CRL: []byte("none")}, fails: []string{snp.CheckCRL}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want, anchors, when := data, v.Anchors(), at
			if tt.want != nil {
				want = *tt.want
			}
			if tt.anchors != nil {
				anchors = *tt.anchors
			}
			if !tt.at.IsZero() {
				when = tt.at
			}
			onlyFails(t, snp.Appraise(tt.ev, snp.Want{ReportData: want}, anchors, when), tt.fails...)
		})
	}
}

func ptr[T any](v T) *T { return &v }

// strangersChain has an ASK of the right name that the root key never signed.
func strangersChain(t *testing.T, chip *simulate.Chip, ark []byte) [][]byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(ark)
	if err != nil {
		t.Fatal(err)
	}
	name := root.Subject
	name.CommonName = "SEV-" + string(chip.Product())
	parent := *root
	parent.SubjectKeyId = nil
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: name, NotBefore: root.NotBefore, NotAfter: root.NotAfter,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SignatureAlgorithm: x509.SHA384WithRSAPSS}
	// CreateCertificate checks that the key belongs to the parent: sign with
	// the stranger's own key under the root's name.
	parent.PublicKey = &key.PublicKey
	der, err := x509.CreateCertificate(rand.Reader, template, &parent, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	ask, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	vcek, err := chip.VCEK(simulate.VCEKOptions{Issuer: ask, IssuerKey: key})
	if err != nil {
		t.Fatal(err)
	}
	return [][]byte{vcek, der, ark}
}

// The hardware's form, a plain name, the production anchors: only the roots
// tell a simulation.
func TestSimulationWithoutSelfDescriptionIsRefused(t *testing.T) {
	v := simulation(t, "another")
	vcek, ask, ark := v.Chip().Certificates()
	for _, der := range [][]byte{vcek, ask, ark} {
		if strings.Contains(strings.ToLower(string(der)), "simulat") {
			t.Fatal("the certificates describe themselves")
		}
	}
	ev := snp.Evidence{Report: report(t, v.Chip(), simulate.SNPOptions{}), Certificates: v.Chip().CertTable()}
	onlyFails(t, snp.Appraise(ev, snp.Want{ReportData: data}, anchor.Vendor(), time.Now()), snp.CheckChain)
	real := vectors(t)["genoa-v3-vcek"]
	ev = snp.Evidence{Report: ev.Report, Chain: [][]byte{vcek, ask, real.ev.Chain[2]}}
	onlyFails(t, snp.Appraise(ev, snp.Want{ReportData: data}, anchor.Vendor(), time.Now()), snp.CheckChain)
}

func TestMalformedReports(t *testing.T) {
	chip := simulation(t, anchor.Genoa).Chip()
	turin := simulation(t, anchor.Turin).Chip()
	edit := func(c *simulate.Chip, at int, v ...byte) []byte {
		return report(t, c, simulate.SNPOptions{Edit: func(r []byte) { copy(r[at:], v) }})
	}
	tests := map[string][]byte{
		"empty":                          {},
		"one byte less":                  report(t, chip, simulate.SNPOptions{})[:snp.ReportSize-1],
		"one byte more":                  append(report(t, chip, simulate.SNPOptions{}), 0),
		"version 0":                      edit(chip, 0, 0),
		"version 1":                      edit(chip, 0, 1),
		"version 4":                      edit(chip, 0, 4),
		"version 6":                      edit(chip, 0, 6),
		"VMPL 4":                         edit(chip, 0x30, 4),
		"signature algorithm 2":          edit(chip, 0x34, 2),
		"policy without bit 17":          edit(chip, 0x0A, 0x01),
		"policy with bit 26":             edit(chip, 0x0B, 0x04),
		"platform info with bit 6":       edit(chip, 0x40, 0x65),
		"platform info with bit 8":       edit(chip, 0x41, 1),
		"key info of key 2":              edit(chip, 0x48, 2<<2),
		"key info with bit 5":            edit(chip, 0x48, 1<<5),
		"unknown family":                 edit(chip, 0x188, 0x18),
		"unknown model":                  edit(chip, 0x189, 0x20),
		"reserved bytes of the TCB":      edit(chip, 0x182, 1),
		"reserved bytes of Turin's TCB":  edit(turin, 0x184, 1),
		"reserved bytes after the CPUID": edit(chip, 0x18B, 1),
		"mitigations before version 5":   edit(chip, 0x1F8, 1),
		"Turin's chip id over 8 bytes":   edit(turin, 0x1A8, 1),
		"scalar over 48 bytes":           report(t, chip, simulate.SNPOptions{EditSigned: func(r []byte) []byte { r[0x2A0+48] = 1; return r }}),
		"data after the signature":       report(t, chip, simulate.SNPOptions{EditSigned: func(r []byte) []byte { r[0x49F] = 1; return r }}),
	}
	for name, b := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := snp.Parse(b); err == nil {
				t.Error("parsed")
			}
		})
	}
}

func TestCertificateTable(t *testing.T) {
	v := simulation(t, anchor.Genoa)
	chip := v.Chip()
	r := report(t, chip, simulate.SNPOptions{})
	vcek, ask, ark := chip.Certificates()
	vcekE, askE, arkE := simulate.Entry{GUID: simulate.VCEKGUID, DER: vcek}, simulate.Entry{GUID: simulate.ASKGUID, DER: ask}, simulate.Entry{GUID: simulate.ARKGUID, DER: ark}
	entry := func(offset, length uint32) []byte {
		b := simulate.Table(vcekE, askE, arkE)
		binary.LittleEndian.PutUint32(b[16:], offset)
		binary.LittleEndian.PutUint32(b[20:], length)
		return b
	}
	tests := []struct {
		name  string
		table []byte
		ok    bool
	}{
		{"complete", chip.CertTable(), true},
		{"with an entry of another GUID", simulate.Table(vcekE, askE, arkE, simulate.Entry{GUID: "0123456789abcdef", DER: []byte("x")}), true},
		{"without the VCEK", simulate.Table(askE, arkE), false},
		{"VCEK twice", simulate.Table(vcekE, vcekE, askE, arkE), false},
		{"without end", simulate.Table(vcekE, askE, arkE)[:48], false},
		{"too many entries", simulate.Table(slices.Repeat([]simulate.Entry{vcekE}, 20)...), false},
		{"entry past the end", entry(96, 1<<20), false},
		{"offset and length that wrap around", entry(0xFFFFFFFF, 2), false},
		{"VCEK of no bytes", entry(96, 0), false},
		{"over the limit", append(chip.CertTable(), make([]byte, 64<<10)...), false},
		{"not certificates", simulate.Table(simulate.Entry{GUID: simulate.VCEKGUID, DER: []byte("no")}, askE, arkE), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := snp.Appraise(snp.Evidence{Report: r, Certificates: tt.table}, snp.Want{ReportData: data}, v.Anchors(), time.Now())
			if tt.ok != res.Genuine() {
				t.Errorf("genuine is %v: %v", res.Genuine(), res.Checks.Failed())
			}
			if !tt.ok {
				onlyFails(t, res, snp.CheckChain)
			}
		})
	}
	t.Run("the chain fills what the table lacks", func(t *testing.T) {
		res := snp.Appraise(snp.Evidence{Report: r, Certificates: simulate.Table(vcekE), Chain: [][]byte{nil, ask, ark}}, snp.Want{ReportData: data}, v.Anchors(), time.Now())
		if !res.Genuine() {
			t.Error(res.Checks.Failed())
		}
	})
}

// Every single-bit flip and every truncation of one real report of each version.
func TestFlipsAndTruncations(t *testing.T) {
	all := vectors(t)
	var flips, cuts atomic.Int64
	for _, name := range []string{"milan-v2-vcek", "genoa-v3-vcek", "turin-v5-vcek", "milan-v3-vlek-aws"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v, anchors := all[name], anchor.Vendor()
			for bit := range len(v.ev.Report) * 8 {
				ev := v.ev
				ev.Report = slices.Clone(ev.Report)
				ev.Report[bit/8] ^= 1 << (bit % 8)
				// A flip that does not parse costs nothing. A signature costs
				// 0.7 ms, so of those only one in eleven is looked at, in another
				// phase for each report.
				if _, err := snp.Parse(ev.Report); err == nil && bit%11 != len(name)%11 {
					continue
				}
				flips.Add(1)
				// What the flip may change in the nonce is granted.
				if res := snp.Appraise(ev, snp.Want{ReportData: [64]byte(ev.Report[0x50:])}, anchors, v.at); res.Genuine() {
					t.Fatalf("accepted with bit %d flipped", bit)
				}
			}
			for n := range v.ev.Report {
				ev := v.ev
				ev.Report = ev.Report[:n]
				cuts.Add(1)
				if snp.Appraise(ev, snp.Want{ReportData: v.data}, anchors, v.at).Genuine() {
					t.Fatalf("accepted with %d bytes", n)
				}
			}
		})
	}
	t.Cleanup(func() { t.Logf("%d flips and %d truncations refused", flips.Load(), cuts.Load()) })
}

func TestZeroResultIsNotGenuine(t *testing.T) {
	if (snp.Result{}).Genuine() {
		t.Error("the zero result is genuine")
	}
}

func FuzzParse(f *testing.F) {
	for _, p := range anchor.Products() {
		f.Add(report(f, simulation(f, p).Chip(), simulate.SNPOptions{}))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := snp.Parse(b); (r == nil) == (err == nil) {
			t.Fatal("neither a report nor an error, or both")
		}
	})
}

func FuzzCertificates(f *testing.F) {
	v := simulation(f, anchor.Genoa)
	r := report(f, v.Chip(), simulate.SNPOptions{})
	f.Add(v.Chip().CertTable())
	want, vendors := snp.Want{ReportData: data}, anchor.Vendor()
	at := time.Now()
	f.Fuzz(func(t *testing.T, b []byte) {
		if snp.Appraise(snp.Evidence{Report: r, Certificates: b}, want, vendors, at).Genuine() {
			t.Fatal("accepted")
		}
	})
}
