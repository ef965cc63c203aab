package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"testing"
)

// newELF returns the smallest file that debug/elf reads as a dynamic program: perhaps an interpreter, libraries and a library path.
func newELF(t *testing.T, interpreter, runpath string, needed ...string) []byte {
	t.Helper()
	le := binary.LittleEndian
	strtab := []byte{0}
	str := func(s string) uint64 {
		at := uint64(len(strtab))
		strtab = append(append(strtab, s...), 0)
		return at
	}
	var dynamic []byte
	entry := func(tag elf.DynTag, v uint64) {
		dynamic = le.AppendUint64(le.AppendUint64(dynamic, uint64(tag)), v)
	}
	for _, library := range needed {
		entry(elf.DT_NEEDED, str(library))
	}
	if runpath != "" {
		entry(elf.DT_RUNPATH, str(runpath))
	}
	entry(elf.DT_NULL, 0)
	interp := append([]byte(interpreter), 0)
	kind := elf.PT_INTERP
	if interpreter == "" {
		kind = elf.PT_NULL
	}

	const header, prog, section = 64, 56, 64
	interpAt := uint64(header + prog)
	strAt := interpAt + uint64(len(interp))
	dynAt := strAt + uint64(len(strtab))
	sectionsAt := dynAt + uint64(len(dynamic))

	var b bytes.Buffer
	write := func(v any) {
		if err := binary.Write(&b, le, v); err != nil {
			t.Fatal(err)
		}
	}
	write(elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: header, Phentsize: prog, Phnum: 1, Ehsize: header,
		Shoff: sectionsAt, Shentsize: section, Shnum: 3, Shstrndx: 1,
	})
	write(elf.Prog64{Type: uint32(kind), Off: interpAt, Filesz: uint64(len(interp))})
	b.Write(interp)
	b.Write(strtab)
	b.Write(dynamic)
	write(elf.Section64{})
	write(elf.Section64{Type: uint32(elf.SHT_STRTAB), Off: strAt, Size: uint64(len(strtab))})
	write(elf.Section64{Type: uint32(elf.SHT_DYNAMIC), Off: dynAt, Size: uint64(len(dynamic)), Link: 1, Entsize: 16})
	return b.Bytes()
}
