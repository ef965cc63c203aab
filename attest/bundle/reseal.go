package bundle

const (
	// ResealPart is a Reseal: what a job without a container sealed anew.
	ResealPart Part = "reseal"
	// StageReseal stands in the place of decrypt, start and run for such a job.
	StageReseal Stage = "reseal"
	// MaxResealFiles bounds the records of files in a bundle, so that they fit into
	// one part. Of a job with more of them the bundle has none.
	MaxResealFiles = 4000
)

// Reseal is a job's word on what it sealed anew, and the broker's.
type Reseal struct {
	// Record is the canonical receipt.ResealRecord, and Signature the session key's
	// over it.
	Record    []byte `json:"record"`
	Signature []byte `json:"signature"`
	// Receipt is the broker's signed answer (receipt.Resealed).
	Receipt string `json:"receipt"`
	// Files are the records of the files (receipt.ResealFile), in the order of their
	// ids; absent if there are more than MaxResealFiles.
	Files []ResealedFile `json:"files,omitempty"`
}

// ResealedFile is the record of one file with the session key's signature.
type ResealedFile struct {
	Record    []byte `json:"record"`
	Signature []byte `json:"signature"`
}
