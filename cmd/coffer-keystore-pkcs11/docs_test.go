package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/docs/pages"
	"github.com/coffer-run/coffer/internal/executable"
)

// TestDocumented types what docs/keystores.md says of this program, in its order.
func TestDocumented(t *testing.T) {
	needSoftHSM(t)
	page, err := os.ReadFile("../../docs/keystores.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(page), "\n## PKCS#11\n")
	section, _, end := strings.Cut(section, "\n## ")
	if !found || !end {
		t.Fatal("docs/keystores.md has no section of this program")
	}
	config := regexp.MustCompile("(?ms)^```json\n(.*?)^```$").FindStringSubmatch(section)
	fences := regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(section, -1)
	if config == nil || len(fences) != 2 {
		t.Fatalf("a configuration and two fences are expected, not %d", len(fences))
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, bin := t.TempDir(), t.TempDir()
	files := map[string]string{
		filepath.Join(dir, "pkcs11.json"):            config[1],
		filepath.Join(bin, "coffer-keystore-pkcs11"): "#!/bin/sh\n" + asCommand + "=1 exec " + exe + ` "$@"` + "\n",
		filepath.Join(dir, "pin"):                    "482915\n",
		filepath.Join(dir, "softhsm2.conf"):          "directories.tokendir = " + bin + "\nlog.level = ERROR\n",
	}
	for path, text := range files {
		if err := executable.Write(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	typed := pages.For(t, "cmd/coffer-keystore-pkcs11 TestDocumented")
	script := "set -eu\n"
	for _, f := range fences {
		script += f[1]
		typed.TypedFence("docs/keystores.md", f[1])
	}
	cmd := exec.Command("bash", "-c", script+"coffer-keystore-pkcs11 --config pkcs11.json status\n")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "SOFTHSM2_CONF="+filepath.Join(dir, "softhsm2.conf"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if last := "weights  versions 1 to 1  enabled\n"; !strings.HasSuffix(string(out), last) {
		t.Errorf("it ended with %s", out)
	}
}
