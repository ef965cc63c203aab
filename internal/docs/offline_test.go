package docs

import (
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/internal/docs/pages"
)

// offline is a shell for pages that need no stack.
func offline(t *testing.T, s *pages.Script) *pages.Shell {
	t.Helper()
	bin := os.Getenv("COFFER_BIN")
	if _, err := os.Stat(filepath.Join(bin, "coffer")); bin == "" || err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("COFFER_BIN holds no coffer: run make test")
		}
		t.Skip("COFFER_BIN holds no coffer: run make test")
	}
	return pages.NewShell(t, s, bin)
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// maintainers makes SSH keys in a folder, and a file with their public halves.
func maintainers(t *testing.T, dir string, names ...string) {
	t.Helper()
	list := ""
	for _, name := range names {
		path := filepath.Join(dir, name)
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
		public, err := os.ReadFile(path + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		list += name + " " + string(public)
	}
	write(t, dir, "maintainers", list)
}

// TestPolicySets types what docs/access.md says of a policy set: ada signs with a
// key in a file, bea with one that only ssh-agent has.
func TestPolicySets(t *testing.T) {
	s := pages.For(t, "internal/docs TestPolicySets")
	policySet(t, offline(t, s), s.Commands("docs/access.md", ""))
}

func policySet(t *testing.T, sh *pages.Shell, commands []pages.Command) {
	t.Helper()
	maintainers(t, sh.Dir, "ada", "bea")
	sh.Here = strings.NewReplacer("~/.ssh/id_ed25519", "ada")
	for _, c := range commands {
		sh.Within = nil
		if strings.HasPrefix(c.Text, "ssh-keygen") {
			sh.Within = []string{"ssh-agent", "sh", "-c", `ssh-add -q bea && rm bea && exec "$@"`, "sh"}
		}
		says := ""
		if strings.HasPrefix(c.Text, "coffer access check") {
			says = "ada, bea"
		}
		sh.Must(c, 0, says)
	}
}

// TestOperations types what docs/operations.md says of the verifier's and the
// broker's machines: AMD's real certificates, a policy with its signed values, and
// the set that TestPolicySets makes.
func TestOperations(t *testing.T) {
	s := pages.For(t, "internal/docs TestOperations")
	sh := offline(t, s)
	const page, vectors = "docs/operations.md", "snp/milan-v2-vcek/"
	leaf, _ := pem.Decode(vectortest.Read(t, vectors+"vek.pem"))
	write(t, sh.Dir, "media/vcek.crt", string(leaf.Bytes))
	write(t, sh.Dir, "media/chain.pem", string(slices.Concat(vectortest.Read(t, vectors+"ask.pem"), vectortest.Read(t, vectors+"ark.pem"))))
	sh.Here = strings.NewReplacer("/media/endorsements", "media", "/etc/coffer/endorsements", "taken")
	in := s.Commands(page, "5. Endorsements")
	sh.Must(in[0], 0, "^taken: 2 added, 0 there already, 0 refused$")
	sh.Must(in[1], 0, "^vek +")

	write(t, sh.Dir, "my-policy/policy.json", `{"version": "coffer.run/policy/v1", "name": "own", "allowSimulated": false,
 "snp": {"require": ["snp.crl"], "allowDebug": false, "allowMigration": false, "maxVMPL": 0, "products": ["Genoa"], "requireMeasurement": true}}`)
	write(t, sh.Dir, "my-policy/own.rego", "package coffer.appraisal\n\ndecision := {\"checks\": [], \"submods\": {}}\n")
	write(t, sh.Dir, "values.json", `{"snp": {"measurements": ["`+strings.Repeat("ab", 48)+`"]}}`)
	says := []string{`"issuer": "values.example.org"`, "^values.jwt: signed by values.example.org until ", "^policy.json: policy own, sha384:", "^POLICY +own$"}
	for i, c := range s.Commands(page, "6. The policy") {
		sh.Must(c, 0, says[i])
	}

	access := s.Commands(page, "7. Verifier and broker")
	all, err := pages.All()
	if err != nil {
		t.Fatal(err)
	}
	policySet(t, sh, slices.DeleteFunc(all, func(c pages.Command) bool { return c.Page != "docs/access.md" || c.Section != "Policy sets" }))
	for _, c := range access {
		sh.Must(c, 0, "ada, bea")
	}
}
