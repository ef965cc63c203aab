// Package vtpm judges whether a TPM 2.0 quote is genuine, and enrols the
// attestation keys that make quotes.
//
// Trusted: the endorsement key roots and pinned attestation keys in the given
// anchors, the verifier's own credential or the platform's report that names the
// attestation key, and the given clock. Checked: the quote's form, its extra
// data, PCR selection, PCR digest and signature, the attestation key's
// attributes, and that the event logs of agent and firmware replay to the quoted
// PCRs. Not checked: whether PCR values are acceptable, and whether a
// self-measured log tells the truth; the first is for attest/policy, the second
// nobody can tell.
package vtpm
