package alerts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// queueLength is how many alerts wait for a slow sink; further ones are dropped
	// and counted, so that no job waits for whoever collects alerts.
	queueLength = 4096
	// batchBytes bounds one request to a collector.
	batchBytes = 256 << 10
	// firstRetry and lastRetry bound the pause after a failure, which doubles.
	firstRetry, lastRetry = 250 * time.Millisecond, 30 * time.Second
	postTimeout           = 10 * time.Second
)

// Writer takes a batch of lines, whole or not at all.
type Writer interface {
	Write(ctx context.Context, lines []byte) error
}

// Sink hands alerts to a writer. It never blocks who adds them.
type Sink struct {
	queue   chan []byte
	dropped atomic.Int64
	written atomic.Int64
	log     *slog.Logger
	stop    context.CancelFunc
	done    sync.WaitGroup
}

// NewSink starts a sink. Close ends it.
func NewSink(w Writer, log *slog.Logger) *Sink {
	ctx, stop := context.WithCancel(context.Background())
	s := &Sink{queue: make(chan []byte, queueLength), log: log, stop: stop}
	s.done.Go(func() { s.run(ctx, w) })
	return s
}

// Add queues an alert, or drops and counts it where the queue is full.
func (s *Sink) Add(a Alert) error {
	b, err := a.OCSF()
	if err != nil {
		return fmt.Errorf("encode alert of job %s: %w", a.Job, err)
	}
	select {
	case s.queue <- append(b, '\n'):
	default:
		s.dropped.Add(1)
	}
	return nil
}

// Counts returns how many alerts were written and how many were dropped.
func (s *Sink) Counts() (written, dropped int64) { return s.written.Load(), s.dropped.Load() }

// Close writes what is queued, for at most as long as ctx lasts. What is left then
// counts as dropped.
func (s *Sink) Close(ctx context.Context) {
	close(s.queue)
	ended := make(chan struct{})
	go func() {
		s.done.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
	}
	s.stop()
	<-ended
}

func (s *Sink) run(ctx context.Context, w Writer) {
	var held []byte // one alert that did not fit into the batch before
	for {
		batch, n := held, int64(0)
		if held != nil {
			n = 1
		}
		if batch == nil {
			b, ok := <-s.queue
			if !ok {
				return
			}
			batch, n = bytes.Clone(b), 1
		}
		held, n = s.fill(&batch, n)
		if s.deliver(ctx, w, batch) {
			s.written.Add(n)
		} else {
			s.dropped.Add(n)
		}
	}
}

// fill adds what waits already, up to the size of a batch.
func (s *Sink) fill(batch *[]byte, n int64) (held []byte, _ int64) {
	for {
		select {
		case b, ok := <-s.queue:
			if !ok {
				return nil, n
			}
			if len(*batch)+len(b) > batchBytes {
				return b, n
			}
			*batch = append(*batch, b...)
			n++
		default:
			return nil, n
		}
	}
}

// deliver tries until it works or the sink is closed.
func (s *Sink) deliver(ctx context.Context, w Writer, batch []byte) bool {
	for pause := firstRetry; ; pause = min(2*pause, lastRetry) {
		err := w.Write(ctx, batch)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			s.log.ErrorContext(ctx, "alerts lost at the end", "error", err)
			return false
		}
		s.log.WarnContext(ctx, "alerts wait", "error", err, "retry", pause)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// File appends to a file and keeps one older one beside it, PATH.1.
type File struct {
	Path string
	// MaxBytes is when a new file is begun.
	MaxBytes int64
}

// Write appends lines and syncs them. A batch that was written in part is cut off again.
func (f File) Write(_ context.Context, lines []byte) (err error) {
	out, err := os.OpenFile(f.Path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open alert file: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	st, err := out.Stat()
	if err != nil {
		return fmt.Errorf("read size of alert file: %w", err)
	}
	if f.MaxBytes > 0 && st.Size() > 0 && st.Size()+int64(len(lines)) > f.MaxBytes {
		if err := os.Rename(f.Path, f.Path+".1"); err != nil {
			return fmt.Errorf("rotate alert file: %w", err)
		}
		next, err := os.OpenFile(f.Path, os.O_CREATE|os.O_EXCL|os.O_RDWR|os.O_APPEND, 0o600)
		if err != nil {
			return fmt.Errorf("begin alert file: %w", err)
		}
		_ = out.Close()
		out = next
		if st, err = out.Stat(); err != nil {
			return fmt.Errorf("read size of alert file: %w", err)
		}
	}
	if _, err := out.Write(lines); err != nil {
		return fmt.Errorf("write alerts: %w", errors.Join(err, out.Truncate(st.Size())))
	}
	if err := out.Sync(); err != nil {
		return fmt.Errorf("sync alerts: %w", err)
	}
	return nil
}

// HTTP posts batches as application/x-ndjson. The zero value delivers nothing.
type HTTP struct {
	url, token string
	client     *http.Client
}

// NewHTTP returns a writer to the collector at url. A token that is not empty goes into
// the Authorization header as a bearer's. The collector is the one that is configured:
// where it sends elsewhere, neither alerts nor the token follow.
func NewHTTP(url, token string, transport http.RoundTripper) HTTP {
	return HTTP{url, token, &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

// Write posts lines. Any answer but 2xx is an error, which names nothing of the URL but
// its host: a query can be a key.
func (h HTTP) Write(ctx context.Context, lines []byte) error {
	ctx, cancel := context.WithTimeout(ctx, postTimeout)
	defer cancel()
	if h.client == nil {
		return errors.New("post alerts: no collector is configured")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, bytes.NewReader(lines))
	if err != nil {
		return errors.New("post alerts: the collector's URL is none")
	}
	req.Header.Set("Content-Type", "application/x-ndjson")
	if h.token != "" {
		req.Header.Set("Authorization", "Bearer "+h.token)
	}
	res, err := h.client.Do(req)
	if err != nil {
		var at *url.Error
		if errors.As(err, &at) {
			err = at.Err
		}
		return fmt.Errorf("post alerts to %s: %w", req.URL.Host, err)
	}
	defer res.Body.Close() //nolint:errcheck // nothing of it is used
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10))
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("post alerts to %s: the collector answers %d", req.URL.Host, res.StatusCode)
	}
	return nil
}
