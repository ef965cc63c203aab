package sink

import (
	"io"
	"os"
	"sync/atomic"
)

// Sending is a checkpoint on its way to its bucket.
type Sending struct {
	// Folder is the checkpoint's.
	Folder string
	// Bytes of its sealed files are in the bucket, or were handed to what sends them;
	// of how many.
	Bytes, Total int64
}

// Sending says which checkpoint of a job is on its way. ok is false if none is.
func (b *Buckets) Sending(job string) (_ Sending, ok bool) {
	b.mu.Lock()
	s := b.going[job]
	b.mu.Unlock()
	if s == nil {
		return Sending{}, false
	}
	return Sending{Folder: s.folder, Bytes: min(s.got.Load(), s.total), Total: s.total}, true
}

// sending counts one checkpoint. A nil one counts nothing.
type sending struct {
	folder string
	total  int64
	got    atomic.Int64
}

// begin says that a checkpoint goes to its bucket, until done is called.
func (b *Buckets) begin(job, folder string, root *os.Root, names []string) (s *sending, done func(), err error) {
	s = &sending{folder: folder}
	for _, n := range names {
		if !sealedForm.MatchString(n) {
			continue
		}
		st, err := root.Lstat(n)
		if err != nil {
			return nil, nil, err
		}
		s.total += st.Size()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.going == nil {
		b.going = map[string]*sending{}
	}
	b.going[job] = s
	return s, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.going, job)
	}, nil
}

func (s *sending) add(n int64) {
	if s != nil {
		s.got.Add(n)
	}
}

// reader counts what is read of a file.
func (s *sending) reader(r io.Reader) io.Reader {
	if s == nil {
		return r
	}
	return &counted{r, s}
}

type counted struct {
	r io.Reader
	s *sending
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.s.add(int64(n))
	return n, err
}
