package verifier_test

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/evidence"
)

// ids in sources and documents look alike.
var checkID = regexp.MustCompile("[\"`]((?:snp|tpm|gpu|hcl|nonce|binding|sandbox|policy|ek|enrolment)\\.[a-z0-9.*-]+)[\"`]")

func find(t *testing.T, text string) []string {
	t.Helper()
	var out []string
	for _, m := range checkID.FindAllStringSubmatch(text, -1) {
		out = append(out, m[1])
	}
	return out
}

func readAll(t *testing.T, globs ...string) string {
	t.Helper()
	var out strings.Builder
	for _, g := range globs {
		paths, err := filepath.Glob("../../" + g)
		if err != nil || len(paths) == 0 {
			t.Fatalf("%s: %v", g, err)
		}
		for _, p := range paths {
			if strings.HasSuffix(p, "_test.go") {
				continue
			}
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			out.Write(b)
			out.WriteByte('\n')
		}
	}
	return out.String()
}

// TestChecksAreDocumented holds the table of checks against the sources, both
// ways: what is checked and not told is as wrong as what is told and not checked.
func TestChecksAreDocumented(t *testing.T) {
	sources := readAll(t, "attest/snp/*.go", "attest/vtpm/*.go", "attest/nvgpu/*.go", "attest/azure/*.go", "attest/composite/*.go", "attest/verifier/*.go",
		"attest/policy/rego/*.go", "attest/policy/rules/*.rego")
	claims := readAll(t, "attest/policy/claims.schema.json")
	page := readAll(t, "docs/attestation.md")
	documented := find(t, page)
	told := func(id string) bool {
		return slices.ContainsFunc(documented, func(d string) bool {
			before, after, family := strings.Cut(d, "*")
			return d == id || family && strings.HasPrefix(d, "policy.") && strings.HasPrefix(id, before) && strings.HasSuffix(id, after) && len(id) > len(before)+len(after)
		})
	}
	made := find(t, sources)
	for _, id := range made {
		// Of ids that are put together, the sources have the parts.
		if id == "policy.tpm.pcr" || id == "policy.tpm.pcr14" || strings.Contains(claims, `"`+id+`"`) {
			continue
		}
		if !told(id) {
			t.Errorf("docs/attestation.md does not tell of %s", id)
		}
	}
	for _, id := range documented {
		switch {
		case strings.Contains(id, "*"), strings.HasPrefix(id, "policy.tpm.pcr"), strings.Contains(claims, `"`+id+`"`), slices.Contains(made, id):
		case regexp.MustCompile(`^policy\.(snp|tpm|gpu)\.(required|simulated|claims|tier)$`).MatchString(id):
		default:
			t.Errorf("docs/attestation.md tells of %s, which nothing checks", id)
		}
	}
	if len(made) < 80 || len(documented) < 60 {
		t.Errorf("%d ids in the sources, %d in the page: is this looking at the right things?", len(made), len(documented))
	}
}

// TestEnvelopeIsDocumented holds the description of the envelope against its type.
func TestEnvelopeIsDocumented(t *testing.T) {
	page := readAll(t, "docs/formats/evidence.md")
	for _, v := range []any{evidence.Envelope{}, evidence.TPM{}, evidence.SNP{}, evidence.GPU{}, evidence.Failure{}} {
		typ := reflect.TypeOf(v)
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if !strings.Contains(page, "`"+name+"`") {
				t.Errorf("docs/formats/evidence.md does not tell of %s.%s", typ.Name(), name)
			}
		}
	}
}
