package vtpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

const (
	// MaxTCGLog bounds a firmware event log, in bytes. Real ones have 15 to 60 KiB.
	MaxTCGLog = 256 << 10
	// maxTCGEvents bounds the events of one log.
	maxTCGEvents = 4096
	// maxTCGBanks bounds the digests of one event.
	maxTCGBanks = 8
	maxPCR      = 23
)

// Event types of the TCG PC Client Platform Firmware Profile, section 10.4.1.
const (
	evNoAction             = 0x00000003
	evSeparator            = 0x00000004
	evIPL                  = 0x0000000d
	evEFIVariableConfig    = 0x80000001
	evEFIAction            = 0x80000007
	evEFIVariableAuthority = 0x800000e0
)

const algSHA256 = 0x000b // TPM_ALG_SHA256, TPM 2.0 Part 2, section 6.3

// firmwarePCRs are those which firmware, boot loader and the kernel's stub
// extend and nothing after them: 10 is the kernel's own, 14 also the agent's,
// 15 and above belong to the system.
func firmwarePCRs() []int { return []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13} }

// TCGEvent is one entry of a firmware event log. A replay vouches for PCR and
// Digest alone: Type is whatever the log says, and so is Data, unless it hashes
// to Digest.
type TCGEvent struct {
	PCR    int
	Type   uint32
	Digest [sha256.Size]byte
	Data   []byte
}

// measures reports whether Data is what was measured.
func (e TCGEvent) measures(b []byte) bool { return sha256.Sum256(b) == e.Digest }

// TCGLog is a firmware event log in the crypto agile format.
type TCGLog struct {
	Events []TCGEvent
	// locality is that from which the TPM was started. It is the initial value
	// of PCR 0 (TPM 2.0 Part 1, section 34.1).
	locality byte
}

// ParseTCGLog reads a firmware event log (TCG PC Client Platform Firmware
// Profile, section 10.2). Every event must have one digest in each of the
// declared banks, SHA-256 among them; nothing may follow the last event.
//
// This is our own, and so is what is read from PCRs 7 and 8:
// google/go-eventlog v0.0.2 makes up events for known defects of firmware,
// passes a register without events whatever its value, recurses without end on
// an unknown event type, and allocates 4 GiB for a list of signatures of size
// zero. It serves the tests here as a second opinion.
func ParseTCGLog(b []byte) (*TCGLog, error) {
	if len(b) > MaxTCGLog {
		return nil, fmt.Errorf("parse firmware log: %d bytes, at most %d are allowed", len(b), MaxTCGLog)
	}
	r := &reader{rest: b}
	banks, err := r.specID()
	if err != nil {
		return nil, fmt.Errorf("parse firmware log: %w", err)
	}
	l := &TCGLog{}
	located, started := false, false
	for n := 1; len(r.rest) > 0; n++ {
		if n > maxTCGEvents {
			return nil, fmt.Errorf("parse firmware log: more than %d events", maxTCGEvents)
		}
		e, err := r.event(banks)
		if err != nil {
			return nil, fmt.Errorf("parse firmware log: event %d: %w", n, err)
		}
		if e.Type != evNoAction {
			started = started || e.PCR == 0
			l.Events = append(l.Events, e)
			continue
		}
		// Section 10.4.5.3: EV_NO_ACTION is not extended.
		if e.PCR == 0 && bytes.HasPrefix(e.Data, []byte("StartupLocality\x00")) {
			if len(e.Data) != 17 || located || started {
				return nil, fmt.Errorf("parse firmware log: event %d: misplaced or malformed startup locality", n)
			}
			located, l.locality = true, e.Data[16]
			if l.locality != 0 && l.locality != 3 && l.locality != 4 {
				return nil, fmt.Errorf("parse firmware log: event %d: startup locality %d: want 0, 3 or 4", n, l.locality)
			}
		}
	}
	return l, nil
}

// Replay returns the values of PCRs 0 to 23 after the log's events. PCRs
// without an event have their reset value.
func (l *TCGLog) Replay() [maxPCR + 1][sha256.Size]byte {
	var out [maxPCR + 1][sha256.Size]byte
	out[0][sha256.Size-1] = l.locality
	for _, e := range l.Events {
		out[e.PCR] = extended(out[e.PCR], e.Digest)
	}
	return out
}

// of returns the events of one PCR, in order.
func (l *TCGLog) of(pcr int) []TCGEvent {
	var out []TCGEvent
	for _, e := range l.Events {
		if e.PCR == pcr {
			out = append(out, e)
		}
	}
	return out
}

// extended is TPM 2.0 Part 1, section 17.2: new = H(old || digest).
func extended(old, digest [sha256.Size]byte) [sha256.Size]byte {
	return sha256.Sum256(slices.Concat(old[:], digest[:]))
}

var errShort = errors.New("ends within an event")

// reader takes little-endian values off the front.
type reader struct{ rest []byte }

func (r *reader) take(n uint32) ([]byte, error) {
	if uint64(n) > uint64(len(r.rest)) {
		return nil, errShort
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b, nil
}

func (r *reader) uint32() (uint32, error) {
	b, err := r.take(4)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b), nil
}

func (r *reader) uint16() (uint16, error) {
	b, err := r.take(2)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint16(b), nil
}

// bank is a digest algorithm with the size of its digests.
type bank struct{ alg, size uint16 }

// specID reads the first event, which is in the older format and declares the
// banks (section 10.4.5.1).
func (r *reader) specID() ([]bank, error) {
	head, err := r.take(32)
	if err != nil {
		return nil, err
	}
	size := binary.LittleEndian.Uint32(head[28:])
	data, err := r.take(size)
	if err != nil {
		return nil, err
	}
	const fixed = 28
	if !bytes.Equal(head[:8], []byte{0, 0, 0, 0, evNoAction, 0, 0, 0}) || len(data) < fixed || !bytes.Equal(data[:16], []byte("Spec ID Event03\x00")) {
		return nil, errors.New("it is not in the crypto agile format")
	}
	if data[20] != 0 || data[21] != 2 {
		return nil, fmt.Errorf("format version %d.%d: want 2.0", data[21], data[20])
	}
	s := &reader{rest: data[24:]}
	n, err := s.uint32()
	if err != nil {
		return nil, err
	}
	if n == 0 || n > maxTCGBanks {
		return nil, fmt.Errorf("%d banks: want 1 to %d", n, maxTCGBanks)
	}
	var banks []bank
	for range n {
		b, err := s.take(4)
		if err != nil {
			return nil, err
		}
		k := bank{alg: binary.LittleEndian.Uint16(b), size: binary.LittleEndian.Uint16(b[2:])}
		switch {
		case slices.ContainsFunc(banks, func(o bank) bool { return o.alg == k.alg }):
			return nil, fmt.Errorf("bank %#04x is declared twice", k.alg)
		case k.size == 0 || k.size > 64 || k.alg == algSHA256 && k.size != sha256.Size:
			return nil, fmt.Errorf("bank %#04x has digests of %d bytes", k.alg, k.size)
		}
		banks = append(banks, k)
	}
	if !slices.ContainsFunc(banks, func(k bank) bool { return k.alg == algSHA256 }) {
		return nil, errors.New("it has no SHA-256 bank")
	}
	vendor, err := s.take(1)
	if err != nil {
		return nil, err
	}
	if len(s.rest) != int(vendor[0]) {
		return nil, errors.New("the format event has bytes of no meaning")
	}
	return banks, nil
}

func (r *reader) event(banks []bank) (TCGEvent, error) {
	var e TCGEvent
	index, err := r.uint32()
	if err != nil {
		return e, err
	}
	if e.Type, err = r.uint32(); err != nil {
		return e, err
	}
	// Informative events may name no PCR at all (section 10.4.5.2).
	if index > maxPCR && (e.Type != evNoAction || index != 0xffffffff) {
		return e, fmt.Errorf("PCR %d: there are %d", index, maxPCR+1)
	}
	e.PCR = int(int32(index)) //nolint:gosec // 0 to 23, or -1
	n, err := r.uint32()
	if err != nil {
		return e, err
	}
	if int64(n) != int64(len(banks)) {
		return e, fmt.Errorf("%d digests: want one in each of %d banks", n, len(banks))
	}
	var seen []uint16
	for range n {
		alg, err := r.uint16()
		if err != nil {
			return e, err
		}
		i := slices.IndexFunc(banks, func(k bank) bool { return k.alg == alg })
		if i < 0 || slices.Contains(seen, alg) {
			return e, fmt.Errorf("digest of bank %#04x, which is not declared or has one", alg)
		}
		seen = append(seen, alg)
		d, err := r.take(uint32(banks[i].size))
		if err != nil {
			return e, err
		}
		if alg == algSHA256 {
			e.Digest = [sha256.Size]byte(d)
		}
	}
	size, err := r.uint32()
	if err != nil {
		return e, err
	}
	e.Data, err = r.take(size)
	return e, err
}
