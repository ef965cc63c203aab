package sandbox

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/coffer-run/coffer/attest/plan"
)

// binary is a program as it was when the node was opened.
type binary struct {
	digest plan.Digest
	// pieces says again what digest says, in a form that all cores check at once, each
	// with the processor's own instructions. It stays in this process.
	pieces []piece
}

// piece is the SHA-256 of pieceSize bytes of a file, or of what there is.
type piece [sha256.Size]byte

const pieceSize = 2 << 20

// readBinary reads a program once for both.
func readBinary(path string) (binary, error) {
	f, err := os.Open(path)
	if err != nil {
		return binary{}, fmt.Errorf("digest: %w", err)
	}
	defer f.Close()
	whole := sha512.New384()
	var b binary
	for {
		h := sha256.New()
		n, err := io.Copy(io.MultiWriter(whole, h), io.LimitReader(f, pieceSize))
		if err != nil {
			return binary{}, fmt.Errorf("digest %s: %w", path, err)
		}
		b.pieces = append(b.pieces, piece(h.Sum(nil)))
		if n < pieceSize {
			break
		}
	}
	b.digest = plan.Digest("sha384:" + hex.EncodeToString(whole.Sum(nil)))
	return b, nil
}

// digestNow reads the whole program again and returns its digest.
func (b binary) digestNow(path string) (plan.Digest, error) {
	got, err := readPieces(path)
	if err != nil {
		return "", err
	}
	if b.digest != "" && slices.Equal(got, b.pieces) {
		return b.digest, nil
	}
	return FileDigest(path)
}

func readPieces(path string) ([]piece, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("digest: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("digest: %w", err)
	}
	// As readBinary counts them: the last one has less than pieceSize bytes.
	out := make([]piece, st.Size()/pieceSize+1)
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i := range out {
		group.Go(func() error {
			buf := make([]byte, pieceSize)
			n, err := f.ReadAt(buf, int64(i)*pieceSize)
			if err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("digest %s: %w", path, err)
			}
			out[i] = sha256.Sum256(buf[:n])
			return nil
		})
	}
	return out, group.Wait()
}

// binaries are the digests of the programs that a node runs sandboxes with.
type binaries struct {
	runsc, shim plan.Digest
	err         error
}

// readBinaries reads them again.
func (n *Node) readBinaries() (b binaries) {
	if b.runsc, b.err = n.runsc.digestNow(n.cfg.Runsc); b.err == nil {
		b.shim, b.err = n.shim.digestNow(n.cfg.ShimPath)
	}
	return b
}

// ReadBinaries begins to read the runtime's binaries for the next Recheck, which reads
// them itself otherwise. The sandbox's process and its shim have been executed from them
// when it was created: what is read from then on tells of them no less than what is read
// right before the start, which executes the runtime only to tell that process to go on.
func (s *Sandbox) ReadBinaries() {
	read := make(chan binaries, 1)
	s.read = read
	go func() { read <- s.node.readBinaries() }()
}

// binariesRead waits for what ReadBinaries began, once.
func (s *Sandbox) binariesRead(ctx context.Context) binaries {
	if s.read == nil {
		return s.node.readBinaries()
	}
	select {
	case b := <-s.read:
		s.read = nil
		return b
	case <-ctx.Done():
		return binaries{err: ctx.Err()}
	}
}
