package hold

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

const (
	// maxLogChunk bounds the log bytes in one answer.
	maxLogChunk = 64 << 10
	// drainQuiet is how long a pipe must stay empty, after the task has ended,
	// to be believed empty: the runtime's copier may still be writing.
	drainQuiet = 100 * time.Millisecond
	// drainLimit ends the draining of a pipe that never falls silent: whoever
	// still writes then should have been gone.
	drainLimit = 2 * time.Second
)

// budget is what both streams together may still say: in all, and at what rate.
type budget struct {
	now func() time.Time

	mu   sync.Mutex // guards what follows
	left int64
	cut  int64
	// rate is in bytes a second, burst what may come at once, room what of it is
	// left as of at.
	rate, burst, room int64
	at                time.Time
}

func newBudget(total, rate int64, now func() time.Time) *budget {
	burst := rate * plan.LogBurst
	return &budget{now: now, left: total, rate: rate, burst: burst, room: burst, at: now()}
}

// take returns how many bytes of b are within the budget, and counts the rest.
// Where the rate is what ends it, it ends with a line if there is a whole one.
func (b *budget) take(p []byte) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	// More than a burst's worth of time adds no more than a burst.
	if gained := b.rate * int64(min(now.Sub(b.at), plan.LogBurst*time.Second)/time.Microsecond) / 1e6; gained > 0 {
		b.room, b.at = min(b.burst, b.room+gained), now
	}
	k := int(min(int64(len(p)), b.left, b.room))
	if k < len(p) && int64(k) == b.room {
		// A line that is longer than a burst is kept in part.
		if i := bytes.LastIndexByte(p[:k], '\n'); i >= 0 || b.room < b.burst {
			k = i + 1
		}
	}
	b.left -= int64(k)
	b.room -= int64(k)
	b.cut += int64(len(p) - k)
	return k
}

// drop counts n bytes that are not kept.
func (b *budget) drop(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cut += int64(n)
}

func (b *budget) dropped() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cut
}

// logStream is one of a job's output streams, kept in memory.
type logStream struct {
	f      *os.File
	budget *budget
	// metrics read the whole stream; nil if nobody does.
	metrics *metrics
	done    chan struct{}

	// cutting is the reader's: the rest of a line whose beginning was dropped goes too.
	cutting bool

	mu   sync.Mutex
	data []byte
	eof  bool
	last time.Time
	news chan struct{}
}

// openLog makes the pipe and reads it until close. It is opened for reading and
// writing, so that no writer ever blocks on opening and none ends the stream.
func openLog(path string, b *budget, m *metrics) (*logStream, error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("make log pipe: %w", err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open log pipe: %w", err)
	}
	s := &logStream{f: os.NewFile(uintptr(fd), path), budget: b, metrics: m, done: make(chan struct{}), news: make(chan struct{}), last: time.Now()}
	go s.read()
	return s, nil
}

func (s *logStream) read() {
	defer close(s.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := s.f.Read(buf)
		if n > 0 {
			s.metrics.add(buf[:n])
			kept := s.within(buf[:n])
			s.mu.Lock()
			s.data = append(s.data, kept...)
			s.last = time.Now()
			s.wake()
			s.mu.Unlock()
		}
		if err != nil {
			s.mu.Lock()
			s.eof = true
			s.wake()
			s.mu.Unlock()
			return
		}
	}
}

// within returns what of b is kept.
func (s *logStream) within(b []byte) []byte {
	if s.cutting {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			s.budget.drop(len(b))
			return nil
		}
		s.budget.drop(i + 1)
		s.cutting, b = false, b[i+1:]
	}
	k := s.budget.take(b)
	s.cutting = k < len(b) && b[len(b)-1] != '\n'
	return b[:k]
}

func (s *logStream) wake() {
	close(s.news)
	s.news = make(chan struct{})
}

// finish ends the stream once the pipe has been empty for drainQuiet, or after
// drainLimit.
func (s *logStream) finish(ctx context.Context) error {
	start := time.Now()
	t := time.NewTicker(drainQuiet / 5)
	defer t.Stop()
	for quiet := false; !quiet; {
		select {
		case <-ctx.Done():
			quiet = true
		case <-s.done:
			quiet = true
		case <-t.C:
			s.mu.Lock()
			quiet = time.Since(s.last) >= drainQuiet && time.Since(start) >= drainQuiet || time.Since(start) >= drainLimit
			s.mu.Unlock()
		}
	}
	err := s.f.Close()
	<-s.done
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

func (s *logStream) size() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(len(s.data))
}

func (s *logStream) chunk(ctx context.Context, offset int64, wait time.Duration) holdapi.LogChunk {
	t := time.NewTimer(min(wait, maxWait))
	defer t.Stop()
	for {
		s.mu.Lock()
		n := int64(len(s.data))
		at := min(max(offset, 0), n)
		end := min(at+maxLogChunk, n)
		c := holdapi.LogChunk{Offset: at, Data: append([]byte(nil), s.data[at:end]...), EOF: s.eof && end == n, Cut: s.budget.dropped()}
		news := s.news
		s.mu.Unlock()
		if len(c.Data) > 0 || c.EOF {
			return c
		}
		select {
		case <-ctx.Done():
			return c
		case <-t.C:
			return c
		case <-news:
		}
	}
}
