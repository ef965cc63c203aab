package bench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// settled runs f on a disk that has nothing else to write: what an earlier part
// left dirty would be charged to the next.
func settled(f func() time.Duration) func() time.Duration {
	return func() time.Duration {
		unix.Sync()
		return f()
	}
}

const (
	// tensors is what a checkpoint holds, in bytes, where memory and disk have room.
	tensors = 4 << 30
	// checkpointRounds is fewer than fileRounds: each is of eight times as many bytes.
	checkpointRounds = 3
)

// tensorsFor is tensors, or fileSize where memory or the disk of dir has no room to
// spare for them.
func tensorsFor(t *testing.T, dir string) int {
	t.Helper()
	var disk unix.Statfs_t
	if err := unix.Statfs(dir, &disk); err != nil {
		t.Fatal(err)
	}
	// A checkpoint is removed before the next one is written.
	if available() < 2*tensors || disk.Bavail*uint64(disk.Bsize) < 2*tensors { //nolint:gosec // a block's size is positive
		return fileSize
	}
	return tensors
}

// checkpoints measures sealing from memory to disk, durable when it returns. The
// disk's floor writes as many bytes in the same way, past the page cache where the
// file system has that, and ends with the same sync. Each part begins with a disk
// at rest.
func checkpoints(t *testing.T) []row {
	key := keys.GenerateDataKey()
	session := must[*keys.Session](t)(keys.GenerateSession())
	dir := t.TempDir()
	size := tensorsFor(t, dir)
	// Given back at the end: the parts that come after need it.
	plain := must[[]byte](t)(unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE))
	t.Cleanup(func() { _ = unix.Munmap(plain) })
	rate := func(d time.Duration) float64 { return float64(size) / d.Seconds() / 1e9 }
	sink := must[*os.Root](t)(os.OpenRoot(dir))
	t.Cleanup(func() { sink.Close() })
	n := 0
	commit := func(from []seal.Source) time.Duration {
		n++
		name := fmt.Sprintf("checkpoint-%d", n)
		began := time.Now()
		_, err := seal.SealCheckpoint(context.WithoutCancel(t.Context()), key, session, from, sink, seal.Commit{
			JobID: "job-1", Plan: plan.Sum([]byte("plan")), Asset: "a", Sequence: 1, Name: name, Folder: name,
		}, time.Now, seal.Options{})
		took := time.Since(began)
		if err != nil {
			t.Fatal(err)
		}
		if err := sink.RemoveAll(name); err != nil {
			t.Fatal(err)
		}
		return took
	}
	// The holder's blocks are sealed where they lie.
	inPlace := func() time.Duration { return commit(blocks(plain)) }
	aead, nonce := gcm(t), make([]byte, 12)
	// As many buffers as keep two workers from meeting in one.
	out := make([][]byte, 64*runtime.GOMAXPROCS(0))
	for i := range out {
		out[i] = make([]byte, chunk+tag)
	}
	encrypt := func() time.Duration {
		began := time.Now()
		each(size/chunk, func(i int) { aead.Seal(out[i%len(out)][:0], nonce, plain[i*chunk:(i+1)*chunk], nil) })
		return time.Since(began)
	}
	// What the format asks for besides: one SHA-256 of the ciphertext.
	digest := func() time.Duration {
		began := time.Now()
		each(size/chunk, func(i int) { sha256.Sum256(plain[i*chunk : (i+1)*chunk]) })
		return time.Since(began)
	}
	// Aligned for writes past the page cache, as long as the sealer's and of huge pages
	// as they are.
	const piece = 4 << 20
	aligned := must[[]byte](t)(unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS))
	t.Cleanup(func() { _ = unix.Munmap(aligned) })
	_ = unix.Madvise(aligned, unix.MADV_HUGEPAGE)
	clear(aligned)
	disk := func() time.Duration {
		name := filepath.Join(dir, "plain")
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|unix.O_DIRECT, 0o600)
		if err != nil {
			f = must[*os.File](t)(os.Create(name))
		}
		began := time.Now()
		_ = unix.Fallocate(int(f.Fd()), 0, 0, int64(size))
		each(size/piece, func(i int) {
			if _, err := f.WriteAt(aligned, int64(i)*piece); err != nil {
				t.Error(err)
			}
		})
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		return took
	}
	m, ratio := rounds(t, checkpointRounds, func(s sample) float64 { return float64(max(s[1], s[2])) / float64(s[0]) }, settled(inPlace), settled(encrypt), settled(disk), digest)
	return []row{
		atLeast(fmt.Sprintf("checkpoint of %d MiB sealed and durable / the slower of cipher and disk", size>>20), ratio, "x", 0.85),
		// What the processor has to do at least, whatever the disk does meanwhile.
		info("  the same / 1/(1/cipher + 1/SHA-256)", float64(m[1]+m[3])/float64(m[0]), "x"),
		info("  checkpoint", rate(m[0]), "GB/s"),
		info("  cipher, AES-256-GCM seal, memory to memory, all cores", rate(m[1]), "GB/s"),
		info("  disk, write past the page cache and fsync of as many bytes, begun with a disk at rest", rate(m[2]), "GB/s"),
		info("  SHA-256, which the format asks for beside the cipher, all cores", rate(m[3]), "GB/s"),
	}
}

// lying is memory that lies in blocks of a chunk each, as the holder's does.
type lying struct {
	memory
	b []byte
}

func (l lying) View(off int64, n int) ([]byte, error) { return l.b[off : off+int64(n)], nil }

func blocks(b []byte) []seal.Source {
	return []seal.Source{{Name: "f", Size: int64(len(b)), Open: func() (seal.Reader, error) { return lying{memory{bytes.NewReader(b)}, b}, nil }}}
}
