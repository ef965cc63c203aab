package sandbox

import (
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
