package translog

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// MaxWitnessRequest bounds a request to a witness, in bytes.
const MaxWitnessRequest = MaxCheckpoint + (MaxProofHashes+2)*64

// WitnessRequest is what a log asks of a witness (C2SP tlog-witness,
// add-checkpoint): to cosign Checkpoint, which follows the one of size Old that
// the witness cosigned last.
type WitnessRequest struct {
	Old        uint64
	Proof      [][]byte
	Checkpoint []byte
}

// ParseWitnessRequest reads the body of add-checkpoint: a line "old N", a line of
// base64 for each hash of the proof, an empty line, and the checkpoint.
func ParseWitnessRequest(body []byte) (WitnessRequest, error) {
	if len(body) > MaxWitnessRequest {
		return WitnessRequest{}, fmt.Errorf("parse witness request: %d bytes, at most %d are allowed", len(body), MaxWitnessRequest)
	}
	head, checkpoint, ok := bytes.Cut(body, []byte("\n\n"))
	if !ok {
		return WitnessRequest{}, errors.New("parse witness request: no empty line before the checkpoint")
	}
	lines := strings.Split(string(head), "\n")
	size, ok := strings.CutPrefix(lines[0], "old ")
	if !ok || len(lines)-1 > MaxProofHashes {
		return WitnessRequest{}, errors.New("parse witness request: want a line \"old N\" and a proof")
	}
	old, err := strconv.ParseUint(size, 10, 64)
	if err != nil || strconv.FormatUint(old, 10) != size {
		return WitnessRequest{}, fmt.Errorf("parse witness request: old size %.40q", size)
	}
	r := WitnessRequest{Old: old, Checkpoint: checkpoint}
	for _, l := range lines[1:] {
		h, err := base64.StdEncoding.DecodeString(l)
		if err != nil || len(h) != len(LeafHash(nil)) {
			return WitnessRequest{}, fmt.Errorf("parse witness request: %.80q is no hash", l)
		}
		r.Proof = append(r.Proof, h)
	}
	return r, nil
}
