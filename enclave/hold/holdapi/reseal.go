package holdapi

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

// Operations of a job without a container, which seals an asset anew.
const (
	// OpResealSource hands over the sealed source: descriptor 0 is its folder
	// (O_PATH|O_DIRECTORY). ResealSource.
	OpResealSource = "reseal-source"
	// OpReseal begins the work, once both keys are there: descriptor 0 is the folder
	// in which the new one is made. Reseal.
	OpReseal = "reseal"
	// OpResealStatus asks how far it is. ResealStatusQuery, ResealStatus.
	OpResealStatus = "reseal-status"
)

// States of a ResealStatus.
const (
	ResealNone    = "none"
	ResealRunning = "running"
	ResealDone    = "done"
	ResealFailed  = "failed"
)

// ResealSource names the sealed folder that is to be sealed anew.
type ResealSource struct {
	Asset  string      `json:"asset"`
	Digest plan.Digest `json:"digest"`
}

// Reseal begins the work. Plan is the canonical plan; Name is the new folder in the
// sink, with its records beside it.
type Reseal struct {
	Plan []byte `json:"plan"`
	Name string `json:"name"`
}

// ResealStatusQuery asks for the records after the first After.
type ResealStatusQuery struct {
	After int `json:"after"`
}

// ResealStatus is how far a re-sealing is.
type ResealStatus struct {
	State string `json:"state"`
	// Error says why it failed.
	Error string `json:"error,omitempty"`
	// Files have a record. Bytes of the plaintext's Total are sealed, in Nanos once
	// the work is over.
	Files int   `json:"files"`
	Bytes int64 `json:"bytes"`
	Total int64 `json:"total"`
	Nanos int64 `json:"nanos"`
	// Records are as many as a message holds, in the order of the files.
	Records []ResealRecord `json:"records,omitempty"`
	// Result is the last record, which has the digest; nil until the work is done.
	Result *ResealRecord `json:"result,omitempty"`
}

// ResealRecord is a canonical record (receipt.ResealFile, or receipt.ResealRecord)
// with the session key's signature.
type ResealRecord struct {
	Record    []byte `json:"record"`
	Signature []byte `json:"signature"`
}

// ResealSource hands over the sealed folder at path.
func (c *Client) ResealSource(ctx context.Context, in ResealSource, path string) error {
	return c.withDir(path, unix.O_PATH, func(f *os.File) error {
		_, err := c.do(ctx, Request{Op: OpResealSource, ResealSource: &in}, f)
		return err
	})
}

// Reseal begins to seal the source anew below the folder at path.
func (c *Client) Reseal(ctx context.Context, q Reseal, path string) error {
	return c.withDir(path, unix.O_RDONLY, func(f *os.File) error {
		_, err := c.do(ctx, Request{Op: OpReseal, Reseal: &q}, f)
		return err
	})
}

// ResealStatus says how far it is, with records after the first q.After.
func (c *Client) ResealStatus(ctx context.Context, q ResealStatusQuery) (ResealStatus, error) {
	r, err := c.do(ctx, Request{Op: OpResealStatus, ResealStatus: &q}, nil)
	return part(r.Reseal, err)
}
