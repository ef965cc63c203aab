package verifier

import (
	"bytes"
	"crypto/hpke"
	"testing"
)

// The library has the last word where the key is used. This check may neither
// refuse what it takes nor let through what it refuses.
func TestRecipientKeysAreThoseOfTheLibrary(t *testing.T) {
	k, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	good := k.PublicKey().Bytes()
	same := func(what string, b []byte) {
		t.Helper()
		_, err := hpke.MLKEM768X25519().NewPublicKey(b)
		if got := checkRecipient(b); (got == nil) != (err == nil) {
			t.Fatalf("%s: %v, and the library says %v", what, got, err)
		}
	}
	same("a key", good)
	for _, b := range [][]byte{nil, good[:len(good)-1], append(bytes.Clone(good), 0), make([]byte, len(good)), bytes.Repeat([]byte{0xff}, len(good))} {
		same("another length or filling", b)
	}
	refused := 0
	for i := range 2 * mlkemVector / 3 {
		for _, n := range []int{mlkemPrime - 1, mlkemPrime, 4095} {
			b := bytes.Clone(good)
			if three := b[i/2*3:]; i%2 == 0 {
				three[0], three[1] = byte(n), three[1]&0xf0|byte(n>>8)
			} else {
				three[1], three[2] = three[1]&0xf|byte(n<<4), byte(n>>4)
			}
			if n < mlkemPrime != (checkRecipient(b) == nil) {
				t.Fatalf("number %d is %d: %v", i, n, checkRecipient(b))
			}
			if i%64 == 0 || i == 2*mlkemVector/3-1 {
				same("a number changed", b)
			}
			if n >= mlkemPrime {
				refused++
			}
		}
	}
	if refused != 2*768 {
		t.Errorf("%d keys were to be refused, want two for each of 768 numbers", refused)
	}
	// Seed and curve have no form.
	for _, at := range []int{mlkemVector, recipientKey - 1} {
		b := bytes.Clone(good)
		b[at] ^= 0xff
		same("seed or curve changed", b)
	}
}

func FuzzRecipient(f *testing.F) {
	k, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(k.PublicKey().Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := hpke.MLKEM768X25519().NewPublicKey(b); (checkRecipient(b) == nil) != (err == nil) {
			t.Fatal(checkRecipient(b), err)
		}
	})
}
