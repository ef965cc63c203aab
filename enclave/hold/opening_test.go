package hold

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// slowly is a holder of a started job whose inputs are being opened as fast as a
// test lets them.
type slowly struct {
	*clocked
	o *opening
	// files are by name, in the order of the manifest f0, f1 and so on; plain is
	// what they hold, made the regions in the order in which they were asked for.
	files []*residentFile
	plain [][]byte
	made  []*dma.Region
	// chunk lets one chunk be decrypted; closed, all.
	chunk chan struct{}
}

// newSlowly has files of the given sizes. damage may change them where they lie.
func newSlowly(t *testing.T, damage func(dir string), sizes ...int) *slowly {
	t.Helper()
	s := &slowly{clocked: newClocked(t), chunk: make(chan struct{})}
	key := keys.GenerateDataKey()
	ok(t, s.request("a"))
	ok(t, s.give(key, "a"))
	var sources []seal.Source
	for i, n := range sizes {
		b := make([]byte, n)
		_, _ = rand.NewChaCha8([32]byte{byte(i + 1)}).Read(b)
		s.plain = append(s.plain, b)
		sources = append(sources, sourceOf("f"+string(rune('0'+i)), b))
	}
	dir := filepath.Join(t.TempDir(), "sealed")
	done, err := seal.Seal(t.Context(), key, "a", sources, dir, seal.Options{ChunkSize: seal.MinChunkSize})
	ok(t, err)
	if damage != nil {
		damage(dir)
	}
	root, err := os.OpenRoot(dir)
	ok(t, err)
	t.Cleanup(func() { _ = root.Close() })
	folder, err := seal.ReadFolder(root, "a", done.Digest)
	ok(t, err)
	entries, err := folder.Entries(key)
	ok(t, err)
	s.pool = dma.NewPool(0)
	s.o = &opening{
		progress:    &progress{},
		passthrough: s.inputFS.passthrough, ending: s.ending,
		get: func(size int64) (*dma.Region, error) {
			r, err := s.pool.Get(regionName, size)
			s.made = append(s.made, r)
			return r, err
		},
		use: func() error {
			select {
			case <-s.chunk:
			case <-s.ending.Done():
			}
			return s.lease.use()
		},
	}
	s.inputFS.addInput(t.Context(), "in")
	for i, e := range entries {
		f := s.o.add(&heldInput{Input: holdapi.Input{Name: "in"}, folder: folder, prepared: make([]*dma.Region, len(entries))}, key, i, e)
		s.files = append(s.files, f)
		s.inputFS.addFile(t.Context(), "in", e.Name, f)
		s.handout.add("in/"+e.Name, f)
	}
	s.mu.Lock()
	s.state = decrypting
	s.mu.Unlock()
	return s
}

// begin has the files opened in the background.
func (s *slowly) begin() {
	go s.openRest(s.o, time.Now(), holdapi.Decrypted{Files: len(s.files)})
}

type bytesRead struct {
	b   []byte
	err error
}

// read reads a file by its path, in a process of its own, as a job does.
func (s *slowly) read(i int) (*exec.Cmd, <-chan bytesRead) {
	s.t.Helper()
	out := make(chan bytesRead, 1)
	c := exec.Command("cat", s.path(holdapi.InputsName, "in", "f"+string(rune('0'+i))))
	var b bytes.Buffer
	c.Stdout = &b
	ok(s.t, c.Start())
	go func() {
		err := c.Wait()
		out <- bytesRead{b.Bytes(), err}
	}()
	return c, out
}

// descriptor asks for a file's descriptor.
func (s *slowly) descriptor(i int) <-chan bytesRead {
	out := make(chan bytesRead, 1)
	go func() {
		f, _, err := holdapi.OpenRegion(s.path(holdapi.RegionsDir, holdapi.RegionsSocket), "in/f"+string(rune('0'+i)))
		var b []byte
		if err == nil {
			b = make([]byte, len(s.plain[i]))
			_, err = f.ReadAt(b, 0)
			_ = f.Close()
		}
		out <- bytesRead{b, err}
	}()
	return out
}

func (s *slowly) wants(i int, r bytesRead) {
	s.t.Helper()
	if r.err != nil || !bytes.Equal(r.b, s.plain[i]) {
		s.t.Errorf("f%d: %d bytes, %v", i, len(r.b), r.err)
	}
}

func (s *slowly) waits(c <-chan bytesRead) {
	s.t.Helper()
	select {
	case r := <-c:
		s.t.Fatalf("%d bytes of a file that is not open, %v", len(r.b), r.err)
	case <-time.After(50 * time.Millisecond):
	}
}

// asked returns when somebody waits for a file.
func (s *slowly) asked(i int) {
	for wanted := false; !wanted; time.Sleep(time.Millisecond) {
		s.o.mu.Lock()
		wanted = s.files[i].wanted
		s.o.mu.Unlock()
	}
}

func (s *slowly) told() (kinds []string, details string) {
	for _, e := range s.events.after(s.t.Context(), 0, 0) {
		kinds, details = append(kinds, e.Kind), details+e.Detail+"\n"
	}
	return kinds, details
}

func TestReaderWaitsForTheFile(t *testing.T) {
	s := newSlowly(t, nil, 5*seal.MinChunkSize+7, seal.MinChunkSize, 0)
	var paths, descriptors []<-chan bytesRead
	for i := range s.plain {
		_, p := s.read(i)
		paths, descriptors = append(paths, p), append(descriptors, s.descriptor(i))
	}
	for i := range s.plain {
		s.waits(paths[i])
		s.waits(descriptors[i])
	}
	s.begin()
	for range 3 {
		s.chunk <- struct{}{}
	}
	for i := range s.plain {
		s.waits(paths[i])
		s.waits(descriptors[i])
	}
	close(s.chunk)
	for i := range s.plain {
		s.wants(i, <-paths[i])
		if r := <-descriptors[i]; len(s.plain[i]) > 0 {
			s.wants(i, r)
		}
	}
	<-s.filled
	if k, d := s.told(); !slices.Equal(k, []string{"inputs-open"}) || !strings.Contains(d, "3 files") {
		t.Errorf("events %v %s", k, d)
	}
}

func TestWantedFileIsOpenedFirst(t *testing.T) {
	s := newSlowly(t, nil, 1000, 2000, 3000, 4000)
	_, r := s.read(2)
	s.asked(2)
	s.begin()
	close(s.chunk)
	s.wants(2, <-r)
	<-s.filled
	var order []int64
	for _, m := range s.made {
		order = append(order, m.Size())
	}
	if !slices.Equal(order, []int64{3000, 1000, 2000, 4000}) {
		t.Errorf("files were opened in the order %v", order)
	}
}

// A damaged file gives nothing, nor does any after it; what is open stays right.
func TestFileIsDamagedInTheMiddle(t *testing.T) {
	s := newSlowly(t, func(dir string) {
		p := filepath.Join(dir, seal.SealedName("000001"))
		b, err := os.ReadFile(p)
		ok(t, err)
		b[seal.PayloadOffset+3*(seal.MinChunkSize+seal.TagSize)+100] ^= 1
		ok(t, os.WriteFile(p, b, 0o600))
	}, 3*seal.MinChunkSize, 6*seal.MinChunkSize, seal.MinChunkSize)
	if s.files[1].entry.ID != "000001" {
		t.Fatalf("the second file is %s", s.files[1].entry.ID)
	}
	_, damaged := s.read(1)
	after, first := s.descriptor(2), s.descriptor(0)
	// All are asked for, so that they come in order.
	for i := range s.files {
		s.asked(i)
	}
	s.begin()
	for range 4 {
		s.chunk <- struct{}{}
	}
	s.wants(0, <-first)
	f, err := os.Open(s.path(holdapi.InputsName, "in", "f0"))
	ok(t, err)
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, len(s.plain[0]), unix.PROT_READ, unix.MAP_SHARED)
	ok(t, err)
	defer func() { _ = unix.Munmap(m) }()
	s.waits(damaged)
	close(s.chunk)
	<-s.filled
	if r := <-damaged; r.err == nil || len(r.b) > 0 {
		t.Errorf("%d bytes of a damaged file, %v", len(r.b), r.err)
	}
	if r := <-after; r.err == nil {
		t.Error("a file after a damaged one was opened")
	}
	if !bytes.Equal(m, s.plain[0]) {
		t.Error("a file that was open changed")
	}
	_, again := s.read(0)
	s.wants(0, <-again)
	if _, err := s.made[1].ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("what was decrypted of a damaged file can be read")
	}
	if k, d := s.told(); !slices.Contains(k, "inputs-failed") || !strings.Contains(d, "input in: file 000001") || !strings.Contains(d, "chunk 3 does not authenticate") {
		t.Errorf("events %v %s", k, d)
	}
}

// The lease's end stops the work at its next chunk, and everything is taken back.
func TestRevokedWhileInputsAreOpened(t *testing.T) {
	for name, end := range map[string]func(s *slowly) error{
		"the holder takes back": func(s *slowly) error { s.takeBack(holdapi.Lease{}); return nil },
		"the agent ends the job": func(s *slowly) error {
			_, err := s.finish(context.WithoutCancel(s.t.Context()))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSlowly(t, nil, 8*seal.MinChunkSize, seal.MinChunkSize)
			_, path := s.read(0)
			descriptor := s.descriptor(1)
			// Both are asked for, so that they come in order.
			s.asked(0)
			s.asked(1)
			s.begin()
			for range 4 {
				s.chunk <- struct{}{}
			}
			s.waits(path)
			s.waits(descriptor)
			ok(t, end(s))
			for _, r := range []bytesRead{<-path, <-descriptor} {
				if r.err == nil || len(r.b) > 0 {
					t.Errorf("%d bytes after the end, %v", len(r.b), r.err)
				}
			}
			if st := s.status(); !st.Scrubbed || st.RegionBytes != 0 {
				t.Errorf("%+v", st)
			}
			if k, _ := s.told(); slices.Contains(k, "inputs-open") || slices.Contains(k, "inputs-failed") {
				t.Errorf("events %v", k)
			}
		})
	}
	t.Run("nothing but the look at the clock", func(t *testing.T) {
		s := newSlowly(t, nil, 8*seal.MinChunkSize)
		s.begin()
		for range 4 {
			s.chunk <- struct{}{}
		}
		s.lapse()
		close(s.chunk)
		<-s.filled
		if r, err := s.files[0].wait(nil); err == nil || r != nil {
			t.Error("a file was opened past the lease")
		}
		if _, err := s.made[0].ReadAt(make([]byte, 1), 0); err == nil {
			t.Error("what was decrypted before the lease's end can be read")
		}
		if k, _ := s.told(); len(k) > 0 {
			t.Errorf("events %v", k)
		}
	})
}

// Who waited reads nothing once nobody watches the job.
func TestTraceIsLostWhileAReaderWaits(t *testing.T) {
	s := newSlowly(t, nil, seal.MinChunkSize)
	_, path := s.read(0)
	descriptor := s.descriptor(0)
	s.waits(path)
	s.waits(descriptor)
	s.trace.declareLost("test")
	s.begin()
	close(s.chunk)
	for _, r := range []bytesRead{<-path, <-descriptor} {
		if r.err == nil || len(r.b) > 0 {
			t.Errorf("%d bytes without a trace, %v", len(r.b), r.err)
		}
	}
}

func TestWaitingReaderCanBeKilled(t *testing.T) {
	s := newSlowly(t, nil, seal.MinChunkSize)
	c, path := s.read(0)
	s.waits(path)
	ok(t, c.Process.Kill())
	select {
	case <-path:
	case <-time.After(time.Minute):
		t.Error("it hangs")
	}
	s.begin()
	close(s.chunk)
	<-s.filled
}
