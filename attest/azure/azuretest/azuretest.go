// Package azuretest writes the reports of Azure's paravisor, for tests: its
// caller can forge every field, which the paravisor would not do.
package azuretest

import (
	"crypto/rsa"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
)

// Claims returns runtime claims that name ak.
func Claims(ak *rsa.PublicKey) ([]byte, error) {
	n := base64.RawURLEncoding.EncodeToString(ak.N.FillBytes(make([]byte, ak.Size())))
	type object = map[string]any
	return json.Marshal(object{
		"keys": []object{
			{"kid": "HCLAkPub", "key_ops": []string{"sign"}, "kty": "RSA", "e": "AQAB", "n": n},
			{"kid": "HCLEkPub", "key_ops": []string{"encrypt"}, "kty": "RSA", "e": "AQAB", "n": n},
		},
		"vm-configuration": object{"console-enabled": true, "secure-boot": true, "tpm-enabled": true, "vmUniqueId": "simulated"},
		"user-data":        "00",
	})
}

// Report returns the report of a paravisor around an SEV-SNP report of 1184
// bytes.
func Report(snp, claims []byte) []byte {
	le := binary.LittleEndian
	b := append([]byte("HCLA"), make([]byte, 28)...)
	le.PutUint32(b[4:], 2)
	le.PutUint32(b[8:], uint32(32+1184+20+len(claims))) //nolint:gosec // some kilobytes
	le.PutUint32(b[12:], 2)
	b = append(b, snp...)
	for _, v := range []int{20 + len(claims), 1, 2, 1, len(claims)} {
		b = le.AppendUint32(b, uint32(v)) //nolint:gosec // some kilobytes
	}
	b = append(b, claims...)
	return append(b, make([]byte, max(0, 2600-len(b)))...)
}
