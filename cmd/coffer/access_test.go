package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker/access"
)

// The commands make a set that a broker takes, and say what is wrong with one
// that it does not.
func TestAccessCommands(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	coffer := func(args ...string) result {
		t.Helper()
		var out, errs bytes.Buffer
		r := result{err: run(t.Context(), append([]string{"access"}, args...), strings.NewReader(""), &out, &errs)}
		r.stdout, r.stderr = out.String(), errs.String()
		var coded *exitError
		if errors.As(r.err, &coded) {
			r.code = coded.code
		}
		return r
	}
	lines := "# maintainers\n"
	for _, name := range []string{"ada", "bea", "cyd"} {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		ok(err)
		block, err := ssh.MarshalPrivateKey(key, name)
		ok(err)
		ok(os.WriteFile(path(name), pem.EncodeToMemory(block), 0o600))
		s, err := ssh.NewSignerFromKey(key)
		ok(err)
		lines += name + " " + string(ssh.MarshalAuthorizedKey(s.PublicKey()))
	}
	ok(os.WriteFile(path("maintainers"), []byte(lines), 0o600))
	set := path("policies")
	checkSet := func() result {
		t.Helper()
		return coffer("check", set, "--broker", "broker.test", "--maintainers", path("maintainers"), "--threshold", "2")
	}
	pack := func(serial string) {
		t.Helper()
		coffer("pack", set, "--broker", "broker.test", "--serial", serial).want(t, 0, "packed set "+serial)
	}
	sign := func(name string) { t.Helper(); coffer("sign", set, "--key", path(name), "--name", name).want(t, 0) }

	coffer("init", set).want(t, 0, access.PeopleFile)
	coffer("init", set).want(t, exitFailed, "exists")
	checkSet().want(t, exitRefused, "policy.manifest")
	pack("1")
	checkSet().want(t, exitRefused, "policy.threshold", "signatures of 2 maintainers")
	sign("ada")
	checkSet().want(t, exitRefused, "policy.threshold")
	sign("cyd")
	checkSet().want(t, 0, "set 1 of broker.test holds, signed by ada, cyd", "sha384:")

	ok(os.WriteFile(filepath.Join(set, "site.cedar"), []byte("@id(\"x\")\nforbid (principal, action == Coffer::Action::\"ApproveGrant\", resource)\nunless { context.network == \"private\" };\n"), 0o600))
	checkSet().want(t, exitRefused, "policy.file-extra", "site.cedar")
	pack("2")
	checkSet().want(t, exitRefused, "policy.threshold")
	sign("ada")
	sign("bea")
	checkSet().want(t, 0, "set 2")
	ok(os.Rename(filepath.Join(set, "signatures", "bea.sig"), filepath.Join(set, "signatures", "cyd.sig")))
	checkSet().want(t, 0, "signed by ada, bea")
	b, err := os.ReadFile(filepath.Join(set, "signatures", "ada.sig"))
	ok(err)
	ok(os.WriteFile(filepath.Join(set, "signatures", "more.sig"), b, 0o600))
	checkSet().want(t, exitRefused, "policy.duplicate-signer", "ada signed twice")

	coffer("pack", set).want(t, exitUsage, "--broker")
	coffer("sign", set, "--key", path("ada"), "--name", "../x").want(t, exitUsage, "--name")
	coffer("check", set).want(t, exitUsage, "--maintainers")
	ok(os.Chmod(path("ada"), 0o644))
	coffer("sign", set, "--key", path("ada"), "--name", "ada").want(t, exitFailed, "chmod 600")
}
