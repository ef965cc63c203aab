package hold

import (
	"context"
	"errors"
	"os"
	"regexp"
	"runtime"
	"slices"
	"time"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// inputName is a folder's name under inputs/.
var inputName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

type decryptState int

const (
	notDecrypted decryptState = iota
	decrypting
	decrypted
	decryptFailed
)

type heldInput struct {
	holdapi.Input
	root   *os.Root
	folder *seal.Folder
	// prepared are regions by place in the manifest, nil where there is none. They
	// are read once done is closed, which follows stop.
	prepared []*dma.Region
	stop     context.CancelFunc // nil before prepare
	done     chan struct{}
	// sizes are those of its files, in bytes.
	sizes []int64
}

// input takes a sealed folder. root becomes the holder's.
func (h *Holder) input(ctx context.Context, in holdapi.Input, root *os.Root) (err error) {
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	if !inputName.MatchString(in.Name) {
		return fail(holdapi.CodeInvalid, "input name %.80q", in.Name)
	}
	folder, err := seal.ReadFolder(root, in.Asset, in.Digest)
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return err
	}
	if h.reseal.source != nil {
		return fail(holdapi.CodeState, "a job that reseals has no inputs")
	}
	if i := slices.IndexFunc(h.inputs, func(o *heldInput) bool { return o.Name == in.Name }); i >= 0 {
		if h.inputs[i].Input != in {
			return fail(holdapi.CodeState, "input %s is another one", in.Name)
		}
		return root.Close()
	}
	if h.state != notDecrypted {
		return fail(holdapi.CodeState, "inputs are decrypted already")
	}
	if len(h.inputs) == maxInputs {
		return fail(holdapi.CodeFull, "more than %d inputs", maxInputs)
	}
	sizes, err := folder.Sizes()
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	if in.Secret {
		if err := checkSecret(in.Name, sizes); err != nil {
			return err
		}
	}
	held := &heldInput{Input: in, root: root, folder: folder, prepared: make([]*dma.Region, len(sizes)), done: make(chan struct{}), sizes: sizes}
	h.plan(held) //nolint:contextcheck // it ends with the job, not with the request
	h.inputs = append(h.inputs, held)
	if in.Secret {
		h.inputFS.addSecret(ctx, in.Name)
	} else {
		h.inputFS.addInput(ctx, in.Name)
	}
	return nil
}

// plan counts an input, and prepares it unless there is a reserve: then that waits
// until all inputs are known. h.mu is held.
func (h *Holder) plan(in *heldInput) {
	for _, n := range in.sizes {
		h.planned += n
	}
	if h.reserve == nil {
		h.prepare(in)
	}
}

// prepare makes regions while the job attests, for new memory comes slower than
// the cipher fills it. Half the cores do it: the others have work. h.mu is held.
func (h *Holder) prepare(in *heldInput) {
	ctx, stop := context.WithCancel(h.ending)
	in.stop = stop
	if !h.resident() {
		stop()
		close(in.done)
		return
	}
	workers := max(1, runtime.GOMAXPROCS(0)/2)
	go func() {
		defer close(in.done)
		defer stop()
		for i, n := range in.sizes {
			if n < minPrefault || ctx.Err() != nil {
				continue
			}
			var err error
			if in.prepared[i] == nil {
				in.prepared[i], err = h.pool.Get(regionName, n)
			}
			if err == nil {
				err = in.prepared[i].Prefault(ctx, workers)
			}
			if err != nil {
				// Whoever fills the region meets the same error, and it counts there.
				if ctx.Err() == nil {
					h.log.Warn("prepare memory", "input", in.Name, "error", err)
				}
				return
			}
		}
	}()
}

// resident says whether the inputs so far fit into memory together. h.mu is held.
func (h *Holder) resident() bool { return h.cfg.RegionBytes <= 0 || h.planned <= h.cfg.RegionBytes }

// unprepare ends prepare.
func (in *heldInput) unprepare() {
	if in.stop == nil {
		return
	}
	in.stop()
	<-in.done
}

// decrypt opens all inputs, once: into regions, or so that files are decrypted when
// they are opened or read. Inputs of more than h.first bytes go on being decrypted
// when it has returned. A second call waits for the first and has its answer.
func (h *Holder) decrypt(ctx context.Context) (holdapi.Decrypted, error) {
	h.mu.Lock()
	if h.state != notDecrypted {
		begun := h.begun
		h.mu.Unlock()
		<-begun
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.result, h.failure
	}
	if err := errors.Join(h.running(), h.share()); err != nil { //nolint:contextcheck // it ends with the job, not with the request
		h.mu.Unlock()
		return holdapi.Decrypted{}, err
	}
	work := make(map[*heldInput]*keys.DataKey, len(h.inputs))
	inputs := slices.Clone(h.inputs)
	for _, in := range inputs {
		k, ok := h.keys[in.Asset]
		if !ok {
			h.mu.Unlock()
			return holdapi.Decrypted{}, fail(holdapi.CodeState, "no key for asset %.80q was delivered", in.Asset)
		}
		work[in] = k.key
	}
	h.state = decrypting
	h.mu.Unlock()

	start := time.Now()
	res, rest, err := h.fill(ctx, inputs, work)
	res.Nanos = time.Since(start).Nanoseconds()

	h.mu.Lock()
	defer h.mu.Unlock()
	h.result = res
	switch {
	case err != nil:
		h.result, h.failure, h.state = holdapi.Decrypted{}, err, decryptFailed
		// Nothing of an input that was damaged is kept.
		if serr := h.pool.Scrub(); serr != nil {
			h.log.ErrorContext(ctx, "scrub after failed decryption", "error", serr)
		}
	case rest != nil:
		h.result.Opening = true
		go h.openRest(rest, start, h.result) //nolint:contextcheck // it ends with the job, not with the request
	default:
		h.state = decrypted
		h.log.InfoContext(ctx, "inputs are open", "files", res.Files, "bytes", res.Bytes, "nanos", res.Nanos, "onDemand", h.demand != nil, "hugePages", dma.HugePages())
	}
	close(h.begun)
	if rest == nil {
		close(h.filled)
	}
	return h.result, h.failure
}

// fill makes the inputs' files known. rest is what remains to be decrypted, nil if
// nothing does; it is nil after an error.
func (h *Holder) fill(ctx context.Context, inputs []*heldInput, work map[*heldInput]*keys.DataKey) (res holdapi.Decrypted, rest *opening, err error) {
	entries, total, chunkSize, err := h.readEntries(inputs, work)
	if err != nil {
		return res, nil, err
	}
	var d *demand
	if h.cfg.RegionBytes > 0 && total > h.cfg.RegionBytes {
		if d, err = h.onDemand(inputs, chunkSize); err != nil {
			return res, nil, fail(holdapi.CodeIO, "%w", err)
		}
	}
	o := &opening{
		get: func(size int64) (*dma.Region, error) { return h.pool.Get(regionName, size) },
		use: h.lease.use, passthrough: h.inputFS.passthrough, progress: &h.progress, ending: h.ending,
	}
	files := make([][]content, len(inputs))
	for i, in := range inputs {
		for j, e := range entries[i] {
			res.Files++
			if d == nil {
				res.Bytes += e.Size
				files[i] = append(files[i], o.add(in, work[in], j, e))
				continue
			}
			files[i] = append(files[i], d.add(in, work[in], e))
		}
	}
	if d != nil || res.Bytes > h.first {
		// What is wrong with a whole file shows before the job starts.
		for i, in := range inputs {
			for _, e := range entries[i] {
				if err := h.check(in, work[in], e); err != nil {
					// Names of files are secret, and errors reach people's logs.
					return res, nil, fail(holdapi.CodeIO, "input %s: file %s: %w", in.Name, e.ID, err)
				}
			}
		}
	}
	h.progress.total.Store(res.Bytes)
	if res.Bytes > h.first {
		rest = o
	} else if err := o.run(); err != nil {
		return res, nil, &apiError{holdapi.CodeIO, err}
	}
	for i, in := range inputs {
		h.show(ctx, in, entries[i], files[i])
	}
	return res, rest, nil
}

// readEntries opens the inputs' manifests. total is the bytes of all their files,
// chunkSize the largest chunk's, in bytes.
func (h *Holder) readEntries(inputs []*heldInput, work map[*heldInput]*keys.DataKey) (entries [][]seal.Entry, total int64, chunkSize int, err error) {
	for _, in := range inputs {
		in.unprepare()
		if err := h.lease.use(); err != nil {
			return nil, 0, 0, err
		}
		es, err := in.folder.Entries(work[in])
		if err != nil {
			return nil, 0, 0, fail(holdapi.CodeRefused, "input %s: %w", in.Name, err)
		}
		entries = append(entries, es)
		for _, e := range es {
			total += e.Size
		}
		chunkSize = max(chunkSize, in.folder.Manifest().ChunkSize)
	}
	return entries, total, chunkSize, nil
}

// show gives an input's files their paths, and those in memory their regions. Secrets
// have paths only.
func (h *Holder) show(ctx context.Context, in *heldInput, entries []seal.Entry, files []content) {
	for i, c := range files {
		if in.Secret {
			h.inputFS.addSecretFile(ctx, in.Name, c)
			continue
		}
		h.inputFS.addFile(ctx, in.Name, entries[i].Name, c)
		if f, ok := c.(*residentFile); ok {
			h.handout.add(in.Name+"/"+entries[i].Name, f)
		}
	}
}

// onDemand makes what serves inputs that do not fit into memory together.
func (h *Holder) onDemand(inputs []*heldInput, chunkSize int) (*demand, error) {
	for _, in := range inputs {
		for _, r := range in.prepared {
			if r == nil {
				continue
			}
			if err := h.pool.Put(r); err != nil {
				return nil, err
			}
		}
	}
	// Two chunks at the least: one that is read, and one that is decrypted.
	size := max(min(maxCache, h.cfg.RegionBytes/4), 2*int64(chunkSize))
	h.pool.Reserve(size)
	d := &demand{pool: h.pool, use: h.lease.use, cache: newChunkCache(h.ending, h.lease.use, size, chunkSize), passthrough: h.inputFS.passthrough, ending: h.ending, log: h.log}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.demand = d
	return d, nil
}

// check opens a file that is decrypted later, to see that it can be.
func (h *Holder) check(in *heldInput, key *keys.DataKey, e seal.Entry) error {
	if err := h.lease.use(); err != nil {
		return err
	}
	f, err := in.folder.Open(key, e)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), h.ending.Err())
}

// fillRegion bounds its workers by what their buffers take, not by cores alone.
// use says before each chunk whether the key may be used.
func fillRegion(ctx context.Context, use func() error, f *seal.OpenedFile, r *dma.Region) error {
	f.Sequential()
	f.Map()
	return r.Fill(ctx, f.ChunkSize(), workersFor(f.ChunkSize()), func() func(int64, []byte) error {
		w := f.Worker()
		return func(i int64, dst []byte) error {
			if err := use(); err != nil {
				return err
			}
			return w.ReadChunk(i, dst)
		}
	})
}
