package emulate

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
)

const (
	// inblobMax is TSM_REPORT_INBLOB_MAX of the kernel.
	inblobMax = 64
	// reportDataSize is what the sev-guest driver wants of an inblob.
	reportDataSize = 64
	// privlevelMax is TSM_REPORT_PRIVLEVEL_MAX.
	privlevelMax = 3
	reportRoot   = configfsi.TsmPrefix + "/report"
)

// attributes of an entry under report/, as the sev-guest driver shows them.
var (
	readable = []string{"auxblob", "generation", "outblob", "privlevel_floor", "provider"}
	writable = []string{"inblob", "privlevel"}
)

// TSM is a configfsi.Client that behaves as drivers/virt/coco/tsm.c of Linux
// with the sev-guest provider, reports coming from the emulator.
type TSM struct {
	client *Client

	// mu guards entries, as the kernel's one rwsem does.
	mu      sync.Mutex
	entries map[string]*entry
}

// entry is struct tsm_report_state. Generations count writes: the report that
// is kept is current while both are equal.
type entry struct {
	inblob           []byte
	privlevel        uint32
	writeGeneration  uint64
	readGeneration   uint64
	outblob, auxblob []byte
}

var _ configfsi.Client = (*TSM)(nil)

// NewTSM returns an empty report/ folder.
func NewTSM(c *Client) *TSM { return &TSM{client: c, entries: map[string]*entry{}} }

// MkdirTemp makes a new entry.
func (t *TSM) MkdirTemp(dir, pattern string) (string, error) {
	p, err := configfsi.ParseTsmPath(dir)
	if err != nil || p.Subsystem != "report" || p.Entry != "" {
		return "", &fs.PathError{Op: "mkdir", Path: dir, Err: syscall.EPERM}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		name := configfsi.TempName(rand.Reader, pattern)
		if _, taken := t.entries[name]; taken {
			continue
		}
		t.entries[name] = &entry{}
		return path.Join(reportRoot, name), nil
	}
}

// RemoveAll removes an entry. Its attributes go with it.
func (t *TSM) RemoveAll(name string) error {
	p, err := configfsi.ParseTsmPath(name)
	if err != nil || p.Subsystem != "report" || p.Entry == "" || p.Attribute != "" {
		return &fs.PathError{Op: "remove", Path: name, Err: syscall.EPERM}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.entries[p.Entry]; !ok {
		return &fs.PathError{Op: "remove", Path: name, Err: syscall.ENOENT}
	}
	delete(t.entries, p.Entry)
	return nil
}

// WriteFile sets an attribute.
func (t *TSM) WriteFile(name string, contents []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.write(name, contents); err != nil {
		return &fs.PathError{Op: "write", Path: name, Err: err}
	}
	return nil
}

func (t *TSM) write(name string, contents []byte) error {
	e, attr, err := t.attribute(name)
	if err != nil {
		return err
	}
	if slices.Contains(readable, attr) {
		return syscall.EACCES
	}
	if !slices.Contains(writable, attr) {
		return syscall.ENOENT
	}
	// A writer that comes round to the generation last read would pass an old
	// report off as current.
	if e.writeGeneration == e.readGeneration-1 {
		return syscall.EBUSY
	}
	switch attr {
	case "inblob":
		if len(contents) == 0 || len(contents) > inblobMax {
			return syscall.EINVAL
		}
		e.inblob = bytes.Clone(contents)
	case "privlevel":
		v, err := configfsi.Kstrtouint(contents, 0, 32)
		if err != nil || v > privlevelMax {
			return syscall.EINVAL
		}
		e.privlevel = uint32(v) // #nosec G115 -- parsed with 32 bits
	}
	e.writeGeneration++
	return nil
}

// ReadFile reads an attribute; outblob and auxblob make the report.
func (t *TSM) ReadFile(name string) ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b, err := t.read(name)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return b, nil
}

func (t *TSM) read(name string) ([]byte, error) {
	e, attr, err := t.attribute(name)
	if err != nil {
		return nil, err
	}
	switch attr {
	case "generation":
		return []byte(strconv.FormatUint(e.writeGeneration, 10) + "\n"), nil
	case "provider":
		return []byte("sev_guest\n"), nil
	case "privlevel_floor":
		return []byte("0\n"), nil
	case "outblob", "auxblob":
	default:
		if slices.Contains(writable, attr) {
			return nil, syscall.EACCES
		}
		return nil, syscall.ENOENT
	}
	if len(e.inblob) != reportDataSize {
		return nil, syscall.EINVAL
	}
	if e.outblob == nil || e.readGeneration != e.writeGeneration {
		resp, err := t.client.Do(context.Background(), Request{Op: OpSNPReport, ReportData: e.inblob, VMPL: e.privlevel})
		if err != nil {
			return nil, fmt.Errorf("%w: %w", syscall.EIO, err)
		}
		e.outblob, e.auxblob, e.readGeneration = resp.Report, resp.Certificates, e.writeGeneration
	}
	if attr == "auxblob" {
		return bytes.Clone(e.auxblob), nil
	}
	return bytes.Clone(e.outblob), nil
}

// ReadDir lists report/ or an entry of it.
func (t *TSM) ReadDir(dirname string) ([]os.DirEntry, error) {
	p, err := configfsi.ParseTsmPath(dirname)
	if err != nil || p.Subsystem != "report" || p.Attribute != "" {
		return nil, &fs.PathError{Op: "readdir", Path: dirname, Err: syscall.ENOENT}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []os.DirEntry
	if p.Entry == "" {
		for name := range t.entries {
			out = append(out, dirEntry{name: name, mode: fs.ModeDir | 0o755})
		}
	} else {
		if _, ok := t.entries[p.Entry]; !ok {
			return nil, &fs.PathError{Op: "readdir", Path: dirname, Err: syscall.ENOENT}
		}
		for _, name := range readable {
			out = append(out, dirEntry{name: name, mode: 0o444})
		}
		for _, name := range writable {
			out = append(out, dirEntry{name: name, mode: 0o200})
		}
	}
	slices.SortFunc(out, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return out, nil
}

func (t *TSM) attribute(name string) (*entry, string, error) {
	p, err := configfsi.ParseTsmPath(name)
	if err != nil || p.Subsystem != "report" || p.Attribute == "" {
		return nil, "", syscall.ENOENT
	}
	e, ok := t.entries[p.Entry]
	if !ok {
		return nil, "", syscall.ENOENT
	}
	return e, p.Attribute, nil
}

// dirEntry is a name in configfs and its own FileInfo.
type dirEntry struct {
	name string
	mode fs.FileMode
}

func (d dirEntry) Name() string               { return d.name }
func (d dirEntry) IsDir() bool                { return d.mode.IsDir() }
func (d dirEntry) Type() fs.FileMode          { return d.mode.Type() }
func (d dirEntry) Info() (fs.FileInfo, error) { return d, nil }
func (d dirEntry) Size() int64                { return 0 }
func (d dirEntry) Mode() fs.FileMode          { return d.mode }
func (d dirEntry) ModTime() time.Time         { return time.Time{} }
func (d dirEntry) Sys() any                   { return nil }
