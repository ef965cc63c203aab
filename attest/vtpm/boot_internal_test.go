package vtpm

import (
	"crypto/sha256"
	"testing"
)

// What is read from PCRs 7 and 8 is read from events of any form.
func FuzzBoot(f *testing.F) {
	f.Add(uint32(evEFIVariableConfig), []byte("variable"), uint32(evIPL), []byte("kernel_cmdline: /vmlinuz\x00"))
	f.Fuzz(func(_ *testing.T, t1 uint32, d1 []byte, t2 uint32, d2 []byte) {
		a, b := TCGEvent{PCR: 7, Type: t1, Data: d1}, TCGEvent{PCR: 8, Type: t2, Data: d2}
		for _, e := range []*TCGEvent{&a, &b} {
			e.Digest = sha256.Sum256(e.Data)
		}
		_, _ = secureBoot([]TCGEvent{a, b})
		_, _ = commandLine([]TCGEvent{b, a})
		_, _, _ = efiVariable(d1)
	})
}
