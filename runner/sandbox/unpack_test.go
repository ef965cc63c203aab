package sandbox

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
)

// archiveOf is a layer's archive; an entry's user name is its content.
func archiveOf(t *testing.T, entries ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := *e
		body := h.Uname
		h.Uname, h.Size = "", int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// zeros is an archive with one file of so many bytes, all of them zero.
func zeros(t *testing.T, n int) []byte {
	t.Helper()
	return zerosAt(t, "zeros", n)
}

func zerosAt(t *testing.T, name string, n int) []byte {
	t.Helper()
	return archiveOf(t, &tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg, Uname: string(make([]byte, n))})
}

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstandard(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

// sparse is an archive with one file of 8 GiB less one byte that is nothing but a hole
// (GNU tar, "Old GNU Format").
func sparse() []byte {
	h := make([]byte, 512)
	for at, s := range map[int]string{0: "hole", 100: "0000644", 108: "0000000", 116: "0000000", 124: "00000000000", 136: "00000000000", 156: "S", 257: "ustar  ", 483: "77777777777"} {
		copy(h[at:], s)
	}
	copy(h[148:], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(h, make([]byte, 1024)...)
}

// blobs has layers by digest.
type blobs map[digest.Digest][]byte

func (b blobs) ReaderAt(_ context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	blob, ok := b[d.Digest]
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	return whole{bytes.NewReader(blob)}, nil
}

// What a layer becomes is counted before it is unpacked, however it is packed.
func TestMeasure(t *testing.T) {
	const max = 1 << 20
	file := func(name string) *tar.Header {
		return &tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg, Uname: "x"}
	}
	var many []*tar.Header
	for i := range 101 {
		many = append(many, file(fmt.Sprint(i)))
	}
	small := zeros(t, max/4)
	plain, gz, zst := ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd
	for name, row := range map[string]struct {
		media  string
		layers [][]byte
		room   int64
		want   string // the check that fails, an error's text, or nothing
	}{
		"small":                            {gz, [][]byte{gzipped(t, small)}, max, ""},
		"small, Zstandard":                 {zst, [][]byte{zstandard(t, small)}, max, ""},
		"small, of another type":           {gz, [][]byte{zstandard(t, small)}, max, ""},
		"small, not compressed":            {plain, [][]byte{small}, max, ""},
		"a gzip bomb":                      {gz, [][]byte{gzipped(t, zeros(t, max+1))}, math.MaxInt64, "image.unpacked"},
		"a Zstandard bomb":                 {zst, [][]byte{zstandard(t, zeros(t, max+1))}, math.MaxInt64, "image.unpacked"},
		"a bomb of another type":           {gz, [][]byte{zstandard(t, zeros(t, max+1))}, math.MaxInt64, "image.unpacked"},
		"two parts of a bomb":              {gz, [][]byte{append(gzipped(t, zeros(t, max)[:max/2]), gzipped(t, zeros(t, max)[max/2:])...)}, math.MaxInt64, "image.unpacked"},
		"a hole":                           {plain, [][]byte{sparse()}, math.MaxInt64, "image.unpacked"},
		"nothing, after the archive's end": {gz, [][]byte{gzipped(t, append(archiveOf(t, file("a")), make([]byte, max)...))}, math.MaxInt64, "image.unpacked"},
		"in several layers":                {gz, [][]byte{gzipped(t, small), gzipped(t, zeros(t, max/2)), gzipped(t, zeros(t, max/2-1))}, math.MaxInt64, "image.unpacked"},
		"one layer, listed often":          {gz, [][]byte{gzipped(t, small), gzipped(t, small), gzipped(t, small), gzipped(t, small)}, math.MaxInt64, "image.unpacked"},
		"files without content":            {gz, [][]byte{gzipped(t, archiveOf(t, many...))}, math.MaxInt64, "image.entries"},
		"folders that are made for a file": {gz, [][]byte{gzipped(t, archiveOf(t, file(strings.Repeat("d/", 101)+"f")))}, math.MaxInt64, "image.entries"},
		"a folder, listed often":           {gz, [][]byte{gzipped(t, archiveOf(t, slices.Repeat([]*tar.Header{{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}}, 200)...))}, math.MaxInt64, ""},
		"a long path":                      {gz, [][]byte{gzipped(t, archiveOf(t, file(strings.Repeat("d", maxPath))))}, math.MaxInt64, "image.path"},
		"a long link":                      {gz, [][]byte{gzipped(t, archiveOf(t, &tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("d", maxPath)}))}, math.MaxInt64, "image.path"},
		"attributes":                       {gz, [][]byte{gzipped(t, archiveOf(t, &tar.Header{Name: "a", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", max*3/4)}}, &tar.Header{Name: "b", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.b": strings.Repeat("x", max*3/4)}}))}, math.MaxInt64, "image.unpacked"},
		"more than there is room for":      {gz, [][]byte{gzipped(t, small)}, max / 4, "no space left on device"},
		"no room at all":                   {gz, [][]byte{gzipped(t, archiveOf(t, file("a")))}, -1, "no space left on device"},
		"a window of 512 MiB":              {zst, [][]byte{{0x28, 0xb5, 0x2f, 0xfd, 0, 0x98, 1, 0, 0}}, max, "window size exceeded"},
		"a layer that is cut off":          {gz, [][]byte{gzipped(t, small)[:100]}, max, "EOF"},
		"what is no layer":                 {"application/json", [][]byte{small}, max, "type"},
	} {
		t.Run(name, func(t *testing.T) {
			from := blobs{}
			var layers []ocispec.Descriptor
			for _, b := range row.layers {
				d := digest.FromBytes(b)
				from[d] = b
				layers = append(layers, ocispec.Descriptor{MediaType: row.media, Digest: d, Size: int64(len(b))})
			}
			err := measure(t.Context(), from, layers, meter{max: max, files: 100, room: storeRoom{"/store", row.room}})
			var refused *check.Refusal
			switch {
			case row.want == "" && err != nil, row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)):
				t.Errorf("%v, want %q", err, row.want)
			case strings.HasPrefix(row.want, "image.") && (!errors.As(err, &refused) || refused.Checks[0].Hint == ""):
				t.Errorf("%v is no refusal with a cure", err)
			case strings.HasPrefix(row.want, "no space") && !errors.Is(err, unix.ENOSPC):
				t.Errorf("%v is of no full disk", err)
			}
		})
	}
	t.Run("told to end", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		d := digest.FromBytes(small)
		err := measure(ctx, blobs{d: small}, []ocispec.Descriptor{{MediaType: plain, Digest: d}}, meter{max: max, files: 100, room: storeRoom{"", max}})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// packed is a layer that is packed as the test says.
type packed struct {
	blob, plain []byte
	media       types.MediaType
}

func (p packed) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(p.blob))
	return h, err
}

func (p packed) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(p.plain))
	return h, err
}

func (p packed) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(p.blob)), nil
}

func (p packed) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(p.plain)), nil
}
func (p packed) Size() (int64, error)                { return int64(len(p.blob)), nil }
func (p packed) MediaType() (types.MediaType, error) { return p.media, nil }

// stored lists everything that containerd keeps of images.
func (n *Node) stored(t *testing.T) []string {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), Namespace)
	var out []string
	add := func(kind, name string) { out = append(out, kind+" "+name) }
	is, err := n.client.ImageService().List(ctx)
	for _, i := range is {
		add("image", i.Name+" "+i.Target.Digest.String())
	}
	ls, lerr := n.client.LeasesService().List(ctx)
	for _, l := range ls {
		add("lease", l.ID)
	}
	cs := n.client.ContentStore()
	cerr := cs.Walk(ctx, func(i content.Info) error { add("content", i.Digest.String()); return nil })
	ss, serr := cs.ListStatuses(ctx)
	for _, s := range ss {
		add("ingest", s.Ref)
	}
	werr := n.client.SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error { add("snapshot", i.Name); return nil })
	if err := errors.Join(err, lerr, cerr, serr, werr); err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

// settled is stored once containerd has removed what nothing names.
func (n *Node) settled(t *testing.T) []string {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), Namespace)
	l, err := n.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.client.LeasesService().Delete(ctx, l, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	return n.stored(t)
}

// refusesTooMuch: a bomb is refused, nothing of it stays, and other jobs go on. With a
// larger bound the same image is unpacked: nothing else stood in its way.
func refusesTooMuch(t *testing.T, n *Node) {
	const size = 16 << 20
	running := n.testJob(t, "beside", "/usr/bin/python3", "-c", "print('whole')")
	// Layers that are there already are not unpacked again, so each has a file of its own.
	one, two, three := zerosAt(t, "one", size), zerosAt(t, "two", size), zerosAt(t, "three", size)
	var before []string
	same := func(t *testing.T) {
		t.Helper()
		if after := n.stored(t); !slices.Equal(after, before) {
			t.Errorf("the store has\n%s\nand had\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
		}
	}
	imported := func(t *testing.T, name string, layer packed, max int64) error {
		t.Helper()
		n.cfg.ImageBytes = max
		t.Cleanup(func() { n.cfg.ImageBytes = 0 })
		// The layer below it would be unpacked first.
		small := archiveOf(t, &tar.Header{Name: strings.ReplaceAll(t.Name(), "/", "-"), Mode: 0o644, Typeflag: tar.TypeReg, Uname: "x"})
		base, err := mutate.AppendLayers(bare(), packed{gzipped(t, small), small, types.OCILayer}, layer)
		if err != nil {
			t.Fatal(err)
		}
		return n.importImage(t, base, name)
	}
	for name, layer := range map[string]packed{
		"gzip":      {gzipped(t, one), one, types.OCILayer},
		"Zstandard": {zstandard(t, two), two, types.OCILayerZStd},
		"a hole":    {sparse(), sparse(), types.OCIUncompressedLayer},
	} {
		t.Run(name, func(t *testing.T) {
			before = n.settled(t)
			ref := "registry.example/bomb:" + strings.ReplaceAll(strings.ToLower(name), " ", "-")
			err := imported(t, ref, layer, size/2)
			var refused *check.Refusal
			if !errors.As(err, &refused) || len(refused.Checks) != 1 || refused.Checks[0].ID != "image.unpacked" {
				t.Errorf("%d bytes that become %d: %v", len(layer.blob), size, err)
			}
			same(t)
			if _, err := n.Image(t.Context(), ref); !errors.Is(err, ErrNoImage) {
				t.Errorf("it is there: %v", err)
			}
			if name == "a hole" {
				return
			}
			if err := imported(t, ref, layer, 2*size); err != nil {
				t.Errorf("where so much is allowed: %v", err)
			}
		})
	}
	t.Run("a full disk", func(t *testing.T) {
		before = n.settled(t)
		dir := filepath.Join(filepath.Dir(n.cfg.Containerd), "root", "io.containerd.snapshotter.v1."+snapshotter, "snapshots")
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		noise := make([]byte, 1<<20)
		if _, err := io.ReadFull(&chance{1}, noise); err != nil {
			t.Fatal(err)
		}
		layer := archiveOf(t, &tar.Header{Name: "noise", Mode: 0o644, Typeflag: tar.TypeReg, Uname: string(noise)})
		err := imported(t, "registry.example/large:latest", packed{gzipped(t, layer), layer, types.OCILayer}, 0)
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("containerd has no room for it: %v", err)
		}
		same(t)
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		if err := n.Room(t.Context(), math.MaxInt64); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("room for anything: %v", err)
		}
		if err := n.Room(t.Context(), 1); err != nil {
			t.Error(err)
		}
	})
	t.Run("the name is another image's", func(t *testing.T) {
		const ref = "coffer.local/numpy:latest"
		before = n.settled(t)
		if err := imported(t, ref, packed{gzipped(t, three), three, types.OCILayer}, size/2); err == nil {
			t.Error("imported")
		}
		same(t)
	})
	if err := running.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out := <-running.stdout; out != "whole\n" {
		t.Errorf("a job beside it printed %q", out)
	}
}

// chance is noise that is the same each time (xorshift64).
type chance struct{ state uint64 }

func (c *chance) Read(b []byte) (int, error) {
	for i := range b {
		c.state ^= c.state << 13
		c.state ^= c.state >> 7
		c.state ^= c.state << 17
		b[i] = byte(c.state)
	}
	return len(b), nil
}

// unpacksWhatWasCutOff: an image whose import was cut off before it was unpacked is unpacked
// for its first job, within the same bound.
func unpacksWhatWasCutOff(t *testing.T, n *Node) {
	const ref, size = "registry.example/cut:off", 4 << 20
	layer := zerosAt(t, "cut", size)
	img, err := mutate.AppendLayers(bare(), packed{gzipped(t, layer), layer, types.OCILayer})
	if err != nil {
		t.Fatal(err)
	}
	r, digest := streamOf(t, img, ref)
	if _, err := n.client.Import(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	of := func(r *Request) { r.Image, r.Plan.Image = Image{ref, digest}, digest }
	n.cfg.ImageBytes = size / 2
	_, err = n.tryJob(t, "cut", of, "/bin/true")
	n.cfg.ImageBytes = 0
	var refused *check.Refusal
	if !errors.As(err, &refused) || refused.Checks[0].ID != "image.unpacked" {
		t.Errorf("more than the bound: %v", err)
	}
	if _, err := n.tryJob(t, "cut", of, "/bin/true"); err != nil {
		t.Errorf("within the bound: %v", err)
	}
}

// bare is an image without layers.
func bare() v1.Image {
	return mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
}
