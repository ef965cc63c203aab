package boot

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"unicode/utf16"
)

// Types of events (TCG PC Client Platform Firmware Profile, section 10.4.1).
const (
	evNoAction    = 0x00000003
	evSeparator   = 0x00000004
	evCRTMVersion = 0x00000008
	evIPL         = 0x0000000d
	evVariable    = 0x80000001
	evBootApp     = 0x80000003
	evAuthority   = 0x800000e0
)

// GUIDs of the variables that Secure Boot reads (UEFI 2.10, sections 3.3 and 32.6).
const (
	guidGlobal   = "\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c"
	guidDatabase = "\xcb\xb2\x19\xd7\x3a\x3d\x96\x45\xa3\xbc\xda\xd0\x0e\x67\x65\x6f"
)

// CommandLine is that of the emulated machine's kernel.
const CommandLine = "/vmlinuz root=/dev/vda2 ro simulated"

// event is one entry of a firmware's log.
type event struct {
	pcr, kind uint32
	data      []byte
	// measured is what the digest is of; nil means data.
	measured []byte
}

// Log is the firmware's log of the emulated machine, the same for all: firmware
// with Secure Boot on, GRUB, a kernel and an initrd. Each thing in it that has
// content has the word simulated.
func Log() []byte {
	keys := []byte("coffer simulated key, which signs no boot loader that there is")
	separators := []event{}
	for pcr := range uint32(7) {
		separators = append(separators, event{pcr: pcr, kind: evSeparator, data: make([]byte, 4)})
	}
	return encode(slices.Concat(
		[]event{{pcr: 0, kind: evCRTMVersion, data: wide("coffer simulated firmware 1\x00")}, {pcr: 1, kind: evVariable, data: variable(guidGlobal, "BootOrder", []byte{0, 0})}},
		[]event{
			{pcr: 7, kind: evVariable, data: variable(guidGlobal, "SecureBoot", []byte{1})}, {pcr: 7, kind: evVariable, data: variable(guidGlobal, "PK", keys)},
			{pcr: 7, kind: evVariable, data: variable(guidGlobal, "KEK", keys)}, {pcr: 7, kind: evVariable, data: variable(guidDatabase, "db", keys)},
			{pcr: 7, kind: evVariable, data: variable(guidDatabase, "dbx", keys)}, {pcr: 7, kind: evSeparator, data: make([]byte, 4)},
			{pcr: 7, kind: evAuthority, data: variable(guidDatabase, "db", keys)},
		},
		separators,
		[]event{
			{pcr: 4, kind: evBootApp, data: []byte("simulated: \\EFI\\BOOT\\GRUBX64.EFI"), measured: []byte("coffer simulated boot loader")},
			{pcr: 8, kind: evIPL, data: []byte("grub_cmd: linux " + CommandLine + "\x00"), measured: []byte("linux " + CommandLine)},
			{pcr: 8, kind: evIPL, data: []byte("grub_cmd: initrd /initrd.img\x00"), measured: []byte("initrd /initrd.img")},
			{pcr: 8, kind: evIPL, data: []byte("kernel_cmdline: " + CommandLine + "\x00"), measured: []byte(CommandLine)},
			{pcr: 9, kind: evIPL, data: []byte("/vmlinuz\x00"), measured: []byte("coffer simulated kernel")},
			{pcr: 9, kind: evIPL, data: []byte("/initrd.img\x00"), measured: []byte("coffer simulated initrd")},
			{pcr: 11, kind: evIPL, data: []byte("simulated: enter-initrd\x00"), measured: []byte("enter-initrd")},
		},
	))
}

func wide(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// variable is UEFI_VARIABLE_DATA: what measures an EFI variable.
func variable(guid, name string, value []byte) []byte {
	text := wide(name)
	b := binary.LittleEndian.AppendUint64([]byte(guid), uint64(len(text)/2))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	return slices.Concat(b, text, value)
}

// encode writes a log in the crypto agile format with a SHA-256 bank (section 10.2).
func encode(events []event) []byte {
	le := binary.LittleEndian
	spec := slices.Concat([]byte("Spec ID Event03\x00"), []byte{0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0})
	b := make([]byte, 32)
	le.PutUint32(b[4:], evNoAction)
	le.PutUint32(b[28:], uint32(len(spec))) //nolint:gosec // 33
	b = append(b, spec...)
	for _, e := range events {
		of := e.measured
		if of == nil {
			of = e.data
		}
		sum := sha256.Sum256(of)
		b = le.AppendUint32(b, e.pcr)
		b = le.AppendUint32(b, e.kind)
		b = append(le.AppendUint32(b, 1), 0x0b, 0)
		b = append(b, sum[:]...)
		b = append(le.AppendUint32(b, uint32(len(e.data))), e.data...) //nolint:gosec // a few hundred bytes
	}
	return b
}
