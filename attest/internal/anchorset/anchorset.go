// Package anchorset carries a simulation's trust anchors from attest/simulate
// to attest/anchor. It is internal and a test lets attest/simulate alone import
// it beside attest/anchor, so that a binary without attest/simulate cannot
// trust a simulation.
package anchorset

import "crypto/sha256"

// Fingerprint is the SHA-256 of a certificate's DER encoding.
type Fingerprint = [sha256.Size]byte

// Simulation names the roots that one simulation minted.
type Simulation struct {
	// ARKs are the AMD root keys by product line: "Milan", "Genoa", "Turin".
	ARKs       map[string]Fingerprint
	DeviceRoot Fingerprint
	RIMRoot    Fingerprint
}
