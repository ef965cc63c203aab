package plan

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// MaxEgress bounds the destinations of one plan.
const MaxEgress = 32

// Egress is one destination that the job may reach over TLS, and how much it may
// send there. What it receives is counted and not bounded.
type Egress struct {
	// Host is a DNS name in lower case, without wildcards and without a final dot.
	Host string `json:"host"`
	Port int    `json:"port"`
	// MaxBytes is what all connections to this destination may send together, TLS
	// included, and BytesPerSecond how fast.
	MaxBytes       int64 `json:"maxBytes"`
	BytesPerSecond int64 `json:"bytesPerSecond"`
}

// EgressProfile says what stands between a job's sandbox and the network. A node
// that offers no network has none.
type EgressProfile struct {
	// Gateway is the digest of the program that lets connections through.
	Gateway Digest `json:"gateway"`
	// Filter is the digest of the packet filter's rules.
	Filter Digest `json:"filter"`
	// Flag takes the place of --network=none for a job with egress.
	Flag string `json:"flag"`
}

// A label of RFC 1123, and a last one with a letter in it: what is not a name is an
// address, and addresses cannot be approved.
var hostForm = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ParseHost checks the form of a destination's name: at least two labels, in lower
// case.
func ParseHost(s string) (string, error) {
	if len(s) > 253 || !hostForm.MatchString(s) {
		return "", fmt.Errorf("host %.80q: want a DNS name in lower case, such as metrics.example.com", s)
	}
	return s, nil
}

// Allows reports whether the plan lets the job connect to a name and port.
func (p Plan) Allows(host string, port int) bool {
	for _, e := range p.Egress {
		if e.Host == host && e.Port == port {
			return true
		}
	}
	return false
}

func (p Plan) validateEgress() error {
	o := p.Output
	if len(p.Egress) == 0 {
		if o.EgressBytes != 0 || o.EgressBytesPerSecond != 0 || o.EgressEvents != 0 {
			return errors.New("plan bounds egress and allows none")
		}
		return nil
	}
	if len(p.Egress) > MaxEgress {
		return fmt.Errorf("plan has %d destinations, at most %d are allowed", len(p.Egress), MaxEgress)
	}
	if o.EgressBytes <= 0 || o.EgressBytesPerSecond <= 0 || o.EgressEvents <= 0 {
		return errors.New("plan allows egress and does not bound it")
	}
	seen := map[string]bool{}
	for _, e := range p.Egress {
		if _, err := ParseHost(e.Host); err != nil {
			return fmt.Errorf("plan egress: %w", err)
		}
		at := fmt.Sprintf("%s:%d", e.Host, e.Port)
		switch {
		case e.Port < 1 || e.Port > 65535:
			return fmt.Errorf("plan egress %s: want a port from 1 to 65535", at)
		case e.MaxBytes <= 0 || e.BytesPerSecond <= 0:
			return fmt.Errorf("plan egress %s: bytes and rate must be positive", at)
		case seen[at]:
			return fmt.Errorf("plan egress %s: listed twice", at)
		}
		seen[at] = true
	}
	return nil
}

// networkFlag is the runtime's flag by which a sandbox has a network or none.
const (
	networkFlag = "--network="
	noNetwork   = networkFlag + "none"
)

// Network returns the runtime flag that a sandbox of this plan must have been made
// with, and those of its flags that are about the network. They must be equal: the
// runtime takes the last of several, and without any it gives a network.
func (s Sandbox) Network(p Plan) (want, got string) {
	want = noNetwork
	if len(p.Egress) > 0 {
		want = "one that the node's profile has"
		if e := s.Profile.Egress; e != nil && strings.HasPrefix(e.Flag, networkFlag) {
			want = e.Flag
		}
	}
	var found []string
	for _, f := range s.Wrapper {
		if name, _, _ := strings.Cut(strings.TrimLeft(f, "-"), "="); strings.HasPrefix(f, "-") && name == "network" {
			found = append(found, f)
		}
	}
	if len(found) == 0 {
		return want, "none"
	}
	return want, strings.Join(found, " ")
}
