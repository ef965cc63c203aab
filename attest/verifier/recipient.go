package verifier

import (
	"errors"
	"fmt"
)

// Sizes of a recipient key, in bytes: an encapsulation key of ML-KEM-768 (FIPS 203,
// table 3), whose vector comes before its seed, and a public key of X25519
// (draft-ietf-hpke-pq, section 4).
const (
	mlkemVector  = 1152
	recipientKey = mlkemVector + 32 + 32
	// mlkemPrime is the modulus q of ML-KEM.
	mlkemPrime = 3329
)

// checkRecipient makes the input checks of FIPS 203, section 7.2: length, and that
// each of the vector's numbers of 12 bits is below the modulus. Every X25519 key of
// its length is one. Whoever wraps to the key expands it besides, which the library
// does where it checks it, and which takes ten times as long.
func checkRecipient(b []byte) error {
	if len(b) != recipientKey {
		return fmt.Errorf("recipient key has %d bytes: want %d", len(b), recipientKey)
	}
	for v := b[:mlkemVector]; len(v) > 0; v = v[3:] {
		if int(v[0])|int(v[1]&0xf)<<8 >= mlkemPrime || int(v[1]>>4)|int(v[2])<<4 >= mlkemPrime {
			return errors.New("recipient key is not one of ML-KEM-768: a number in it is not reduced")
		}
	}
	return nil
}
