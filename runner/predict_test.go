package runner

import (
	"bytes"
	"testing"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
)

func TestPredicted(t *testing.T) {
	var failed, passed check.List
	failed.Fail("snp.debug", "off", "on", "")
	passed.Pass("snp.debug", "off")
	with := func(tiers ...receipt.Tier) map[string]receipt.Appraisal {
		out := map[string]receipt.Appraisal{}
		for i, tier := range tiers {
			out[string(rune('a'+i))] = receipt.Appraisal{Status: tier}
		}
		return out
	}
	for name, c := range map[string]struct {
		result   receipt.Result
		accepted bool
	}{
		"every device affirmed":   {receipt.Result{Submods: with(receipt.Affirming, receipt.Affirming), Checks: passed}, true},
		"one device is not":       {receipt.Result{Submods: with(receipt.Affirming, receipt.Warning), Checks: passed}, false},
		"a check failed":          {receipt.Result{Submods: with(receipt.Affirming), Checks: failed}, false},
		"no device":               {receipt.Result{Checks: passed}, false},
		"nothing at all":          {receipt.Result{}, false},
		"a device without a word": {receipt.Result{Submods: with("")}, false},
	} {
		if got := predicted(c.result); got.Accepted != c.accepted || len(got.Failed) != len(c.result.AllChecks().Failed()) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	r1, s1, err := lostKeys()
	r2, s2, err2 := lostKeys()
	if err != nil || err2 != nil || bytes.Equal(r1, r2) || bytes.Equal(s1, s2) {
		t.Errorf("keys of two predictions: %v %v", err, err2)
	}
}
