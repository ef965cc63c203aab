package seal

import (
	"fmt"
	"os"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

const (
	// AnchorName is the file in a checkpoint's folder that has the broker's
	// countersignature (receipt.CheckpointHead). A checkpoint without is unanchored.
	AnchorName = "anchor.jwt"
	// anchorTmp is what an agent leaves that is killed while it writes AnchorName.
	anchorTmp = AnchorName + ".tmp"
)

// ReadSignedRecord reads the record in a checkpoint's folder and checks the
// signature by the session key beside it. Whose key that is, this does not say.
func ReadSignedRecord(root *os.Root) (receipt.SignedCheckpoint, receipt.CheckpointRecord, error) {
	b, err := readRegular(root, RecordName, receipt.MaxSignedCheckpoint)
	if err != nil {
		return receipt.SignedCheckpoint{}, receipt.CheckpointRecord{}, fmt.Errorf("read checkpoint record: %w", err)
	}
	return receipt.ParseSignedCheckpoint(b)
}

// Whole says whether every file that the manifest names is there, as long as the
// manifest says, and nothing besides. It reads no content: that authenticates as
// it is opened.
func (f *Folder) Whole() error {
	if err := f.checkListing(); err != nil {
		return err
	}
	for _, s := range f.manifest.Files {
		st, err := f.root.Lstat(SealedName(s.ID))
		if err != nil {
			return fmt.Errorf("sealed folder: %w", err)
		}
		if st.Size() != s.CipherSize {
			return fmt.Errorf("%w: file %s has %d bytes, the manifest says %d", ErrDamaged, s.ID, st.Size(), s.CipherSize)
		}
	}
	return nil
}

// Digest is the SHA-384 of the manifest.
func (f *Folder) Digest() plan.Digest { return f.digest }
