package vtpmtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"unicode/utf16"
)

// Event types of the TCG PC Client Platform Firmware Profile, section 10.4.1.
const (
	NoAction  = 0x00000003
	Separator = 0x00000004
	IPL       = 0x0000000d
	Variable  = 0x80000001
	Action    = 0x80000007
	Authority = 0x800000e0
)

// FirmwareEvent is an event of a made-up firmware log.
type FirmwareEvent struct {
	PCR  uint32
	Type uint32
	Data []byte
	// Measured is what the digest is of; nil means Data.
	Measured []byte
}

// Digest is what the PCR is extended with; zero of an event that extends none.
func (e FirmwareEvent) Digest() [sha256.Size]byte {
	switch {
	case e.Type == NoAction:
		return [sha256.Size]byte{}
	case e.Measured != nil:
		return sha256.Sum256(e.Measured)
	default:
		return sha256.Sum256(e.Data)
	}
}

// FirmwareLog writes a log in the crypto agile format with a SHA-256 bank.
func FirmwareLog(events ...FirmwareEvent) []byte {
	le := binary.LittleEndian
	spec := slices.Concat([]byte("Spec ID Event03\x00"), []byte{0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0}, []byte{0x0b, 0, 32, 0}, []byte{0})
	b := make([]byte, 32)
	le.PutUint32(b[4:], NoAction)
	le.PutUint32(b[28:], uint32(len(spec))) //nolint:gosec // 33
	b = append(b, spec...)
	for _, e := range events {
		sum := e.Digest()
		b = le.AppendUint32(b, e.PCR)
		b = le.AppendUint32(b, e.Type)
		b = append(le.AppendUint32(b, 1), 0x0b, 0)
		b = append(b, sum[:]...)
		b = append(le.AppendUint32(b, uint32(len(e.Data))), e.Data...) //nolint:gosec // a test's
	}
	return b
}

// GUIDs of the variables that Secure Boot reads (UEFI 2.10, sections 3.3 and 32.6).
const (
	GUIDGlobal   = "\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c"
	GUIDDatabase = "\xcb\xb2\x19\xd7\x3a\x3d\x96\x45\xa3\xbc\xda\xd0\x0e\x67\x65\x6f"
)

// VariableEvent measures an EFI variable into PCR 7.
func VariableEvent(guid, name string, value []byte) FirmwareEvent {
	b := []byte(guid)
	units := utf16.Encode([]rune(name))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(units)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	for _, u := range units {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return FirmwareEvent{PCR: 7, Type: Variable, Data: append(b, value...)}
}

// SeparatorEvent ends the firmware's part of a PCR.
func SeparatorEvent(pcr uint32) FirmwareEvent {
	return FirmwareEvent{PCR: pcr, Type: Separator, Data: make([]byte, 4)}
}

// GRUBEvent measures text into PCR 8, and logs it with GRUB's name for its kind.
func GRUBEvent(prefix, text string) FirmwareEvent {
	return FirmwareEvent{PCR: 8, Type: IPL, Data: []byte(prefix + text + "\x00"), Measured: []byte(text)}
}

// SecureBootEvents are those of PCR 7 of a machine on which Secure Boot is on.
func SecureBootEvents() []FirmwareEvent {
	keys := make([]byte, 100)
	return []FirmwareEvent{
		VariableEvent(GUIDGlobal, "SecureBoot", []byte{1}), VariableEvent(GUIDGlobal, "PK", keys), VariableEvent(GUIDGlobal, "KEK", keys),
		VariableEvent(GUIDDatabase, "db", keys), VariableEvent(GUIDDatabase, "dbx", keys), SeparatorEvent(7),
		{PCR: 7, Type: Authority, Data: VariableEvent(GUIDDatabase, "db", keys).Data},
	}
}

// BootEvents are those of a machine with Secure Boot, shim and GRUB. Shim
// measures its lists of keys into PCR 14.
func BootEvents() []FirmwareEvent {
	return slices.Concat([]FirmwareEvent{{PCR: 0, Type: 8, Data: []byte("firmware 1")}, SeparatorEvent(0)},
		SecureBootEvents(), []FirmwareEvent{
			GRUBEvent("grub_cmd: ", "linux /vmlinuz root=/dev/sda1"), GRUBEvent("kernel_cmdline: ", "/vmlinuz root=/dev/sda1"),
			{PCR: 9, Type: IPL, Data: []byte("/vmlinuz\x00"), Measured: []byte("the kernel")},
			{PCR: 14, Type: IPL, Data: []byte("MokList\x00"), Measured: []byte("the list")},
		})
}

// StartupLocality is the event of a TPM that was started from a locality other
// than 0, which is the first of its log.
func StartupLocality(locality byte) FirmwareEvent {
	return FirmwareEvent{Type: NoAction, Data: append(bytes.Clone([]byte("StartupLocality\x00")), locality)}
}
