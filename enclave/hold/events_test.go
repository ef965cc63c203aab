package hold

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

func TestEventsOfAnyTextFitAnAnswer(t *testing.T) {
	l := newEventLog(time.Now)
	const n = 1000
	for range n {
		l.add(holdapi.Event{Kind: "connect", Detail: strings.Repeat("<", 4*maxText), Process: "\x01\x02\x03<>&"})
	}
	var seen uint64
	for seen < n {
		batch := l.after(t.Context(), seen, 0)
		if len(batch) == 0 {
			t.Fatalf("no events after %d", seen)
		}
		b, err := json.Marshal(holdapi.Response{Events: &holdapi.EventsResult{Events: batch}})
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > holdapi.MaxMessage {
			t.Fatalf("an answer of %d bytes, at most %d fit", len(b), holdapi.MaxMessage)
		}
		seen = batch[len(batch)-1].Sequence
	}
}

func TestAJobCannotPushOutWhatPeopleMustSee(t *testing.T) {
	for _, kind := range []string{"exec", "connect", "ptrace", "input-error", "checkpoint-error"} {
		l := newEventLog(time.Now)
		for range maxEvents + 10 {
			l.add(holdapi.Event{Kind: kind})
		}
		l.add(holdapi.Event{Kind: "operator-exec"})
		l.add(holdapi.Event{Kind: "trace-lost"})
		if n := len(l.list); n < 2 || l.list[n-2].Kind != "operator-exec" || l.list[n-1].Kind != "trace-lost" {
			t.Errorf("a flood of %s hides an operator's exec or the loss of the trace", kind)
		}
	}
}
