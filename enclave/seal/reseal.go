package seal

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/keys"
)

const (
	// ResealRecordsSuffix is what the folder of a re-sealing's records has after the
	// name of the sealed folder.
	ResealRecordsSuffix = ".records"

	infoReseal   = "coffer reseal v1 records\x00"
	resealSuffix = ".json"
)

// Reseal says what is sealed anew, and where to.
type Reseal struct {
	JobID string
	Plan  plan.Digest
	// From has the source, FromKey opens it.
	From    *Folder
	FromKey *keys.DataKey
	// To is the asset whose key ToKey is. The two keys MUST differ.
	To    string
	ToKey *keys.DataKey
	// Name is the new folder in the sink.
	Name string
	// Use is called before a key is used on each chunk: an error ends the work.
	Use func() error
	// Each is told of every file that is sealed and signed for, in order.
	Each func(SignedReseal)
}

// SignedReseal is one record with the session key's signature.
type SignedReseal struct {
	Record    []byte
	Signature []byte
}

// keptRecord is what lies beside a sealed file. Tag is HMAC-SHA256 over Record
// under a key that is derived from the new data key: a job that was attested for
// the same plan, and nobody else, could have made it. Signature and SessionKey
// are for others; the job that goes on knows no session key but its own.
type keptRecord struct {
	Record     []byte `json:"record"`
	Tag        []byte `json:"tag"`
	Signature  []byte `json:"signature"`
	SessionKey []byte `json:"sessionKey"`
}

// resealing is one Reseal under way.
type resealing struct {
	Reseal
	session *keys.Session
	o       Options
	entries []Entry
	about   receipt.Resealing
	tagKey  []byte
	// work holds the sealed files, records their records.
	work, records *os.Root
	// done says that work is the finished folder.
	done bool
}

// ResealFolder opens each file of a sealed folder and seals it under another data
// key into the new folder r.Name of the sink, with chunks of the same size. The
// plaintext is in memory only, a chunk for each worker, which its ciphertext
// overwrites. Each file's Merkle root over the plaintext must be the one in the
// source's manifest. Checkpoints have none, nor has what is made of them: there the
// ciphertext is held against the manifest before it is opened.
//
// It may be called again after it ended in any way, by the same job or another
// one of the same plan: files whose record and ciphertext hold are kept, every
// other one is begun again under a fresh key of its own. The folder is made as
// Name + ".tmp" and renamed when it is whole; the records stay beside it.
func ResealFolder(ctx context.Context, r Reseal, session *keys.Session, sink *os.Root, o Options) (_ SignedReseal, err error) {
	w := &resealing{Reseal: r, session: session, o: o}
	w.o.ChunkSize = r.From.manifest.ChunkSize
	if err := w.prepare(sink); err != nil {
		return SignedReseal{}, fmt.Errorf("reseal: %w", err)
	}
	defer w.close()
	out, err := w.run(ctx, sink)
	if err != nil {
		return SignedReseal{}, fmt.Errorf("reseal: %w", err)
	}
	return out, nil
}

func (w *resealing) prepare(sink *os.Root) (err error) {
	switch {
	case w.JobID == "" || w.Plan.Bytes() == nil || w.To == "" || w.To == w.From.manifest.Asset || w.Use == nil || w.Each == nil:
		return errors.New("job, plan, or another asset to seal for is missing")
	case checkName(w.Name) != nil || strings.Contains(w.Name, "/") || len(w.Name) > 200:
		return fmt.Errorf("folder name %.80q", w.Name)
	case w.FromKey.Equal(w.ToKey):
		return errors.New("the new data key is the old one")
	}
	if err := w.Use(); err != nil {
		return err
	}
	if w.entries, err = w.From.Entries(w.FromKey); err != nil {
		return err
	}
	w.about = receipt.Resealing{JobID: w.JobID, Plan: w.Plan, From: w.From.manifest.Asset, FromDigest: w.From.digest, To: w.To}
	if w.tagKey, err = w.ToKey.Derive(nil, infoReseal, sha256.Size); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.records, err = makeFolder(sink, w.Name+ResealRecordsSuffix); err != nil {
		return err
	}
	switch _, err := sink.Lstat(w.Name); {
	case err == nil:
		w.done = true
		w.work, err = sink.OpenRoot(w.Name)
		return err
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	w.work, err = makeFolder(sink, w.Name+".tmp")
	w.o.at()
	return err
}

func (w *resealing) close() {
	clear(w.tagKey)
	for _, r := range []*os.Root{w.work, w.records} {
		if r != nil {
			_ = r.Close()
		}
	}
}

// makeFolder opens a folder, which it makes if it is not there.
func makeFolder(in *os.Root, name string) (*os.Root, error) {
	if err := in.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	// Not through a link, to wherever else in the sink.
	if st, err := in.Lstat(name); err != nil || !st.IsDir() {
		return nil, cmp.Or(err, fmt.Errorf("%s is no folder", name))
	}
	return in.OpenRoot(name)
}

func (w *resealing) run(ctx context.Context, sink *os.Root) (SignedReseal, error) {
	m := Manifest{Version: Version, Asset: w.To, ChunkSize: w.o.ChunkSize}
	var p privatePart
	var records [][]byte
	var total, bytes int64
	for _, e := range w.entries {
		total += e.Size
	}
	progress := func(done int64) {
		if w.o.Progress != nil {
			w.o.Progress(done, total)
		}
	}
	for i, e := range w.entries {
		if err := ctx.Err(); err != nil {
			return SignedReseal{}, err
		}
		f, salt, by, err := w.kept(ctx, i, e)
		switch {
		case err != nil:
			return SignedReseal{}, fmt.Errorf("file %s: %w", e.ID, err)
		case f.ID == "" && w.done:
			return SignedReseal{}, fmt.Errorf("%s is there, but file %s in it has no record that holds: move it away", w.Name, e.ID)
		case f.ID == "":
			if f, salt, err = w.file(ctx, i, e); err != nil {
				return SignedReseal{}, fmt.Errorf("file %s: %w", e.ID, err)
			}
			by = w.JobID
		}
		record, err := w.record(i, f, by)
		if err != nil {
			return SignedReseal{}, fmt.Errorf("file %s: %w", e.ID, err)
		}
		if by == w.JobID {
			if err := w.keep(e.ID, record); err != nil {
				return SignedReseal{}, fmt.Errorf("file %s: %w", e.ID, err)
			}
		}
		w.Each(record)
		records = append(records, record.Record)
		m.Files = append(m.Files, f)
		p.Files = append(p.Files, privateEntry{Name: e.Name, Size: e.Size, Root: e.PlainRoot, Salt: salt})
		bytes += e.Size
		progress(bytes)
	}
	digest, err := w.finish(sink, m, p)
	if err != nil {
		return SignedReseal{}, err
	}
	last, err := receipt.ResealRecord{Version: receipt.ResealVersion, Resealing: w.about, Digest: digest, Files: len(m.Files), Bytes: bytes, Records: receipt.ResealRecords(records)}.Canonical()
	if err != nil {
		return SignedReseal{}, err
	}
	return w.sign(last)
}

// file seals entry i anew and compares it with the source's manifest.
func (w *resealing) file(ctx context.Context, i int, e Entry) (SealedFile, []byte, error) {
	for _, err := range []error{w.records.Remove(e.ID + resealSuffix), w.work.Remove(SealedName(e.ID))} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return SealedFile{}, nil, err
		}
	}
	if e.PlainRoot == "" {
		if err := w.From.checkFile(ctx, w.From.manifest.Files[i]); err != nil {
			return SealedFile{}, nil, err
		}
	}
	w.o.at()
	src := Source{Name: e.Name, Size: e.Size, Open: func() (Reader, error) {
		f, err := w.From.Open(w.FromKey, e)
		if err != nil {
			return nil, err
		}
		f.Sequential()
		return usedReader{f, w.Use}, nil
	}}
	f, got, err := sealFile(ctx, w.ToKey, src, w.work, fileID(i), w.o, func(int) {}, atOnce)
	if err != nil {
		return SealedFile{}, nil, err
	}
	if e.PlainRoot != "" && got.Root != e.PlainRoot {
		return SealedFile{}, nil, fmt.Errorf("%w: its plaintext is not the one in its manifest", ErrDamaged)
	}
	w.o.at()
	return f, got.Salt, nil
}

// usedReader asks before each chunk.
type usedReader struct {
	*OpenedFile
	use func() error
}

func (r usedReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.use(); err != nil {
		return 0, err
	}
	return r.OpenedFile.ReadAt(p, off)
}

// record signs for file i.
func (w *resealing) record(i int, f SealedFile, by string) (SignedReseal, error) {
	b, err := receipt.ResealFile{
		Version: receipt.ResealFileVersion, Resealing: w.about, SealedBy: by, ID: f.ID, FromRoot: string(w.From.manifest.Files[i].Root), ToRoot: string(f.Root), Bytes: w.entries[i].Size,
	}.Canonical()
	if err != nil {
		return SignedReseal{}, err
	}
	return w.sign(b)
}

func (w *resealing) sign(record []byte) (SignedReseal, error) {
	sig, err := w.session.SignReseal(record)
	if err != nil {
		return SignedReseal{}, err
	}
	return SignedReseal{Record: record, Signature: sig}, nil
}

func (w *resealing) tag(record []byte) []byte {
	m := hmac.New(sha256.New, w.tagKey)
	m.Write(record)
	return m.Sum(nil)
}

// keep writes a file's record, unless it is there. The file itself is on disk.
func (w *resealing) keep(id string, s SignedReseal) error {
	if _, err := w.records.Lstat(id + resealSuffix); err == nil {
		return nil
	}
	b, err := plan.Canonical(keptRecord{Record: s.Record, Tag: w.tag(s.Record), Signature: s.Signature, SessionKey: w.session.Public()})
	if err != nil {
		return err
	}
	if err := writeNew(w.records, id+resealSuffix, b); err != nil {
		return err
	}
	w.o.at()
	return nil
}

// kept returns file i as an earlier run sealed it, with its salt and the job that
// sealed it, or the zero SealedFile if there is none that holds.
func (w *resealing) kept(ctx context.Context, i int, e Entry) (_ SealedFile, salt []byte, by string, err error) {
	b, err := readRegular(w.records, e.ID+resealSuffix, 4*receipt.MaxResealRecord)
	if err != nil {
		return SealedFile{}, nil, "", nil //nolint:nilerr // begun again
	}
	var k keptRecord
	if plan.Decode(b, 4*receipt.MaxResealRecord, &k) != nil || !hmac.Equal(k.Tag, w.tag(k.Record)) {
		return SealedFile{}, nil, "", nil
	}
	r, err := receipt.ParseResealFile(k.Record)
	if err != nil {
		return SealedFile{}, nil, "", nil //nolint:nilerr // begun again
	}
	about := w.about
	about.JobID = r.JobID
	l, err := layoutOf(e.Size, w.o.ChunkSize)
	if err != nil {
		return SealedFile{}, nil, "", err
	}
	if r.Resealing != about || r.ID != e.ID || r.FromRoot != string(w.From.manifest.Files[i].Root) || r.Bytes != e.Size {
		return SealedFile{}, nil, "", nil
	}
	f := SealedFile{ID: e.ID, CipherSize: l.cipherSize(), Root: Root(r.ToRoot)}
	folder := Folder{root: w.work, manifest: Manifest{ChunkSize: w.o.ChunkSize}}
	if err := folder.checkFile(ctx, f); err != nil {
		return SealedFile{}, nil, "", ctx.Err() // begun again, unless nobody may
	}
	h, err := w.header(e.ID)
	if err != nil {
		return SealedFile{}, nil, "", err
	}
	return f, h.salt(), r.SealedBy, nil
}

// header reads a file's header under the new key.
func (w *resealing) header(id string) (header, error) {
	f, _, err := openRegular(w.work, SealedName(id))
	if err != nil {
		return header{}, err
	}
	defer f.Close()
	b := make([]byte, PayloadOffset)
	if _, err := io.ReadFull(f, b); err != nil {
		return header{}, err
	}
	if err := w.Use(); err != nil {
		return header{}, err
	}
	h, _, err := parseHeader(w.ToKey, b)
	return h, err
}

// finish makes the folder whole, or sees that it is, and returns its digest.
func (w *resealing) finish(sink *os.Root, m Manifest, p privatePart) (plan.Digest, error) {
	if w.done {
		return w.finished(m, p)
	}
	if err := w.work.Remove(ManifestName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := w.Use(); err != nil {
		return "", err
	}
	b, err := sealManifest(w.ToKey, m, p, nil)
	if err != nil {
		return "", fmt.Errorf("seal manifest: %w", err)
	}
	if len(b) > MaxManifest {
		return "", fmt.Errorf("manifest of %d bytes, at most %d are allowed", len(b), MaxManifest)
	}
	if err := writeNew(w.work, ManifestName, b); err != nil {
		return "", err
	}
	w.o.at()
	whole := Folder{root: w.work, manifest: m}
	if err := whole.checkListing(); err != nil {
		return "", err
	}
	if err := errors.Join(syncDir(w.work), syncDir(w.records)); err != nil {
		return "", err
	}
	w.o.at()
	if err := renameNew(sink, w.Name+".tmp", w.Name); err != nil {
		return "", err
	}
	w.o.at()
	return plan.Sum(b), nil
}

// finished checks a folder that an earlier run finished: its manifest is one that
// a holder of the new key made of these files.
func (w *resealing) finished(m Manifest, p privatePart) (plan.Digest, error) {
	b, err := readRegular(w.work, ManifestName, MaxManifest)
	if err != nil {
		return "", err
	}
	got, digest, err := ParseManifest(b)
	if err != nil {
		return "", err
	}
	entries, err := got.Open(w.ToKey)
	if err != nil {
		return "", err
	}
	same := got.Asset == m.Asset && got.ChunkSize == m.ChunkSize && len(entries) == len(p.Files)
	for i := 0; same && i < len(entries); i++ {
		e, f := entries[i], p.Files[i]
		same = got.Files[i] == m.Files[i] && e.Name == f.Name && e.PlainRoot == f.Root && string(e.salt) == string(f.Salt)
	}
	if !same {
		return "", fmt.Errorf("%w: %s is not what its records say: move it away", ErrDamaged, w.Name)
	}
	return digest, nil
}
