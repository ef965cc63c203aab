package sandbox

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
)

// What an image may be once it is unpacked. A few bytes can become any number of them, by
// compression and, without any, as a sparse file of an archive.
const (
	// DefaultImageBytes is what the files of one image may take, of all its layers, unless
	// Config says otherwise.
	DefaultImageBytes = 64 << 30
	// maxLayers bounds the layers of an image.
	maxLayers = 128
	// maxPath bounds a path in a layer, in bytes (PATH_MAX of Linux).
	maxPath = 4096
	// maxWindow bounds the memory that a layer's compression asks for, in bytes (RFC 8878,
	// "Window Descriptor"): that of zstd --long.
	maxWindow = 128 << 20
	// entryBytes is what a file system keeps of a file besides its content, and blockBytes
	// by which it gives room to content.
	entryBytes, blockBytes = 1 << 10, 4 << 10
	// storeReserve is the share of an image store that no image gets: one of so many.
	storeReserve = 20
	// undoTimeout bounds the removal of what an import has left.
	undoTimeout = time.Minute
)

// Import brings the images of an OCI archive into containerd's store and unpacks them, each
// within maxBytes; 0 is DefaultImageBytes. With an error none of them is there, and what
// had their names before has them again: a *check.Refusal of an image that is too much, or
// unix.ENOSPC where the store is too small for it.
func Import(ctx context.Context, c *containerd.Client, archive io.Reader, maxBytes int64) ([]images.Image, error) {
	return importOf(ctx, c, archive, maxBytes, func([]images.Image) error { return nil })
}

// importOf is Import of images that are looked at before they are unpacked.
func importOf(ctx context.Context, c *containerd.Client, archive io.Reader, maxBytes int64, look func([]images.Image) error) (_ []images.Image, err error) {
	defer func() { err = typed(err) }()
	had, err := c.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	before := map[string]images.Image{}
	for _, i := range had {
		before[i.Name] = i
	}
	lease, err := c.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(24*time.Hour))
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	var got []images.Image
	defer func() {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if err == nil {
			err = c.LeasesService().Delete(undo, lease)
			return
		}
		for _, i := range got {
			err = errors.Join(err, putBack(undo, c.ImageService(), i.Name, before))
		}
		// What no image names goes with the lease.
		err = errors.Join(err, c.LeasesService().Delete(undo, lease, leases.SynchronousDelete))
	}()
	ctx = leases.WithLease(ctx, lease.ID)
	if got, err = c.Import(ctx, archive); err != nil {
		return nil, err
	}
	if err := look(got); err != nil {
		return nil, err
	}
	for _, i := range got {
		if err := Unpack(ctx, c, i, maxBytes); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", i.Name, err)
		}
	}
	return got, nil
}

// putBack gives a name the image that it had.
func putBack(ctx context.Context, s images.Store, name string, before map[string]images.Image) error {
	old, was := before[name]
	if was {
		_, err := s.Update(ctx, old)
		return err
	}
	if err := s.Delete(ctx, name); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// Unpack unpacks an image that is in containerd's store, once all that its layers hold was
// counted; Import says within what. containerd itself has no bound.
func Unpack(ctx context.Context, c *containerd.Client, img images.Image, maxBytes int64) error {
	image := containerd.NewImage(c, img)
	if done, err := image.IsUnpacked(ctx, snapshotter); err == nil && done {
		return nil
	}
	manifest, err := images.Manifest(ctx, documents{c.ContentStore()}, img.Target, platforms.Default())
	if err != nil {
		return err
	}
	info, err := c.ContentStore().Info(ctx, manifest.Config.Digest)
	if err != nil {
		return err
	}
	if info.Size > maxDocument {
		return tooMuch("image.config", fmt.Sprintf("a configuration of at most %d bytes", maxDocument), strconv.FormatInt(info.Size, 10))
	}
	if len(manifest.Layers) > maxLayers {
		return tooMuch("image.layers", fmt.Sprintf("at most %d layers", maxLayers), strconv.Itoa(len(manifest.Layers)))
	}
	if maxBytes == 0 {
		maxBytes = DefaultImageBytes
	}
	left, err := room(ctx, c)
	if err != nil {
		return err
	}
	if err := measure(ctx, c.ContentStore(), manifest.Layers, meter{max: maxBytes, files: maxEntries, room: left}); err != nil {
		return err
	}
	return image.Unpack(ctx, snapshotter)
}

// tooMuch refuses an image for one of the bounds that no configuration changes.
func tooMuch(id, expected, found string) error {
	var l check.List
	l.Fail(id, expected, found, "build the image with less: this bound is the same on every node")
	return check.Refuse("admit", l)
}

// storeRoom is how much image content a store takes.
type storeRoom struct {
	dir   string
	bytes int64
}

func (s storeRoom) lacks(bytes int64) error {
	return fmt.Errorf("the image store at %s takes %d MiB more, and the image needs %d MiB or more: %w", s.dir, max(0, s.bytes)>>20, bytes>>20, unix.ENOSPC)
}

// Room is an error, unix.ENOSPC, if the node's image store does not take so many bytes.
func (n *Node) Room(ctx context.Context, bytes int64) error {
	s, err := room(ctx, n.client)
	if err == nil && bytes > s.bytes {
		err = s.lacks(bytes)
	}
	return err
}

// room is what is free where containerd unpacks images, less the reserve. Where that is
// memory it is no more than what the machine has left: jobs live of it too.
func room(ctx context.Context, c *containerd.Client) (storeRoom, error) {
	res, err := c.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1,id=="+snapshotter)
	if err != nil {
		return storeRoom{}, fmt.Errorf("ask containerd for its folders: %w", err)
	}
	for _, p := range res.GetPlugins() {
		dir := p.GetExports()["root"]
		if dir == "" {
			continue
		}
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return storeRoom{}, fmt.Errorf("look for room at %s: %w", dir, err)
		}
		free := int64(st.Bavail) * st.Bsize //nolint:gosec // a disk's size fits
		if st.Type == unix.TMPFS_MAGIC {
			memory, err := memoryLeft()
			if err != nil {
				return storeRoom{}, err
			}
			free = min(free, memory)
		}
		return storeRoom{dir, free - int64(st.Blocks)*st.Bsize/storeReserve}, nil //nolint:gosec // as above
	}
	return storeRoom{}, fmt.Errorf("ask containerd for its folders: it names none of %s", snapshotter)
}

// memoryLeft is what the kernel could give without swapping (proc(5), MemAvailable).
func memoryLeft() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("look for memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("look for memory: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("look for memory: the kernel does not say what is available")
}

// meter counts what layers hold, and errs as soon as that is too much.
type meter struct {
	max   int64     // bytes
	files int       // entries
	room  storeRoom // what there is for them

	bytes   int64 // of files, as a file system gives room to them
	plain   int64 // of archives
	entries int
	seed    maphash.Seed
	folders map[uint64]bool // of the layer, by a hash of the path
}

// measure counts what layers become. A layer that is listed twice is unpacked twice.
func measure(ctx context.Context, from content.Provider, layers []ocispec.Descriptor, m meter) error {
	m.seed = maphash.MakeSeed()
	type size struct {
		bytes, plain int64
		entries      int
	}
	known := map[digest.Digest]size{}
	for _, d := range layers {
		if s, ok := known[d.Digest]; ok {
			m.entries += s.entries
			if err := errors.Join(m.add(s.bytes), m.unpack(s.plain), m.count(0)); err != nil {
				return err
			}
			continue
		}
		before := size{m.bytes, m.plain, m.entries}
		if err := m.layer(ctx, from, d); err != nil {
			return fmt.Errorf("layer %s: %w", d.Digest, err)
		}
		known[d.Digest] = size{m.bytes - before.bytes, m.plain - before.plain, m.entries - before.entries}
	}
	return nil
}

func (m *meter) layer(ctx context.Context, from content.Provider, d ocispec.Descriptor) error {
	at, err := from.ReaderAt(ctx, d)
	if err != nil {
		return err
	}
	defer at.Close() //nolint:errcheck // it was read only
	blob := bufio.NewReaderSize(io.NewSectionReader(at, 0, at.Size()), 1<<20)
	plain, done, err := decompress(ctx, d.MediaType, blob)
	if err != nil {
		return err
	}
	defer done()
	archive := &metered{ctx: ctx, m: m, r: plain}
	m.folders = map[uint64]bool{}
	for t := tar.NewReader(archive); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := m.entry(h); err != nil {
			return err
		}
	}
	// containerd reads what follows the archive, too.
	_, err = io.Copy(io.Discard, archive)
	return err
}

// decompress reads a layer as containerd does: by its content, unless its type says that it
// is not compressed.
func decompress(ctx context.Context, mediaType string, blob *bufio.Reader) (io.Reader, func(), error) {
	kind, err := images.DiffCompression(ctx, mediaType)
	if err != nil {
		return nil, nil, fmt.Errorf("type %.80q: %w", mediaType, err)
	}
	begin, err := blob.Peek(10)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	if kind == "" {
		return blob, func() {}, nil
	}
	switch compression.DetectCompression(begin) {
	case compression.Gzip:
		z, err := gzip.NewReader(blob)
		return z, func() {}, err
	case compression.Zstd:
		z, err := zstd.NewReader(blob, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	case compression.Uncompressed, compression.Unknown:
	}
	return blob, func() {}, nil
}

// metered is an archive that is read.
type metered struct {
	ctx context.Context //nolint:containedctx // that of the call that reads
	m   *meter
	r   io.Reader
}

func (r *metered) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(b)
	if over := r.m.unpack(int64(n)); over != nil {
		return 0, over
	}
	return n, err
}

// unpack counts bytes of an archive: they cost time, if no room.
func (m *meter) unpack(n int64) error {
	if m.plain += n; m.plain > m.max || m.plain < 0 {
		return m.over()
	}
	return nil
}

// add counts bytes that are kept.
func (m *meter) add(n int64) error {
	m.bytes += n
	switch {
	case n < 0 || m.bytes < 0 || m.bytes > m.max:
		return m.over()
	case m.bytes > m.room.bytes:
		return m.room.lacks(m.bytes)
	}
	return nil
}

func (m *meter) over() error {
	var l check.List
	l.Fail("image.unpacked", fmt.Sprintf("at most %d bytes unpacked", m.max), "more", "whoever operates the node can raise images.maxUnpackedBytes, if the image is meant to be so large")
	return check.Refuse("admit", l)
}

// count counts entries, and what is kept of each.
func (m *meter) count(n int) error {
	if m.entries += n; m.entries > m.files {
		return tooMuch("image.entries", fmt.Sprintf("at most %d files and folders", m.files), "more")
	}
	return m.add(int64(n) * entryBytes)
}

// entry counts a file, with the folders above it that are made for it.
func (m *meter) entry(h *tar.Header) error {
	for _, p := range []string{h.Name, h.Linkname} {
		if len(p) >= maxPath {
			return tooMuch("image.path", fmt.Sprintf("paths of less than %d bytes", maxPath), fmt.Sprintf("%d bytes", len(p)))
		}
	}
	name := inside(h.Name)
	made := 1
	if h.Typeflag == tar.TypeDir && !m.first(name) {
		made = 0
	}
	for dir := path.Dir(name); dir != "." && m.first(dir); dir = path.Dir(dir) {
		made++
	}
	kept := int64(0)
	for k, v := range h.PAXRecords {
		kept += int64(len(k) + len(v)) // extended attributes among them
	}
	// The size of a sparse file is that with its holes, which are written.
	if h.Size > m.max {
		return m.over()
	}
	kept += (h.Size + blockBytes - 1) / blockBytes * blockBytes
	return errors.Join(m.count(made), m.add(kept))
}

// first reports whether the layer has not named a folder before.
func (m *meter) first(dir string) bool {
	key := maphash.String(m.seed, dir)
	if m.folders[key] {
		return false
	}
	m.folders[key] = true
	return true
}
