package sandbox

import (
	"errors"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coffer-run/coffer/attest/plan"
)

// noNetwork leaves a sandbox loopback and nothing else.
const noNetwork = "--network=none"

// Network is the way out of a sandbox whose plan allows egress (runner/egress).
type Network struct {
	// Namespace is the network namespace with the link to the gateway.
	Namespace string
	// Resolver is the job's /etc/resolv.conf.
	Resolver string
	// Proxy is the gateway's, as a URL.
	Proxy string
}

// enter puts a sandbox into the network. The variables stand before the job's own,
// which the plan binds and which may replace them: that opens no other way out.
func (n *Network) enter(s *specs.Spec) {
	i := slices.IndexFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.NetworkNamespace })
	s.Linux.Namespaces[i].Path = n.Namespace
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/etc/resolv.conf", Type: "bind", Source: n.Resolver, Options: []string{"rbind", "nosuid", "nodev", "noexec", "ro"}})
	var proxy []string
	// Programs differ in the case that they read. A plain http:// request gets the
	// gateway's refusal, which says what to do, rather than silence.
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
		proxy = append(proxy, name+"="+n.Proxy)
	}
	s.Process.Env = append(proxy, s.Process.Env...)
}

// flags are the runtime's for a job of this plan.
func (n *Node) flags(p plan.Plan) ([]string, error) {
	flags := slices.Clone(runtimeFlags)
	if n.profile.GPU != nil && p.Resources.GPUs > 0 {
		flags = append(flags, n.profile.GPU.Flags...)
	}
	if len(p.Egress) == 0 {
		return flags, nil
	}
	e := n.profile.Egress
	i := slices.Index(flags, noNetwork)
	if e == nil || i < 0 {
		return nil, errors.New("this node offers no network: its configuration has no egress, and the job file asks for it")
	}
	flags[i] = e.Flag
	return flags, nil
}
