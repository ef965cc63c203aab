package verifier

import (
	"fmt"
	"strings"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Endorsements returns the endorsements that an appraisal used, as endorse.Encode
// writes them, so that its record can be verified by them for years. token is the
// signed result of this verifier. One that is no longer held is a refusal: a part
// of them would make for other checks than were made.
func (v *Verifier) Endorsements(token string) ([]byte, error) {
	var r receipt.Result
	if err := v.keys.Load().public.Open(receipt.TypeResult, token, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	used, err := endorse.UsedIn(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	var items []endorse.Item
	var gone []string
	for _, u := range used {
		i, ok := v.endorsed.ByDigest(u.Key, u.Digest)
		if !ok {
			gone = append(gone, u.Key.String())
			continue
		}
		items = append(items, i)
	}
	if len(gone) > 0 {
		var l check.List
		l.Fail("endorsements.held", "all that the appraisal used", "without "+clip(strings.Join(gone, ", ")), "ask the verifier that appraised, and soon: of each, 64 versions are kept")
		return nil, check.Refuse("endorsements", l)
	}
	return endorse.Encode(items)
}
