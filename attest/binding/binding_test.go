package binding_test

import (
	"testing"

	"github.com/coffer-run/coffer/attest/binding"
	"github.com/coffer-run/coffer/attest/plan"
)

// No two lists of logs have one report data, and a firmware log that is empty is
// none.
func TestReportDataCoversEveryLog(t *testing.T) {
	b, err := binding.Challenge{
		VerifierID: "v", Nonce: make([]byte, 16), PlanDigest: plan.Sum(nil), JobID: "j", SandboxDigest: plan.Sum(nil), RecipientKey: []byte("r"), SessionKey: []byte("s"),
	}.Bind()
	if err != nil {
		t.Fatal(err)
	}
	d := binding.DevicesOf(nil)
	data := func(quote, log string, firmware ...[]byte) [64]byte {
		return b.SNPReportData(d, []byte(quote), []byte(log), firmware...)
	}
	seen := map[[64]byte]string{}
	for situation, v := range map[string][64]byte{
		"no firmware log":                data("q", "log"),
		"firmware log":                   data("q", "log", []byte("tcg")),
		"another firmware log":           data("q", "log", []byte("tcf")),
		"firmware log in the agent's":    data("q", "logtcg"),
		"firmware log in its own frame":  data("q", "log\x00\x00\x00\x03tcg"),
		"the agent's log as firmware's":  data("q", "", []byte("log")),
		"the firmware's log as agent's":  data("q", "tcg"),
		"the logs exchanged":             data("q", "tcg", []byte("log")),
		"another quote":                  data("r", "log", []byte("tcg")),
		"two firmware logs":              data("q", "log", []byte("t"), []byte("cg")),
		"nothing at all":                 data("", ""),
		"agent's log where the quote is": data("log", "", []byte("tcg")),
	} {
		if other, again := seen[v]; again {
			t.Errorf("%s has the report data of %s", situation, other)
		}
		seen[v] = situation
	}
	if data("q", "log") != data("q", "log", nil) || data("q", "log") != data("q", "log", []byte{}) {
		t.Error("an empty firmware log is not none")
	}
}
