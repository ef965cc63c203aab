package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/policy"
)

// What the commands write, a verifier takes: values signed by the source that a
// packed policy names, until they expire, and no one else's.
func TestPolicySignAndPack(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	coffer := func(args ...string) []byte {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if err := run(t.Context(), append([]string{"policy"}, args...), nil, &stdout, &stderr); err != nil {
			t.Fatalf("coffer policy %v: %v: %s", args, err, stderr.String())
		}
		return stdout.Bytes()
	}
	write := func(name string, v any) {
		t.Helper()
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(path(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}

	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	p.Name = "ours"
	var source policy.Source
	if err := json.Unmarshal(coffer("source", "--key", path("key.pem"), "--issuer", "values.example"), &source); err != nil {
		t.Fatal(err)
	}
	p.Sources = []policy.Source{source}
	write("ours.json", p)
	packed := coffer("pack", path("ours.json"), "--out", path("packed.json"))
	if p, err = policy.Parse(read("packed.json")); err != nil {
		t.Fatal(err)
	}
	d, err := p.Digest()
	if err != nil || !strings.Contains(string(packed), string(d)) {
		t.Errorf("%s, %v: packed said %s", d, err, packed)
	}

	measurement := strings.Repeat("ab", 48)
	write("values.json", map[string]any{"snp": map[string]any{"measurements": []string{measurement}}})
	coffer("sign", path("values.json"), "--key", path("key.pem"), "--issuer", "values.example", "--out", path("values.jwt"), "--valid", "1h")
	coffer("sign", path("values.json"), "--key", path("other.pem"), "--issuer", "values.example", "--out", path("forged.jwt"))
	coffer("sign", path("values.json"), "--key", path("key.pem"), "--issuer", "somebody.example", "--out", path("renamed.jwt"))
	now := time.Now()
	r, err := p.OpenReferences(string(read("values.jwt")), now)
	if err != nil || !slices.Equal(r.Values().SNP.Measurements, []string{measurement}) {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := p.OpenReferences(string(read("values.jwt")), now.Add(2*time.Hour)); err == nil {
		t.Error("expired values were taken")
	}
	for _, name := range []string{"forged.jwt", "renamed.jwt"} {
		if _, err := p.OpenReferences(string(read(name)), now); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if info, err := os.Stat(path("key.pem")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %v, %v", info.Mode(), err)
	}
}
