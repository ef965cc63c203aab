package vtpm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

const (
	// maxPublic bounds TPMT_PUBLIC: an RSA-4096 key needs under 600 bytes.
	maxPublic = 1 << 10
	// maxAttest bounds TPMS_ATTEST and TPMT_SIGNATURE.
	maxAttest = 2 << 10
)

// decode reads one TPM structure that fills b exactly. tpm2.Unmarshal leaves
// trailing bytes alone and reads a missing length as zero, so the value must
// also encode to b again.
func decode[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](b []byte, limit int) (_ *T, err error) {
	if len(b) == 0 {
		return nil, errors.New("nothing there")
	}
	if len(b) > limit {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(b), limit)
	}
	// tpm2.Marshal panics on a union whose selector it does not know.
	defer func() {
		if r := recover(); r != nil {
			err = errors.New("not a TPM structure of this kind")
		}
	}()
	v, err := tpm2.Unmarshal[T, P](b)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(P(v)), b) {
		return nil, errors.New("not in the TPM's own encoding, or bytes follow it")
	}
	return v, nil
}
