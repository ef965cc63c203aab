package endorse

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// maxVersions bounds the versions of one endorsement that a library keeps:
	// bundles are verified by those that were used, until they are exported.
	maxVersions = 64
	// maxItems bounds what one library holds.
	maxItems = 1 << 16
	// maxBytes bounds the same in bytes.
	maxBytes = 512 << 20
)

// ErrFull is wrapped by errors about a library that can take no more.
var ErrFull = errors.New("the library is full")

// Held is an item in a library, and when it was last got from where it comes
// from.
type Held struct {
	Item
	Checked time.Time
}

// Library holds endorsements by key, every version of each up to a limit. It
// may be used by many at once.
type Library struct {
	mu       sync.Mutex
	versions map[Key][]Held // guarded by mu; by time of issue, the latest last
	count    int            // guarded by mu
	bytes    int            // guarded by mu
}

// NewLibrary returns an empty library.
func NewLibrary() *Library { return &Library{versions: map[Key][]Held{}} }

// Get returns the version that is valid at a time, of several the one issued
// last. If none is valid it returns the one issued last of all: appraisal says
// what is wrong with it.
func (l *Library) Get(k Key, at time.Time) (Held, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.versions[k]
	for _, h := range slices.Backward(all) {
		if h.ValidAt(at) {
			return h, true
		}
	}
	if len(all) == 0 {
		return Held{}, false
	}
	return all[len(all)-1], true
}

// Newest returns the version issued last.
func (l *Library) Newest(k Key) (Held, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.versions[k]
	if len(all) == 0 {
		return Held{}, false
	}
	return all[len(all)-1], true
}

// Add takes an item in. One that is there already is noted as checked again. It
// returns the versions that gave way.
func (l *Library) Add(i Item, checked time.Time) (dropped []Item, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.versions[i.Key]
	for n := range all {
		if all[n].Digest == i.Digest {
			if checked.After(all[n].Checked) {
				all[n].Checked = checked
			}
			return nil, nil
		}
	}
	if l.count >= maxItems || l.bytes+len(i.Bytes) > maxBytes {
		return nil, fmt.Errorf("%w: %d endorsements, %d bytes", ErrFull, l.count, l.bytes)
	}
	at, _ := slices.BinarySearchFunc(all, i.From, func(h Held, t time.Time) int {
		if h.From.After(t) {
			return 1
		}
		return -1
	})
	all = slices.Insert(slices.Clone(all), at, Held{i, checked})
	l.count++
	l.bytes += len(i.Bytes)
	for len(all) > maxVersions {
		dropped = append(dropped, all[0].Item)
		l.count--
		l.bytes -= len(all[0].Bytes)
		all = all[1:]
	}
	l.versions[i.Key] = all
	return dropped, nil
}

// All returns every version of everything, in order of key and time of issue.
func (l *Library) All() []Held {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := slices.SortedFunc(maps.Keys(l.versions), func(a, b Key) int { return strings.Compare(a.String(), b.String()) })
	out := make([]Held, 0, l.count)
	for _, k := range keys {
		out = append(out, l.versions[k]...)
	}
	return out
}

// ByDigest returns the version of an endorsement with that digest.
func (l *Library) ByDigest(k Key, d plan.Digest) (Held, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.versions[k] {
		if h.Digest == d {
			return h, true
		}
	}
	return Held{}, false
}

// Path is where an item is kept in a folder: KIND/DIGEST.EXT, for manifests
// rim/ID/DIGEST.xml, for revocation lists about the issuers of VLEKs
// crl/vlek/DIGEST.crl. The digest is that of the content, in hex.
func Path(i Item) string {
	name := strings.TrimPrefix(string(i.Digest), "sha384:") + extensions[i.Key.Kind]
	if i.Key.Kind == RIM {
		return path.Join(string(RIM), i.Key.ID, name)
	}
	if i.Key.Kind == CRL && strings.HasPrefix(i.Key.ID, vlekPrefix) {
		return path.Join(string(CRL), vlekFolder, name)
	}
	return path.Join(string(i.Key.Kind), name)
}

// vlekFolder is the folder of lists about the issuers of VLEKs.
const vlekFolder = "vlek"

var extensions = map[Kind]string{VEK: ".crt", Chain: ".pem", CRL: ".crl", OCSP: ".ocsp", RIM: ".xml"}

// Problem is a file of a folder that is not used, and why.
type Problem struct {
	File string
	Err  error
}

func (p Problem) String() string { return fmt.Sprintf("%s: %s", p.File, p.Err) }

// Load reads a folder in the form of Path into the library, but for files that
// known says are there already. Files that are not what their name says are not
// used; they are returned.
func (l *Library) Load(fsys fs.FS, known func(file string) bool) (problems []Problem, err error) {
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() || strings.HasPrefix(path.Base(name), ".") || known != nil && known(name):
			return nil
		}
		i, checked, err := read(fsys, name, d)
		if err == nil {
			_, err = l.Add(i, checked)
		}
		if err != nil {
			problems = append(problems, Problem{name, err})
		}
		if errors.Is(err, ErrFull) || len(problems) > maxItems {
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		return problems, fmt.Errorf("read endorsements: %w", err)
	}
	return problems, nil
}

func read(fsys fs.FS, name string, d fs.DirEntry) (Item, time.Time, error) {
	info, err := d.Info()
	if err != nil {
		return Item{}, time.Time{}, err
	}
	if !info.Mode().IsRegular() {
		return Item{}, time.Time{}, errors.New("not a regular file")
	}
	parts := strings.Split(name, "/")
	k, id := Kind(parts[0]), ""
	vlek := len(parts) == 3 && k == CRL && parts[1] == vlekFolder
	if len(parts) == 3 && k == RIM {
		id = parts[1]
	} else if len(parts) != 2 && !vlek {
		return Item{}, time.Time{}, errors.New("not where endorsements are kept")
	}
	b, err := readAll(fsys, name, k.MaxSize())
	if err != nil {
		return Item{}, time.Time{}, err
	}
	var i Item
	if vlek {
		i, err = vlekList(b)
	} else {
		i, err = Parse(k, id, b)
	}
	if err != nil {
		return Item{}, time.Time{}, err
	}
	if Path(i) != name {
		return Item{}, time.Time{}, errors.New("its name is not the digest of its content")
	}
	return i, info.ModTime(), nil
}

func readAll(fsys fs.FS, name string, limit int) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(b) > limit {
		return nil, fmt.Errorf("more than %d bytes", limit)
	}
	return b, nil
}
