package hold

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

const (
	eventInputsOpen   = "inputs-open"
	eventInputsFailed = "inputs-failed"
	// openFirst is up to how many bytes, of all inputs together, are decrypted before
	// the container starts: that is over in the time that the start takes. Larger
	// inputs are decrypted while the container starts.
	openFirst = 128 << 20
)

// opening decrypts files into regions, one after the other, each by all cores. A
// file that somebody waits for comes before those that nobody waits for. Files
// that are open stay right when a later one fails: only what was being decrypted
// is scrubbed, for zeros are no content.
type opening struct {
	// get makes a region; use says whether keys may be used.
	get         func(size int64) (*dma.Region, error)
	use         func() error
	passthrough bool
	// progress is the holder's.
	progress *progress
	// ending is over with the job.
	ending context.Context

	mu sync.Mutex
	// left are the files that were not begun.
	left []*residentFile
}

// residentFile is a file that lies in a region for as long as the job runs, once
// it is decrypted.
type residentFile struct {
	o      *opening
	input  string
	folder *seal.Folder
	key    *keys.DataKey
	entry  seal.Entry
	// prepared is the region that was made before the key was there, or nil.
	prepared *dma.Region
	// wanted is guarded by o.mu.
	wanted bool
	// ready is closed when either region or err is there, for good.
	ready  chan struct{}
	region *dma.Region
	err    error
}

func (o *opening) add(in *heldInput, key *keys.DataKey, place int, e seal.Entry) *residentFile {
	f := &residentFile{o: o, input: in.Name, folder: in.folder, key: key, entry: e, prepared: in.prepared[place], ready: make(chan struct{})}
	o.left = append(o.left, f)
	return f
}

// run decrypts all files, and ends at the first that fails.
func (o *opening) run() error {
	for f := o.next(); f != nil; f = o.next() {
		if f.region, f.err = f.decrypt(); f.err == nil {
			close(f.ready)
			continue
		}
		f.err = fmt.Errorf("input %s: file %s: %w", f.input, f.entry.ID, f.err)
		close(f.ready)
		o.mu.Lock()
		defer o.mu.Unlock()
		for _, g := range o.left {
			g.err = fmt.Errorf("input %s: file %s: not opened, because of another: %w", g.input, g.entry.ID, f.err)
			close(g.ready)
		}
		o.left = nil
		return f.err
	}
	return nil
}

// next takes the file that is decrypted next, nil if there is none.
func (o *opening) next() *residentFile {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.left) == 0 {
		return nil
	}
	i := max(0, slices.IndexFunc(o.left, func(f *residentFile) bool { return f.wanted }))
	f := o.left[i]
	o.left = slices.Delete(o.left, i, i+1)
	return f
}

// decrypt returns f's region, filled. After an error there is none.
func (f *residentFile) decrypt() (*dma.Region, error) {
	if err := f.o.use(); err != nil {
		return nil, err
	}
	s, err := f.folder.Open(f.key, f.entry)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	r := f.prepared
	if r == nil {
		if r, err = f.o.get(s.Size()); err != nil {
			return nil, err
		}
	}
	if err := fillRegion(f.o.ending, f.o.progress.counted(f.o.use, int64(s.ChunkSize()), s.Size()), s, r); err != nil {
		return nil, errors.Join(err, r.Scrub())
	}
	return r, nil
}

// wait returns f's region once it is filled, or why there is none. It ends with
// done, which may be nil, and with the job.
func (f *residentFile) wait(done <-chan struct{}) (*dma.Region, error) {
	if !isClosed(f.ready) {
		f.o.mu.Lock()
		f.wanted = true
		f.o.mu.Unlock()
		select {
		case <-f.ready:
		case <-done:
			return nil, errInterrupted
		case <-f.o.ending.Done():
			return nil, errOver
		}
	}
	return f.region, f.err
}

var errInterrupted = errors.New("interrupted")

func (f *residentFile) size() int64 { return f.entry.Size }

func (f *residentFile) open(done <-chan struct{}) (source, error) {
	r, err := f.wait(done)
	if err != nil {
		return nil, err
	}
	return openRegion(r, f.o.passthrough)
}

// openRest decrypts what is to be opened while the container starts. What becomes
// of it is an event, unless the job ended first.
func (h *Holder) openRest(o *opening, began time.Time, d holdapi.Decrypted) {
	err := o.run()
	took := time.Since(began)
	e := holdapi.Event{Kind: eventInputsOpen, Detail: fmt.Sprintf("%d files, %d bytes, %d ms after the keys were used first", d.Files, d.Bytes, took.Milliseconds())}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state = decrypted
	if err != nil {
		h.state = decryptFailed
		e = holdapi.Event{Kind: eventInputsFailed, Detail: err.Error()}
	}
	if err == nil || h.ending.Err() == nil && h.lease.use() == nil {
		h.log.Info("inputs", "state", e.Kind, "detail", e.Detail, "nanos", took.Nanoseconds(), "hugePages", dma.HugePages())
		h.events.add(e)
	}
	close(h.filled)
}
