package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/internal/docs/pages"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// token is a SoftHSM token of an owner's, with a key named weights.
type token struct{ program, dir string }

func (n *node) token(t *testing.T) token {
	t.Helper()
	if _, err := os.Stat(softHSM); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("no SoftHSM")
	}
	k := token{filepath.Join(n.bin, "coffer-keystore-pkcs11"), t.TempDir()}
	config, err := json.Marshal(map[string]any{"store": "hsm", "module": softHSM, "token": "coffer", "pinFile": filepath.Join(k.dir, "pin"), "keys": []string{"weights"}})
	if err := errors.Join(err,
		os.Mkdir(filepath.Join(k.dir, "tokens"), 0o700),
		os.WriteFile(filepath.Join(k.dir, "softhsm2.conf"), []byte("directories.tokendir = "+filepath.Join(k.dir, "tokens")+"\nlog.level = ERROR\n"), 0o600),
		os.WriteFile(filepath.Join(k.dir, "pin"), []byte("482915\n"), 0o600),
		os.WriteFile(filepath.Join(k.dir, "pkcs11.json"), config, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	k.run(t, "softhsm2-util", "--init-token", "--free", "--label", "coffer", "--so-pin", "1234567890", "--pin", "482915")
	k.owner(t, "generate")
	return k
}

func (k token) run(t *testing.T, program string, args ...string) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(k.dir, "softhsm2.conf"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", program, strings.Join(args, " "), err, out)
	}
}

// owner does something to the key, in the token and past coffer's services.
func (k token) owner(t *testing.T, what string) {
	t.Helper()
	k.run(t, k.program, "--config", filepath.Join(k.dir, "pkcs11.json"), what, "weights")
}

// documented runs the commands of a section of docs/keystores.md over its
// configuration, both changed as replace says.
func (n *node) documented(t *testing.T, script *pages.Script, section, file, dir string, replace *strings.Replacer) {
	t.Helper()
	page, err := os.ReadFile("../../docs/keystores.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(page), "\n## "+section+"\n")
	text, _, _ = strings.Cut(text, "\n## ")
	config := regexp.MustCompile("(?ms)^```json\n(.*?)^```$").FindStringSubmatch(text)
	commands := regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindStringSubmatch(text)
	if !found || config == nil || commands == nil {
		t.Fatalf("docs/keystores.md has no section %s with a configuration and commands", section)
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(replace.Replace(config[1])), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("bash", "-euc", replace.Replace(commands[1]))
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+n.bin+":"+os.Getenv("PATH"), "COFFER_DIR="+n.dir, "NO_COLOR=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", commands[1], err, out)
	}
	script.TypedFence("docs/keystores.md", commands[1])
}

// TestKeyStoreOfAnOwner trains from weights whose key only a token can open. Its
// owner gives the key, takes it back, also from a job that runs, and makes another
// version of it.
func TestKeyStoreOfAnOwner(t *testing.T) {
	n := need(t)
	k := n.token(t)
	if _, err := os.Stat(filepath.Join(n.dir, "broker", "keystore", "keys.json")); err != nil {
		t.Errorf("the stack has no key store of its own: %v", err)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "broker", "kek.key")); err == nil {
		t.Error("the stack has a key-encryption key outside of a key store")
	}

	program, err := os.ReadFile(k.program)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(program)
	secret, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(secret) })
	if err := os.WriteFile(filepath.Join(secret, "model.safetensors"), n.weights, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(filepath.Join(n.dir, "keystores", "hsm.json")); err != nil {
			t.Error(err)
		}
		n.must(t, "restart", "coffer-broker")
	})
	sealed := filepath.Join(n.dir, "hsm-sealed")
	n.documented(t, pages.For(t, "internal/e2e TestKeyStoreOfAnOwner"), "In the stack", "hsm.json", secret, strings.NewReplacer(
		"/usr/local/bin/coffer-keystore-pkcs11", k.program, "the output of sha256sum", hex.EncodeToString(sum[:]), "/etc/coffer", k.dir, "/var/lib/coffer", n.dir,
		"--out sealed", "--out "+sealed, "--asset frontier-weights", "--asset hsm-model",
	))
	if err := os.Remove(filepath.Join(secret, "model.safetensors")); err != nil {
		t.Fatal(err)
	}
	if out := n.must(t, "assets", "show", "hsm-model"); !regexp.MustCompile(`(?m)^key store +hsm$`).MatchString(out) {
		t.Errorf("the asset's key store is not shown:\n%s", out)
	}

	job := n.jobFile(t, "hsm", func(s string) string {
		return strings.NewReplacer("asset: model\n", "asset: hsm-model\n", "file://"+n.model+"\n", "file://"+sealed+"\n", "maxDuration: 30m", "maxDuration: 10m").Replace(s)
	})
	n.must(t, "grant", "create", "--plan", n.planDigest(t, job), "--asset", "data", "--asset", "hsm-model", "--asset", "ckpt", "--allow-simulated", "--releases", "3")
	run := func(t *testing.T) status {
		t.Helper()
		return n.wait(t, n.submit(t, job), "ended", ended)
	}
	if s := run(t); s.State != "succeeded" {
		t.Fatalf("with the key in the token: %+v", s)
	}

	// A job that is running, of an owner who wants none to run on.
	n.must(t, "assets", "policy", "hsm-model", "--stop-at-key-disabled")
	sleeps := n.jobFile(t, "hsm-sleeps", func(s string) string {
		return strings.NewReplacer("asset: model\n", "asset: hsm-model\n", "file://"+n.model+"\n", "file://"+sealed+"\n", trains, `[/usr/bin/python3, -c, "import time; time.sleep(300)"]`).Replace(s)
	})
	n.must(t, "grant", "create", "--plan", n.planDigest(t, sleeps), "--asset", "data", "--asset", "hsm-model", "--asset", "ckpt", "--allow-simulated", "--releases", "1")
	id := n.submit(t, sleeps)
	n.wait(t, id, "running", running)

	k.owner(t, "disable")
	began := time.Now()
	n.gone(t, id, time.Minute)
	t.Logf("a running job is gone %s after its key was disabled", time.Since(began).Round(time.Millisecond))
	if s := n.wait(t, id, "ended", ended); s.State != "failed" || !strings.Contains(s.Message, "key-disabled") {
		t.Errorf("the key of a running job is disabled: %+v", s)
	}
	if o, _ := n.stopOf(t, id); !strings.Contains(o.Stop.By, "key-disabled") {
		t.Errorf("the evidence does not say why it was stopped: %+v", o)
	}

	began = time.Now()
	s := run(t)
	t.Logf("refused %s after it was submitted: %s", time.Since(began).Round(time.Millisecond), s.Message)
	if s.State != "refused" || s.Stage != "release" || len(s.Checks) != 1 || s.Checks[0].ID != "asset.key-disabled" {
		t.Errorf("with the key disabled: %+v", s)
	}
	if !strings.Contains(s.Message, "found one in key store hsm that its owner disabled or removed") {
		t.Errorf("it does not say who is in the way: %q", s.Message)
	}

	// Another version: the broker moves the data key to it, and the sealed files stay.
	k.owner(t, "enable")
	k.owner(t, "generate")
	p := n.people(t, "operator", "engineer")
	p.refused(t, "", "engineer", "assets", "rewrap")
	if out := p.must(t, "operator", "assets", "rewrap"); !strings.Contains(out, ", 1 moved to a newer version") {
		t.Errorf("rewrap: %s", out)
	}
	if s := run(t); s.State != "succeeded" {
		t.Errorf("under another version of the key: %+v", s)
	}
	if out := n.must(t, "log", "verify"); out == "" {
		t.Error("coffer log verify says nothing")
	}
}
