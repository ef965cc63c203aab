// Package serve keeps a broker's evidence log as a Merkle tree in files (C2SP
// tlog-tiles), signs its checkpoints, asks witnesses to cosign them, and hands
// all of it out; and it runs a witness of other people's logs.
//
// The broker's database has the entries: the transaction that changes something
// inserts the entry, and that commit is the durable record. One sequencer copies
// entries from there into the tree, in order. It keeps no note of how far it got:
// the tree's size says so, so that nothing can disagree after a crash.
//
// Trusted: the database, as far as its hash chain holds; the log's key. Checked:
// that the tree has exactly the database's entries in their places, before a
// checkpoint is signed, and at each start; that there is one sequencer. Not
// checked: that the broker's operator shows everyone this tree; witnesses do that.
package serve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"

	"github.com/coffer-run/coffer/attest/translog"
)

const (
	// batchSize and batchAge are when entries are put into the tree: so many, or
	// so long after the first of them.
	batchSize = 64
	batchAge  = 5 * time.Millisecond
	// checkpointInterval is how often a checkpoint is signed while the log grows,
	// the shortest that Tessera takes; republishInterval how often while it does
	// not, which is when a witness that was away cosigns.
	checkpointInterval = 100 * time.Millisecond
	republishInterval  = time.Minute
	// witnessTimeout is how long a checkpoint waits for witnesses. It is published
	// without them then.
	witnessTimeout = time.Second
	// pollInterval is how often the source is read when nobody wakes the sequencer,
	// and retryInterval how long it waits after an error.
	pollInterval  = time.Second
	retryInterval = time.Second
	// stopTimeout bounds the wait for a last checkpoint.
	stopTimeout = time.Second
	// page is how many entries are read at a time at the start.
	page = 1000
	// maxWitnessAnswer bounds a witness's answer, in bytes.
	maxWitnessAnswer = 64 << 10
	// lockFile is held by the one sequencer of a folder.
	lockFile = "sequencer.lock"
)

var (
	// ErrDiverged says that tree and source do not have the same entries. The
	// sequencer stops; nothing is signed any more.
	ErrDiverged = errors.New("the Merkle tree and the database differ")
	// ErrOldDatabase is an ErrDiverged of which the source is the cause: it does not
	// have what this log signed for. It is an old copy or was changed, and what it says
	// of grants and revocations is not to be trusted.
	ErrOldDatabase = fmt.Errorf("%w: the database lacks what the log has", ErrDiverged)
	// ErrNotYet says that no published checkpoint covers an entry so far.
	ErrNotYet = errors.New("no published checkpoint has the entry yet")
	// ErrLocked says that another sequencer has the folder.
	ErrLocked = errors.New("another sequencer has this log")
)

// Source has the entries of a log.
type Source interface {
	// LogEntries returns entries from index from on, in order and without a gap,
	// at most limit. It returns only what is durable.
	LogEntries(ctx context.Context, from uint64, limit int) ([]translog.Entry, error)
}

// Witness is someone who is asked to cosign.
type Witness struct {
	// Key is a verifier key (C2SP signed-note), URL the prefix of add-checkpoint.
	Key string
	URL string
}

// Config is what a Log is made of. Every field but Witnesses is required.
type Config struct {
	// Dir is the folder of the tree. It must exist and belong to this log alone.
	Dir string
	// Broker is the id of the broker whose log it is.
	Broker string
	// Key is the log's private key (C2SP signed-note), named translog.KeyName(Broker).
	Key       string
	Source    Source
	Witnesses []Witness
	// Client asks witnesses.
	Client *http.Client
	Log    *slog.Logger
}

// Log is a log in files. It is safe for concurrent use.
type Log struct {
	c         Config
	signer    note.Signer
	publicKey string
	trust     translog.Trust
	files     client.FileFetcher
	witnesses tessera.WitnessGroup
	wake      chan struct{}
	// opened is closed once the files and the source were compared.
	opened chan struct{}
	// maxWait is the constant; tests have less patience.
	maxWait time.Duration
	// reached is called at each step that a crash may hit; tests kill there.
	reached func(step string)
}

// New returns a log. It touches nothing: Run does.
func New(c Config) (*Log, error) {
	if c.Dir == "" || c.Broker == "" || c.Source == nil || c.Client == nil || c.Log == nil {
		return nil, errors.New("a log needs a folder, a broker, a source, a client and a logger")
	}
	signer, err := note.NewSigner(c.Key)
	if err != nil {
		return nil, errors.New("log key: not an Ed25519 private key in the form of C2SP signed-note")
	}
	if signer.Name() != translog.KeyName(c.Broker) {
		return nil, fmt.Errorf("log key is named %q, want %q", signer.Name(), translog.KeyName(c.Broker))
	}
	public, err := translog.PublicKey(c.Key)
	if err != nil {
		return nil, err
	}
	l := &Log{c: c, signer: signer, publicKey: public, files: client.FileFetcher{Root: c.Dir}, wake: make(chan struct{}, 1), opened: make(chan struct{}), maxWait: maxWait, reached: func(string) {}}
	keys := make([]string, 0, len(c.Witnesses))
	members := make([]tessera.Witness, 0, len(c.Witnesses))
	for _, w := range c.Witnesses {
		u, err := url.Parse(w.URL)
		if err != nil || u.Host == "" {
			return nil, fmt.Errorf("witness: url %.200q", w.URL)
		}
		m, err := tessera.NewWitness(w.Key, u)
		if err != nil {
			return nil, fmt.Errorf("witness at %s: %w", w.URL, err)
		}
		keys, members = append(keys, w.Key), append(members, m)
	}
	if l.trust, err = translog.NewTrust(public, keys, len(keys)); err != nil {
		return nil, err
	}
	if len(members) > 0 {
		// All are asked, and all cosignatures that come in time are kept.
		group := tessera.WitnessGroup{N: len(members)}
		for _, m := range members {
			group.Components = append(group.Components, m)
		}
		l.witnesses = group
	}
	return l, nil
}

// Key is the log's public key (C2SP signed-note).
func (l *Log) Key() string { return l.publicKey }

// Wake tells the sequencer that the source has new entries. It never waits.
func (l *Log) Wake() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Opened is closed once Run has seen that the source has what the log signed for.
func (l *Log) Opened() <-chan struct{} { return l.opened }

// Run is the sequencer: it copies entries into the tree until ctx ends, then
// returns nil. It is called once. Errors of disk or source are logged and tried
// again. ErrDiverged and ErrLocked end it: releases can go on without it, and proofs
// end where the last published checkpoint does. ErrOldDatabase ends it too, and
// then nothing may be released.
func (l *Log) Run(ctx context.Context) error {
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	// Tessera puts another in its place where it finds no tree.
	signed, err := l.lastSigned(ctx)
	if err != nil {
		return err
	}
	// The appender outlives ctx by the time for a last checkpoint.
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	guard := &guard{Signer: l.signer, roots: map[uint64][]byte{0: rfc6962.DefaultHasher.EmptyRoot()}}
	options := tessera.NewAppendOptions().WithCheckpointSigner(guard).WithBatching(batchSize, batchAge).
		WithCheckpointInterval(checkpointInterval).WithCheckpointRepublishInterval(republishInterval)
	if len(l.c.Witnesses) > 0 {
		options = options.WithWitnesses(l.witnesses, &tessera.WitnessOptions{Timeout: witnessTimeout, FailOpen: true})
	}
	driver, err := posix.New(background, posix.Config{Path: l.c.Dir, HTTPClient: Bounded(l.c.Client, maxWitnessAnswer)})
	if err != nil {
		return fmt.Errorf("open log %s: %w", l.c.Dir, err)
	}
	appender, shutdown, reader, err := tessera.NewAppender(background, driver, options)
	if err != nil {
		return fmt.Errorf("open log %s: %w", l.c.Dir, err)
	}
	s := &sequencer{Log: l, guard: guard, appender: appender, reader: reader, signed: signed}
	if err := s.run(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	stop, cancelStop := context.WithTimeout(background, stopTimeout)
	defer cancelStop()
	if err := shutdown(stop); err != nil {
		l.c.Log.LogAttrs(background, slog.LevelWarn, "no last checkpoint", slog.String("error", err.Error()))
	}
	return nil
}

// lock takes the folder for one sequencer, of this process or another.
func (l *Log) lock() (func(), error) {
	f, err := os.OpenFile(filepath.Join(l.c.Dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock log: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, l.c.Dir)
		}
		return nil, fmt.Errorf("lock log: %w", err)
	}
	return func() { _ = f.Close() }, nil
}

// guard signs a checkpoint only if its root is the one that the source's entries
// have: what Tessera was given, lost or reordered, no signature says otherwise.
type guard struct {
	note.Signer
	mu sync.Mutex
	// roots are those of the sizes that the tree may have.
	roots map[uint64][]byte
}

// Sign implements note.Signer.
func (g *guard) Sign(text []byte) ([]byte, error) {
	size, root, err := sizeAndRoot(text)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	want, known := g.roots[size]
	g.mu.Unlock()
	if !known {
		return nil, fmt.Errorf("not signing %d entries: they were not compared with the database yet", size)
	}
	if !bytes.Equal(want, root) {
		return nil, fmt.Errorf("%w: not signing %d entries", ErrDiverged, size)
	}
	return g.Signer.Sign(text)
}

func (g *guard) expect(size uint64, root []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.roots[size] = root
}

// forget drops what the tree has outgrown. One batch is kept: a checkpoint of it
// may be about to be signed.
func (g *guard) forget(below uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for size := range g.roots {
		if size < below {
			delete(g.roots, size)
		}
	}
}

// sequencer is one run of a Log. One goroutine uses it.
type sequencer struct {
	*Log
	guard    *guard
	appender *tessera.Appender
	reader   tessera.LogReader
	// signed is the checkpoint that the files had.
	signed translog.Checkpoint
	// tree has the source's entries up to where the files are.
	tree *translog.Tree
	// last is the body of the tree's last entry.
	last []byte
	// before is where tree stood before the last batch.
	before uint64
}

func (s *sequencer) run(ctx context.Context) error {
	if err := s.recover(ctx); err != nil {
		return err
	}
	close(s.opened)
	s.c.Log.LogAttrs(ctx, slog.LevelInfo, "log opened", slog.Uint64("entries", s.tree.Size()), slog.Int("witnesses", len(s.c.Witnesses)))
	for {
		n, err := s.step(ctx)
		wait := pollInterval
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrDiverged):
			return err
		case err != nil:
			s.c.Log.LogAttrs(ctx, slog.LevelError, "log does not grow, trying again", slog.String("error", err.Error()))
			wait = retryInterval
		case n > 0:
			continue
		}
		wake := s.wake
		if err != nil {
			wake = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
		case <-time.After(wait):
		}
	}
}

// recover reads how many entries the files have and compares them with the
// source's: after a crash at any point, and after somebody changed either. An entry
// is durable in the source before it comes into the tree, and the guard signs for
// nothing else, so that a source that falls short of either lost it.
func (s *sequencer) recover(ctx context.Context) error {
	size, err := s.reader.IntegratedSize(ctx)
	if err != nil {
		return fmt.Errorf("read the log's size: %w", err)
	}
	s.tree = translog.NewTree()
	if err := s.takeUpTo(ctx, min(size, s.signed.Size)); err != nil {
		return err
	}
	// Damaged files may have fewer entries than were signed for.
	of := *s
	if of.tree, err = s.tree.Clone(); err != nil {
		return err
	}
	if err := of.takeUpTo(ctx, s.signed.Size); err != nil {
		return err
	}
	root, err := of.tree.Root()
	if err != nil {
		return err
	}
	if s.signed.Size > 0 && !bytes.Equal(root, s.signed.Root) {
		return fmt.Errorf("%w: of the first %d entries it has others", ErrOldDatabase, s.signed.Size)
	}
	if err := s.takeUpTo(ctx, size); err != nil {
		return err
	}
	s.before = size
	if root, err = s.tree.Root(); err != nil {
		return err
	}
	if err := s.same(ctx, root); err != nil {
		return err
	}
	s.guard.expect(size, root)
	return nil
}

// lastSigned is the last checkpoint that this log signed, zero if there is none. One that
// does not hold under its key is none: it says nothing of the source.
func (l *Log) lastSigned(ctx context.Context) (translog.Checkpoint, error) {
	text, err := l.files.ReadCheckpoint(ctx)
	if errors.Is(err, os.ErrNotExist) {
		return translog.Checkpoint{}, nil
	}
	if err != nil {
		return translog.Checkpoint{}, fmt.Errorf("read the log's checkpoint: %w", err)
	}
	c, err := l.trust.Open(text)
	if err != nil {
		l.c.Log.LogAttrs(ctx, slog.LevelError, "the log's checkpoint does not hold", slog.String("error", err.Error()))
		return translog.Checkpoint{}, nil
	}
	return c, nil
}

// takeUpTo adds the source's entries to tree until it has size.
func (s *sequencer) takeUpTo(ctx context.Context, size uint64) error {
	for s.tree.Size() < size {
		l, err := s.c.Source.LogEntries(ctx, s.tree.Size(), int(min(page, size-s.tree.Size()))) //nolint:gosec // at most page
		if err != nil {
			return fmt.Errorf("read entries: %w", err)
		}
		if len(l) == 0 {
			return fmt.Errorf("%w: the log has %d entries, the database %d", ErrOldDatabase, size, s.tree.Size())
		}
		if err := s.take(l); err != nil {
			return err
		}
	}
	return nil
}

// take adds entries to tree.
func (s *sequencer) take(l []translog.Entry) error {
	for _, e := range l {
		if e.Index != s.tree.Size() {
			return fmt.Errorf("%w: the database has entry %d in place %d", ErrDiverged, e.Index, s.tree.Size())
		}
		if err := s.tree.Add(e.Body); err != nil {
			return err
		}
		s.last = e.Body
	}
	return nil
}

// next reads the entries that come after the tree's last one, which must be there
// still: a database can be put back while it is in use.
func (s *sequencer) next(ctx context.Context) ([]translog.Entry, error) {
	if s.tree.Size() == 0 {
		return s.c.Source.LogEntries(ctx, 0, batchSize)
	}
	l, err := s.c.Source.LogEntries(ctx, s.tree.Size()-1, 1+batchSize)
	if err != nil {
		return nil, err
	}
	if len(l) == 0 || !bytes.Equal(l[0].Body, s.last) {
		return nil, fmt.Errorf("%w: entry %d is gone or another one", ErrOldDatabase, s.tree.Size()-1)
	}
	return l[1:], nil
}

// same compares root with the root of the files' tiles.
func (s *sequencer) same(ctx context.Context, root []byte) error {
	size := s.tree.Size()
	hashes, err := client.FetchRangeNodes(ctx, size, s.reader.ReadTile)
	if err != nil {
		return fmt.Errorf("%w: tiles of %d entries: %w", ErrDiverged, size, err)
	}
	found := rfc6962.DefaultHasher.EmptyRoot()
	if size > 0 {
		r, err := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewRange(0, size, hashes)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDiverged, err)
		}
		if found, err = r.GetRootHash(nil); err != nil {
			return fmt.Errorf("%w: %w", ErrDiverged, err)
		}
	}
	if !bytes.Equal(root, found) {
		return fmt.Errorf("%w: the tree of %d entries has root %x, the database's entries have %x", ErrDiverged, size, found, root)
	}
	return nil
}

// step puts the next batch into the tree, and returns how many entries it grew by.
func (s *sequencer) step(ctx context.Context) (int, error) {
	l, err := s.next(ctx)
	if err != nil || len(l) == 0 {
		return 0, err
	}
	if err := s.announce(l); err != nil {
		return 0, err
	}
	s.reached("before add")
	futures := make([]tessera.IndexFuture, len(l))
	for i, e := range l {
		futures[i] = s.appender.Add(ctx, tessera.NewEntry(e.Body))
	}
	s.reached("after add")
	var failed error
	for i, f := range futures {
		at, err := f()
		switch {
		case err != nil:
			failed = errors.Join(failed, err)
		case at.Index != l[i].Index:
			return 0, fmt.Errorf("%w: entry %d came to place %d", ErrDiverged, l[i].Index, at.Index)
		}
	}
	s.reached("after integration")
	// What the files have now counts, also where a write failed half-way.
	size, err := s.reader.IntegratedSize(ctx)
	if err != nil {
		return 0, errors.Join(failed, err)
	}
	from := s.tree.Size()
	if size < from || size > from+uint64(len(l)) {
		return 0, errors.Join(failed, fmt.Errorf("%w: the tree has %d entries, %d to %d expected", ErrDiverged, size, from, from+uint64(len(l))))
	}
	if err := s.take(l[:size-from]); err != nil {
		return 0, errors.Join(failed, err)
	}
	root, err := s.tree.Root()
	if err != nil {
		return 0, errors.Join(failed, err)
	}
	if err := s.same(ctx, root); err != nil {
		return 0, errors.Join(failed, err)
	}
	s.guard.forget(s.before)
	s.before = from
	return int(size - from), failed //nolint:gosec // at most batchSize
}

// announce tells the guard the root of each size that the tree may have soon.
func (s *sequencer) announce(l []translog.Entry) error {
	next, err := s.tree.Clone()
	if err != nil {
		return err
	}
	for _, e := range l {
		if e.Index != next.Size() {
			return fmt.Errorf("%w: the database has entry %d in place %d", ErrDiverged, e.Index, next.Size())
		}
		if err := next.Add(e.Body); err != nil {
			return err
		}
		root, err := next.Root()
		if err != nil {
			return err
		}
		s.guard.expect(next.Size(), root)
	}
	return nil
}

// Bounded returns a client whose answers end in an error after limit bytes.
func Bounded(c *http.Client, limit int64) *http.Client {
	b := *c
	if b.Transport == nil {
		b.Transport = http.DefaultTransport
	}
	b.Transport = limited{b.Transport, limit}
	return &b
}

type limited struct {
	http.RoundTripper
	limit int64
}

// RoundTrip implements http.RoundTripper.
func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, l.limit)
	}
	return resp, err
}
