package nvgpu_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
)

func TestMutations(t *testing.T) {
	v := simulation(t)
	ev := evidence(t, v.GPUs()[0], simulate.GPUOptions{})
	at := time.Now()
	mutatetest.Run(t, mutatetest.Target{
		Kind: "H100 report", Good: ev.Report, Lengths: reportLengths(ev.Report), MaxAlloc: 1 << 20,
		Accepts: func(b []byte) bool {
			ev, want := ev, nvgpu.Want{Nonce: nonce}
			ev.Report = b
			// What a flip changes in what is compared is granted: the signature is left.
			if r, err := nvgpu.Parse(b); err == nil {
				ev.DriverVersion, ev.VBIOSVersion, want.Nonce = r.DriverVersion, r.VBIOSVersion, r.Nonce
			}
			return nvgpu.Appraise(ev, want, v.Anchors(), at).Genuine()
		},
	})
}

// reportLengths are the length fields and counts of a report: of blocks, of the
// record and of each block and its value, of the opaque data and of each field.
func reportLengths(b []byte) []mutatetest.Length {
	const record = 45
	out := []mutatetest.Length{{At: 41, Size: 1}, {At: 42, Size: 3}}
	end := record + (int(b[42]) | int(b[43])<<8 | int(b[44])<<16)
	for at := record; at < end; at += 55 {
		out = append(out, mutatetest.Length{At: at + 2, Size: 2}, mutatetest.Length{At: at + 5, Size: 2})
	}
	opaque := end + 32
	out = append(out, mutatetest.Length{At: opaque, Size: 2})
	n := int(binary.LittleEndian.Uint16(b[opaque:]))
	for at := opaque + 2; at < opaque+2+n; at += 4 + int(binary.LittleEndian.Uint16(b[at+2:])) {
		out = append(out, mutatetest.Length{At: at + 2, Size: 2})
	}
	return out
}

// A manifest takes milliseconds to look at, and most of it is hex.
func TestMutationsOfAManifest(t *testing.T) {
	v := simulation(t)
	good, err := v.DriverRIM(simulate.RIMOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mutatetest.Run(t, mutatetest.Target{
		Kind: "manifest", Good: good, MaxAlloc: 16 << 20, Every: 8*len(good)/400 | 1,
		// Whitespace of base64 says nothing.
		Free:    func(bit int) bool { return good[bit/8] == '\n' || good[bit/8] == ' ' },
		Accepts: func(b []byte) bool { return nvgpu.VerifyRIM(b, v.Anchors()) == nil },
	})
}
