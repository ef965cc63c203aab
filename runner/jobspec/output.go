package jobspec

import (
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/logs"
)

// MaxLogBytesPerSecond bounds the rate of output that a job file may ask for.
const MaxLogBytesPerSecond = 16 << 20

func (c *checker) output(s *Spec) {
	if s.Output.LogBytesPerSecond == 0 {
		s.Output.LogBytesPerSecond = plan.DefaultLogBytesPerSecond
	}
	c.require(s.Output.LogBytesPerSecond <= MaxLogBytesPerSecond, "output.logBytesPerSecond", "want at most 16Mi")
	c.metrics(s)
	if s.Output.LogKey != "" {
		_, err := logs.ParsePublicKey(s.Output.LogKey)
		c.require(err == nil, "output.logKey", "%v: want x25519: or mlkem768x25519: and a public key in base64", err)
	}
}
