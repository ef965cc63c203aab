package vtpm_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

type tcgEvent = vtpmtest.FirmwareEvent

const (
	evNoAction  = vtpmtest.NoAction
	evSeparator = vtpmtest.Separator
	evIPL       = vtpmtest.IPL
	evVariable  = vtpmtest.Variable
	evAction    = vtpmtest.Action
	evAuthority = vtpmtest.Authority

	guidGlobal   = vtpmtest.GUIDGlobal
	guidDatabase = vtpmtest.GUIDDatabase
)

var (
	firmwareLog      = vtpmtest.FirmwareLog
	variable         = vtpmtest.VariableEvent
	separator        = vtpmtest.SeparatorEvent
	grub             = vtpmtest.GRUBEvent
	secureBootEvents = vtpmtest.SecureBootEvents
)

// bootEvents are those of a TPM that firmware started from locality 3.
func bootEvents() []tcgEvent {
	return append([]tcgEvent{vtpmtest.StartupLocality(3)}, vtpmtest.BootEvents()...)
}

func TestFirmwareLogIsAccepted(t *testing.T) {
	s := newScene(t)
	s.boot(t, firmwareLog(bootEvents()...))
	r := vtpm.Appraise(s.ev, s.want, s.now)
	if f := r.Checks.Failed(); len(f) > 0 {
		t.Fatalf("%+v", f)
	}
	if r.Claims["tpm.secure-boot"] != true || r.Claims["tpm.kernel-command-line"] != "/vmlinuz root=/dev/sda1" {
		t.Errorf("%+v", r.Claims)
	}

	// Without the log the same quote cannot be explained: shim measured too.
	s.ev.TCGLog = nil
	r = vtpm.Appraise(s.ev, s.want, s.now)
	if outcome(r.Checks, "tpm.tcg-log") != check.NotChecked || outcome(r.Checks, "tpm.event-log") != check.Fail {
		t.Errorf("%+v", r.Checks)
	}
	if _, told := r.Claims["tpm.secure-boot"]; told {
		t.Error("Secure Boot is told without a log")
	}
}

// One departure a row from a log that is accepted.
func TestFirmwareLogIsRefused(t *testing.T) {
	with := func(change func([]tcgEvent) []tcgEvent) func(*testing.T, *scene) {
		return func(_ *testing.T, s *scene) { s.ev.TCGLog = firmwareLog(change(bootEvents())...) }
	}
	raw := func(change func([]byte) []byte) func(*testing.T, *scene) {
		return func(_ *testing.T, s *scene) { s.ev.TCGLog = change(firmwareLog(bootEvents()...)) }
	}
	for _, row := range []struct {
		situation string
		spoil     func(*testing.T, *scene)
	}{
		{"event left out", with(func(e []tcgEvent) []tcgEvent { return slices.Delete(e, 4, 5) })},
		{"event added", with(func(e []tcgEvent) []tcgEvent { return append(e, grub("grub_cmd: ", "echo")) })},
		{"event added to a PCR that has none", with(func(e []tcgEvent) []tcgEvent { return append(e, separator(3)) })},
		{"two events of one PCR exchanged", with(func(e []tcgEvent) []tcgEvent { e[4], e[5] = e[5], e[4]; return e })},
		{"event with another digest", with(func(e []tcgEvent) []tcgEvent { e[4].Measured = []byte("other"); return e })},
		{"event that says it measures nothing", with(func(e []tcgEvent) []tcgEvent { e[4].Type = evNoAction; return e })},
		{"event moved to another PCR", with(func(e []tcgEvent) []tcgEvent { e[4].PCR = 6; return e })},
		{"another startup locality", with(func(e []tcgEvent) []tcgEvent { e[0].Data = []byte("StartupLocality\x00\x04"); return e })},
		{"no startup locality", with(func(e []tcgEvent) []tcgEvent { return e[1:] })},
		{"unknown startup locality", with(func(e []tcgEvent) []tcgEvent { e[0].Data = []byte("StartupLocality\x00\x05"); return e })},
		{"startup locality twice", with(func(e []tcgEvent) []tcgEvent { return slices.Insert(e, 1, e[0]) })},
		{"startup locality after the start", with(func(e []tcgEvent) []tcgEvent { e[0], e[1] = e[1], e[0]; return e })},
		{"PCR that there is not", with(func(e []tcgEvent) []tcgEvent { e[2].PCR = 24; return e })},
		{"measuring event of no PCR", with(func(e []tcgEvent) []tcgEvent { e[2].PCR = 0xffffffff; return e })},
		{"extension that the log leaves out", func(t *testing.T, s *scene) {
			s.tpm.ExtendDigest(2, [32]byte{1})
			s.quote(t, nil, booted...)
		}},
		{"extension of a PCR without any event", func(t *testing.T, s *scene) {
			s.tpm.ExtendDigest(12, [32]byte{1})
			s.quote(t, nil, booted...)
		}},
		{"quote without a PCR that firmware extends", func(t *testing.T, s *scene) {
			s.quote(t, nil, slices.DeleteFunc(slices.Clone(booted), func(i int) bool { return i == 7 })...)
		}},
		{"quote without a PCR that has no event", func(t *testing.T, s *scene) {
			s.quote(t, nil, slices.DeleteFunc(slices.Clone(booted), func(i int) bool { return i == 11 })...)
		}},
		{"quote of another machine's PCRs", func(t *testing.T, s *scene) {
			for _, i := range booted[:13] {
				s.tpm.SetPCR(i, [32]byte{})
			}
			s.quote(t, nil, booted...)
		}},
		{"byte after the last event", raw(func(b []byte) []byte { return append(b, 0) })},
		{"padding after the last event", raw(func(b []byte) []byte { return append(b, bytes.Repeat([]byte{0xff}, 64)...) })},
		{"last byte cut off", raw(func(b []byte) []byte { return b[:len(b)-1] })},
		{"first event alone, cut off", raw(func(b []byte) []byte { return b[:40] })},
		{"format event alone", raw(func(b []byte) []byte { return b[:65] })},
		{"another format", raw(func(b []byte) []byte { b[32] = 'X'; return b })},
		{"another version of the format", raw(func(b []byte) []byte { b[53] = 1; return b })},
		{"no bank", raw(func(b []byte) []byte { b[56] = 0; return b })},
		{"more banks than there are", raw(func(b []byte) []byte { b[56] = 2; return b })},
		{"banks without number", raw(func(b []byte) []byte { copy(b[56:], []byte{0xff, 0xff, 0xff, 0xff}); return b })},
		{"another bank", raw(func(b []byte) []byte { b[60] = 0x0c; return b })},
		{"bank of another size", raw(func(b []byte) []byte { b[62] = 31; return b })},
		{"bank of size zero", raw(func(b []byte) []byte { b[62] = 0; return b })},
		{"vendor bytes that are not there", raw(func(b []byte) []byte { b[64] = 1; return b })},
		{"two digests in an event", raw(func(b []byte) []byte { b[73] = 2; return b })},
		{"no digest in an event", raw(func(b []byte) []byte { b[73] = 0; return b })},
		{"digests without number", raw(func(b []byte) []byte { copy(b[73:], []byte{0xff, 0xff, 0xff, 0xff}); return b })},
		{"data without end", raw(func(b []byte) []byte { copy(b[111:], []byte{0xff, 0xff, 0xff, 0xff}); return b })},
		{"log over the limit", raw(func(b []byte) []byte { return append(b, make([]byte, vtpm.MaxTCGLog)...) })},
	} {
		t.Run(row.situation, func(t *testing.T) {
			s := newScene(t)
			s.boot(t, firmwareLog(bootEvents()...))
			row.spoil(t, s)
			r := vtpm.Appraise(s.ev, s.want, s.now)
			for _, c := range r.Checks.Failed() {
				// The agent's log starts where this one ends.
				if c.ID != "tpm.tcg-log" && c.ID != "tpm.event-log" {
					t.Errorf("also failed %s", c.ID)
				}
			}
			if outcome(r.Checks, "tpm.tcg-log") != check.Fail {
				t.Fatalf("%+v", r.Checks)
			}
			if _, told := r.Claims["tpm.secure-boot"]; told || r.PCRs != nil || r.Events != nil {
				t.Error("a refused log tells something")
			}
		})
	}
}

// What whoever runs in the guest can do to the log and still have it replay, by
// changing types and text and extending further, must not change what is told.
func TestFirmwareLogThatReplaysTellsNoLies(t *testing.T) {
	events := func(change func([]tcgEvent) []tcgEvent) []tcgEvent { return change(secureBootEvents()) }
	relabel := func(e []tcgEvent, typ uint32) []tcgEvent {
		for i := range e {
			e[i].Type = typ
		}
		return e
	}
	off := variable(guidGlobal, "SecureBoot", []byte{0})
	for situation, log := range map[string][]tcgEvent{
		"true events relabelled, and better ones measured behind them": events(func(e []tcgEvent) []tcgEvent {
			e[0] = off
			return append(relabel(e, 2), secureBootEvents()...)
		}),
		"true events relabelled to a type that there is not": events(func(e []tcgEvent) []tcgEvent {
			e[0] = off
			return append(relabel(e, 0x12345678), secureBootEvents()...)
		}),
		"variable for the second time": events(func(e []tcgEvent) []tcgEvent { return slices.Insert(e, 1, e[0]) }),
		"variable after the separator": events(func(e []tcgEvent) []tcgEvent {
			return append(slices.Delete(e, 0, 1), variable(guidGlobal, "SecureBoot", []byte{1}))
		}),
		"variable that is not what was measured": events(func(e []tcgEvent) []tcgEvent {
			e[0].Measured = off.Data
			return e
		}),
		"separator of an error":      events(func(e []tcgEvent) []tcgEvent { e[5].Data = []byte{1, 0, 0, 0}; return e }),
		"separator twice":            events(func(e []tcgEvent) []tcgEvent { return append(e, e[5]) }),
		"no separator":               events(func(e []tcgEvent) []tcgEvent { return slices.Delete(e, 5, 6) }),
		"no variable SecureBoot":     events(func(e []tcgEvent) []tcgEvent { return e[1:] }),
		"SecureBoot of another GUID": events(func(e []tcgEvent) []tcgEvent { e[0] = variable(guidDatabase, "SecureBoot", []byte{1}); return e }),
		"SecureBoot of two bytes":    events(func(e []tcgEvent) []tcgEvent { e[0] = variable(guidGlobal, "SecureBoot", []byte{1, 0}); return e }),
		"SecureBoot of 2":            events(func(e []tcgEvent) []tcgEvent { e[0] = variable(guidGlobal, "SecureBoot", []byte{2}); return e }),
		"no platform key":            events(func(e []tcgEvent) []tcgEvent { return slices.Delete(e, 1, 2) }),
		"no key exchange keys":       events(func(e []tcgEvent) []tcgEvent { e[2] = variable(guidGlobal, "KEK", nil); return e }),
		"no signature database":      events(func(e []tcgEvent) []tcgEvent { return slices.Delete(e, 3, 4) }),
		"no key used":                events(func(e []tcgEvent) []tcgEvent { return e[:6] }),
		"key used before the separator alone": events(func(e []tcgEvent) []tcgEvent {
			e[5], e[6] = e[6], e[5]
			return e
		}),
		"authority that is not what was measured": events(func(e []tcgEvent) []tcgEvent { e[6].Measured = []byte("x"); return e }),
		"debugger": events(func(e []tcgEvent) []tcgEvent {
			return append(e, tcgEvent{PCR: 7, Type: evAction, Data: []byte("UEFI Debug Mode")})
		}),
		"variable with a name of another length": events(func(e []tcgEvent) []tcgEvent { e[0].Data[16]++; return e }),
		"variable with lengths that wrap around": events(func(e []tcgEvent) []tcgEvent {
			copy(e[0].Data[16:], bytes.Repeat([]byte{0xff}, 16))
			return e
		}),
		"variable cut off": events(func(e []tcgEvent) []tcgEvent { e[0].Data = e[0].Data[:31]; return e }),
	} {
		s := newScene(t)
		s.boot(t, firmwareLog(log...))
		r := vtpm.Appraise(s.ev, s.want, s.now)
		if outcome(r.Checks, "tpm.tcg-log") != check.Pass {
			t.Fatalf("%s: the log does not replay: %+v", situation, r.Checks.Failed())
		}
		if state, told := r.Claims["tpm.secure-boot"]; told || r.Claims["tpm.secure-boot-untold"] == nil {
			t.Errorf("%s: Secure Boot is %v", situation, state)
		}
	}

	const wrong, right = "/vmlinuz init=/bin/sh", "/vmlinuz root=/dev/sda1"
	for situation, log := range map[string][]tcgEvent{
		"true line relabelled as a command": {grub("grub_cmd: ", wrong), grub("kernel_cmdline: ", right)},
		"true line relabelled as a module's": {
			grub("module_cmdline: ", wrong), grub("kernel_cmdline: ", right)},
		"true line on a device relabelled":       {grub("grub_cmd: ", "(hd0,gpt1)"+wrong), grub("kernel_cmdline: ", right)},
		"two lines":                              {grub("kernel_cmdline: ", wrong), grub("kernel_cmdline: ", right)},
		"two lines under two names":              {grub("kernel_cmdline: ", wrong), grub("grub_kernel_cmdline ", right)},
		"no line":                                {grub("grub_cmd: ", "boot")},
		"line that is not what was measured":     {{PCR: 8, Type: evIPL, Data: []byte("kernel_cmdline: " + right + "\x00"), Measured: []byte(wrong)}},
		"event that is not GRUB's":               {grub("kernel_cmdline: ", right), {PCR: 8, Type: evIPL, Data: []byte("x")}},
		"event of another type":                  {grub("kernel_cmdline: ", right), {PCR: 8, Type: 6, Data: []byte("x")}},
		"name without a text or its terminator":  {grub("kernel_cmdline: ", right), {PCR: 8, Type: evIPL, Data: []byte("grub_cmd: "), Measured: []byte("x")}},
		"line with a line break":                 {grub("kernel_cmdline: ", right+"\n")},
		"line with a byte that is not printable": {grub("kernel_cmdline: ", right+"\x1b[2J")},
		"line over the limit":                    {grub("kernel_cmdline: ", "/"+strings.Repeat("a", 2048))},
		"nothing":                                nil,
	} {
		s := newScene(t)
		s.boot(t, firmwareLog(log...))
		r := vtpm.Appraise(s.ev, s.want, s.now)
		if outcome(r.Checks, "tpm.tcg-log") != check.Pass {
			t.Fatalf("%s: the log does not replay: %+v", situation, r.Checks.Failed())
		}
		if line, told := r.Claims["tpm.kernel-command-line"]; told || r.Claims["tpm.kernel-command-line-untold"] == nil {
			t.Errorf("%s: the command line is %v", situation, line)
		}
	}
}

// Flips of a real log are refused, or are in what no digest covers: then nothing
// else is told than before.
func TestEveryFlipOfAFirmwareLog(t *testing.T) {
	s := newScene(t)
	log := read(t, eventlogModule(t), "testdata", "eventlogs", "tpm", "cos-101-amd-sev.bin")
	s.boot(t, log)
	// What is not about the log is checked above, and takes the time.
	parsed := func(b []byte) (ok bool, boot any, line any) {
		s.ev.TCGLog = b
		r := vtpm.Appraise(s.ev, s.want, s.now)
		return outcome(r.Checks, "tpm.tcg-log") == check.Pass, r.Claims["tpm.secure-boot"], r.Claims["tpm.kernel-command-line"]
	}
	ok, boot, line := parsed(log)
	if !ok || boot != true || line == nil {
		t.Fatal("the log itself is refused")
	}
	until := time.Now().Add(2 * time.Second)
	refused, passed := 0, 0
	// 37 is prime to 8: every bit of a byte has its turn.
	for i := 0; i < len(log)*8 && time.Now().Before(until); i += 37 {
		b := bytes.Clone(log)
		b[i/8] ^= 1 << (i % 8)
		ok, state, text := parsed(b)
		if !ok {
			refused++
			continue
		}
		passed++
		if state != nil && state != boot || text != nil && text != line {
			t.Errorf("bit %d: tells %v, %v", i, state, text)
		}
	}
	ends := map[bool]int{}
	for i := 0; i < len(log); i += 131 {
		ok, _, _ := parsed(log[:i])
		ends[ok]++
	}
	// An empty log is none, and not checked.
	if ends[true] != 0 || refused == 0 {
		t.Errorf("%d truncations accepted, %d flips refused", ends[true], refused)
	}
	t.Logf("%d flips refused, %d in what no digest covers; %d truncations refused", refused, passed, ends[false])
}

func FuzzParseTCGLog(f *testing.F) {
	f.Add(firmwareLog(bootEvents()...))
	f.Add(firmwareLog())
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := vtpm.ParseTCGLog(b)
		if err != nil {
			return
		}
		l.Replay()
		for _, e := range l.Events {
			if e.PCR < 0 || e.PCR > 23 {
				t.Fatalf("PCR %d", e.PCR)
			}
		}
	})
}
