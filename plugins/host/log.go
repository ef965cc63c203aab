package host

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
)

const (
	maxLine = 4096
	// keepLines is how much of what a plugin said explains why it did not start.
	keepLines = 5
)

// stderrLog turns a plugin's lines into log records of the host's. What a
// plugin writes is data: bounded, and never a record of its own.
type stderrLog struct {
	log *slog.Logger

	// mu guards what follows.
	mu   sync.Mutex
	line []byte
	last []string
}

// Write never fails: a plugin is not stopped by its log.
func (l *stderrLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for rest := b; len(rest) > 0; {
		part, after, whole := bytes.Cut(rest, []byte{'\n'})
		if room := maxLine - len(l.line); room > 0 {
			l.line = append(l.line, part[:min(room, len(part))]...)
		}
		if whole {
			l.emit()
		}
		rest = after
	}
	return len(b), nil
}

func (l *stderrLog) emit() {
	s := strings.ToValidUTF8(strings.TrimSpace(string(l.line)), "?")
	l.line = l.line[:0]
	if s == "" {
		return
	}
	l.log.WarnContext(context.Background(), "plugin says", "line", s)
	l.last = append(l.last, s)
	if len(l.last) > keepLines {
		l.last = l.last[1:]
	}
}

// said returns the plugin's last lines for an error's text.
func (l *stderrLog) said() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.last) == 0 {
		return ""
	}
	return ": it said: " + strings.Join(l.last, "; ")
}
