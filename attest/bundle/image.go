package bundle

// ImageSignaturePart is an ImageSignature. It is there if and only if the sandbox
// profile names who must have signed the image.
const ImageSignaturePart Part = "image-signature"

// MaxImageSignature bounds a signature, in bytes.
const MaxImageSignature = 256 << 10

// ImageSignature is the signature by which the agent admitted the job's image.
type ImageSignature struct {
	// Signer is "key NAME" or "SUBJECT by ISSUER", one of the profile's signers.
	Signer string `json:"signer"`
	// Bundle is a Sigstore bundle (JSON, version 0.3).
	Bundle []byte `json:"bundle"`
}
