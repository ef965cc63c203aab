package stack

// VerifierKeys is the file with the public keys of the stack's verifier.
func (e Endpoint) VerifierKeys() string { return e.layout.path("verifier", "jwks.json") }

// BrokerKeys is the file with the public keys of the stack's broker.
func (e Endpoint) BrokerKeys() string { return e.layout.path("broker", "jwks.json") }

// SimulationRoots is the folder with the roots in which the certificates of the
// stack's emulated devices end.
func (e Endpoint) SimulationRoots() string { return e.layout.path("simulation") }
