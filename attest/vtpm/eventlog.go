package vtpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"

	"github.com/go-json-experiment/json"
)

// LogVersion is the only event log version there is.
const LogVersion = "coffer.run/event-log/v1"

// AgentPCR holds what coffer's agent measures of itself and its helpers.
const AgentPCR = 14

// MeasuredBySelf says that the agent measured itself: the log shows what an
// honest agent ran, and nothing about a dishonest one.
const MeasuredBySelf = "self"

const (
	// MaxLog bounds an encoded event log, in bytes.
	MaxLog = 64 << 10
	// MaxEvents bounds the events of one log.
	MaxEvents = 256
	// MaxEventName bounds the name of one event, in bytes.
	MaxEventName = 255
)

const labelEvent = "coffer/v1 event"

// Digest is a SHA-256 digest; lower-case hex in text.
type Digest [sha256.Size]byte

// MarshalText encodes d as lower-case hex.
func (d Digest) MarshalText() ([]byte, error) {
	return hex.AppendEncode(nil, d[:]), nil
}

// UnmarshalText decodes exactly 64 lower-case hex digits.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) != 2*len(d) || !bytes.Equal(b, bytes.ToLower(b)) {
		return fmt.Errorf("digest %.80q: want %d lower-case hex digits", b, 2*len(d))
	}
	_, err := hex.Decode(d[:], b)
	if err != nil {
		return fmt.Errorf("digest %.80q: %w", b, err)
	}
	return nil
}

// String returns the text form.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Event is one measurement. The PCR is extended with Extension, not with Digest.
type Event struct {
	PCR int `json:"pcr"`
	// Name says what was measured: "agent", "holder", "runsc", ...
	Name string `json:"name"`
	// Digest is the SHA-256 of what was measured.
	Digest Digest `json:"digest"`
	// MeasuredBy says whose word this is.
	MeasuredBy string `json:"measuredBy"`
}

// Extension is the value with which the PCR is extended. It covers the name and
// who measured, so that a log with the names exchanged does not replay.
func (e Event) Extension() [sha256.Size]byte {
	h := sha256.New()
	for _, p := range [][]byte{[]byte(labelEvent), []byte(e.Name), []byte(e.MeasuredBy), e.Digest[:]} {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(p))) //nolint:gosec // names are bounded by MaxEventName
		h.Write(n[:])
		h.Write(p)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func (e Event) validate() error {
	if e.PCR != AgentPCR {
		return fmt.Errorf("event %.80q is in PCR %d: want %d", e.Name, e.PCR, AgentPCR)
	}
	if e.Name == "" || len(e.Name) > MaxEventName {
		return fmt.Errorf("event name has %d bytes: want 1 to %d", len(e.Name), MaxEventName)
	}
	for _, c := range []byte(e.Name) {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("event name %.80q: want printable ASCII without spaces", e.Name)
		}
	}
	if e.MeasuredBy != MeasuredBySelf {
		return fmt.Errorf("event %.80q is measured by %.80q: want %q", e.Name, e.MeasuredBy, MeasuredBySelf)
	}
	return nil
}

type eventLog struct {
	Version string  `json:"version"`
	Events  []Event `json:"events"`
}

// EncodeLog returns events, in the order of extension, as canonical JSON
// (RFC 8785). An empty log is valid: nothing was measured.
func EncodeLog(events []Event) ([]byte, error) {
	if len(events) > MaxEvents {
		return nil, fmt.Errorf("encode event log: %d events, at most %d are allowed", len(events), MaxEvents)
	}
	for _, e := range events {
		if err := e.validate(); err != nil {
			return nil, fmt.Errorf("encode event log: %w", err)
		}
	}
	b := []byte(`{"events":[`)
	for i, e := range events {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(hex.AppendEncode(append(b, `{"digest":"`...), e.Digest[:]), `","measuredBy":`...)
		b = append(appendQuoted(b, e.MeasuredBy), `,"name":`...)
		b = append(appendQuoted(b, e.Name), `,"pcr":`...)
		b = append(strconv.AppendInt(b, int64(e.PCR), 10), '}')
	}
	b = append(appendQuoted(append(b, `],"version":`...), LogVersion), '}')
	if len(b) > MaxLog {
		return nil, fmt.Errorf("encode event log: %d bytes, at most %d are allowed", len(b), MaxLog)
	}
	return b, nil
}

// appendQuoted writes printable ASCII as RFC 8785 does.
func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	for i := range len(s) {
		if s[i] == '"' || s[i] == '\\' {
			b = append(b, '\\')
		}
		b = append(b, s[i])
	}
	return append(b, '"')
}

// ParseLog reads what EncodeLog wrote. Any other encoding of the same events is
// an error, so that one list of events has one log.
func ParseLog(b []byte) ([]Event, error) {
	var l eventLog
	if len(b) > MaxLog {
		return nil, fmt.Errorf("parse event log: %d bytes, at most %d are allowed", len(b), MaxLog)
	}
	if err := json.Unmarshal(b, &l, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("parse event log: %w", err)
	}
	if l.Version != LogVersion {
		return nil, fmt.Errorf("parse event log: version %.40q: want %q", l.Version, LogVersion)
	}
	c, err := EncodeLog(l.Events)
	if err != nil {
		return nil, fmt.Errorf("parse event log: %w", err)
	}
	if !bytes.Equal(b, c) {
		return nil, errors.New("parse event log: not in canonical form (RFC 8785)")
	}
	return l.Events, nil
}

// Replay returns the value of AgentPCR after events. start is what it was before
// them: zero after a reset, unless firmware and boot loader extended it, whose
// log then leads there (TCGLog.Replay).
func Replay(start [sha256.Size]byte, events []Event) [sha256.Size]byte {
	for _, e := range events {
		start = extended(start, e.Extension())
	}
	return start
}
