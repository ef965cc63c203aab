package verifier_test

import (
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/verifier"
)

// Signed reference values reach the decision, and a verifier with others than
// its policies ask for does not start.
func TestSignedReferenceValues(t *testing.T) {
	w := newWorld(t)
	vendor := newSigner(t, "vendor")
	keys, err := vendor.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	w.policy.Sources = []policy.Source{{Issuer: "vendor", Keys: keys}}
	values := func(driver string) string {
		token, err := policy.SignValues(vendor, policy.Values{
			IssuedAt: w.now.Unix(), Expires: w.now.Add(time.Hour).Unix(), GPU: &policy.GPUValues{DriverVersions: []string{driver}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	decide := func(tokens ...string) (string, []string) {
		w.v = w.verifier(func(o *verifier.Options) { o.References = tokens })
		_, r := w.attester().collect().appraise()
		var ids []string
		for _, c := range r.AllChecks().Failed() {
			ids = append(ids, c.ID)
		}
		driver, _ := r.Submods["gpu0"].Claims["x-nvidia-gpu-driver-version"].(string)
		return driver, ids
	}
	driver, ids := decide()
	if len(ids) != 1 || ids[0] != "policy.references" {
		t.Errorf("without values: failed %v", ids)
	}
	if _, ids := decide(values("1.2.3")); len(ids) != 1 || ids[0] != "policy.gpu.driver-version" {
		t.Errorf("with values for another driver: failed %v", ids)
	}
	if _, ids := decide(values(driver)); len(ids) != 0 {
		t.Errorf("with values for this driver: failed %v", ids)
	}
	o := w.options()
	o.References = []string{"not a token"}
	if _, err := verifier.New(o); err == nil {
		t.Error("a verifier with reference values of nobody")
	}
}
