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

// A policy that no verifier would start with is neither shown as one nor packed.
func TestPolicyRulesAreCompiled(t *testing.T) {
	const document = `{"version":"coffer.run/policy/v1","name":"mine","allowSimulated":false,
"snp":{"require":[],"allowDebug":false,"allowMigration":false,"maxVMPL":0,"products":["Genoa"]}}`
	const decision = "package coffer.appraisal\n\ndecision := {\"checks\": [], \"submods\": {}}"
	for situation, row := range map[string]struct{ rules, says string }{
		"rules that decide":               {decision, ""},
		"rules that ask somebody":         {decision + " if http.send({\"method\": \"get\", \"url\": \"https://rules.example\"}).status_code == 200\n", "http.send"},
		"rules that ask for the time":     {decision + " if time.now_ns() > 0\n", "time.now_ns"},
		"rules that draw lots":            {decision + " if rand.intn(\"x\", 2) == 1\n", "rand.intn"},
		"rules that read the machine":     {decision + " if opa.runtime().env.HOME\n", "opa.runtime"},
		"rules that are not Rego":         {"package coffer.appraisal\n\ndecision := ", "rego_parse_error"},
		"rules of another package":        {"package mine\n\ndecision := {}\n", "want data.coffer.appraisal"},
		"rules without a decision":        {"package coffer.appraisal\n\nverdict := {}\n", "no rule decision"},
		"rules that speak of what is not": {decision + " if answer\n", "answer"},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{"policy.json": document, "mine.rego": row.rules} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		packed := filepath.Join(dir, "packed.json")
		for _, args := range [][]string{{"show", dir}, {"pack", dir, "--out", packed}} {
			var stdout, stderr bytes.Buffer
			err := run(t.Context(), append([]string{"policy"}, args...), nil, &stdout, &stderr)
			if row.says == "" {
				if err != nil {
					t.Errorf("%s: %s: %v", situation, args[0], err)
				}
				continue
			}
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("%s: %s: %v, want something about %q", situation, args[0], err, row.says)
			}
			if stdout.Len() > 0 {
				t.Errorf("%s: %s says %s", situation, args[0], stdout.String())
			}
		}
		if _, err := os.Stat(packed); (err == nil) != (row.says == "") {
			t.Errorf("%s: packed: %v", situation, err)
		}
	}
}
