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

// Digest is the SHA-384 of the manifest.
func (f *Folder) Digest() plan.Digest { return f.digest }
