package vtpm_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-eventlog/extract"
	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// module returns where a module's source lies. Its test data are read from
// there: they are others' to distribute.
func module(t testing.TB, path, version string) string {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", path+"@"+version)
	cmd.Dir = t.TempDir()
	out, err := cmd.Output()
	var m struct{ Dir string }
	if err == nil {
		err = json.Unmarshal(out, &m)
	}
	if err != nil || m.Dir == "" {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s@%s is missing: %v %s", path, version, err, out)
		}
		t.Skipf("%s@%s is not in the module cache: %v", path, version, err)
	}
	return m.Dir
}

func eventlogModule(t testing.TB) string {
	return module(t, "github.com/google/go-eventlog", "v0.0.2")
}
func tpmToolsModule(t testing.TB) string {
	return module(t, "github.com/google/go-tpm-tools", "v0.4.10")
}
func attestationModule(t testing.TB) string {
	return module(t, "github.com/google/go-attestation", "v0.6.1")
}

func read(t testing.TB, path ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// realLog is a firmware log with the SHA-256 PCRs of the machine that wrote it.
type realLog struct {
	name string
	log  []byte
	pcrs map[int][32]byte
}

// values that the machines' TPMs had.
func realLogs(t testing.TB) []realLog {
	t.Helper()
	dir := eventlogModule(t)
	file := map[string]string{}
	for _, m := range regexp.MustCompile(`go:embed (\S+)\s+(\w+) \[\]byte`).FindAllStringSubmatch(string(read(t, dir, "testdata", "eventlog_data.go")), -1) {
		file[m[2]] = m[1]
	}
	value := regexp.MustCompile(`(\d+):\s*decodeHex\("([0-9a-f]{64})"\)`)
	var out []realLog
	for _, block := range strings.Split(string(read(t, dir, "tpmeventlog", "replay_test.go")), "\nvar ")[1:] {
		raw := regexp.MustCompile(`RawLog:\s*testdata\.(\w+)`).FindStringSubmatch(block)
		_, bank, ok := strings.Cut(block, "HashAlgo_SHA256, map[uint32][]byte{")
		if raw == nil || !ok {
			continue
		}
		bank, _, _ = strings.Cut(bank, "})")
		l := realLog{name: raw[1], log: read(t, dir, "testdata", file[raw[1]]), pcrs: map[int][32]byte{}}
		for _, m := range value.FindAllStringSubmatch(bank, -1) {
			i, _ := strconv.Atoi(m[1])
			b, _ := hex.DecodeString(m[2])
			l.pcrs[i] = [32]byte(b)
		}
		if len(l.pcrs) > 0 {
			out = append(out, l)
		}
	}
	return out
}

func TestRealFirmwareLogsReplay(t *testing.T) {
	logs := realLogs(t)
	if len(logs) < 8 {
		t.Fatalf("%d logs with known PCRs", len(logs))
	}
	for _, l := range logs {
		t.Run(l.name, func(t *testing.T) {
			p, err := vtpm.ParseTCGLog(l.log)
			if err != nil {
				t.Fatal(err)
			}
			got := p.Replay()
			for i, want := range l.pcrs {
				if got[i] != want {
					t.Errorf("PCR %d is %x, the machine had %x", i, got[i], want)
				}
			}
		})
	}
	t.Logf("vectors of firmware logs: %d replay to their machines' PCRs", len(logs))
}

// allLogs are all firmware logs of the modules, whether they have PCRs or not.
func allLogs(t testing.TB) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, pattern := range []string{
		filepath.Join(eventlogModule(t), "testdata", "eventlogs", "tpm", "*.bin"),
		filepath.Join(eventlogModule(t), "testdata", "legacydata", "*_eventlog"),
		filepath.Join(tpmToolsModule(t), "internal", "test", "eventlogs", "*.bin"),
		filepath.Join(attestationModule(t), "attest", "testdata", "*_eventlog"),
	} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		for _, f := range files {
			out[filepath.Base(filepath.Dir(filepath.Dir(f)))+"/"+filepath.Base(f)] = read(t, f)
		}
	}
	return out
}

// boot lets the scene's TPM measure a firmware log and quotes what it explains.
func (s *scene) boot(t testing.TB, log []byte) {
	t.Helper()
	p, err := vtpm.ParseTCGLog(log)
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range p.Replay() {
		s.tpm.SetPCR(i, v)
	}
	s.tpm.Extend(testEvents()...)
	s.ev.TCGLog = log
	s.quote(t, nil, booted...)
	s.log(t, testEvents())
}

var booted = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, vtpm.AgentPCR}

func outcome(l check.List, id string) check.Outcome {
	i := slices.IndexFunc(l, func(c check.Check) bool { return c.ID == id })
	if i < 0 {
		return ""
	}
	return l[i].Outcome
}

// Every crypto agile log is accepted under a quote of its PCRs, with the agent's
// events behind what shim measured into PCR 14. Logs of the older format are not.
func TestRealFirmwareLogsUnderAQuote(t *testing.T) {
	older := []string{"debian-10.bin", "ebs_event_missing_eventlog", "option_rom_eventlog", "short_no_action_eventlog"}
	on := []string{"cos-85-amd-sev.bin", "cos-93-amd-sev.bin", "cos-101-amd-sev.bin", "rhel8-uefi.bin", "sb_cert_eventlog",
		"confidential-gke-debug-251000_eventlog.bin", "eventlogwithsp800155.bin"}
	untold := []string{"arch-linux-workstation.bin", "crypto_agile_eventlog"}
	s := newScene(t)
	accepted, refused := 0, 0
	all := allLogs(t)
	for name, log := range all {
		base := filepath.Base(name)
		if slices.Contains(older, base) {
			s.ev.TCGLog = log
			if got := outcome(vtpm.Appraise(s.ev, s.want, s.now).Checks, "tpm.tcg-log"); got != check.Fail {
				t.Errorf("%s: %q", name, got)
			}
			refused++
			continue
		}
		s.boot(t, log)
		r := vtpm.Appraise(s.ev, s.want, s.now)
		if f := r.Checks.Failed(); len(f) > 0 || outcome(r.Checks, "tpm.tcg-log") != check.Pass {
			t.Errorf("%s: %+v", name, f)
		}
		state, told := r.Claims["tpm.secure-boot"]
		if told == slices.Contains(untold, base) || told && state != slices.Contains(on, base) {
			t.Errorf("%s: Secure Boot is %v (%v)", name, state, r.Claims["tpm.secure-boot-untold"])
		}
		accepted++
	}
	if accepted < 25 || refused < 5 {
		t.Errorf("%d logs accepted, %d refused", accepted, refused)
	}
	t.Logf("vectors of firmware logs: %d accepted, %d of the older format refused", accepted, refused)
}

func TestRealCommandLines(t *testing.T) {
	source := string(read(t, tpmToolsModule(t), "internal", "test", "test_data.go"))
	s := newScene(t)
	n := 0
	for _, m := range regexp.MustCompile(`(?m)^\s+(\w+)Cmdline\s+= (".*")$`).FindAllStringSubmatch(source, -1) {
		file := regexp.MustCompile(`go:embed (\S+)\s+` + m[1] + `EventLog`).FindStringSubmatch(source)
		want, err := strconv.Unquote(m[2])
		if file == nil || err != nil {
			t.Fatalf("%s: %v", m[1], err)
		}
		s.boot(t, read(t, tpmToolsModule(t), "internal", "test", file[1]))
		r := vtpm.Appraise(s.ev, s.want, s.now)
		if got := r.Claims["tpm.kernel-command-line"]; got != strings.TrimSuffix(want, "\x00") {
			t.Errorf("%s: %v (%v)", m[1], got, r.Claims["tpm.kernel-command-line-untold"])
		}
		n++
	}
	if n < 4 {
		t.Errorf("%d command lines", n)
	}
}

// go-eventlog is asked for its opinion on the logs of known machines. Where it
// can tell, it tells the same.
func TestFirmwareLogsSecondOpinion(t *testing.T) {
	s := newScene(t)
	same := 0
	for name, log := range allLogs(t) {
		p, err := vtpm.ParseTCGLog(log)
		if err != nil {
			continue
		}
		var mrs []register.MR
		for i, v := range p.Replay() {
			mrs = append(mrs, register.PCR{Index: i, Digest: bytes.Clone(v[:]), DigestAlg: register.HashSHA256.CryptoHash()})
		}
		events, err := tcg.ParseAndReplay(log, mrs, tcg.ParseOpts{})
		if err != nil {
			// It takes an informative event without a PCR for padding.
			t.Logf("%s: go-eventlog: %v", name, err)
			continue
		}
		s.boot(t, log)
		claims := vtpm.Appraise(s.ev, s.want, s.now).Claims
		state, err := extract.ParseSecurebootState(events, extract.TPMRegisterConfig)
		got, told := claims["tpm.secure-boot"]
		if err != nil {
			// It reads the certificates in the key databases too, some of which
			// crypto/x509 refuses.
			t.Logf("%s: go-eventlog: %v", name, err)
		} else if told && got != state.Enabled {
			t.Errorf("%s: Secure Boot %v, go-eventlog: %+v, %v", name, got, state, err)
		}
		if grub, err := extract.GrubStateFromTPMLog(register.HashSHA256.CryptoHash(), events); err == nil {
			kernel, err := extract.LinuxKernelStateFromGRUB(grub)
			if err != nil || claims["tpm.kernel-command-line"] != strings.TrimSuffix(kernel.GetCommandLine(), "\x00") {
				t.Errorf("%s: command line %v, go-eventlog: %v, %v", name, claims["tpm.kernel-command-line"], kernel, err)
			}
		}
		same++
	}
	if same < 20 {
		t.Errorf("%d logs compared", same)
	}
	t.Logf("%d logs read alike", same)
}

// message is a protobuf message, by field number.
type message map[protowire.Number][][]byte

func parseMessage(t testing.TB, b []byte) message {
	t.Helper()
	out := message{}
	for len(b) > 0 {
		n, typ, k := protowire.ConsumeTag(b)
		if k < 0 {
			t.Fatal(protowire.ParseError(k))
		}
		b = b[k:]
		var v []byte
		switch typ {
		case protowire.BytesType:
			v, k = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			var u uint64
			u, k = protowire.ConsumeVarint(b)
			v = binary.BigEndian.AppendUint64(nil, u)
		default:
			k = protowire.ConsumeFieldValue(n, typ, b)
		}
		if k < 0 {
			t.Fatal(protowire.ParseError(k))
		}
		b = b[k:]
		out[n] = append(out[n], v)
	}
	return out
}

// gceQuotes are the quotes of one real machine, one for each bank.
func gceQuotes(t testing.TB, name string) map[string]vtpm.Evidence {
	t.Helper()
	m := parseMessage(t, read(t, tpmToolsModule(t), "internal", "test", "attestations", name))
	empty, err := vtpm.EncodeLog(nil)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]vtpm.Evidence{}
	for _, q := range m[2] {
		q := parseMessage(t, q)
		bank := parseMessage(t, q[3][0])
		ev := vtpm.Evidence{AKPublic: m[1][0], Quote: q[1][0], Signature: q[2][0], PCRs: map[int][]byte{}, EventLog: empty, TCGLog: m[3][0]}
		for _, entry := range bank[2] {
			e := parseMessage(t, entry)
			i := uint64(0)
			if len(e[1]) > 0 {
				i = binary.BigEndian.Uint64(e[1][0])
			}
			ev.PCRs[int(i)] = e[2][0] //nolint:gosec // 0 to 23
		}
		out[map[uint64]string{4: "SHA-1", 11: "SHA-256", 12: "SHA-384"}[binary.BigEndian.Uint64(bank[1][0])]] = ev
	}
	return out
}

func akName(t testing.TB, ev vtpm.Evidence) string {
	t.Helper()
	name, ok := vtpm.Appraise(ev, vtpm.Want{}, newScene(t).now).Claims["tpm.ak-name"].(string)
	if !ok {
		t.Fatal("the attestation key has no name")
	}
	return name
}

// Quotes of a real machine's vTPM, under its pinned key: all holds but the extra
// data, which was another verifier's.
func TestRealQuotes(t *testing.T) {
	now := newScene(t).now
	for _, file := range []string{"gce-cos-85-nonce9009.pb", "gce-cos-85-no-nonce.pb"} {
		all := gceQuotes(t, file)
		ev, ok := all["SHA-256"]
		if !ok {
			t.Fatalf("%s has quotes of %v", file, slices.Collect(maps.Keys(all)))
		}
		anchors, err := anchor.Vendor().WithAKs(anchor.Hypervisor, akName(t, ev))
		if err != nil {
			t.Fatal(err)
		}
		failed := func(ev vtpm.Evidence, anchors anchor.Set) []string {
			var ids []string
			for _, c := range vtpm.Appraise(ev, vtpm.Want{Anchors: anchors}, now).Checks.Failed() {
				ids = append(ids, c.ID)
			}
			return ids
		}
		if got := failed(ev, anchors); !slices.Equal(got, []string{"tpm.extra-data"}) {
			t.Fatalf("%s: failed %v", file, got)
		}
		r := vtpm.Appraise(ev, vtpm.Want{Anchors: anchors}, now)
		if r.Class != string(anchor.Hypervisor) || r.Simulated || r.Claims["tpm.ak-by"] != vtpm.AKByPin || r.Claims["tpm.secure-boot"] != true {
			t.Errorf("%s: %+v", file, r.Claims)
		}
		if line, _ := r.Claims["tpm.kernel-command-line"].(string); !strings.HasPrefix(line, "/syslinux/vmlinuz.A ") {
			t.Errorf("%s: command line %q", file, line)
		}
		for situation, row := range map[string]struct {
			spoil func(*vtpm.Evidence)
			by    string
		}{
			"one bit of the quote":     {func(ev *vtpm.Evidence) { ev.Quote[len(ev.Quote)-1] ^= 1 }, "tpm.signature"},
			"one bit of the signature": {func(ev *vtpm.Evidence) { ev.Signature[40] ^= 1 }, "tpm.signature"},
			"one bit of a PCR":         {func(ev *vtpm.Evidence) { ev.PCRs[7][0] ^= 1 }, "tpm.pcr-digest"},
			"one bit of the log":       {func(ev *vtpm.Evidence) { ev.TCGLog[120] ^= 1 }, "tpm.tcg-log"},
			"the quote of another bank": {func(ev *vtpm.Evidence) {
				o := gceQuotes(t, file)["SHA-1"]
				ev.Quote, ev.Signature = o.Quote, o.Signature
			}, "tpm.pcr-selection"},
			"another bank altogether": {func(ev *vtpm.Evidence) { *ev = gceQuotes(t, file)["SHA-1"] }, "tpm.pcr-selection"},
			"a PCR left out":          {func(ev *vtpm.Evidence) { delete(ev.PCRs, 3) }, "tpm.pcr-selection"},
		} {
			e := gceQuotes(t, file)["SHA-256"]
			row.spoil(&e)
			if got := failed(e, anchors); !slices.Contains(got, row.by) {
				t.Errorf("%s: failed %v, want %s", situation, got, row.by)
			}
		}
		if got := failed(ev, anchor.Vendor()); !slices.Contains(got, "tpm.ak-credential") {
			t.Errorf("key that nobody pinned: failed %v", got)
		}
	}
}

// A real quote over the SHA-1 bank, by a key whose signatures are of SHA-1.
func TestRealSHA1QuoteIsRefused(t *testing.T) {
	var dump struct {
		AK    struct{ Public []byte }
		Quote struct{ Quote, Signature []byte }
		Log   struct{ Raw []byte }
	}
	if err := json.Unmarshal(read(t, attestationModule(t), "attest", "testdata", "windows_gcp_shielded_vm.json"), &dump); err != nil {
		t.Fatal(err)
	}
	s := newScene(t)
	s.ev.AKPublic, s.ev.Quote, s.ev.Signature, s.ev.TCGLog = dump.AK.Public, dump.Quote.Quote, dump.Quote.Signature, dump.Log.Raw
	l := vtpm.Appraise(s.ev, s.want, s.now).Checks
	for _, id := range []string{"tpm.pcr-selection", "tpm.tcg-log", "tpm.ak-credential"} {
		if outcome(l, id) != check.Fail {
			t.Errorf("%s: %q", id, outcome(l, id))
		}
	}
}
