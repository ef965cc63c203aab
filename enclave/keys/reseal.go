package keys

import "github.com/coffer-run/coffer/attest/receipt"

// SignReseal signs a re-sealing record of either kind (receipt.ResealFile,
// receipt.ResealRecord).
func (s *Session) SignReseal(record []byte) ([]byte, error) {
	return s.signLabelled(receipt.ResealLabel, record, receipt.MaxResealRecord)
}
