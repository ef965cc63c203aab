package endorse

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/crypto/ocsp"
)

// MaxFile bounds a file that Recognize reads, in bytes: a manifest in the
// service's answer, in base64.
const MaxFile = 1 << 20

// Recognize finds the endorsements in a file as vendors, tools and people hand
// them out: certificates, chains and revocation lists in DER or PEM, OCSP
// answers, manifests in XML or in the JSON of NVIDIA's service. The name matters
// for manifests in XML, whose id it must be, and for revocation lists: one is about
// the issuers of VLEKs if its path has the word, as at AMD's service
// ("vlek/v1/Milan/crl"). Anything else in the file is an error.
func Recognize(name string, b []byte) ([]Item, error) {
	if len(b) > MaxFile {
		return nil, fmt.Errorf("more than %d bytes", MaxFile)
	}
	switch trimmed := bytes.TrimSpace(b); {
	case len(trimmed) == 0:
		return nil, errors.New("the file is empty")
	case trimmed[0] == '{':
		id, xml, err := UnwrapRIM(trimmed)
		if err != nil {
			return nil, err
		}
		if id == "" {
			id = manifestID(name)
		}
		return one(Parse(RIM, id, xml))
	case trimmed[0] == '<':
		return one(Parse(RIM, manifestID(name), b))
	case bytes.HasPrefix(trimmed, []byte("-----BEGIN ")):
		return recognizePEM(name, trimmed)
	}
	return recognizeDER(name, b)
}

// list reads a revocation list from a file of that name.
func list(name string, b []byte) (Item, error) {
	if strings.Contains(strings.ToLower(name), "vlek") {
		return vlekList(b)
	}
	return Parse(CRL, "", b)
}

func one(i Item, err error) ([]Item, error) {
	if err != nil {
		return nil, err
	}
	return []Item{i}, nil
}

// manifestID reads a manifest's id from the name of its file.
func manifestID(name string) string {
	base := path.Base(name)
	for _, ext := range []string{".xml", ".json", ".swidtag"} {
		base = strings.TrimSuffix(base, ext)
	}
	return base
}

// UnwrapRIM returns the manifest in an answer of NVIDIA's service, and the id
// that the answer states, if any.
func UnwrapRIM(b []byte) (id string, xml []byte, err error) {
	// The service adds fields now and then: only these matter.
	var answer struct {
		ID  string `json:"id"`
		RIM string `json:"rim"`
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		return "", nil, fmt.Errorf("manifest service's answer: %w", err)
	}
	if answer.RIM == "" {
		return "", nil, errors.New("the manifest service's answer has no manifest")
	}
	if xml, err = base64.StdEncoding.DecodeString(answer.RIM); err != nil {
		return "", nil, fmt.Errorf("manifest service's answer: %w", err)
	}
	return answer.ID, xml, nil
}

func recognizePEM(name string, b []byte) ([]Item, error) {
	var out []Item
	var certs []*x509.Certificate
	for rest := b; len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("there is something beside the PEM blocks")
		}
		switch block.Type {
		case "CERTIFICATE":
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, err
			}
			certs = append(certs, c)
		case "X509 CRL":
			i, err := list(name, block.Bytes)
			if err != nil {
				return nil, err
			}
			out = append(out, i)
		default:
			return nil, fmt.Errorf("PEM block %.40q is no endorsement", block.Type)
		}
	}
	// Signing keys stand by themselves; of the others, each issuer is followed
	// by its root.
	for n := 0; n < len(certs); n++ {
		c := certs[n]
		switch {
		case c.Subject.CommonName == "SEV-VCEK" || c.Subject.CommonName == "SEV-VLEK":
			i, err := Parse(VEK, "", c.Raw)
			if err != nil {
				return nil, err
			}
			out = append(out, i)
		case n+1 < len(certs):
			i, err := Parse(Chain, "", encodeChain(certs[n:n+2]))
			if err != nil {
				return nil, err
			}
			out = append(out, i)
			n++
		default:
			return nil, fmt.Errorf("the certificate of %.60q is no endorsement by itself", c.Subject.CommonName)
		}
	}
	return out, nil
}

func recognizeDER(name string, b []byte) ([]Item, error) {
	if _, err := x509.ParseCertificate(b); err == nil {
		return one(Parse(VEK, "", b))
	}
	if _, err := x509.ParseRevocationList(b); err == nil {
		return one(list(name, b))
	}
	if _, err := ocsp.ParseResponse(b, nil); err == nil {
		return one(Parse(OCSP, "", b))
	}
	return nil, errors.New("not a certificate, a revocation list, an OCSP answer or a manifest")
}
