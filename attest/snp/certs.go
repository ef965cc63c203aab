package snp

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/coffer-run/coffer/attest/anchor"
)

const (
	maxTable       = 64 << 10
	maxEntries     = 16
	maxCertificate = 16 << 10
)

// GUIDs of the certificate table (GHCB specification, MSG_REPORT certificates),
// in the order of bytes in which tables carry them.
const (
	guidVCEK = "\x63\xda\x75\x8d\xe6\x64\x45\x64\xad\xc5\xf4\xb9\x3b\xe8\xac\xcd"
	guidVLEK = "\xa8\x07\x4b\xc2\xa2\x5a\x48\x3e\xaa\xe6\x39\xc0\x45\xa0\xb8\xa1"
	guidASK  = "\x4a\xb7\xb3\x79\xbb\xac\x4f\xe4\xa0\x2f\x05\xae\xf3\x27\xc7\x82"
	guidARK  = "\xc0\xb4\x06\xa4\xa8\x03\x49\x52\x97\x43\x3f\xb6\x01\x4c\xd0\xae"
	guidCRL  = "\x92\xf8\x1b\xc3\x58\x11\x4d\x3d\x97\xff\xd1\x9f\x88\xdc\x67\xea"
)

// parseTable reads a certificate table: entries of GUID, offset and length up
// to one of zeros, then what they point to. Entries of other GUIDs are left
// alone: the table is unsigned, and nothing follows from them.
func parseTable(b []byte) (map[string][]byte, error) {
	out := map[string][]byte{}
	if len(b) == 0 {
		return out, nil
	}
	if len(b) > maxTable {
		return nil, fmt.Errorf("certificate table has %d bytes, at most %d are allowed", len(b), maxTable)
	}
	for i := 0; ; i++ {
		if i > maxEntries || len(b) < (i+1)*24 {
			return nil, errors.New("certificate table has no end")
		}
		e := b[i*24 : (i+1)*24]
		if isZero(e) {
			return out, nil
		}
		// In 64 bits, so that the sum cannot wrap around.
		from, n := uint64(binary.LittleEndian.Uint32(e[16:])), uint64(binary.LittleEndian.Uint32(e[20:]))
		if from+n > uint64(len(b)) || n > maxCertificate {
			return nil, fmt.Errorf("certificate table entry %d points outside the table", i)
		}
		guid := string(e[:16])
		if _, twice := out[guid]; twice {
			return nil, fmt.Errorf("certificate table has two entries of GUID %x", guid)
		}
		out[guid] = b[from : from+n]
	}
}

// vek is what a VCEK or VLEK certificate says of its key.
type vek struct {
	key     *ecdsa.PublicKey
	product anchor.Product
	tcb     TCB
	hwid    []byte // VCEK
	csp     string // VLEK
}

// parseVEK reads the extensions that AMD's key distribution service puts into
// VCEK and VLEK certificates (document 57230, chapter 3).
func parseVEK(c *x509.Certificate, s Signer) (*vek, error) {
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve.Params().BitSize != 384 {
		return nil, fmt.Errorf("%s is not a P-384 key", s)
	}
	v := &vek{key: key}
	base := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}
	levels := map[int]uint8{}
	for _, e := range c.Extensions {
		if len(e.Id) <= len(base) || !e.Id[:len(base)].Equal(base) {
			continue
		}
		var err error
		switch rest := e.Id[len(base):]; {
		case len(rest) == 1 && rest[0] == 1:
			_, err = derUint8(e.Value) // the version of this structure; its content is the same
		case len(rest) == 1 && rest[0] == 2:
			v.product, err = productName(e.Value)
		case len(rest) == 2 && rest[0] == 3 && rest[1] >= 1 && rest[1] <= 9:
			levels[rest[1]], err = derUint8(e.Value)
		case len(rest) == 1 && rest[0] == 4:
			v.hwid, err = hwid(e.Value)
		case len(rest) == 1 && rest[0] == 5:
			v.csp, err = ia5(e.Value)
		default:
			err = errors.New("it is not known")
		}
		if err != nil {
			return nil, fmt.Errorf("%s extension %s: %w", s, e.Id, err)
		}
	}
	need := []int{1, 2, 3, 8}
	if v.product == anchor.Turin {
		need = append(need, 9)
	}
	for n, level := range levels {
		if !slices.Contains(need, n) && level != 0 {
			return nil, fmt.Errorf("%s has a level of %d for the reserved component %d", s, level, n)
		}
	}
	for _, n := range need {
		if _, ok := levels[n]; !ok {
			return nil, fmt.Errorf("%s has no level for component %d", s, n)
		}
	}
	v.tcb = TCB{FMC: levels[9], Bootloader: levels[1], TEE: levels[2], SNP: levels[3], Microcode: levels[8]}

	hwidSize := 64
	if v.product == anchor.Turin {
		hwidSize = 8
	}
	switch {
	case v.product == "":
		return nil, fmt.Errorf("%s names no product", s)
	case s == VCEK && (len(v.hwid) != hwidSize || v.csp != ""):
		return nil, fmt.Errorf("VCEK has a hardware id of %d bytes and cloud provider %q: want %d and none", len(v.hwid), v.csp, hwidSize)
	case s == VLEK && (v.hwid != nil || v.csp == ""):
		return nil, errors.New("VLEK has a hardware id or no cloud provider")
	}
	return v, nil
}

func productName(der []byte) (anchor.Product, error) {
	s, err := ia5(der)
	if err != nil {
		return "", err
	}
	// Some carry the stepping: "Milan-B0".
	name, _, _ := strings.Cut(s, "-")
	if p := anchor.Product(name); slices.Contains(anchor.Products(), p) {
		return p, nil
	}
	return "", fmt.Errorf("product %.40q is not supported", s)
}

func derUint8(der []byte) (uint8, error) {
	in := cryptobyte.String(der)
	var n uint8
	var wide uint64
	if !in.ReadASN1Integer(&wide) || !in.Empty() || wide > 255 {
		return 0, errors.New("want one INTEGER from 0 to 255")
	}
	n = uint8(wide)
	return n, nil
}

func ia5(der []byte) (string, error) {
	in := cryptobyte.String(der)
	var s cryptobyte.String
	if !in.ReadASN1(&s, cbasn1.IA5String) || !in.Empty() || len(s) > 256 {
		return "", errors.New("want one IA5String")
	}
	return string(s), nil
}

// hwid reads the chip's id, which stands in the extension with or without an
// OCTET STRING around it.
func hwid(b []byte) ([]byte, error) {
	if len(b) == 64 || len(b) == 8 {
		return b, nil
	}
	in := cryptobyte.String(b)
	var s cryptobyte.String
	if !in.ReadASN1(&s, cbasn1.OCTET_STRING) || !in.Empty() || len(s) != 64 && len(s) != 8 {
		return nil, errors.New("want 64 or 8 bytes")
	}
	return s, nil
}
