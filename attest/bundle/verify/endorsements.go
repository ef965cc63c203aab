package verify

import (
	"fmt"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
)

// endorsements returns what to appraise by: what the caller has, and what the
// bundle carries. Whoever made the bundle chose what it carries, and may have
// chosen a list of revoked certificates from before the revocation: of what grows
// old, only that counts which a result under pinned keys says was used. The other
// kinds are what their signatures say, whoever hands them out.
func (v *verification) endorsements(l *check.List) *endorse.Library {
	if v.again {
		return v.trust.Endorsements
	}
	own := v.carried(l)
	if len(own) == 0 {
		return v.trust.Endorsements
	}
	out := endorse.NewLibrary()
	if v.trust.Endorsements != nil {
		for _, h := range v.trust.Endorsements.All() {
			if err := out.Put(h.Item, h.Checked); err != nil {
				l.Fail("endorsements.count", "as many as fit", err.Error(), "give fewer of your own")
				return v.trust.Endorsements
			}
		}
	}
	aside := 0
	for _, i := range own {
		if !v.believed() && (i.Key.Kind == endorse.CRL || i.Key.Kind == endorse.OCSP) {
			aside++
			continue
		}
		if err := out.Put(i, v.rep.At); err != nil {
			l.Fail("endorsements.count", "as many as fit", err.Error(), "give fewer of your own")
		}
	}
	if aside > 0 {
		l.Skip("endorsements.current", fmt.Sprintf("%d revocation lists and answers about certificates are in the bundle; that they are those of the time is the verifier's word: pin its keys", aside))
	}
	return out
}

// carried reads the bundle's endorsements and holds them against the result's
// list of what was used: no more of them and no fewer.
func (v *verification) carried(l *check.List) []endorse.Item {
	const id = "endorsements.listed"
	var used []endorse.Used
	var err error
	if v.result != nil {
		if used, err = endorse.UsedIn(*v.result); err != nil {
			l.Fail(id, "a list of what was used, in the result", err.Error(), "")
			return nil
		}
	}
	b, there := v.part(bundle.Endorsements)
	switch {
	case !there && len(used) > 0:
		l.Skip(id, fmt.Sprintf("the bundle does not carry the %d endorsements that the appraisal used", len(used)))
		return nil
	case !there:
		return nil
	}
	items, err := endorse.Decode(b)
	if err != nil {
		l.Fail("endorsements.form", "a list of endorsements", err.Error(), "")
		return nil
	}
	names := func(n int, name func(int) string) []string {
		out := make([]string, n)
		for i := range out {
			out[i] = name(i)
		}
		slices.Sort(out)
		return out
	}
	want := names(len(used), func(i int) string { return used[i].Key.String() + " " + string(used[i].Digest) })
	have := names(len(items), func(i int) string { return items[i].Key.String() + " " + string(items[i].Digest) })
	if !slices.Equal(want, have) {
		l.Fail(id, fmt.Sprintf("the %d that the result says were used", len(want)), difference(want, have), "the bundle carries other endorsements than the appraisal had")
		return nil
	}
	l.Pass(id, fmt.Sprintf("%d, as the result lists them", len(items)))
	return items
}

// difference names the first few that are missing or too many.
func difference(want, have []string) string {
	var out []string
	add := func(what string, from, in []string) {
		for _, s := range from {
			if !slices.Contains(in, s) && len(out) < 4 {
				out = append(out, what+s)
			}
		}
	}
	add("without ", want, have)
	add("also ", have, want)
	return strings.Join(out, "; ")
}
