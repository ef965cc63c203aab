package logs

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/coffer-run/coffer/runner/bootkey"
)

const (
	// SegmentBytes is the size at which the next segment begins.
	SegmentBytes = 4 << 20
	// DefaultMaxBytes bounds the logs of ended jobs on a node; the oldest go first.
	DefaultMaxBytes = 1 << 30
	// slack is what a job's log may take besides its budget: many short lines take
	// more than their bytes. Beyond it the oldest segment goes.
	slack = 8 << 20

	suffix = ".log"
)

// ErrSealed means that a log is sealed to a key that the agent does not have.
var ErrSealed = errors.New("the log is sealed to the key that its job file names")

// ErrNotKept means that there is no log of a job.
var ErrNotKept = errors.New("no log of this job is kept")

// Store keeps the logs of a node's jobs below one folder.
type Store struct {
	dir string
	key *bootkey.Key
	max int64

	mu   sync.Mutex // guards what follows
	live map[string]bool
}

// secret implements secrets for logs under the key of this boot.
type bootSecrets struct{ key *bootkey.Key }

func (s bootSecrets) secret(h header) ([]byte, error) {
	if h.KEM != "" {
		return nil, ErrSealed
	}
	return s.key.Derive(h.info(), label)
}

// Open returns the store in dir, which is made if it is not there. max bounds the
// logs of ended jobs, in bytes.
func Open(dir string, key *bootkey.Key, max int64) (*Store, error) {
	if key == nil || max <= 0 {
		return nil, errors.New("open log store: no key or no bound")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open log store: %w", err)
	}
	return &Store{dir: dir, key: key, max: max, live: map[string]bool{}}, nil
}

func (s *Store) path(job string) string { return filepath.Join(s.dir, job) }

// jobForm keeps a job's id from leaving the folder.
func jobForm(job string) error {
	if job == "" || strings.ContainsAny(job, "/\x00") || strings.HasPrefix(job, ".") {
		return fmt.Errorf("log of job %.40q: not a job id", job)
	}
	return nil
}

// Create begins a job's log anew: what an earlier agent wrote of it goes, because
// the holder tells everything again from its beginning. budget is how many bytes
// the job may print. With to, the log is sealed to that key.
func (s *Store) Create(job string, budget int64, to *PublicKey) (_ *Log, err error) {
	if err := jobForm(job); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.live[job] = true
	s.mu.Unlock()
	defer func() {
		if err != nil {
			s.mu.Lock()
			delete(s.live, job)
			s.mu.Unlock()
		}
	}()
	if err := s.prune(); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(s.path(job)); err != nil {
		return nil, fmt.Errorf("log of job %s: %w", job, err)
	}
	if err := os.MkdirAll(s.path(job), 0o700); err != nil {
		return nil, fmt.Errorf("log of job %s: %w", job, err)
	}
	l := &Log{store: s, job: job, to: to, max: 2*budget + slack, news: make(chan struct{})}
	if err := l.begin(0); err != nil {
		return nil, err
	}
	return l, nil
}

// prune removes the oldest logs of ended jobs while all of them are too large.
// Job ids sort by time.
func (s *Store) prune() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	dirs, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("prune logs: %w", err)
	}
	total := int64(0)
	for _, d := range slices.Backward(dirs) {
		if s.live[d.Name()] {
			continue
		}
		size, err := folderSize(s.path(d.Name()))
		if err != nil {
			return fmt.Errorf("prune logs: %w", err)
		}
		if total += size; total > s.max {
			if err := os.RemoveAll(s.path(d.Name())); err != nil {
				return fmt.Errorf("prune logs: %w", err)
			}
		}
	}
	return nil
}

// Remove removes what is kept of an ended job's log; it is no error that there is
// nothing.
func (s *Store) Remove(job string) error {
	if err := jobForm(job); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live[job] {
		return fmt.Errorf("remove log of job %s: it is still written", job)
	}
	if err := os.RemoveAll(s.path(job)); err != nil {
		return fmt.Errorf("remove log of job %s: %w", job, err)
	}
	return nil
}

func folderSize(dir string) (int64, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var n int64
	for _, f := range files {
		if i, err := f.Info(); err == nil {
			n += i.Size()
		}
	}
	return n, nil
}

// Segments returns the numbers of the segments that are kept of a job's log, in
// order.
func (s *Store) Segments(job string) ([]int, error) {
	if err := jobForm(job); err != nil {
		return nil, err
	}
	files, err := os.ReadDir(s.path(job))
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(files) == 0 {
		return nil, fmt.Errorf("job %s: %w", job, ErrNotKept)
	}
	if err != nil {
		return nil, fmt.Errorf("log of job %s: %w", job, err)
	}
	var out []int
	for _, f := range files {
		var n int
		if _, err := fmt.Sscanf(f.Name(), "%d"+suffix, &n); err == nil && f.Name() == segmentName(n) {
			out = append(out, n)
		}
	}
	return out, nil
}

// Segment returns a segment as it lies there.
func (s *Store) Segment(job string, n int) ([]byte, error) {
	if err := jobForm(job); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(s.path(job), segmentName(n)))
	if err != nil {
		return nil, fmt.Errorf("log of job %s: %w", job, err)
	}
	return b, nil
}

// Read calls f with each entry of an ended job's log. ErrSealed says that only the
// owner of the key can, and then Segment has the sealed bytes. ErrCut comes after
// everything that could be read.
func (s *Store) Read(job string, f func(Entry) error) error {
	numbers, err := s.Segments(job)
	if err != nil {
		return err
	}
	// Segment by segment: a log can be larger than the agent should hold.
	c := chain{job: job, from: bootSecrets{s.key}}
	for _, n := range numbers {
		b, err := s.Segment(job, n)
		if err != nil {
			return err
		}
		if err := c.read(b, f); err != nil {
			return err
		}
	}
	return c.end()
}

func segmentName(n int) string { return fmt.Sprintf("%06d%s", n, suffix) }

// Log is a log that is being written. Its methods may be called concurrently.
type Log struct {
	store *Store
	job   string
	to    *PublicKey
	max   int64

	mu       sync.Mutex // guards what follows
	segments []*segment
	closed   bool
	news     chan struct{} // closed and replaced when there is more
}

type segment struct {
	number int
	f      *os.File // for reading and writing
	cipher *segmentCipher
	first  int64 // where the blocks begin
	size   int64
	blocks uint64
	ended  bool
}

// begin opens segment n. l.mu is held, or nobody else has l yet.
func (l *Log) begin(n int) error {
	h := header{Version: Version, Job: l.job, Segment: n, Salt: make([]byte, 32)}
	_, _ = rand.Read(h.Salt) // it never fails
	var secret []byte
	var err error
	if l.to != nil {
		secret, err = h.seal(l.to)
	} else {
		secret, err = bootSecrets{l.store.key}.secret(h)
	}
	if err != nil {
		return err
	}
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	s := &segment{number: n, first: int64(len(line)), size: int64(len(line))}
	if s.cipher, err = newCipher(secret, line, h); err != nil {
		return err
	}
	if s.f, err = os.OpenFile(filepath.Join(l.store.path(l.job), segmentName(n)), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); err != nil {
		return fmt.Errorf("log of job %s: %w", l.job, err)
	}
	if _, err := s.f.Write(line); err != nil {
		// A file that stays would be in the way of the next try.
		return errors.Join(fmt.Errorf("log of job %s: %w", l.job, err), s.f.Close(), os.Remove(s.f.Name()))
	}
	l.segments = append(l.segments, s)
	return nil
}

// append writes one block. A block that did not get whole onto the disk is
// overwritten by the next: its nonce counts on only when it is there, and a block
// that is half there is never followed by another.
func (s *segment) append(kind byte, e Entry) error {
	b := s.cipher.seal(nil, s.blocks, kind, e)
	if _, err := s.f.WriteAt(b, s.size); err != nil {
		// The same nonce must not seal other bytes: the segment is over.
		s.ended = true
		return errors.Join(err, s.f.Truncate(s.size))
	}
	s.size += int64(len(b))
	s.blocks++
	s.ended = kind == kindMore || kind == kindEnd
	return nil
}

// Ref is where an entry lies.
type Ref struct {
	segment int
	at      int64
	block   uint64
}

// Append adds an entry of at most MaxData bytes and says where it lies. After an
// error, such as a full disk, the next call begins another segment.
func (l *Log) Append(e Entry) (Ref, error) {
	kind := kindStdout
	if e.Stream == Stderr {
		kind = kindStderr
	}
	if len(e.Data) > MaxData || e.Offset < 0 || e.Stream != Stdout && e.Stream != Stderr {
		return Ref{}, fmt.Errorf("log of job %s: an entry of %d bytes at %d of %.20q", l.job, len(e.Data), e.Offset, e.Stream)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return Ref{}, fmt.Errorf("log of job %s: it is closed", l.job)
	}
	s := l.segments[len(l.segments)-1]
	if s.size >= SegmentBytes && !s.ended {
		if err := s.append(kindMore, Entry{At: e.At}); err != nil {
			return Ref{}, fmt.Errorf("log of job %s: %w", l.job, err)
		}
	}
	if s.ended {
		if err := l.rotate(); err != nil {
			return Ref{}, err
		}
		s = l.segments[len(l.segments)-1]
	}
	ref := Ref{s.number, s.size, s.blocks}
	if err := s.append(kind, e); err != nil {
		return Ref{}, fmt.Errorf("log of job %s: %w", l.job, err)
	}
	close(l.news)
	l.news = make(chan struct{})
	return ref, nil
}

// rotate begins the next segment and drops the oldest ones where there is too
// much. l.mu is held.
func (l *Log) rotate() error {
	if err := l.begin(l.segments[len(l.segments)-1].number + 1); err != nil {
		return err
	}
	for len(l.segments) > 2 {
		total := int64(0)
		for _, s := range l.segments {
			total += s.size
		}
		if total <= l.max {
			return nil
		}
		old := l.segments[0]
		l.segments = l.segments[1:]
		if err := errors.Join(old.f.Close(), os.Remove(filepath.Join(l.store.path(l.job), segmentName(old.number)))); err != nil {
			return fmt.Errorf("log of job %s: %w", l.job, err)
		}
	}
	return nil
}

// At reads the entry at a place that Append returned. It is an error if rotation
// has dropped it.
func (l *Log) At(r Ref) (Entry, error) {
	_, e, _, err := l.block(r)
	return e, err
}

func (l *Log) block(r Ref) (byte, Entry, int64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.segments {
		if s.number == r.segment {
			return s.cipher.open(io.NewSectionReader(s.f, r.at, s.size-r.at), r.block)
		}
	}
	return 0, Entry{}, 0, fmt.Errorf("job %s: %w", l.job, ErrNotKept)
}

// Follow calls f with each entry from the beginning of what is kept, and waits for
// more until the log is closed or ctx ends. Without wait it ends where the log does.
func (l *Log) Follow(ctx context.Context, wait bool, f func(Entry) error) error {
	var at Ref
	for first := true; ; first = false {
		l.mu.Lock()
		oldest := l.segments[0]
		if first || at.segment < oldest.number {
			at = Ref{oldest.number, oldest.first, 0}
		}
		var s *segment
		for _, o := range l.segments {
			if o.number == at.segment {
				s = o
			}
		}
		there, last := s.size > at.at, s == l.segments[len(l.segments)-1]
		closed, news := l.closed, l.news
		l.mu.Unlock()
		switch {
		case there:
			kind, e, n, err := l.block(at)
			if errors.Is(err, ErrNotKept) {
				continue
			}
			if err != nil {
				return fmt.Errorf("log of job %s: %w", l.job, err)
			}
			at.at, at.block = at.at+n, at.block+1
			if kind == kindEnd {
				return nil
			}
			if kind == kindMore {
				continue
			}
			if err := f(e); err != nil {
				return err
			}
		case !last:
			at = Ref{at.segment + 1, s.nextFirst(l, at.segment+1), 0}
		case closed || !wait:
			return nil
		default:
			select {
			case <-news:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// nextFirst is where the blocks of segment n begin.
func (s *segment) nextFirst(l *Log, n int) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.segments {
		if o.number == n {
			return o.first
		}
	}
	return 0
}

// Close ends the log. It can be read on through the Log until Forget.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	close(l.news)
	l.news = make(chan struct{})
	var err error
	if s := l.segments[len(l.segments)-1]; !s.ended {
		err = s.append(kindEnd, Entry{})
		err = errors.Join(err, s.f.Sync())
	}
	l.store.mu.Lock()
	delete(l.store.live, l.job)
	l.store.mu.Unlock()
	if err != nil {
		return fmt.Errorf("log of job %s: %w", l.job, err)
	}
	return nil
}

// Forget closes the files. Whoever reads on reads from the store.
func (l *Log) Forget() error {
	err := l.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.segments {
		err = errors.Join(err, s.f.Close())
	}
	return err
}
