package collect_test

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/azure/azuretest"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/collect/tpm"
	"github.com/coffer-run/coffer/enclave/collect/tsm"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/boot"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
	"github.com/coffer-run/coffer/internal/emulate/server"
)

// booted is a machine whose firmware, shim and GRUB measured into a software TPM
// before the agent came, and kept a log.
type booted struct {
	*testing.T
	vendor   *simulate.Vendor
	machine  *emulatetest.TPM
	devices  string
	log      []byte
	logFile  string
	eventLog string
}

func newBooted(t *testing.T, events ...vtpmtest.FirmwareEvent) *booted {
	t.Helper()
	m := &booted{T: t, vendor: emulatetest.Vendor(t), machine: emulatetest.NewTPM(t), log: vtpmtest.FirmwareLog(events...)}
	m.devices = emulatetest.Devices(t, m.vendor, server.Config{GPUs: 1})
	m.eventLog, m.logFile = filepath.Join(t.TempDir(), "log"), m.file(m.log)
	if err := boot.Firmware(m.raw(), m.log); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *booted) file(log []byte) string {
	m.Helper()
	p := filepath.Join(m.TempDir(), "binary_bios_measurements")
	if err := os.WriteFile(p, log, 0o600); err != nil {
		m.Fatal(err)
	}
	return p
}

func (m *booted) raw() transport.TPM {
	m.Helper()
	tr, err := linuxudstpm.Open(m.machine.Socket)
	if err != nil {
		m.Fatal(err)
	}
	return tr
}

// agent opens the TPM as the agent does.
func (m *booted) agent(o tpm.Options) *tpm.TPM {
	m.Helper()
	d, err := tpm.Open(m.Context(), m.machine.Socket, o)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { _ = d.Close() })
	return d
}

func (m *booted) measured(d *tpm.TPM) []byte {
	m.Helper()
	log, err := d.Measure(m.Context(), m.eventLog, measured)
	if err != nil {
		m.Fatal(err)
	}
	return log
}

// collect returns what the verifier parses of the agent's envelope.
func (m *booted) collect(c *collect.Collector) *evidence.Envelope {
	m.Helper()
	req := request()
	req.AKCredential = ""
	env, err := c.Collect(m.Context(), req)
	if err != nil {
		m.Fatal(err)
	}
	b, err := json.Marshal(env)
	if err != nil {
		m.Fatal(err)
	}
	if env, err = evidence.Parse(b); err != nil {
		m.Fatal(err)
	}
	return env
}

func (m *booted) snp() *tsm.Source { return tsm.New(emulate.NewTSM(emulate.Dial(m.devices))) }

// appraise has the verifier judge an envelope, the attestation key pinned.
func (m *booted) appraise(env *evidence.Envelope) *composite.Appraisal {
	m.Helper()
	s, err := composite.Open(env)
	if err != nil {
		m.Fatal(err)
	}
	sum := sha256.Sum256(env.TPM.AKPublic)
	anchors, err := m.vendor.Anchors().WithAKs(anchor.Software, "000b"+hex.EncodeToString(sum[:]))
	if err != nil {
		m.Fatal(err)
	}
	return s.Appraise(m.Context(), composite.Trust{Anchors: anchors}, time.Now())
}

func failedChecks(a *composite.Appraisal) []string {
	ids := []string{}
	for _, d := range a.Devices() {
		for _, c := range d.Checks.Failed() {
			ids = append(ids, c.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

func outcomeOf(l check.List, id string) check.Outcome {
	i := slices.IndexFunc(l, func(c check.Check) bool { return c.ID == id })
	if i < 0 {
		return ""
	}
	return l[i].Outcome
}

// Shim extends PCR 14 before the agent does: both logs together explain it.
func TestFirmwareLogIsCollected(t *testing.T) {
	m := newBooted(t, vtpmtest.BootEvents()...)
	d := m.agent(tpm.Options{FirmwareLog: m.logFile})
	first := m.measured(d)
	env := m.collect(&collect.Collector{TPM: d, SNP: m.snp()})
	if !bytes.Equal(env.TPM.TCGLog, m.log) {
		t.Fatalf("envelope has %d bytes of the firmware's log, want %d", len(env.TPM.TCGLog), len(m.log))
	}
	a := m.appraise(env)
	if f := failedChecks(a); len(f) > 0 {
		t.Fatalf("failed %v", f)
	}
	for _, id := range []string{"tpm.tcg-log", "tpm.event-log"} {
		if outcomeOf(a.TPM.Checks, id) != check.Pass {
			t.Errorf("%s: %+v", id, a.TPM.Checks)
		}
	}
	if a.TPM.Claims["tpm.secure-boot"] != true || a.TPM.Claims["tpm.kernel-command-line"] != "/vmlinuz root=/dev/sda1" {
		t.Errorf("%+v", a.TPM.Claims)
	}

	t.Run("an agent that restarts in the same boot does not extend again", func(t *testing.T) {
		if again := m.measured(m.agent(tpm.Options{FirmwareLog: m.logFile})); !bytes.Equal(first, again) {
			t.Errorf("log is %s, was %s", again, first)
		}
	})
	// Nothing but the one check named stands between the change and acceptance.
	for _, row := range []struct {
		situation string
		change    func(*evidence.Envelope)
		fails     []string
	}{
		{"the log left out on the way", func(e *evidence.Envelope) { e.TPM.TCGLog = nil }, []string{"snp.report-data", "tpm.event-log"}},
		{"words in the log that no digest covers", func(e *evidence.Envelope) {
			e.TPM.TCGLog = bytes.Replace(e.TPM.TCGLog, []byte("MokList\x00"), []byte("MokLost\x00"), 1)
		}, []string{"snp.report-data"}},
		{"the log of another machine", func(e *evidence.Envelope) {
			events := vtpmtest.BootEvents()
			events[0].Data = []byte("firmware 2")
			e.TPM.TCGLog = vtpmtest.FirmwareLog(events...)
		}, []string{"snp.report-data", "tpm.event-log", "tpm.tcg-log"}},
	} {
		t.Run(row.situation, func(t *testing.T) {
			changed := *env
			part := *env.TPM
			changed.TPM = &part
			row.change(&changed)
			if f := failedChecks(m.appraise(&changed)); !slices.Equal(f, row.fails) {
				t.Errorf("failed %v, want %v", f, row.fails)
			}
		})
	}
	t.Run("something extends PCR 14 after the agent", func(t *testing.T) {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: vtpm.AgentPCR, Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
		}.Execute(m.raw())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Quote(t.Context(), [32]byte{1}); err == nil || !strings.Contains(err.Error(), "something else extended it") {
			t.Errorf("got %v", err)
		}
	})
}

// The agent extends only from where it knows how PCR 14 came to be.
func TestMeasureWithoutTheWholeStory(t *testing.T) {
	m := newBooted(t, vtpmtest.BootEvents()...)
	other := vtpmtest.BootEvents()
	other[len(other)-1].Measured = []byte("another list")
	for situation, o := range map[string]tpm.Options{
		"no firmware log, and shim measured":     {},
		"the firmware log of another machine":    {FirmwareLog: m.file(vtpmtest.FirmwareLog(other...))},
		"a firmware log that leaves shim's out":  {FirmwareLog: m.file(vtpmtest.FirmwareLog(other[:len(other)-1]...))},
		"a firmware log with one event too many": {FirmwareLog: m.file(vtpmtest.FirmwareLog(append(vtpmtest.BootEvents(), other[len(other)-1])...))},
	} {
		t.Run(situation, func(t *testing.T) {
			before := m.pcr14()
			if _, err := m.agent(o).Measure(t.Context(), m.eventLog, measured); err == nil || !strings.Contains(err.Error(), "PCR 14") {
				t.Errorf("got %v", err)
			}
			if !bytes.Equal(before, m.pcr14()) {
				t.Error("PCR 14 was extended")
			}
		})
	}
	for situation, path := range map[string]string{
		"missing":                 m.logFile + "-missing",
		"a folder":                filepath.Dir(m.logFile),
		"empty":                   m.file(nil),
		"cut off within an event": m.file(m.log[:len(m.log)-1]),
		"of more bytes than any":  m.file(append(bytes.Clone(m.log), make([]byte, vtpm.MaxTCGLog)...)),
	} {
		t.Run("a firmware log that is "+situation, func(t *testing.T) {
			if _, err := tpm.Open(t.Context(), m.machine.Socket, tpm.Options{FirmwareLog: path}); err == nil || !strings.Contains(err.Error(), "firmware log") {
				t.Errorf("got %v", err)
			}
		})
	}
	// And with the right one the machine is as good as before.
	m.measured(m.agent(tpm.Options{FirmwareLog: m.logFile}))
}

func (m *booted) pcr14() []byte {
	m.Helper()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(vtpm.AgentPCR)},
	}}}.Execute(m.raw())
	if err != nil {
		m.Fatal(err)
	}
	return rsp.PCRValues.Digests[0].Buffer
}

// A firmware PCR that the log does not explain is for the verifier to refuse.
func TestFirmwareThatTheLogDoesNotExplain(t *testing.T) {
	m := newBooted(t, vtpmtest.BootEvents()...)
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: 4, Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}.Execute(m.raw())
	if err != nil {
		t.Fatal(err)
	}
	d := m.agent(tpm.Options{FirmwareLog: m.logFile})
	m.measured(d)
	a := m.appraise(m.collect(&collect.Collector{TPM: d, SNP: m.snp()}))
	if f := failedChecks(a); !slices.Contains(f, "tpm.tcg-log") || a.CPU == nil || len(a.CPU.Checks.Failed()) > 0 {
		t.Errorf("failed %v", f)
	}
}

var paravisorKey = anchor.IDKeyDigest{1: 0xc0, 47: 0xfe}

// azureMachine is a machine whose paravisor keeps the TPM.
func azureMachine(t *testing.T) *booted {
	t.Helper()
	m := newBooted(t, vtpmtest.BootEvents()...)
	err := boot.Paravisor(t.Context(), m.raw(), func(_ context.Context, ak *rsa.PublicKey) ([]byte, error) {
		claims, err := azuretest.Claims(ak)
		if err != nil {
			return nil, err
		}
		// A software TPM's index takes 2048 bytes, Azure's has 2600: the claims
		// name the attestation key alone, and the zeros at the end are left out.
		var c map[string]any
		if err := json.Unmarshal(claims, &c); err != nil {
			return nil, err
		}
		keys, _ := c["keys"].([]any)
		c["keys"] = keys[:1]
		if claims, err = json.Marshal(c); err != nil {
			return nil, err
		}
		var data [64]byte
		sum := sha256.Sum256(claims)
		copy(data[:], sum[:])
		report, err := m.vendor.Chip().Report(data, simulate.SNPOptions{Edit: func(r []byte) { copy(r[0xE0:], paravisorKey[:]) }})
		return bytes.TrimRight(azuretest.Report(report, claims), "\x00"), err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *booted) appraiseAzure(env *evidence.Envelope) *composite.Appraisal {
	m.Helper()
	// What Azure's machines do not hand out comes from the verifier's endorsements.
	env.SNP.Certificates = m.vendor.Chip().CertTable()
	s, err := composite.Open(env)
	if err != nil {
		m.Fatal(err)
	}
	anchors, err := m.vendor.Anchors().WithParavisors(paravisorKey)
	if err != nil {
		m.Fatal(err)
	}
	return s.Appraise(m.Context(), composite.Trust{Anchors: anchors}, time.Now())
}

func TestParavisorsReportIsCollected(t *testing.T) {
	m := azureMachine(t)
	d := m.agent(tpm.Options{FirmwareLog: m.logFile, Paravisor: true})
	m.measured(d)
	env := m.collect(&collect.Collector{TPM: d, Paravisor: d})
	if len(env.SNP.HCLReport) == 0 || len(env.SNP.Report) > 0 || len(env.Failures) > 0 {
		t.Fatalf("%+v, failures %v", env.SNP, env.Failures)
	}
	a := m.appraiseAzure(env)
	if f := failedChecks(a); len(f) > 0 {
		t.Fatalf("failed %v", f)
	}
	if a.TPM.Claims["tpm.trust-class"] != string(anchor.HCLVMPL0) || a.TPM.Claims["tpm.ak-by"] != vtpm.AKByPlatform || a.TPM.Claims["tpm.secure-boot"] != true {
		t.Errorf("%+v", a.TPM.Claims)
	}
	if outcomeOf(a.CPU.Checks, "hcl.binding") != check.Pass {
		t.Errorf("%+v", a.CPU.Checks)
	}

	t.Run("a quote by coffer's own key", func(t *testing.T) {
		own := m.agent(tpm.Options{FirmwareLog: m.logFile})
		m.measured(own)
		if f := failedChecks(m.appraiseAzure(m.collect(&collect.Collector{TPM: own, Paravisor: d}))); !slices.Equal(f, []string{"hcl.binding", "tpm.ak-credential"}) {
			t.Errorf("failed %v", f)
		}
	})
	t.Run("the TPM goes away between quote and report", func(t *testing.T) {
		m.machine.Off()
		env := m.collect(&collect.Collector{TPM: fakeTPM{}, Paravisor: d})
		m.machine.On(t)
		if env.SNP != nil || len(env.Failures) != 1 || env.Failures[0].Source != "snp" {
			t.Errorf("%+v, failures %v", env.SNP, env.Failures)
		}
	})
}

func TestMachineWithoutParavisor(t *testing.T) {
	m := newBooted(t)
	if _, err := tpm.Open(t.Context(), m.machine.Socket, tpm.Options{Paravisor: true}); err == nil || !strings.Contains(err.Error(), "paravisor") {
		t.Errorf("opened: %v", err)
	}
	d := m.agent(tpm.Options{})
	if b, err := d.HCLReport(t.Context()); err == nil {
		t.Errorf("read %d bytes", len(b))
	}
}
