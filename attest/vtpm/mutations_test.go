package vtpm_test

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"testing"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// pinnedScene is a scene whose attestation key is pinned: no credential takes
// time.
func pinnedScene(t *testing.T) *scene {
	t.Helper()
	s := newScene(t)
	sum := sha256.Sum256(s.tpm.AKPublic)
	var err error
	if s.want.Anchors, err = anchor.Vendor().WithAKs(anchor.Discrete, "000b"+hex.EncodeToString(sum[:])); err != nil {
		t.Fatal(err)
	}
	s.ev.AKCredential = ""
	return s
}

func TestMutations(t *testing.T) {
	s := pinnedScene(t)
	s.boot(t, firmwareLog(bootEvents()...))
	big := func(at, size int) mutatetest.Length { return mutatetest.Length{At: at, Size: size, Big: true} }
	for _, part := range []struct {
		kind    string
		of      func(*vtpm.Evidence) *[]byte
		lengths []mutatetest.Length
	}{
		// TPMS_ATTEST: qualified signer, extra data, selections, octets of the
		// first, digest.
		{"TPM quote", func(e *vtpm.Evidence) *[]byte { return &e.Quote }, []mutatetest.Length{big(6, 2), big(42, 2), big(101, 4), big(107, 1), big(111, 2)}},
		// TPMT_SIGNATURE: r, s.
		{"TPM quote's signature", func(e *vtpm.Evidence) *[]byte { return &e.Signature }, []mutatetest.Length{big(4, 2), big(38, 2)}},
		// TPMT_PUBLIC: policy, x, y.
		{"TPM attestation key", func(e *vtpm.Evidence) *[]byte { return &e.AKPublic }, []mutatetest.Length{big(8, 2), big(20, 2), big(54, 2)}},
		{"agent's event log", func(e *vtpm.Evidence) *[]byte { return &e.EventLog }, nil},
	} {
		ev := s.ev
		mutatetest.Run(t, mutatetest.Target{
			Kind: part.kind, Good: *part.of(&ev), Lengths: part.lengths, MaxAlloc: 1 << 20,
			Accepts: func(b []byte) bool {
				ev := s.ev
				*part.of(&ev) = b
				return len(vtpm.Appraise(ev, s.want, s.now).Checks.Failed()) == 0
			},
		})
	}
}

// The digests in a firmware log are all that a PCR vouches for. What they do not
// cover may change, and must tell nothing else then.
func TestMutationsOfAFirmwareLog(t *testing.T) {
	s := pinnedScene(t)
	log := firmwareLog(bootEvents()...)
	s.boot(t, log)
	whole := vtpm.Appraise(s.ev, s.want, s.now).Claims
	lengths := []mutatetest.Length{{At: 28, Size: 4}, {At: 56, Size: 4}, {At: 62, Size: 2}, {At: 64, Size: 1}}
	covered := map[int]bool{}
	for at := 65; at < len(log); {
		lengths = append(lengths, mutatetest.Length{At: at + 8, Size: 4}, mutatetest.Length{At: at + 46, Size: 4})
		size := int(binary.LittleEndian.Uint32(log[at+46:]))
		if kind := binary.LittleEndian.Uint32(log[at+4:]); kind != evNoAction {
			for i := range 4 {
				covered[at+i], covered[at+8+i], covered[at+46+i] = true, true, true
			}
			for i := range 34 {
				covered[at+12+i] = true
			}
		}
		at += 50 + size
	}
	mutatetest.Run(t, mutatetest.Target{
		Kind: "firmware log", Good: log, Lengths: lengths, MaxAlloc: 1 << 20,
		Free: func(bit int) bool { return !covered[bit/8] },
		Accepts: func(b []byte) bool {
			ev := s.ev
			ev.TCGLog = b
			r := vtpm.Appraise(ev, s.want, s.now)
			if len(r.Checks.Failed()) > 0 || outcome(r.Checks, "tpm.tcg-log") != check.Pass {
				return false
			}
			for _, claim := range []string{"tpm.secure-boot", "tpm.kernel-command-line"} {
				if told, ok := r.Claims[claim]; ok && told != whole[claim] {
					t.Errorf("%s: told %v", claim, told)
				}
			}
			return true
		},
	})
}
