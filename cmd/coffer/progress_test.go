package main

import (
	"strings"
	"testing"
	"time"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

func TestLiveProgress(t *testing.T) {
	l := &live{job: "job-1", name: "demo", width: 80, height: 40}
	tell := func(second int64, list ...*agentv1.Progress) {
		l.event(&agentv1.WatchResponse{TimeUnixNano: time.Unix(second, 0).UnixNano(), Event: &agentv1.WatchResponse_Progress{Progress: &agentv1.ProgressEvent{Going: list}}})
	}
	fetch := func(bytes int64) *agentv1.Progress {
		return &agentv1.Progress{What: "fetch", Name: "data\x1b[2J", Bytes: bytes, Total: 10 << 30}
	}
	decrypt := func(bytes int64) *agentv1.Progress {
		return &agentv1.Progress{What: "decrypt", Bytes: bytes, Total: 4 << 30}
	}
	l.event(stage(1, "sandbox", "started", 0, ""))
	tell(100, fetch(1<<30))
	if s := l.text(); !strings.Contains(s, "fetching data?[2J: 1.0 GiB of 10.0 GiB\x1b") {
		t.Errorf("shown:\n%s", s)
	}
	tell(102, fetch(3<<30))
	if s := l.text(); !strings.Contains(s, "3.0 GiB of 10.0 GiB, 1.0 GiB/s, 7s left") {
		t.Errorf("shown:\n%s", s)
	}
	// A rate is that of the newest samples: here nothing came any more.
	for i := range int64(rateOver) {
		tell(103+i, fetch(3<<30), decrypt(i))
	}
	if s := l.text(); !strings.Contains(s, "3.0 GiB of 10.0 GiB, 0 B/s\x1b") || !strings.Contains(s, "decrypting: 4 B of 4.0 GiB, 1 B/s\x1b") {
		t.Errorf("shown:\n%s", s)
	}
	// A fetch that began again has no rate for now.
	tell(110, fetch(1<<20), decrypt(4<<30))
	if s := l.text(); !strings.Contains(s, "1.0 MiB of 10.0 GiB\x1b") || strings.Contains(s, "left") {
		t.Errorf("shown:\n%s", s)
	}
	tell(111)
	if s := l.text(); strings.Contains(s, "fetching") || strings.Contains(s, "decrypting") {
		t.Errorf("shown when it is over:\n%s", s)
	}
	tell(112, decrypt(1))
	l.done = true
	if s := l.text(); strings.Contains(s, "decrypting") {
		t.Errorf("shown when the job is over:\n%s", s)
	}
}
