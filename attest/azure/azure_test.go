package azure_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/azure"
	"github.com/coffer-run/coffer/attest/azure/azuretest"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/snp"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

var now = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// The SEV-SNP report in each real report is genuine for its runtime claims, and
// the key in these signed the quote that lies beside it.
func TestRealReports(t *testing.T) {
	for _, v := range vectortest.All(t, "azure-hcl+tpm-quote") {
		t.Run(v.Name, func(t *testing.T) {
			dir := path.Dir(v.Report)
			r, err := azure.Parse(vectortest.Read(t, v.Report))
			if err != nil {
				t.Fatal(err)
			}
			if r.SecureBoot == nil || !*r.SecureBoot || r.Console == nil || len(r.VM) != 36 {
				t.Errorf("%+v", r)
			}
			chain := "snp/genoa-v3-vcek"
			if strings.Contains(v.Name, "milan") {
				chain = "snp/milan-v2-vcek"
			}
			res := snp.Appraise(snp.Evidence{Report: r.SNP, Chain: [][]byte{
				vectortest.ReadPEM(t, dir+"/vcek.pem"), vectortest.ReadPEM(t, chain+"/ask.pem"), vectortest.ReadPEM(t, chain+"/ark.pem"),
			}}, snp.Want{ReportData: r.ReportData()}, anchor.Vendor(), now)
			if !res.Genuine() || res.Report.VMPL != 0 {
				t.Fatalf("%+v", res.Checks.Failed())
			}

			ev := vtpm.Evidence{
				AKPublic: vtpmtest.AKPublicRSA(r.AK), Quote: vectortest.Read(t, dir+"/quote.bin"),
				Signature: vtpmtest.RSASignature(vectortest.Read(t, dir+"/quote.sig")), PCRs: map[int][]byte{},
			}
			var pcrs []string
			if err := json.Unmarshal(vectortest.Read(t, dir+"/pcrs.sha256.json"), &pcrs); err != nil {
				t.Fatal(err)
			}
			for i, text := range pcrs {
				if ev.PCRs[i], err = hex.DecodeString(text); err != nil {
					t.Fatal(err)
				}
			}
			failed := func(ev vtpm.Evidence, key *rsa.PublicKey) []string {
				var ids []string
				for _, c := range vtpm.Appraise(ev, vtpm.Want{Platform: &vtpm.PlatformKey{Key: key, Class: anchor.HCLVMPL0}}, now).Checks.Failed() {
					ids = append(ids, c.ID)
				}
				return ids
			}
			// Another verifier's challenge, and a machine without coffer's agent.
			rest := []string{"tpm.extra-data", "tpm.event-log"}
			if got := failed(ev, r.AK); !slices.Equal(got, rest) {
				t.Fatalf("failed %v", got)
			}
			other, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				t.Fatal(err)
			}
			if got := failed(ev, &other.PublicKey); !slices.Contains(got, "tpm.ak-credential") {
				t.Errorf("another key in the claims: failed %v", got)
			}
			forged := ev
			forged.AKPublic = vtpmtest.AKPublicRSA(&other.PublicKey)
			if got := failed(forged, r.AK); !slices.Contains(got, "tpm.ak-credential") || !slices.Contains(got, "tpm.signature") {
				t.Errorf("another key under the quote: failed %v", got)
			}
			forged = ev
			forged.Quote = bytes.Clone(ev.Quote)
			forged.Quote[len(forged.Quote)-1] ^= 1
			if got := failed(forged, r.AK); !slices.Contains(got, "tpm.signature") {
				t.Errorf("another quote: failed %v", got)
			}
		})
	}
}

// A flipped bit is an error, or changes the SEV-SNP report, which is signed, or
// the report data that this must have.
func TestEveryFlipOfARealReport(t *testing.T) {
	for _, v := range vectortest.All(t, "azure-hcl+tpm-quote") {
		b := vectortest.Read(t, v.Report)
		whole, err := azure.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		refused, moved := 0, 0
		for i := range len(b) * 8 {
			b[i/8] ^= 1 << (i % 8)
			r, err := azure.Parse(b)
			b[i/8] ^= 1 << (i % 8)
			switch {
			case err != nil:
				refused++
			case !bytes.Equal(r.SNP, whole.SNP) || r.ReportData() != whole.ReportData():
				moved++
			case i/8 == 4:
				// Versions 1 and 2 of the header differ in nothing that is read.
			default:
				t.Fatalf("%s: bit %d makes no difference", v.Name, i)
			}
		}
		for i := range b {
			r, err := azure.Parse(b[:i])
			// Zeros after the claims may be missing.
			if err == nil && (!bytes.Equal(r.Claims, whole.Claims) || !bytes.Equal(r.SNP, whole.SNP)) {
				t.Fatalf("%s: cut off at %d", v.Name, i)
			}
		}
		t.Logf("%s: %d flips refused, %d change what is signed", v.Name, refused, moved)
	}
}

func TestReportIsRefused(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	claims, err := azuretest.Claims(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	good := azuretest.Report(make([]byte, snp.ReportSize), claims)
	if r, err := azure.Parse(good); err != nil || !r.AK.Equal(&key.PublicKey) {
		t.Fatalf("%+v, %v", r, err)
	}
	const runtime = 32 + 1184
	u32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[at:], v); return b }
	}
	said := func(old, as string) func([]byte) []byte {
		return func([]byte) []byte {
			text := strings.Replace(string(claims), old, as, 1)
			if text == string(claims) {
				t.Fatalf("%q is not in the claims", old)
			}
			return azuretest.Report(make([]byte, snp.ReportSize), []byte(text))
		}
	}
	size := uint32(len(claims))
	for situation, spoil := range map[string]func([]byte) []byte{
		"nothing":                          func([]byte) []byte { return nil },
		"header alone":                     func(b []byte) []byte { return b[:32] },
		"no claims":                        func(b []byte) []byte { return b[:runtime+20] },
		"over the limit":                   func(b []byte) []byte { return append(b, make([]byte, azure.MaxSize)...) },
		"another signature":                u32(0, 0),
		"version 0":                        u32(4, 0),
		"version 3":                        u32(4, 3),
		"length over the report's":         u32(8, 32+1184+20+size+1),
		"length under the report's":        u32(8, 32+1184+20+size-1),
		"length of zero":                   u32(8, 0),
		"length of all ones":               u32(8, 0xffffffff),
		"another request":                  u32(12, 1),
		"a status":                         u32(16, 1),
		"reserved bytes":                   u32(28, 1),
		"runtime length over the claims'":  u32(runtime, size+21),
		"runtime length under the claims'": u32(runtime, size+19),
		"runtime length of all ones":       u32(runtime, 0xffffffff),
		"runtime version":                  u32(runtime+4, 2),
		"TDX report":                       u32(runtime+8, 4),
		"VBS report":                       u32(runtime+8, 1),
		"hash type none":                   u32(runtime+12, 0),
		"hash type SHA-384":                u32(runtime+12, 2),
		"hash type SHA-512":                u32(runtime+12, 3),
		"claims of no length":              u32(runtime+16, 0),
		"claims over the end":              u32(runtime+16, uint32(len(good))),
		"claims of all ones":               u32(runtime+16, 0xffffffff),
		"bytes after the claims":           func(b []byte) []byte { b[len(b)-1] = 1; return b },
		"a second report after the first":  func(b []byte) []byte { return append(b, b...) },
		"not JSON":                         said("{", "x"),
		"two values":                       said("{", "{}{"),
		"no keys":                          said(`"keys"`, `"Keys"`),
		"no attestation key":               said("HCLAkPub", "HCLXkPub"),
		"two attestation keys":             said("HCLEkPub", "HCLAkPub"),
		"key to encrypt":                   said(`"sign"`, `"encrypt"`),
		"key for two uses":                 said(`"sign"`, `"sign","encrypt"`),
		"key of another type":              said(`"RSA"`, `"EC"`),
		"another exponent":                 said("AQAB", "Aw"),
		"exponent with a leading zero":     said("AQAB", "AAEAAQ"),
		"no modulus":                       said(`"n":"`, `"m":"`),
		"modulus that is too short":        said(`"n":"`, `"n":"AAAA","x":"`),
		"modulus with padding":             said(`"n":"`, `"n":"=`),
		"modulus that is a number":         said(`"n":"`, `"n":1,"x":"`),
		"configuration that is a text":     said(`"vm-configuration":{`, `"vm-configuration":"","x":{`),
		"name with a line break":           said(`"simulated"`, `"a\nb"`),
		"name without end":                 said(`"simulated"`, `"`+strings.Repeat("a", 65)+`"`),
		"Secure Boot that is a text":       said(`"secure-boot":true`, `"secure-boot":"true"`),
	} {
		if r, err := azure.Parse(spoil(bytes.Clone(good))); err == nil {
			t.Errorf("%s: accepted as %+v", situation, r)
		}
	}
}

func FuzzParse(f *testing.F) {
	key := &rsa.PublicKey{N: new(big.Int).SetBytes(bytes.Repeat([]byte{0xab}, 256)), E: 65537}
	claims, err := azuretest.Claims(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(azuretest.Report(make([]byte, snp.ReportSize), claims))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := azure.Parse(b)
		if err == nil && (r.AK == nil || len(r.SNP) != snp.ReportSize || len(r.Claims) == 0) {
			t.Fatalf("%+v", r)
		}
	})
}
