package vtpm_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// A key that was read before is a key that was read before. Whether a credential
// speaks for it now is asked each time.
func TestRememberedKeyIsNotTrustedForMore(t *testing.T) {
	s := newScene(t)
	genuine := bytes.Clone(s.ev.AKPublic)
	appraised := func(name string, now time.Time, id string) {
		t.Helper()
		for range 2 {
			r := vtpm.Appraise(s.ev, s.want, now)
			failed := false
			for _, c := range r.Checks.Failed() {
				failed = failed || c.ID == id
			}
			if failed != (id != "") || (id == "" && len(r.Checks.Failed()) > 0) {
				t.Errorf("%s: %v, want %q to fail", name, r.Checks.Failed(), id)
			}
		}
	}
	appraised("the honest evidence", s.now, "")
	appraised("an expired credential", s.now.Add(time.Hour), "tpm.ak-credential")
	token := s.ev.AKCredential
	s.credential(t, func(c *vtpm.Credential) { c.AKName = "000b" + vtpm.Digest{}.String() })
	appraised("a credential for another key", s.now, "tpm.ak-credential")
	s.ev.AKCredential = ""
	appraised("no credential", s.now, "tpm.ak-credential")
	s.ev.AKCredential = token
	keys := s.want.CredentialKeys
	s.want.CredentialKeys = keysOf(t, newSigner(t, "verifier"))
	appraised("a credential of a key that was withdrawn", s.now, "tpm.ak-credential")
	s.want.CredentialKeys = receipt.Keys{}
	appraised("a verifier without keys", s.now, "tpm.ak-credential")
	s.want.CredentialKeys = keys

	// The caller's bytes are the caller's to change.
	for i := range s.ev.AKPublic {
		s.ev.AKPublic[i] ^= 0xff
	}
	appraised("bytes that were the key's", s.now, "tpm.ak")
	s.ev.AKPublic = genuine
	appraised("the honest evidence again", s.now, "")

	// One that is of no use is of none the second time either.
	s.otherAK(t, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false })
	appraised("a key that signs anything", s.now, "tpm.ak")
}
