package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/docs/pages"
	"github.com/coffer-run/coffer/internal/loopback"
)

var fence = regexp.MustCompile("(?ms)^```(sh|json)\n(.*?)^```$")

// page is docs/verifier.md, typed in its order into one folder.
type page struct {
	t        *testing.T
	dir      string
	shell    []string
	document string
	// addr is where the daemon answers, in place of the documented address.
	addr string
	env  []string
	// script has what the test types; other commands of the page are another's.
	script *pages.Script
}

const documented = "127.0.0.1:7441"

func openPage(t *testing.T, script *pages.Script) *page {
	for _, tool := range []string{"openssl", "curl", "jq", "base64", "bash", "od", "dd"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	text, err := os.ReadFile("../../docs/verifier.md")
	if err != nil {
		t.Fatal(err)
	}
	p := &page{t: t, dir: t.TempDir(), script: script}
	for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
		if m[1] == "json" {
			p.document = m[2]
		} else {
			p.shell = append(p.shell, m[2])
		}
	}
	if len(p.shell) != 6 || p.document == "" {
		t.Fatalf("the page has %d fences of commands: this test follows six, and a configuration", len(p.shell))
	}
	p.addr = loopback.Addr(t)
	p.bash(p.shell[0])
	p.bash(p.shell[1])
	if err := os.Mkdir(filepath.Join(p.dir, "policies"), 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *page) bash(commands string) {
	p.t.Helper()
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", strings.ReplaceAll(commands, documented, p.addr))
	cmd.Dir, cmd.Env = p.dir, append(os.Environ(), p.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Fatalf("%s\n%v\n%s", commands, err, out)
	}
	p.script.TypedFence("docs/verifier.md", commands)
}

func (p *page) read(name string) string {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.dir, name))
	if err != nil {
		p.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func (p *page) write(name string, b []byte) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), b, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// start runs a built program in the page's folder, with the page's configuration
// and what change makes of it, until the test ends.
func (p *page) start(program string, change func(c map[string]any)) {
	p.t.Helper()
	var c map[string]any
	if err := json.Unmarshal([]byte(strings.ReplaceAll(p.document, documented, p.addr)), &c); err != nil {
		p.t.Fatal(err)
	}
	change(c)
	b, err := json.Marshal(c)
	if err != nil {
		p.t.Fatal(err)
	}
	p.write("verifier.json", b)
	out := filepath.Join(p.dir, "log.txt")
	f, err := os.Create(out)
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	cmd := exec.Command(built(p.t, program), "--config", "verifier.json")
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, f, f
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.env = append(p.env, "VERIFIER="+strconv.Itoa(cmd.Process.Pid))
	p.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || p.t.Failed() {
			p.t.Errorf("the daemon: %v\n%s", err, p.read("log.txt"))
		}
	})
	p.wait("serving")
}

// wait returns once the daemon's log says something.
func (p *page) wait(says string) {
	p.t.Helper()
	for deadline := time.Now().Add(time.Minute); !strings.Contains(p.read("log.txt"), `"`+says+`"`); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("the log does not say %q: %s", says, p.read("log.txt"))
		}
	}
}

// built returns a program as make builds it, or builds it.
func built(t *testing.T, program string) string {
	t.Helper()
	if dir := os.Getenv("COFFER_BIN"); dir != "" {
		path := filepath.Join(dir, program)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		return path
	}
	path := filepath.Join(t.TempDir(), program)
	if out, err := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", path, "../"+program).CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", program, err, out)
	}
	return path
}

// TestDocumentedByItself types what docs/verifier.md says of a whole machine. What
// the page leaves to the attester is a simulation's.
func TestDocumentedByItself(t *testing.T) {
	p := openPage(t, pages.For(t, "cmd/coffer-verifier-simulated TestDocumentedByItself"))
	simulation, tpm := mint(t, p.dir)
	p.start("coffer-verifier-simulated", func(c map[string]any) {
		c["simulationDir"], c["id"] = simulation, c["id"].(string)+".simulated"
	})
	hc, err := daemon.TLS{CA: filepath.Join(p.dir, "ca.pem"), Cert: filepath.Join(p.dir, "party.pem"), Key: filepath.Join(p.dir, "party.key")}.HTTPClient(daemon.RoleVerifier)
	if err != nil {
		t.Fatal(err)
	}
	client := verifierv1connect.NewVerifierServiceClient(hc, "https://"+p.addr)
	credential := enrol(t, client, tpm)
	p.bash(p.shell[2])
	nonce := p.read("nonce.txt")
	e, err := machine(t, p.dir, tpm, credential).Attest("verifier.example.simulated", nonce, "attempt-1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.JSON()
	if err != nil {
		t.Fatal(err)
	}
	p.write("evidence.json", b)
	p.bash(p.shell[3])

	if got := p.read("status.txt"); got != "affirming\naffirming\naffirming" {
		t.Errorf("status %q: %s", got, p.read("answer.json"))
	}
	keys, err := receipt.ParseKeys("verifier.example.simulated", []byte(p.read("verifier.jwks")))
	if err != nil {
		t.Fatal(err)
	}
	var r receipt.Result
	if err := keys.Open(verifier.TypeCheck, p.read("result.jwt"), &r); err != nil {
		t.Fatal(err)
	}
	if r.Nonce != nonce || r.Audience != "party.example" || !r.Simulated || len(r.AllChecks().Failed()) > 0 {
		t.Errorf("nonce %s, audience %s, simulated %v, failed %v", r.Nonce, r.Audience, r.Simulated, r.AllChecks().Failed())
	}
}

// TestDocumentedDevices types what the page says of devices by themselves: the
// program with the vendors' roots, and a real processor's report.
func TestDocumentedDevices(t *testing.T) {
	const dir = "snp/milan-v2-vcek/"
	report := vectortest.Read(t, dir+"report.bin")
	p := openPage(t, pages.For(t, "cmd/coffer-verifier-simulated TestDocumentedDevices"))
	p.start("coffer-verifier", func(map[string]any) {})
	p.write("report.bin", report)
	p.write("report-data.bin", report[0x50:0x90])
	for _, name := range []string{"vek.pem", "ask.pem", "ark.pem"} {
		p.write(name, vectortest.Read(t, dir+name))
	}
	p.bash(p.shell[4])
	p.wait("configuration read")
	p.bash(p.shell[5])
	if got := p.read("devices-status.txt"); got != "affirming" {
		t.Fatalf("status %q: %s", got, p.read("devices-answer.json"))
	}
	token := p.read("devices.jwt")
	body, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var r verifier.DevicesResult
	if err := json.Unmarshal(body, &r); err != nil {
		t.Fatal(err)
	}
	if r.Simulated || r.Named.SNPReportData != hex.EncodeToString(report[0x50:0x90]) || r.Submods["cpu0"].Claims["snp.product"] != "Milan" {
		t.Errorf("the result says %s", body)
	}
	// Of another report, the same question is refused.
	report[0x50] ^= 1
	p.write("report-data.bin", report[0x50:0x90])
	p.bash(p.shell[5])
	if got := p.read("devices-status.txt"); got != "contraindicated" {
		t.Errorf("other report data: status %q", got)
	}
}

func enrol(t *testing.T, c verifierv1connect.VerifierServiceClient, tpm *vtpmtest.TPM) string {
	t.Helper()
	var begun *connect.Response[verifierv1.BeginEnrolmentResponse]
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if begun, err = c.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: tpm.EKChain, AkPublic: tpm.AKPublic})); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	secret, err := tpm.Activate(begun.Msg.GetCredentialBlob(), begun.Msg.GetEncryptedSecret())
	if err != nil {
		t.Fatal(err)
	}
	done, err := c.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{Enrolment: begun.Msg.GetEnrolment(), Secret: secret}))
	if err != nil {
		t.Fatal(err)
	}
	return done.Msg.GetAkCredential()
}

// mint makes a simulation, and a TPM that it trusts.
func mint(t *testing.T, dir string) (string, *vtpmtest.TPM) {
	t.Helper()
	simulation := filepath.Join(dir, "simulation")
	if err := simulate.Mint(simulation, simulate.Options{Fast: true}); err != nil {
		t.Fatal(err)
	}
	return simulation, trust(t, simulation)
}
