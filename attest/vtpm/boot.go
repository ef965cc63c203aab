package vtpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
)

// What is read here comes from a log that replayed. That vouches for digests
// and their order within one PCR, and for neither event types nor the order
// across PCRs, so that a reader must account for every event of the PCR and
// believe only what was itself measured.

// EFI_GLOBAL_VARIABLE and EFI_IMAGE_SECURITY_DATABASE_GUID, UEFI 2.10, sections
// 3.3 and 32.6.
const (
	guidGlobal   = "\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c"
	guidDatabase = "\xcb\xb2\x19\xd7\x3a\x3d\x96\x45\xa3\xbc\xda\xd0\x0e\x67\x65\x6f"
)

// The shortest EFI_SIGNATURE_LIST that lists something.
const minSignatureList = 28 + 16

// secureBoot reads from PCR 7 whether Secure Boot was on (TCG PC Client Platform
// Firmware Profile, section 3.3.4.8). An error means that it cannot be told.
func secureBoot(events []TCGEvent) (bool, error) {
	vars := map[string][]byte{}
	separated, used := false, false
	for i, e := range events {
		switch e.Type {
		case evSeparator:
			if separated || !bytes.Equal(e.Data, make([]byte, 4)) || !e.measures(e.Data) {
				return false, fmt.Errorf("event %d: a second separator, or one of an error", i)
			}
			separated = true
		case evEFIAction:
			if string(e.Data) != "DMA Protection Disabled" || !e.measures(e.Data) {
				return false, fmt.Errorf("event %d: a debugger, or an action that is not known", i)
			}
		case evEFIVariableConfig:
			if separated {
				return false, fmt.Errorf("event %d: a variable after the separator", i)
			}
			if !e.measures(e.Data) {
				return false, fmt.Errorf("event %d: a variable that is not what was measured", i)
			}
			name, value, err := efiVariable(e.Data)
			if err != nil {
				return false, fmt.Errorf("event %d: %w", i, err)
			}
			if _, twice := vars[name]; twice {
				return false, fmt.Errorf("event %d: a variable for the second time", i)
			}
			vars[name] = value
		case evEFIVariableAuthority:
			// Some versions of shim log one byte more than they measure.
			if !e.measures(e.Data) && (len(e.Data) == 0 || !e.measures(e.Data[:len(e.Data)-1])) {
				return false, fmt.Errorf("event %d: an authority that is not what was measured", i)
			}
			used = used || separated
		default:
			return false, fmt.Errorf("event %d: type %#x does not belong into PCR 7", i, e.Type)
		}
	}
	state, ok := vars[guidGlobal+"SecureBoot"]
	switch {
	case !separated:
		return false, errors.New("no separator")
	case !ok || len(state) != 1 || state[0] > 1:
		return false, errors.New("no variable SecureBoot of 0 or 1")
	case state[0] == 0:
		return false, nil
	case !used:
		return false, errors.New("it was on, and no key was used")
	}
	for what, name := range map[string]string{"platform key": guidGlobal + "PK", "key exchange keys": guidGlobal + "KEK", "signature database": guidDatabase + "db"} {
		if len(vars[name]) < minSignatureList {
			return false, fmt.Errorf("it was on, and there is no %s", what)
		}
	}
	return true, nil
}

// efiVariable reads UEFI_VARIABLE_DATA: vendor GUID, length of the name in UTF-16
// units, length of the value, name, value. The GUID comes first in the name
// returned.
func efiVariable(b []byte) (name string, value []byte, err error) {
	if len(b) < 32 {
		return "", nil, errors.New("not an EFI variable")
	}
	units, size, rest := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:]), b[32:]
	if units > 1024 || size > MaxTCGLog || 2*units+size != uint64(len(rest)) {
		return "", nil, errors.New("an EFI variable of another length than it says")
	}
	text := make([]uint16, units)
	for i := range text {
		text[i] = binary.LittleEndian.Uint16(rest[2*i:])
	}
	return string(b[:16]) + string(utf16.Decode(text)), rest[2*units:], nil
}

// maxCommandLine is that of Linux on x86.
const maxCommandLine = 2048

// grubPrefixes is how GRUB names what it measures into PCR 8, in the event alone
// and not in the digest. The older ones are Fedora's.
func grubPrefixes() (commandLine, other []string) {
	return []string{"kernel_cmdline: ", "grub_kernel_cmdline "}, []string{"grub_cmd: ", "module_cmdline: ", "grub_cmd "}
}

// commandLine reads from PCR 8 the command line that GRUB gave to the kernel.
//
// As GRUB does not measure the name of what it measures, whoever runs in the
// guest could extend PCR 8 once more with a command line of choice, and log the
// true one as a command. A command that looks like a command line is therefore
// an error: GRUB's begin with a word, and a command line with a path.
func commandLine(events []TCGEvent) (string, error) {
	lines, others := grubPrefixes()
	found := []string{}
	for i, e := range events {
		if e.Type != evIPL {
			return "", fmt.Errorf("event %d: type %#x is not GRUB's", i, e.Type)
		}
		has := func(p string) bool { return bytes.HasPrefix(e.Data, []byte(p)) }
		line, other := slices.IndexFunc(lines, has), slices.IndexFunc(others, has)
		var text []byte
		switch {
		case line >= 0:
			text = e.Data[len(lines[line]):]
		case other >= 0:
			text = e.Data[len(others[other]):]
		default:
			return "", fmt.Errorf("event %d: not one of GRUB's", i)
		}
		// Measured without the terminator, by older versions of GRUB with it.
		bare := bytes.TrimSuffix(text, []byte{0})
		if !e.measures(bare) && !e.measures(text) {
			return "", fmt.Errorf("event %d: not what was measured", i)
		}
		switch s := string(bare); {
		case line >= 0 && (len(s) > maxCommandLine || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })):
			return "", fmt.Errorf("event %d: a command line of no printable form", i)
		case line >= 0:
			found = append(found, s)
		case strings.HasPrefix(s, "/") || strings.HasPrefix(s, "("):
			return "", fmt.Errorf("event %d: a command that looks like a command line", i)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%d command lines", len(found))
	}
	return found[0], nil
}
