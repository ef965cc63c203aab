package verifier_test

import (
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/verifier"
)

// Whoever watches a verifier sees that its policies or reference values are others, and
// nothing where they are the same in another order.
func TestRules(t *testing.T) {
	w := newWorld(t)
	vendor := newSigner(t, "vendor")
	keys, err := vendor.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	w.policy.Sources = []policy.Source{{Issuer: "vendor", Keys: keys}}
	production, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	values := func(driver string) string {
		token, err := policy.SignValues(vendor, policy.Values{IssuedAt: w.now.Unix(), Expires: w.now.Add(time.Hour).Unix(), GPU: &policy.GPUValues{DriverVersions: []string{driver}}})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	one, two := values("1"), values("2")
	options := func(change func(*verifier.Options)) verifier.Options {
		o := w.options()
		o.Policies = append(slices.Clone(o.Policies), production)
		o.References = []string{one, two}
		change(&o)
		return o
	}
	v, err := verifier.New(options(func(*verifier.Options) {}))
	if err != nil {
		t.Fatal(err)
	}
	before := v.Rules()
	if before == "" {
		t.Fatal("no rules")
	}
	for name, row := range map[string]struct {
		change func(*verifier.Options)
		same   bool
	}{
		"the same":               {func(*verifier.Options) {}, true},
		"in another order":       {func(o *verifier.Options) { slices.Reverse(o.Policies); slices.Reverse(o.References) }, true},
		"a policy less":          {func(o *verifier.Options) { o.Policies = o.Policies[:len(o.Policies)-1] }, false},
		"another policy":         {func(o *verifier.Options) { o.Policies[len(o.Policies)-1].Name = "production-2" }, false},
		"reference values less":  {func(o *verifier.Options) { o.References = []string{one} }, false},
		"other reference values": {func(o *verifier.Options) { o.References = []string{one, values("3")} }, false},
	} {
		if err := v.Reload(options(row.change)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if (v.Rules() == before) != row.same {
			t.Errorf("%s: rules are the same: %v", name, v.Rules() == before)
		}
	}
	held := v.Rules()
	if err := v.Reload(options(func(o *verifier.Options) { o.References = []string{"none"} })); err == nil || v.Rules() != held {
		t.Errorf("what is refused changes the rules: %v", err)
	}
}
