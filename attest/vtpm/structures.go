package vtpm

import (
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
)

// What comes with every appraisal is read here, field by field, rather than by the
// library, whose reflection takes as long as the signature. FuzzStructures holds
// the two against each other.

// quoted is TPMS_ATTEST of a quote (TPM 2.0 Part 2, sections 10.12.12 and 10.12.4),
// without its magic and the qualified name of the signing key.
type quoted struct {
	extraData []byte
	// clock is in milliseconds.
	clock                    uint64
	resetCount, restartCount uint32
	clockSafe                bool
	firmwareVersion          uint64
	selections               []selection
	pcrDigest                []byte
}

// selection is TPMS_PCR_SELECTION (section 10.6.2): bit i of octet n selects PCR 8n+i.
type selection struct {
	hash   tpm2.TPMAlgID
	octets []byte
}

var errTruncated = errors.New("truncated")

// readQuote reads TPMS_ATTEST of a quote that fills b exactly.
func readQuote(b []byte) (*quoted, error) {
	if len(b) > maxAttest {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(b), maxAttest)
	}
	s := cryptobyte.String(b)
	var q quoted
	var magic, count uint32
	var kind uint16
	var safe uint8
	var signer, extra, digest cryptobyte.String
	if !s.ReadUint32(&magic) || !s.ReadUint16(&kind) || !s.ReadUint16LengthPrefixed(&signer) || !s.ReadUint16LengthPrefixed(&extra) ||
		!s.ReadUint64(&q.clock) || !s.ReadUint32(&q.resetCount) || !s.ReadUint32(&q.restartCount) || !s.ReadUint8(&safe) ||
		!s.ReadUint64(&q.firmwareVersion) || !s.ReadUint32(&count) {
		return nil, errTruncated
	}
	switch {
	case magic != tpmGenerated || kind != tpmSTQuote:
		return nil, errors.New("not TPMS_ATTEST of a quote")
	case safe > 1:
		return nil, fmt.Errorf("TPMI_YES_NO is %d", safe)
	}
	// A count that is a lie ends where the bytes do.
	for range count {
		var bk selection
		var hash uint16
		var octets cryptobyte.String
		if !s.ReadUint16(&hash) || !s.ReadUint8LengthPrefixed(&octets) {
			return nil, errTruncated
		}
		bk.hash, bk.octets = tpm2.TPMAlgID(hash), octets
		q.selections = append(q.selections, bk)
	}
	if !s.ReadUint16LengthPrefixed(&digest) {
		return nil, errTruncated
	}
	if !s.Empty() {
		return nil, fmt.Errorf("%d bytes follow it", len(s))
	}
	q.extraData, q.clockSafe, q.pcrDigest = extra, safe == 1, digest
	return &q, nil
}

// signature is TPMT_SIGNATURE (section 11.3.4) of one of the schemes in which
// attestation keys sign.
type signature struct {
	scheme, hash tpm2.TPMAlgID
	// r and s are of ECDSA, rsa of the others.
	r, s *big.Int
	rsa  []byte
}

// readSignature reads TPMT_SIGNATURE that fills b exactly.
func readSignature(b []byte) (*signature, error) {
	if len(b) > maxAttest {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(b), maxAttest)
	}
	in := cryptobyte.String(b)
	var scheme, hash uint16
	if !in.ReadUint16(&scheme) || !in.ReadUint16(&hash) {
		return nil, errTruncated
	}
	out := &signature{scheme: tpm2.TPMAlgID(scheme), hash: tpm2.TPMAlgID(hash)}
	var first, second cryptobyte.String
	switch out.scheme {
	case tpm2.TPMAlgECDSA:
		if !in.ReadUint16LengthPrefixed(&first) || !in.ReadUint16LengthPrefixed(&second) {
			return nil, errTruncated
		}
		out.r, out.s = new(big.Int).SetBytes(first), new(big.Int).SetBytes(second)
	case tpm2.TPMAlgRSASSA, tpm2.TPMAlgRSAPSS:
		if !in.ReadUint16LengthPrefixed(&first) {
			return nil, errTruncated
		}
		out.rsa = first
	default:
		return nil, fmt.Errorf("scheme %#x is none of ECDSA, RSASSA and RSAPSS", scheme)
	}
	if !in.Empty() {
		return nil, fmt.Errorf("%d bytes follow it", len(in))
	}
	return out, nil
}
