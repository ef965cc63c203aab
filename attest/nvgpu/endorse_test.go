package nvgpu_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
)

// source answers from functions; a nil one does not offer its kind.
type source struct {
	rim  func(id string) ([]byte, error)
	ocsp func(cert, issuer *x509.Certificate) ([]byte, error)
}

func (s source) RIM(_ context.Context, id string) ([]byte, error) {
	if s.rim == nil {
		return nil, nvgpu.ErrNotOffered
	}
	return s.rim(id)
}

func (s source) OCSP(_ context.Context, cert, issuer *x509.Certificate) ([]byte, error) {
	if s.ocsp == nil {
		return nil, nvgpu.ErrNotOffered
	}
	return s.ocsp(cert, issuer)
}

func files(t testing.TB, byID map[string]string) func(string) ([]byte, error) {
	return func(id string) ([]byte, error) {
		name, ok := byID[id]
		if !ok {
			return nil, fmt.Errorf("no manifest %s", id)
		}
		return vectortest.Read(t, name), nil
	}
}

const complete = "nvidia/h100-550.90.07-complete/"

func completeRIMs(t testing.TB) func(string) ([]byte, error) {
	return files(t, map[string]string{
		"NV_GPU_DRIVER_GH100_550.90.07":         complete + "driver_rim.xml",
		"NV_GPU_VBIOS_1010_0200_882_96009F0001": complete + "vbios_rim.xml",
	})
}

// rimTime is within the life of the manifests' signers.
var rimTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestRealReferenceValues(t *testing.T) {
	v := vectors(t)["h100-550.90.07-complete"]
	res := nvgpu.AppraiseWith(t.Context(), v.ev, v.want, anchor.Vendor(), nvgpu.Endorsements{Source: source{rim: completeRIMs(t)}}, rimTime)
	if !res.Genuine() {
		t.Fatalf("refused: %v", check.Refuse("appraise", res.Checks))
	}
	i := slices.IndexFunc(res.Checks, func(c check.Check) bool { return c.ID == nvgpu.CheckMeasurements })
	// 33 are active in the two manifests; index 35 is the video decoder's,
	// which is off.
	if got := res.Checks[i]; got.Outcome != check.Pass || got.Found != "32 measurements" {
		t.Errorf("measurements: %+v", got)
	}
	for k, want := range map[string]any{
		"measres": "success", "secboot": true, "dbgstat": "disabled", "x-nvidia-gpu-vbios-index-no-conflict": true,
		"x-nvidia-gpu-driver-rim-fetched": true, "x-nvidia-gpu-driver-rim-cert-chain": true, "x-nvidia-gpu-driver-rim-signature-verified": true,
		"x-nvidia-gpu-driver-rim-version-match": true, "x-nvidia-gpu-driver-rim-measurements-available": true,
		"x-nvidia-gpu-vbios-rim-fetched": true, "x-nvidia-gpu-vbios-rim-version-match": true,
	} {
		if res.Claims[k] != want {
			t.Errorf("%s is %v, want %v", k, res.Claims[k], want)
		}
	}
}

func TestRealManifestsOfOthers(t *testing.T) {
	all := vectors(t)
	rims := func(m map[string]string) source { return source{rim: files(t, m)} }
	v := all["h100-550.90.07-complete"]
	const driver, vbios = "NV_GPU_DRIVER_GH100_550.90.07", "NV_GPU_VBIOS_1010_0200_882_96009F0001"
	tests := []struct {
		name  string
		v     vector
		src   source
		at    time.Time
		fails []string
	}{
		{"after the signers' time", v, source{rim: completeRIMs(t)}, time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC), []string{"gpu.driver-rim-validity", "gpu.vbios-rim-validity"}},
		{"after the VBIOS signer's time", v, source{rim: completeRIMs(t)}, now, []string{"gpu.vbios-rim-validity"}},
		{"driver's manifest of another version", v, rims(map[string]string{driver: "rim/NV_GPU_DRIVER_GH100_550.144.03.xml", vbios: complete + "vbios_rim.xml"}), rimTime, []string{"gpu.driver-rim-version"}},
		{"driver's manifest with a forged signature", v, rims(map[string]string{driver: "rim/incorrect_signature_driver_rim.xml", vbios: complete + "vbios_rim.xml"}), rimTime, []string{"gpu.driver-rim-signature"}},
		{"VBIOS's manifest for the driver", v, rims(map[string]string{driver: complete + "vbios_rim.xml", vbios: complete + "vbios_rim.xml"}), rimTime, []string{"gpu.driver-rim-version"}},
		{"no manifest of the VBIOS", v, rims(map[string]string{driver: complete + "driver_rim.xml"}), rimTime, []string{nvgpu.CheckVBIOSRIM}},
		{
			"changed driver's manifest", all["h100-535.86.09-nofwid"],
			rims(map[string]string{"NV_GPU_DRIVER_GH100_535.86.09": "rim/NV_GPU_DRIVER_GH100_535.86.09_measurement_mismatch.xml", "NV_GPU_VBIOS_1010_0200_882_96005E0001": "rim/NV_GPU_VBIOS_1010_0200_882_96005E0001_measurement_mismatch.xml"}),
			time.Date(2025, 10, 1, 0, 0, 0, 0, time.UTC), []string{"gpu.driver-rim-signature"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			onlyFails(t, nvgpu.AppraiseWith(t.Context(), tt.v.ev, tt.v.want, anchor.Vendor(), nvgpu.Endorsements{Source: tt.src}, tt.at), tt.fails...)
		})
	}
	t.Logf("vectors of manifests: %d combinations refused", len(tests))
}

func TestRealStatus(t *testing.T) {
	v := vectors(t)["h100-550.90.07-complete"]
	bySerial := map[string]string{
		"4c255ede3bd001bf3f4a3b605fca898a": "certificate_l2", "6afe7184f92232c8df7b242261776e56": "certificate_l3", "41431d480fe5e87274": "certificate_l4",
		"c6dbf0754093fdeb4333f34ba205b4dc": "rim_l2", "b4ebf6542022fdec4512f24ba503a3cb": "driver_rim_l3", "d69f10b46c05d201": "driver_rim_l4", "89624ede804c3916": "vbios_l4",
	}
	answer := func(cert, _ *x509.Certificate) ([]byte, error) {
		name, ok := bySerial[fmt.Sprintf("%x", cert.SerialNumber)]
		if !ok {
			return nil, fmt.Errorf("nothing about %x", cert.SerialNumber)
		}
		return vectortest.Read(t, complete+"ocsp/"+name+".der"), nil
	}
	// The answers about the device and about the manifests are of two days.
	device := time.Date(2025, 8, 21, 12, 0, 0, 0, time.UTC)
	manifests := time.Date(2025, 10, 24, 18, 0, 0, 0, time.UTC)
	res := nvgpu.AppraiseWith(t.Context(), v.ev, v.want, anchor.Vendor(), nvgpu.Endorsements{Source: source{ocsp: answer}}, device)
	if !res.Genuine() {
		t.Fatalf("refused: %v", check.Refuse("appraise", res.Checks))
	}
	res = nvgpu.AppraiseWith(t.Context(), v.ev, v.want, anchor.Vendor(), nvgpu.Endorsements{Source: source{ocsp: answer, rim: completeRIMs(t)}}, manifests)
	onlyFails(t, res, nvgpu.CheckOCSP) // the device's answers are old by then
	passed := 0
	for _, c := range res.Checks {
		if strings.HasSuffix(c.ID, "-rim-ocsp") && c.Outcome == check.Pass && c.Found == "3 certificates are good" {
			passed++
		}
	}
	if passed != 2 {
		t.Errorf("the status of %d manifests' signers passed, want 2: %v", passed, res.Checks)
	}
	t.Logf("vectors of OCSP answers: %d verified, those about the device refused once they are old", len(bySerial))
}

func TestSimulatedEndorsements(t *testing.T) {
	v := simulation(t)
	for _, o := range []simulate.GPUOptions{{}, {NVDEC0Enabled: true}, {Measurements: map[int][48]byte{35: {1}}}} {
		res := nvgpu.AppraiseWith(t.Context(), evidence(t, v.GPUs()[0], o), nvgpu.Want{Nonce: nonce}, v.Anchors(), nvgpu.Endorsements{Source: v}, time.Now())
		if !res.Genuine() {
			t.Errorf("refused: %v", check.Refuse("appraise", res.Checks))
		}
		for _, c := range res.Checks {
			if c.Outcome != check.Pass {
				t.Errorf("%s: %s", c.ID, c.Outcome)
			}
		}
	}
}

// Each row leaves one check between the attacker and acceptance.
func TestForgedEndorsements(t *testing.T) {
	v := simulation(t)
	s, err := stranger()
	if err != nil {
		t.Fatal(err)
	}
	g := v.GPUs()[0]
	good, memory := cached(t, v, simulate.OCSPOptions{}), nvgpu.NewMemory()
	driver := func(o simulate.RIMOptions) source {
		return source{ocsp: good.ocsp, rim: func(id string) ([]byte, error) {
			if strings.Contains(id, "DRIVER") {
				return v.DriverRIM(o)
			}
			return good.rim(id)
		}}
	}
	// answers is about one certificate of the device's chain; the others are good.
	answers := func(o simulate.OCSPOptions) source {
		return source{rim: good.rim, ocsp: func(cert, issuer *x509.Certificate) ([]byte, error) {
			if strings.Contains(cert.Subject.CommonName, "Provisioner") {
				return v.OCSPAnswer(cert, issuer, o)
			}
			return good.ocsp(cert, issuer)
		}}
	}
	signer := func(o simulate.OCSPOptions) source {
		return source{rim: good.rim, ocsp: func(cert, issuer *x509.Certificate) ([]byte, error) {
			if strings.Contains(cert.Subject.CommonName, "Signer") {
				return v.OCSPAnswer(cert, issuer, o)
			}
			return good.ocsp(cert, issuer)
		}}
	}
	replace := func(old, new string) func(string) string {
		return func(s string) string {
			if !strings.Contains(s, old) {
				t.Fatalf("the manifest has no %q", old)
			}
			return strings.Replace(s, old, new, 1)
		}
	}
	outage := errors.New("the service is down")
	m := func(i int, v [48]byte) simulate.GPUOptions {
		return simulate.GPUOptions{Measurements: map[int][48]byte{i: v}}
	}
	values := func(i int, v ...[48]byte) simulate.RIMOptions {
		return simulate.RIMOptions{Values: map[int][][48]byte{i: v}}
	}
	one, two := [48]byte{1}, [48]byte{2}
	tests := []struct {
		name   string
		report simulate.GPUOptions
		src    source
		fails  []string
	}{
		{name: "measurement of the driver", report: m(7, one), src: driver(simulate.RIMOptions{}), fails: []string{nvgpu.CheckMeasurements}},
		{name: "measurement of the VBIOS", report: m(12, one), src: driver(simulate.RIMOptions{}), fails: []string{nvgpu.CheckMeasurements}},
		{name: "none of two alternatives", report: m(7, [48]byte{3}), src: driver(values(7, one, two)), fails: []string{nvgpu.CheckMeasurements}},
		{name: "second of two alternatives", report: m(7, two), src: driver(values(7, one, two))},
		{name: "measurement of nobody", report: m(60, one), src: driver(simulate.RIMOptions{})},
		{name: "video decoder's firmware, running", report: simulate.GPUOptions{NVDEC0Enabled: true, Measurements: map[int][48]byte{35: one}}, src: driver(simulate.RIMOptions{}), fails: []string{nvgpu.CheckMeasurements}},
		{name: "index in both manifests", src: driver(values(3, simulate.Measurement(3))), fails: []string{nvgpu.CheckRIMConflict}},
		{name: "manifest without active values", src: driver(simulate.RIMOptions{Empty: true}), fails: []string{"gpu.driver-rim-values"}},
		{name: "manifest of another version", src: driver(simulate.RIMOptions{Version: "1.2.3"}), fails: []string{"gpu.driver-rim-version"}},
		{name: "manifest of another product", src: driver(simulate.RIMOptions{Product: "GB100"}), fails: []string{"gpu.driver-rim-version"}},
		{name: "manifest's signer expired", src: driver(simulate.RIMOptions{SignerNotAfter: time.Now().Add(-time.Minute)}), fails: []string{"gpu.driver-rim-validity"}},
		{name: "manifest's signer may not sign", src: driver(simulate.RIMOptions{EditSigner: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }}), fails: []string{"gpu.driver-rim-chain"}},
		{name: "manifest signed by an OCSP responder", src: driver(simulate.RIMOptions{EditSigner: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning} }}), fails: []string{"gpu.driver-rim-chain"}},
		{name: "manifest without its root", src: driver(simulate.RIMOptions{OmitRoot: true}), fails: []string{"gpu.driver-rim-chain"}},
		{name: "manifest of another simulation", src: source{ocsp: good.ocsp, rim: func(id string) ([]byte, error) { return s.RIM(t.Context(), id) }}, fails: []string{"gpu.driver-rim-chain", "gpu.vbios-rim-chain"}},
		{name: "changed value", src: driver(simulate.RIMOptions{EditSigned: replace(fmt.Sprintf("%x", simulate.Measurement(7)), fmt.Sprintf("%x", one))}), fails: []string{"gpu.driver-rim-signature"}},
		{name: "changed digest", src: driver(simulate.RIMOptions{EditSigned: replace("<ds:DigestValue>", "<ds:DigestValue>AAAA")}), fails: []string{nvgpu.CheckDriverRIM}},
		{name: "changed whitespace", src: driver(simulate.RIMOptions{EditSigned: replace("\n    <ns0:Meta", "\n <ns0:Meta")}), fails: []string{"gpu.driver-rim-signature"}},
		{name: "no manifest", src: source{ocsp: good.ocsp, rim: func(string) ([]byte, error) { return nil, outage }}, fails: []string{nvgpu.CheckDriverRIM, nvgpu.CheckVBIOSRIM}},
		{name: "no status", src: source{rim: good.rim, ocsp: func(_, _ *x509.Certificate) ([]byte, error) { return nil, outage }}, fails: []string{nvgpu.CheckOCSP, "gpu.driver-rim-ocsp", "gpu.vbios-rim-ocsp"}},
		{name: "status not DER", src: source{rim: good.rim, ocsp: func(_, _ *x509.Certificate) ([]byte, error) { return []byte("ok"), nil }}, fails: []string{nvgpu.CheckOCSP, "gpu.driver-rim-ocsp", "gpu.vbios-rim-ocsp"}},
		{name: "provisioner revoked", src: answers(simulate.OCSPOptions{Status: ocsp.Revoked, Reason: ocsp.KeyCompromise}), fails: []string{nvgpu.CheckOCSP}},
		{name: "provisioner on hold", src: answers(simulate.OCSPOptions{Status: ocsp.Revoked, Reason: ocsp.CertificateHold}), fails: []string{nvgpu.CheckOCSP}},
		{name: "provisioner unknown", src: answers(simulate.OCSPOptions{Status: ocsp.Unknown}), fails: []string{nvgpu.CheckOCSP}},
		{name: "stale status", src: answers(simulate.OCSPOptions{ThisUpdate: time.Now().Add(-25 * time.Hour)}), fails: []string{nvgpu.CheckOCSP}},
		{name: "status of the future", src: answers(simulate.OCSPOptions{ThisUpdate: time.Now().Add(time.Hour)}), fails: []string{nvgpu.CheckOCSP}},
		{name: "status of another certificate", src: answers(simulate.OCSPOptions{Serial: big.NewInt(7)}), fails: []string{nvgpu.CheckOCSP}},
		{name: "status under another issuer's name", src: answers(simulate.OCSPOptions{CertIDOf: parse(t, g.ChainPEM())[4]}), fails: []string{nvgpu.CheckOCSP}},
		{name: "status named by SHA-1", src: answers(simulate.OCSPOptions{Hash: crypto.SHA1}), fails: []string{nvgpu.CheckOCSP}},
		{name: "responder without the right to answer", src: answers(simulate.OCSPOptions{EditResponder: func(c *x509.Certificate) { c.ExtKeyUsage = nil }}), fails: []string{nvgpu.CheckOCSP}},
		{name: "responder expired", src: answers(simulate.OCSPOptions{EditResponder: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }}), fails: []string{nvgpu.CheckOCSP}},
		{name: "responder of another issuer", src: source{rim: good.rim, ocsp: func(cert, issuer *x509.Certificate) ([]byte, error) {
			if strings.Contains(cert.Subject.CommonName, "Provisioner") {
				root := parse(t, g.ChainPEM())[4]
				return v.OCSPAnswer(cert, root, simulate.OCSPOptions{CertIDOf: issuer})
			}
			return good.ocsp(cert, issuer)
		}}, fails: []string{nvgpu.CheckOCSP}},
		{name: "manifest's signer revoked", src: signer(simulate.OCSPOptions{Status: ocsp.Revoked}), fails: []string{"gpu.driver-rim-ocsp", "gpu.vbios-rim-ocsp"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := nvgpu.AppraiseWith(t.Context(), evidence(t, g, tt.report), nvgpu.Want{Nonce: nonce}, v.Anchors(), nvgpu.Endorsements{Source: tt.src, Memory: memory}, time.Now())
			if tt.fails == nil {
				if !res.Genuine() {
					t.Errorf("refused: %v", res.Checks.Failed())
				}
				return
			}
			onlyFails(t, res, tt.fails...)
			if res.Claims["measres"] == "success" && slices.Contains(tt.fails, nvgpu.CheckMeasurements) {
				t.Error("claims that measurements match")
			}
		})
	}
}

// What has no place in a manifest, or makes two readers see two of them.
func TestMalformedManifests(t *testing.T) {
	v := simulation(t)
	ev := evidence(t, v.GPUs()[0], simulate.GPUOptions{})
	replace := func(old, new string) func(string) string {
		return func(s string) string {
			if !strings.Contains(s, old) {
				t.Fatalf("the manifest has no %q", old)
			}
			return strings.Replace(s, old, new, 1)
		}
	}
	content := func(old, new string) simulate.RIMOptions {
		return simulate.RIMOptions{EditContent: replace(old, new)}
	}
	after := func(old, new string) simulate.RIMOptions {
		return simulate.RIMOptions{EditSigned: replace(old, new)}
	}
	good, memory := cached(t, v, simulate.OCSPOptions{}), nvgpu.NewMemory()
	tests := map[string]simulate.RIMOptions{
		"empty":                      {EditSigned: func(string) string { return "" }},
		"not XML":                    {EditSigned: func(string) string { return "no" }},
		"cut":                        {EditSigned: func(s string) string { return s[:len(s)/2] }},
		"over the limit":             {EditSigned: func(s string) string { return s + strings.Repeat(" ", 512<<10) }},
		"too deep":                   {EditSigned: func(string) string { return strings.Repeat("<a>", 100) }},
		"too many elements":          {EditSigned: func(s string) string { return s + strings.Repeat("<a></a>", 5000) }},
		"comment":                    after("<ns0:Payload>", "<ns0:Payload><!-- -->"),
		"comment in a hash":          after("</ds:DigestValue>", "<!-- --></ds:DigestValue>"),
		"directive":                  {EditSigned: func(s string) string { return `<!DOCTYPE a [<!ENTITY b "c">]>` + s }},
		"processing instruction":     after("<ns0:Payload>", "<ns0:Payload><?a b?>"),
		"attribute twice":            after(`index="7"`, `index="7" index="7"`),
		"attribute of namespace xml": after(`<ns0:Payload>`, `<ns0:Payload xml:base="a">`),
		"another root":               {EditSigned: func(s string) string { return strings.ReplaceAll(s, "SoftwareIdentity", "Other") }},
		"another namespace":          {EditSigned: func(s string) string { return strings.ReplaceAll(s, "19770", "19771") }},
		"no signature":               {EditSigned: func(s string) string { return s[:strings.Index(s, "<ds:Signature ")] + "</SoftwareIdentity>" }},
		"two signatures": {EditSigned: func(s string) string {
			i := strings.Index(s, "<ds:Signature ")
			return s[:len(s)-len("</SoftwareIdentity>")] + s[i:]
		}},
		"signature wrapped": {EditSigned: func(s string) string {
			return strings.Replace(strings.Replace(s, "<ds:Signature ", "<a><ds:Signature ", 1), "</ds:Signature>", "</ds:Signature></a>", 1)
		}},
		"reference to a part":      after(`URI=""`, `URI="#a"`),
		"no reference":             after(` URI=""`, ``),
		"another canonicalization": after(`CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"`, `CanonicalizationMethod Algorithm="http://www.w3.org/TR/2001/REC-xml-c14n-20010315"`),
		"another signature method": after("ecdsa-sha384", "hmac-sha384"),
		"another digest method":    after("xmldsig-more#sha384", "xmldsig-more#sha224"),
		"one transform":            after(`<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:Transform>`, ""),
		"a third transform":        after("</ds:Transforms>", `<ds:Transform Algorithm="http://www.w3.org/TR/1999/REC-xslt-19991116"></ds:Transform></ds:Transforms>`),
		"two references": {EditSigned: func(s string) string {
			i, j := strings.Index(s, "<ds:Reference"), strings.Index(s, "</ds:SignedInfo>")
			return s[:j] + s[i:j] + s[j:]
		}},
		"no certificates": {EditSigned: func(s string) string {
			i, j := strings.Index(s, "<ds:X509Certificate>"), strings.Index(s, "</ds:X509Data>")
			return s[:i] + s[j:]
		}},
		"too many certificates": {EditSigned: func(s string) string {
			i, j := strings.Index(s, "<ds:X509Certificate>"), strings.Index(s, "</ds:X509Data>")
			return s[:i] + strings.Repeat(s[i:j], 4) + s[j:]
		}},
		"certificate that is none":      after("<ds:X509Certificate>", "<ds:X509Certificate>AAAA</ds:X509Certificate><ds:X509Certificate>"),
		"short signature":               after("<ds:SignatureValue>", "<ds:SignatureValue>AAAA</ds:SignatureValue><ds:SignatureValue>"),
		"measurement twice":             content(`index="8"`, `index="7"`),
		"measurement 64":                content(`index="63"`, `index="64"`),
		"measurement with a sign":       content(`index="7"`, `index="+7"`),
		"more alternatives than hashes": content(`alternatives="1" index="7"`, `alternatives="2" index="7"`),
		"no alternative":                content(`alternatives="1" index="7"`, `alternatives="0" index="7"`),
		"neither active nor not":        content(`active="True" alternatives="1" index="7"`, `active="yes" alternatives="1" index="7"`),
		"measurement of 32 bytes":       content(`size="48"`, `size="32"`),
		"hash that is short":            content(fmt.Sprintf("%x", simulate.Measurement(7)), "00"),
		"hash of another name":          content("ns2:Hash0", "ns2:Hash1"),
		"two products":                  content(`product="GH100"`, `product="GB100"`),
		"no version":                    content(simulate.DefaultDriver, ""),
		"two payloads":                  content("    </ns0:Payload>\n", "    </ns0:Payload><ns0:Payload></ns0:Payload>\n"),
		"payload of another namespace":  content("    </ns0:Payload>\n", "    </ns0:Payload><Payload xmlns=\"a\"></Payload>\n"),
	}
	for name, o := range tests {
		t.Run(name, func(t *testing.T) {
			src := source{rim: func(id string) ([]byte, error) {
				if strings.Contains(id, "DRIVER") {
					return v.DriverRIM(o)
				}
				return good.rim(id)
			}}
			onlyFails(t, nvgpu.AppraiseWith(t.Context(), ev, nvgpu.Want{Nonce: nonce}, v.Anchors(), nvgpu.Endorsements{Source: src, Memory: memory}, time.Now()), nvgpu.CheckDriverRIM)
		})
	}
}

func TestVerifyManifest(t *testing.T) {
	v := simulation(t)
	mint := func(o simulate.RIMOptions) []byte {
		b, err := v.DriverRIM(o)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, row := range []struct {
		situation string
		manifest  []byte
		anchors   anchor.Set
		refused   string // empty for none
	}{
		{"good", mint(simulate.RIMOptions{}), v.Anchors(), ""},
		{"nothing", nil, v.Anchors(), "not in its form"},
		{"changed after signing", mint(simulate.RIMOptions{EditSigned: func(s string) string { return strings.Replace(s, `active="True"`, `active="False"`, 1) }}), v.Anchors(), "signature does not hold"},
		{"another vendor's", mint(simulate.RIMOptions{}), anchor.Vendor(), "signer is not trusted"},
		{"no anchors", mint(simulate.RIMOptions{}), anchor.Set{}, "signer is not trusted"},
	} {
		err := nvgpu.VerifyRIM(row.manifest, row.anchors)
		if (err == nil) != (row.refused == "") || err != nil && !strings.Contains(err.Error(), row.refused) {
			t.Errorf("%s: %v", row.situation, err)
		}
	}
}

// One byte in 197 of a real manifest: its signer is asked for each, which takes a
// few milliseconds.
func TestFlipsOfAManifest(t *testing.T) {
	v := vectors(t)["h100-550.90.07-complete"]
	good := vectortest.Read(t, complete+"driver_rim.xml")
	anchors, memory := anchor.Vendor(), nvgpu.NewMemory()
	n := 0
	for i := 0; i < len(good); i += 197 {
		b := slices.Clone(good)
		b[i] ^= 1 << (i % 7)
		src := source{rim: func(id string) ([]byte, error) {
			if strings.Contains(id, "DRIVER") {
				return b, nil
			}
			return vectortest.Read(t, complete+"vbios_rim.xml"), nil
		}}
		n++
		res := nvgpu.AppraiseWith(t.Context(), v.ev, v.want, anchors, nvgpu.Endorsements{Source: src, Memory: memory}, rimTime)
		if res.Genuine() && res.Claims["measres"] == "success" {
			// A flip may turn one whitespace of base64 into another; anything
			// else is in the content.
			if good[i] != '\n' {
				t.Fatalf("accepted with byte %d changed from %q to %q", i, good[i], b[i])
			}
		}
	}
	t.Logf("%d flips", n)
}

func TestNobodyIsAskedAboutStrangers(t *testing.T) {
	v, s := simulation(t), vectors(t)["h100-550.90.07-complete"]
	src := source{
		rim: func(string) ([]byte, error) { t.Error("asked for a manifest"); return nil, errors.New("no") },
		ocsp: func(_, _ *x509.Certificate) ([]byte, error) {
			t.Error("asked for a status")
			return nil, errors.New("no")
		},
	}
	onlyFails(t, nvgpu.AppraiseWith(t.Context(), s.ev, s.want, v.Anchors(), nvgpu.Endorsements{Source: src}, now), nvgpu.CheckChain)
}

func parse(t *testing.T, chain []byte) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for _, b := range splitPEM(t, chain) {
		c, err := x509.ParseCertificate(der(t, b))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

func FuzzManifest(f *testing.F) {
	v := simulation(f)
	ev := evidence(f, v.GPUs()[0], simulate.GPUOptions{})
	good, err := v.DriverRIM(simulate.RIMOptions{})
	if err != nil {
		f.Fatal(err)
	}
	vbios, err := v.VBIOSRIM(simulate.RIMOptions{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	s, err := stranger()
	if err != nil {
		f.Fatal(err)
	}
	// Under these anchors no manifest can be good.
	anchors, at := s.Anchors(), time.Now()
	chain, err := s.GPUs()[0].Chain(simulate.ChainOptions{})
	if err != nil {
		f.Fatal(err)
	}
	ev = nvgpu.Evidence{Report: report(f, s.GPUs()[0], simulate.GPUOptions{}), Chain: chain, DriverVersion: ev.DriverVersion, VBIOSVersion: ev.VBIOSVersion}
	f.Fuzz(func(t *testing.T, b []byte) {
		src := source{rim: func(id string) ([]byte, error) {
			if strings.Contains(id, "DRIVER") {
				return b, nil
			}
			return vbios, nil
		}}
		res := nvgpu.AppraiseWith(t.Context(), ev, nvgpu.Want{Nonce: nonce}, anchors, nvgpu.Endorsements{Source: src}, at)
		if res.Claims["x-nvidia-gpu-driver-rim-cert-chain"] == true {
			t.Fatal("accepted")
		}
	})
}
