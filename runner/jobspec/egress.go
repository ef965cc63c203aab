package jobspec

import (
	"fmt"

	"github.com/coffer-run/coffer/attest/plan"
)

// Where a job file that asks for egress is silent.
const (
	DefaultEgressPort           = 443
	DefaultEgressBytesPerSecond = 1 << 20
	DefaultEgressEvents         = 100

	// MaxEgressEvents bounds what a job file may ask for: agent and gateway keep it
	// in memory.
	MaxEgressEvents = 1000
)

// Egress is one destination that the job may reach over TLS, through the node's
// gateway. MaxBytes has no default: who approves the plan approves the number.
type Egress struct {
	Host           string `yaml:"host"`
	Port           int    `yaml:"port,omitempty"`
	MaxBytes       Bytes  `yaml:"maxBytes"`
	BytesPerSecond Bytes  `yaml:"bytesPerSecond,omitempty"`
}

func (c *checker) egress(s *Spec) {
	o := &s.Output
	if len(s.Egress) == 0 {
		c.require(o.EgressBytes == 0 && o.EgressBytesPerSecond == 0 && o.EgressEvents == 0, "output", "it bounds egress and the job file asks for none")
		return
	}
	var sum, fastest Bytes
	seen := map[string]bool{}
	for i := range s.Egress {
		e, at := &s.Egress[i], fmt.Sprintf("egress[%d].", i)
		if e.Port == 0 {
			e.Port = DefaultEgressPort
		}
		if e.BytesPerSecond == 0 {
			e.BytesPerSecond = DefaultEgressBytesPerSecond
		}
		_, err := plan.ParseHost(e.Host)
		c.require(err == nil, at+"host", "%v", err)
		name := fmt.Sprintf("%s:%d", e.Host, e.Port)
		c.require(!seen[name], at+"host", "%s is listed twice", name)
		seen[name] = true
		sum, fastest = sum+e.MaxBytes, max(fastest, e.BytesPerSecond)
	}
	if o.EgressBytes == 0 {
		o.EgressBytes = sum
	}
	if o.EgressBytesPerSecond == 0 {
		o.EgressBytesPerSecond = fastest
	}
	if o.EgressEvents == 0 {
		o.EgressEvents = DefaultEgressEvents
	}
}

// planEgress puts the destinations and their bounds into the plan.
func (s Spec) planEgress(p *plan.Plan) {
	for _, e := range s.Egress {
		p.Egress = append(p.Egress, plan.Egress{Host: e.Host, Port: e.Port, MaxBytes: int64(e.MaxBytes), BytesPerSecond: int64(e.BytesPerSecond)})
	}
	p.Output.EgressBytes, p.Output.EgressBytesPerSecond, p.Output.EgressEvents = int64(s.Output.EgressBytes), int64(s.Output.EgressBytesPerSecond), s.Output.EgressEvents
}
