// Package egress gives a job with egress its way to the network, and takes it away:
// a network namespace for the sandbox, another one for a gateway, one link between
// them, and the gateway's process, whose way out is a socket and no route.
//
//	sandbox -- eth0 | job namespace | veth | gateway namespace | coffer-gateway -- node's network
//
// The gateway's namespace has no link but the one to the job and forwards nothing.
// The gateway process is in the node's namespace, or the one that the node's
// configuration names; only its listening sockets are in the gateway's. So a packet
// from the job has nowhere to go but these sockets, whatever the filter says, and the
// filter, which drops everything else, holds whatever the kernel would do with it.
//
// Trusted: the gateway's binary, as measured at the agent's start; the kernel.
// Checked: that it is that binary which is started; namespaces and filter, when they are made and again before the start.
// Not trusted: the job, including one that has broken out of its sandbox's kernel
// and sends what it likes on the link.
package egress

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/runner/egress/gate"
	"github.com/coffer-run/coffer/runner/egress/netns"
)

// Names in a job's run directory.
const (
	jobNetName     = "job.net"
	gatewayNetName = "gateway.net"
	socketName     = "gateway.sock"
	logName        = "gateway.log"
	resolvName     = "resolv.conf"
)

const (
	startTimeout = 10 * time.Second
	// maxReport bounds a gateway's answer, in bytes.
	maxReport = 16 << 20
	// uid is who gateways run as.
	uid = 65533
)

// SandboxFlag lets a sandbox have the link in its namespace.
const SandboxFlag = "--network=sandbox"

// Config is a node's.
type Config struct {
	// Gateway is the program, coffer-gateway.
	Gateway string
	// Uplink is a network namespace to connect from; empty for the agent's own.
	Uplink string
	// Resolvers answer for names; without any, the node's own do.
	Resolvers []netip.AddrPort

	// checksum is that of the program in the profile: no other is started.
	checksum string
}

// Profile is what plans bind of a node's egress. Without it no gateway is started:
// it says which program may be.
func (c *Config) Profile() (*plan.EgressProfile, error) {
	b, err := os.ReadFile(c.Gateway)
	if err != nil {
		return nil, fmt.Errorf("digest gateway: %w", err)
	}
	sum := sha256.Sum256(b)
	c.checksum = hex.EncodeToString(sum[:])
	return &plan.EgressProfile{Gateway: plan.Sum(b), Filter: FilterDigest(), Flag: SandboxFlag}, nil
}

// Gateway is one job's.
type Gateway struct {
	runDir string
	client *http.Client
}

// Proxy is what a job's HTTPS_PROXY says.
func Proxy() string {
	return "http://" + netip.AddrPortFrom(gatewayAddr, proxyPort).String()
}

// Addr is the address of every job's gateway.
func Addr() netip.Addr { return gatewayAddr }

// Is reports whether an address that the job connects to, as the trace shows it, is
// the gateway's or within the sandbox.
func Is(address string) bool {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return false
	}
	return ap.Addr().Unmap().IsLoopback() || ap == netip.AddrPortFrom(gatewayAddr, proxyPort) || ap == netip.AddrPortFrom(gatewayAddr, dnsPort)
}

// Namespace is where the sandbox of a job with egress runs.
func Namespace(runDir string) string { return filepath.Join(runDir, jobNetName) }

// Resolver is the file that is the job's /etc/resolv.conf.
func Resolver(runDir string) string { return filepath.Join(runDir, resolvName) }

// Open makes the namespaces of a job and starts its gateway. join puts the process
// into a control group, before it lets anything through. On an error nothing is
// left behind but what Remove removes.
func (c Config) Open(ctx context.Context, runDir string, p plan.Plan, join func(pid int) error) (*Gateway, error) {
	gw, job := filepath.Join(runDir, gatewayNetName), Namespace(runDir)
	for _, ns := range []string{gw, job} {
		if err := netns.New(ns); err != nil {
			return nil, err
		}
	}
	// The filter comes before the link.
	if err := setFilter(gw); err != nil {
		return nil, err
	}
	err := netns.Inside(job, harden)
	if err == nil {
		err = netns.Inside(gw, func() error { return errors.Join(harden(), connect(job)) })
	}
	if err == nil {
		err = netns.Inside(job, prepareJob)
	}
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(Resolver(runDir), []byte("nameserver "+gatewayAddr.String()+"\noptions timeout:2 attempts:1\n"), 0o644); err != nil { //nolint:gosec // the job reads it
		return nil, fmt.Errorf("write the job's resolver: %w", err)
	}
	return c.start(ctx, runDir, gate.Config{
		Destinations: p.Egress, MaxBytes: p.Output.EgressBytes, BytesPerSecond: p.Output.EgressBytesPerSecond, Events: p.Output.EgressEvents, Resolvers: c.Resolvers,
	}, join)
}

// Attach finds the gateway of a job that an earlier agent started.
func Attach(ctx context.Context, runDir string) (*Gateway, error) {
	g := open(runDir)
	if _, err := g.Report(ctx, 0, 0); err != nil {
		return nil, fmt.Errorf("attach to gateway: %w", err)
	}
	return g, nil
}

// Replace starts a gateway that lets nothing through, in the place of one that died:
// what that one had let through is not known, and so neither is what is left of the
// budgets.
func (c Config) Replace(ctx context.Context, runDir, why string, join func(pid int) error) (*Gateway, error) {
	if err := os.Remove(filepath.Join(runDir, socketName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replace gateway: %w", err)
	}
	return c.start(ctx, runDir, gate.Config{Closed: why}, join)
}

func (c Config) start(ctx context.Context, runDir string, cfg gate.Config, join func(pid int) error) (_ *Gateway, err error) {
	files, err := sockets(runDir)
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	if err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	if c.Uplink != "" {
		// The gateway sees the addresses of its uplink alone.
		if cfg.Node, err = gate.OwnAddresses(); err != nil {
			return nil, fmt.Errorf("start gateway: %w", err)
		}
	}
	stdin, err := json.Marshal(cfg)
	if err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	config, feed, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	defer config.Close()
	defer feed.Close()
	stderr, err := os.OpenFile(filepath.Join(runDir, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	defer stderr.Close()
	// It must outlive ctx.
	cmd, binary, err := host.Command(context.WithoutCancel(ctx), host.Config{Path: c.Gateway, SHA256: c.checksum, Args: []string{"--uid", strconv.Itoa(uid)}})
	if err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	defer binary.Close() //nolint:errcheck // a memory file
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stderr, cmd.ExtraFiles = config, stderr, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	begin := cmd.Start
	if c.Uplink != "" {
		// A process begins in the namespace of the thread that starts it.
		begin = func() error { return netns.Inside(c.Uplink, cmd.Start) }
	}
	if err := begin(); err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait() // its end shows in the next question
	}()
	defer func() {
		if err != nil {
			_ = cmd.Process.Kill()
			<-exited
		}
	}()
	if err := join(cmd.Process.Pid); err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	// It lets nothing through before it has its configuration.
	if _, err := io.Copy(feed, bytes.NewReader(stdin)); err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	if err := feed.Close(); err != nil {
		return nil, fmt.Errorf("start gateway: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	go func() {
		select {
		case <-exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	g := open(runDir)
	// The socket takes the question before the process serves it.
	r, err := g.Report(ctx, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("start gateway: no answer, see %s: %w", filepath.Join(runDir, logName), err)
	}
	if r.Pid != cmd.Process.Pid {
		return nil, fmt.Errorf("start gateway: process %d answers, want %d", r.Pid, cmd.Process.Pid)
	}
	return g, nil
}

// sockets are what a gateway listens on: the proxy and the name server in its
// namespace, and the agent's socket, which only root reaches.
func sockets(runDir string) (files []*os.File, err error) {
	var tcp *net.TCPListener
	var udp *net.UDPConn
	err = netns.Inside(filepath.Join(runDir, gatewayNetName), func() error {
		var err error
		if tcp, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(gatewayAddr, proxyPort))); err != nil {
			return err
		}
		udp, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(gatewayAddr, dnsPort)))
		return err
	})
	if tcp != nil {
		defer tcp.Close()
	}
	if udp != nil {
		defer udp.Close()
	}
	if err != nil {
		return nil, err
	}
	control, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(runDir, socketName), Net: "unix"})
	if err != nil {
		return nil, err
	}
	control.SetUnlinkOnClose(false)
	defer control.Close()
	if err := os.Chmod(filepath.Join(runDir, socketName), 0o600); err != nil {
		return nil, err
	}
	for _, s := range []interface{ File() (*os.File, error) }{tcp, udp, control} {
		f, err := s.File()
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

func open(runDir string) *Gateway {
	path := filepath.Join(runDir, socketName)
	return &Gateway{runDir: runDir, client: &http.Client{Transport: &http.Transport{
		DisableCompression: true, MaxIdleConns: 2,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}}}
}

func (g *Gateway) call(ctx context.Context, method, path string, q url.Values) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://gateway"+path+"?"+q.Encode(), http.NoBody)
	if err != nil {
		return nil, err
	}
	res, err := g.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask gateway: %w", err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxReport+1))
	if err != nil {
		return nil, fmt.Errorf("ask gateway: %w", err)
	}
	if res.StatusCode/100 != 2 || len(b) > maxReport {
		return nil, fmt.Errorf("ask gateway: %s, %d bytes", res.Status, len(b))
	}
	return b, nil
}

// Report returns what changed after a sequence number, and waits up to wait for it.
func (g *Gateway) Report(ctx context.Context, after uint64, wait time.Duration) (gate.Report, error) {
	b, err := g.call(ctx, http.MethodGet, "/report", url.Values{"after": {strconv.FormatUint(after, 10)}, "wait": {strconv.FormatInt(wait.Milliseconds(), 10)}})
	if err != nil {
		return gate.Report{}, err
	}
	var r gate.Report
	if err := plan.Decode(b, maxReport, &r); err != nil {
		return gate.Report{}, fmt.Errorf("ask gateway: %w", err)
	}
	return r, nil
}

// Close ends the job's connections and lets nothing through any more. It returns
// when they have ended.
func (g *Gateway) Close(ctx context.Context, why string) error {
	_, err := g.call(ctx, http.MethodPost, "/close", url.Values{"why": {why}})
	return err
}

// Detach drops the connection and leaves the gateway running.
func (g *Gateway) Detach() { g.client.CloseIdleConnections() }

// Dropped counts the packets that the filter dropped.
func (g *Gateway) Dropped() (Dropped, error) {
	return readFilter(filepath.Join(g.runDir, gatewayNetName))
}

// Recheck compares the gateway's namespace with what the agent made: links, what
// they forward, and the filter. Every difference is in the *check.Refusal.
func (g *Gateway) Recheck() error {
	var l check.List
	const hint = "somebody changed the job's network after it was attested"
	gw := filepath.Join(g.runDir, gatewayNetName)
	if _, err := readFilter(gw); errors.Is(err, errChanged) {
		l.Fail("egress.filter", string(FilterDigest()), err.Error(), hint)
	} else if err != nil {
		return err
	}
	err := netns.Inside(gw, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		names := ""
		for _, link := range links {
			// Some kernels put tunnel devices into every namespace; they are down.
			if n := link.Attrs().Name; n == gatewayLink || link.Attrs().Flags&net.FlagUp != 0 {
				names += " " + n
			}
		}
		l.Equal("egress.links", " "+gatewayLink, names, hint)
		for path, want := range settings {
			b, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if err == nil {
				l.Equal("egress.setting", path+" "+want, path+" "+string(bytes.TrimSpace(b)), hint)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("recheck egress: %w", err)
	}
	if len(l.Failed()) > 0 {
		return check.Refuse("start", l)
	}
	return nil
}

// Remove lets go of a job's namespaces. The gateway's process goes with its control
// group. It is safe to call for a job that has none.
func Remove(runDir string) error {
	return errors.Join(netns.Drop(Namespace(runDir)), netns.Drop(filepath.Join(runDir, gatewayNetName)))
}
