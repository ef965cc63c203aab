package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/internal/docs/pages"
	"github.com/coffer-run/coffer/internal/loopback"
	"github.com/coffer-run/coffer/internal/stack"
)

// shell is a shell on the stack, with the programs that make builds.
func (n *node) shell(t *testing.T, s *pages.Script) *pages.Shell {
	t.Helper()
	sh := pages.NewShell(t, s, n.bin+":"+os.Getenv("COFFER_TOOLS"))
	sh.Env = append(sh.Env, "COFFER_DIR="+n.dir, "COFFER_SESSIONS="+t.TempDir(), "NO_COLOR=1")
	return sh
}

// become lets somebody else type, who is signed in where they were before.
func become(t *testing.T, sh *pages.Shell, who string) {
	t.Helper()
	sh.Env = append(sh.Env, "COFFER_SESSIONS="+filepath.Join(sh.Dir, "sessions-"+who))
}

// given puts into the shell's folder what its reader was given by others: keys of
// verifier, broker and log, the simulation's roots, and who approves.
func (n *node) given(t *testing.T, sh *pages.Shell) {
	t.Helper()
	for file, from := range map[string]string{
		"verifier.jwks": filepath.Join(n.dir, "verifier", "jwks.json"), "broker.jwks": filepath.Join(n.dir, "broker", "jwks.json"),
		"log.vkey": filepath.Join(n.dir, "broker", "log.vkey"), "approvers": n.approvers(t),
	} {
		copyFile(t, from, filepath.Join(sh.Dir, file))
	}
	if err := os.CopyFS(filepath.Join(sh.Dir, "roots"), os.DirFS(filepath.Join(n.dir, "simulation", "roots"))); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// signIn types a `coffer login`, and signs a person in with the code that it shows,
// as they would in a browser.
func (n *node) signIn(t *testing.T, sh *pages.Shell, c pages.Command, who string) {
	t.Helper()
	e, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	password, err := os.ReadFile(filepath.Join(n.dir, "people", who+".password"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(e.CA())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	r := sh.Start(c)
	shown := r.Says(`To sign in open (\S+)\nand enter the code (\S+)\n`)
	form := url.Values{"user_code": {shown[2]}, "username": {who}, "password": {strings.TrimSpace(string(password))}, "action": {"allow"}}
	res, err := (&http.Client{Transport: transport}).PostForm(shown[1], form)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_ = res.Body.Close()
	if out, code := r.End(); code != 0 || res.StatusCode != http.StatusOK || !strings.Contains(out, "signed in as "+who+"\n") {
		t.Fatalf("%s: %q: %s, exit code %d: %s", c.At(), c.Text, res.Status, code, out)
	}
}

// onlySimulated is what coffer-verify says last of a good record of a simulated machine
// to those who have not named the simulation's roots: nothing else is wrong.
const onlySimulated = `^FAILED: the record is not what it says: snp\.chain, policy\.snp\.require, evidence\.simulated$`

// TestReadme types what the README says by hand, on a stack that is up by its first
// command, and what other pages say of such a job, its files and its log.
func TestReadme(t *testing.T) {
	n := need(t)
	s := pages.For(t, "internal/e2e TestReadme")
	sh := n.shell(t, s)
	dir := sh.Dir
	n.given(t, sh)
	root, err := pages.Root()
	if err != nil {
		t.Fatal(err)
	}
	shm, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(shm) })

	// Assets of this test's own, in the places that the pages name.
	const asset = "by-hand"
	here := []string{
		"build/bin", n.bin, "build/images", os.Getenv("COFFER_IMAGES"), "/var/lib/coffer", n.dir, "/dev/shm", shm,
		"/usr/share/datasets/fashion-mnist", "/usr/share/datasets/fashion-mnist",
		"examples/fashion-mnist-numpy/job.yaml", filepath.Join(dir, "job.yaml"),
		"fashion-mnist", asset, "bundle.json", filepath.Join(dir, "bundle.json"),
	}
	job, err := os.ReadFile(filepath.Join(root, "examples/fashion-mnist-numpy/job.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "job.yaml"), []byte(strings.NewReplacer(here...).Replace(string(job))), 0o600); err != nil {
		t.Fatal(err)
	}
	sh.Here, sh.Dir = strings.NewReplacer(here...), root
	for _, c := range s.Commands("README.md", "") {
		says := ""
		switch {
		case strings.Contains(c.Text, "coffer submit"):
			says = "^succeeded"
		case strings.Contains(c.Text, "coffer-verify"):
			says = "^VERIFIED"
		}
		out := sh.Must(c, 0, says)
		if strings.Contains(c.Text, "coffer submit") {
			sh.Vars["JOB"] = jobID.FindString(out)
		}
	}
	sh.Dir = dir

	n.witnessedLog(t, sh, s.Commands("docs/formats/log.md", ""))

	checkpoints := filepath.Join(n.dir, "demo", asset+"-numpy-checkpoints")
	sh.Here = strings.NewReplacer("/srv/checkpoints", checkpoints, "/srv/sealed", filepath.Join(n.dir, "demo"), "my-checkpoints", asset+"-numpy-checkpoints", "tuned", asset+"-tuned")
	for _, c := range s.Commands("docs/checkpoints.md", "") {
		says := ""
		if strings.Contains(c.Text, "coffer submit") {
			says = "^succeeded"
		}
		sh.Must(c, 0, says)
	}

	const model = asset + "-numpy-model"
	sh.Here = strings.NewReplacer("file:///srv/sealed/weights-2", "file://"+filepath.Join(n.dir, "demo", model+"-2"), "file:///srv/sealed/weights", "file://"+filepath.Join(n.dir, "demo", model), "fashion-weights", model)
	for _, c := range s.Commands("docs/keystores.md", "") {
		says := ""
		switch {
		case strings.Contains(c.Text, "coffer submit"):
			says = "^succeeded"
		case strings.Contains(c.Text, "--user operator"):
			// Signed in for this one alone: who signed in last acts at the broker.
			before := sh.Env
			become(t, sh, "operator")
			login := exec.Command(filepath.Join(n.bin, "coffer"), "login", "--user", "operator", "--password-file", filepath.Join(n.dir, "people", "operator.password"))
			login.Env = sh.Env
			if out, err := login.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			sh.Must(c, 0, "0 moved to a newer version")
			sh.Env = before
			continue
		}
		sh.Must(c, 0, says)
	}

	// Last: it takes the image away that other tests use, and gives it back.
	sh.Here = strings.NewReplacer("build/images", os.Getenv("COFFER_IMAGES"))
	images := s.Commands("docs/images.md", "")
	t.Cleanup(func() { n.must(t, "image", "import", filepath.Join(os.Getenv("COFFER_IMAGES"), "numpy.tar")) })
	sh.Must(images[0], 0, "^imported coffer.local/numpy:latest$")
	sh.Must(images[1], 0, "^coffer.local/numpy:latest +sha256:.* yes$")
	sh.Must(images[2], 0, "^removed coffer.local/numpy:latest$")
	if out := n.must(t, "image", "ls"); strings.Contains(out, "numpy") {
		t.Errorf("the image is still there:\n%s", out)
	}
}

// witnessedLog types docs/formats/log.md: a witness by its commands and one more,
// and what they cosign checked with a job's bundle.
func (n *node) witnessedLog(t *testing.T, sh *pages.Shell, commands []pages.Command) {
	t.Helper()
	copyFile(t, filepath.Join(sh.Dir, "bundle.json"), filepath.Join(sh.Dir, "job.bundle"))
	key := regexp.MustCompile(`witness\d*\.example\.org\+\S+`)
	type witness struct {
		Key string `json:"key"`
		URL string `json:"url"`
	}
	var witnesses []witness
	keys := ""
	for i := range 2 {
		// The page's own witness, and one like it.
		addr := fmt.Sprintf("127.0.0.1:%d", n.portBase+loopback.Ports-1-i)
		other := ""
		if i > 0 {
			other = fmt.Sprint(i)
		}
		sh.Here = strings.NewReplacer("witness.example.org", "witness"+other+".example.org", "witness.key", "witness"+other+".key", "seen", "seen"+other, "127.0.0.1:7450", addr)
		w := witness{key.FindString(sh.Must(commands[0], 0, "")), "http://" + addr}
		r := sh.Start(commands[1])
		t.Cleanup(func() {
			r.Interrupt()
			r.End()
		})
		witnesses, keys = append(witnesses, w), keys+w.Key+"\n"
	}
	sh.Here = strings.NewReplacer()
	list, err := json.Marshal(witnesses)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(n.dir, "witnesses.json")
	for path, b := range map[string][]byte{config: list, filepath.Join(sh.Dir, "witnesses"): []byte(keys)} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		_ = os.Remove(config)
		n.must(t, "restart", "coffer-broker")
	})
	n.must(t, "restart", "coffer-broker")
	// The next entry is signed by all.
	n.must(t, "assets", "create", "by-hand-logged", "--kind", "checkpoints")
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		out, err := n.coffer("log", "verify", "--witness-keys", filepath.Join(sh.Dir, "witnesses"), "--witnesses", "2")
		if err == nil && !strings.Contains(out, "not witnessed") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("two witnesses do not cosign: %s", out)
		}
	}
	says := []string{"chained and in the tree", "release", "", "^ *pass +log.witness "}
	for i, c := range commands[2:] {
		sh.Must(c, 0, says[i])
	}
}

// quickJob reads two inputs and prints what the pages show.
const quickJob = `apiVersion: coffer.run/v1
name: quick-start
image: coffer.local/numpy:latest
command: [/usr/bin/python3, -c, "import os; print('{\"step\": 1, \"loss\": 0.5}'); print(len(open('/inputs/model/model.safetensors', 'rb').read()), os.environ['EPOCHS'])"]
env: {EPOCHS: "1"}
inputs:
  - {name: model, asset: quick-weights, uri: "file://%s", mount: /inputs/model}
  - {name: data, asset: data, uri: "file://%s", mount: /inputs/data}
resources: {cpu: 500m, memory: 256Mi, gpus: 0}
maxDuration: 2m
attestationPolicy: simulation
`

// TestQuickStarts types the quick starts of owner, engineer, reviewer and scheduler
// in the order in which they need each other, and docs/report.md.
func TestQuickStarts(t *testing.T) {
	n := need(t)
	s := pages.For(t, "internal/e2e TestQuickStarts")
	sh := n.shell(t, s)
	n.given(t, sh)
	p := n.people(t, "owner", "bob")
	if err := os.Mkdir(filepath.Join(sh.Dir, "weights"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sh.Dir, "weights", "model.safetensors"), n.weights, 0o600); err != nil {
		t.Fatal(err)
	}
	sh.Here = strings.NewReplacer("base-weights", "quick-weights", "--asset fashion-mnist", "--asset data", "~/.ssh/id_ed25519", filepath.Join(n.dir, "people", "alice.ssh"))

	owner := s.Commands("docs/quickstart-owner.md", "")
	become(t, sh, "owner")
	n.signIn(t, sh, owner[0], "owner")
	sh.Must(owner[1], 0, "")
	sh.Must(owner[2], 0, "2 of weights-approvers")

	engineer := s.Commands("docs/quickstart-engineer.md", "")
	job := filepath.Join(sh.Dir, "job.yaml")
	next := func(code int, says string) string {
		t.Helper()
		c := engineer[0]
		engineer = engineer[1:]
		return sh.Must(c, code, says)
	}
	become(t, sh, "engineer")
	n.signIn(t, sh, engineer[0], "engineer")
	engineer = engineer[1:]
	next(0, "^wrote job.yaml")
	if err := os.WriteFile(job, fmt.Appendf(nil, quickJob, filepath.Join(sh.Dir, "sealed"), n.data), 0o600); err != nil {
		t.Fatal(err)
	}
	next(0, "latest")
	next(0, "job.yaml is a job file")
	next(0, "sha384:[0-9a-f]{96}")
	sh.Vars["GRANT"] = anyGrant.FindString(next(0, "grant-"))

	become(t, sh, "alice")
	n.signIn(t, sh, owner[3], "alice")
	sh.Must(owner[4], 0, sh.Vars["GRANT"])
	sh.Must(owner[5], 0, "fine-tune for the safety evals")
	sh.Must(owner[6], 0, "")
	p.approve(t, "bob", sh.Vars["GRANT"])
	p.must(t, "owner", "grant", "approve", sh.Vars["GRANT"], "--consent")

	become(t, sh, "engineer")
	out := next(0, "^succeeded")
	first := jobID.FindString(out)
	sh.Vars["JOB"] = first
	next(0, "^state +succeeded$")
	next(0, "^succeeded")
	next(0, fmt.Sprintf("^%d 1$", len(n.weights)))
	next(0, "")
	if b, err := os.ReadFile(filepath.Join(sh.Dir, "train.log")); err != nil || !strings.Contains(string(b), `"loss": 0.5`) {
		t.Errorf("the downloaded log is %q, %v", b, err)
	}
	next(0, "run")
	next(0, `~ env\[0\]`)
	again := jobID.FindString(strings.ReplaceAll(next(0, ""), first, ""))
	sh.Vars["JOB"] = again
	next(0, "")
	if got := n.wait(t, again, "ended", ended); got.State != "cancelled" {
		t.Errorf("the job that was retried and cancelled is %+v", got)
	}

	become(t, sh, "owner")
	sh.Must(owner[7], 0, "")
	if out := p.must(t, "owner", "grant", "show", sh.Vars["GRANT"]); !strings.Contains(out, "revoked") {
		t.Errorf("the grant is not revoked:\n%s", out)
	}

	n.schedules(t, s)

	// What the job left behind, for a reviewer.
	sh.Vars["JOB"] = first
	copyFile(t, n.evidence(t, again), filepath.Join(sh.Dir, "before.json"))
	for i, says := range []string{"", "quick-start", "^VERIFIED", "", "outcome", "", "^report.html: verified: "} {
		sh.Must(s.Commands("docs/report.md", "")[i], 0, says)
	}
	reviewer := s.Commands("docs/quickstart-reviewer.md", "")
	sh.Must(reviewer[0], 1, onlySimulated)
	if err := os.Remove(filepath.Join(sh.Dir, "report.html")); err != nil {
		t.Fatal(err)
	}
	sh.Must(reviewer[1], 0, "^VERIFIED")
	for _, page := range []string{"report.html", "page.html"} {
		if b, err := os.ReadFile(filepath.Join(sh.Dir, page)); err != nil || !strings.Contains(string(b), first) {
			t.Errorf("%s is not about the job: %v", page, err)
		}
	}
}

// schedules types docs/quickstart-scheduler.md.
func (n *node) schedules(t *testing.T, s *pages.Script) {
	t.Helper()
	sh := n.shell(t, s)
	copyFile(t, n.small(t, "quick-scheduled", "print('done')", ""), filepath.Join(sh.Dir, "job.yaml"))
	for _, c := range s.Commands("docs/quickstart-scheduler.md", "") {
		out := sh.Must(c, 0, "")
		if strings.HasPrefix(c.Text, "JOB=") || strings.HasPrefix(c.Text, "PLAN=") {
			continue
		}
		for l := range strings.Lines(out) {
			if !json.Valid([]byte(l)) && !json.Valid([]byte(out)) {
				t.Errorf("%s: %q prints what is no JSON: %s", c.At(), c.Text, out)
			}
		}
	}
	if !strings.HasPrefix(sh.Vars["PLAN"], "sha384:") || n.status(t, sh.Vars["JOB"]).State != "succeeded" {
		t.Errorf("plan and job are %v", sh.Vars)
	}
}

// TestOperations types docs/operations.md where it needs no confidential hardware.
func TestOperations(t *testing.T) {
	n := need(t)
	s := pages.For(t, "internal/e2e TestOperations")
	sh := n.shell(t, s)
	n.given(t, sh)
	config := filepath.Join(n.dir, "config")
	sh.Here = strings.NewReplacer("/etc/coffer/keystore.json", filepath.Join(config, "coffer-keystore-local.json"), "/etc/coffer/cofferd.json", filepath.Join(config, "cofferd.json"),
		"/etc/coffer/endorsements", filepath.Join(n.dir, "verifier", "endorsements"))
	copyFile(t, n.small(t, "check", "print('done')", ""), filepath.Join(sh.Dir, "check.yaml"))
	for _, c := range s.Commands("docs/operations.md", "") {
		switch {
		case strings.HasPrefix(c.Text, "coffer submit"):
			sh.Vars["JOB"] = jobID.FindString(sh.Must(c, 0, "^succeeded"))
		case strings.HasPrefix(c.Text, "coffer-verify"):
			sh.Must(c, 1, onlySimulated)
		case strings.HasPrefix(c.Text, "coffer ps --watch"):
			r := sh.Start(c)
			r.Says(sh.Vars["JOB"])
			r.Interrupt()
			if out, code := r.End(); code != 0 && code != int(128+syscall.SIGINT) && code != -1 {
				t.Errorf("%s: exit code %d after Ctrl-C: %s", c.At(), code, out)
			}
		default:
			says := map[string]string{
				"coffer policy": "^tpm PCRs to be listed +4 8 9 11 12 13$", "runsc nvproxy": `^\d+\.\d+\.\d+`, "coffer doctor": "^memory|^verifier +ok",
				"coffer-keystore-local status": "enabled", "coffer log": "chained", "coffer why": "^state +succeeded$", "coffer restart": "nothing to restart",
			}
			want := ""
			for begin, text := range says {
				if strings.HasPrefix(c.Text, begin) {
					want = text
				}
			}
			sh.Must(c, 0, want)
		}
	}
}

// TestSigningIn types what docs/access.md says of signing in.
func TestSigningIn(t *testing.T) {
	n := need(t)
	s := pages.For(t, "internal/e2e TestSigningIn")
	e, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	sh := n.shell(t, s)
	sh.Here = strings.NewReplacer("https://id.example.org", e.Issuer(), "/var/lib/coffer", n.dir)
	for _, c := range s.Commands("docs/access.md", "") {
		switch {
		case strings.Contains(c.Text, "--password-file"):
			sh.Must(c, 0, "^signed in as alice$")
		case strings.HasPrefix(c.Text, "coffer login"):
			n.signIn(t, sh, c, "engineer")
		case strings.HasPrefix(c.Text, "coffer whoami"):
			sh.Must(c, 0, "^engineer ")
		default:
			sh.Must(c, 0, "")
		}
	}
}
