package verifiertest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/json"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/simulate"
)

// KBSGuest is a guest of the Confidential Containers KBS protocol as its own
// components make it, on a simulation's processor. Its fields are what a test may
// change of an honest one.
type KBSGuest struct {
	Chip *simulate.Chip
	Key  crypto.Signer
	// InitData is the body of its init-data, with which it was started.
	InitData string
	// Additional is the evidence of its further devices: JSON in a string.
	Additional string
	SNP        simulate.SNPOptions
}

// JWK is the guest's tee-pubkey.
func (g *KBSGuest) JWK() jose.JSONWebKey {
	k := jose.JSONWebKey{Key: g.Key.Public(), Algorithm: string(jose.RSA_OAEP_256)}
	if _, ok := g.Key.(*ecdsa.PrivateKey); ok {
		k.Algorithm = string(jose.ECDH_ES_A256KW)
	}
	return k
}

// ReportData is what its report speaks of: SHA-384, and then zeros.
func (g *KBSGuest) ReportData(nonce string) (data [64]byte, err error) {
	b, err := plan.Canonical(map[string]any{"nonce": nonce, "tee-pubkey": g.JWK(), "additional-evidence": g.Additional})
	sum := sha512.Sum384(b)
	copy(data[:], sum[:])
	return data, err
}

// Attestation is what it posts to /kbs/v0/attest.
func (g *KBSGuest) Attestation(nonce string) (map[string]any, error) {
	data, err := g.ReportData(nonce)
	if err != nil {
		return nil, err
	}
	o := g.SNP
	if o.HostData == ([32]byte{}) {
		o.HostData = sha256.Sum256([]byte(g.InitData))
	}
	report, err := g.Chip.Report(data, o)
	if err != nil {
		return nil, err
	}
	vcek, ask, ark := g.Chip.Certificates()
	certs := []any{}
	for _, c := range []struct {
		kind string
		der  []byte
	}{{"VCEK", vcek}, {"ASK", ask}, {"ARK", ark}} {
		certs = append(certs, map[string]any{"cert_type": c.kind, "data": Octets(c.der)})
	}
	certs = append(certs, map[string]any{"cert_type": map[string]string{"OTHER": "00000000-0000-0000-0000-000000000001"}, "data": []int{1}})
	return map[string]any{
		"init-data":    map[string]string{"format": "toml", "body": g.InitData},
		"runtime-data": map[string]any{"nonce": nonce, "tee-pubkey": g.JWK()},
		"tee-evidence": map[string]any{
			"primary_evidence":    map[string]any{"attestation_report": SEVReport(report), "cert_chain": certs},
			"additional_evidence": g.Additional,
		},
	}, nil
}

// KBSRequest is what a broker asks a verifier about an attestation.
func KBSRequest(audience, session, tee, nonce string, attestation map[string]any) ([]byte, error) {
	r := map[string]any{"audience": audience, "session": session, "tee": tee, "nonce": nonce}
	for k, v := range attestation {
		r[k] = v
	}
	return json.Marshal(r)
}

// Octets are bytes as serde writes them.
func Octets(b []byte) []int {
	out := make([]int, len(b))
	for i, v := range b {
		out[i] = int(v)
	}
	return out
}

// SEVReport takes a report apart as the Rust crate sev does (version 6,
// AttestationReport::from_bytes), and names its parts as serde does.
func SEVReport(b []byte) map[string]any {
	le := binary.LittleEndian
	version := le.Uint32(b)
	turin := version >= 3 && b[0x188] == 0x1A
	tcb := func(at int) map[string]any {
		if turin {
			return map[string]any{"fmc": b[at], "bootloader": b[at+1], "tee": b[at+2], "snp": b[at+3], "microcode": b[at+7]}
		}
		return map[string]any{"fmc": nil, "bootloader": b[at], "tee": b[at+1], "snp": b[at+6], "microcode": b[at+7]}
	}
	firmware := func(at int) map[string]any {
		return map[string]any{"build": b[at], "minor": b[at+1], "major": b[at+2]}
	}
	r := map[string]any{
		"version": version, "guest_svn": le.Uint32(b[4:]), "policy": le.Uint64(b[8:]), "family_id": Octets(b[0x10:0x20]), "image_id": Octets(b[0x20:0x30]),
		"vmpl": le.Uint32(b[0x30:]), "sig_algo": le.Uint32(b[0x34:]), "current_tcb": tcb(0x38), "plat_info": le.Uint64(b[0x40:]), "key_info": le.Uint32(b[0x48:]),
		"report_data": Octets(b[0x50:0x90]), "measurement": Octets(b[0x90:0xC0]), "host_data": Octets(b[0xC0:0xE0]), "id_key_digest": Octets(b[0xE0:0x110]),
		"author_key_digest": Octets(b[0x110:0x140]), "report_id": Octets(b[0x140:0x160]), "report_id_ma": Octets(b[0x160:0x180]), "reported_tcb": tcb(0x180),
		"cpuid_fam_id": nil, "cpuid_mod_id": nil, "cpuid_step": nil, "chip_id": Octets(b[0x1A0:0x1E0]), "committed_tcb": tcb(0x1E0),
		"current": firmware(0x1E8), "committed": firmware(0x1EC), "launch_tcb": tcb(0x1F0), "launch_mit_vector": nil, "current_mit_vector": nil,
		"signature": map[string]any{"r": Octets(b[0x2A0:0x2E8]), "s": Octets(b[0x2E8:0x330])},
	}
	if version >= 3 {
		r["cpuid_fam_id"], r["cpuid_mod_id"], r["cpuid_step"] = b[0x188], b[0x189], b[0x18A]
	}
	if version >= 5 {
		r["launch_mit_vector"], r["current_mit_vector"] = le.Uint64(b[0x1F8:]), le.Uint64(b[0x200:])
	}
	return r
}
