package hold

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestLogRate(t *testing.T) {
	now := time.Unix(1_000, 0)
	b := newBudget(1<<20, 100, func() time.Time { return now })
	s := &logStream{budget: b}
	feed := func(text string) string { return string(s.within([]byte(text))) }

	// A burst of four seconds' worth, cut after a whole line.
	line := strings.Repeat("x", 99) + "\n"
	if got := feed(strings.Repeat(line, 3) + line[:50]); got != strings.Repeat(line, 3)+line[:50] {
		t.Errorf("within the burst %d bytes are kept", len(got))
	}
	if got := feed(line[50:] + line + "half"); got != line[50:] {
		t.Errorf("beyond it: %q", got)
	}
	// The rest of the line that was begun goes too.
	now = now.Add(time.Second)
	if got := feed(" of a line\nnext\n"); got != "next\n" {
		t.Errorf("after a pause: %q", got)
	}
	if want := int64(len(line) + len("half") + len(" of a line\n")); b.dropped() != want {
		t.Errorf("%d bytes are counted, want %d", b.dropped(), want)
	}
	// A long pause gives no more than a burst.
	now = now.Add(time.Hour)
	if got := feed(strings.Repeat(line, 10)); len(got) != 400 {
		t.Errorf("after an hour: %d bytes", len(got))
	}
	now = now.Add(time.Hour)
	if got := feed(strings.Repeat("x", 1000)); len(got) != 400 {
		t.Errorf("of a line that is longer than a burst: %d bytes", len(got))
	}
}

// TestLogRateOfAFlood counts what gets through of a flood: the rate, and a burst.
func TestLogRateOfAFlood(t *testing.T) {
	now := time.Unix(1_000, 0)
	const rate, seconds = 64 << 10, 60
	b := newBudget(1<<30, rate, func() time.Time { return now })
	s := &logStream{budget: b}
	block := append(bytes.Repeat([]byte("y"), 1023), '\n')
	kept, sent := 0, 0
	for range seconds * 1000 {
		now = now.Add(time.Millisecond)
		for range 8 {
			kept += len(s.within(block))
			sent += len(block)
		}
	}
	if limit := rate * (seconds + 4); kept > limit || kept < limit*9/10 {
		t.Errorf("%d bytes are kept, want close to %d", kept, limit)
	}
	if int64(kept)+b.dropped() != int64(sent) {
		t.Errorf("%d kept and %d cut of %d", kept, b.dropped(), sent)
	}
	if kept%len(block) != 0 {
		t.Error("a line is cut in its middle")
	}
}
