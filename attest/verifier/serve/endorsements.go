package serve

import (
	"errors"
	"io"
	"net/http"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
)

// EndorsementsPath answers a POST of a signed result with the endorsements that
// its appraisal used (endorse.Encode).
const EndorsementsPath = "/endorsements"

func endorsements(v *verifier.Verifier) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, err := io.ReadAll(http.MaxBytesReader(w, r.Body, receipt.MaxToken))
		if err != nil {
			http.Error(w, "no result of at most 256 KiB", http.StatusBadRequest)
			return
		}
		b, err := v.Endorsements(string(token))
		var refused *check.Refusal
		switch {
		case errors.As(err, &refused):
			http.Error(w, err.Error(), http.StatusGone)
		case err != nil:
			http.Error(w, "not a result of this verifier's", http.StatusBadRequest)
		default:
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write(b)
		}
	})
}
