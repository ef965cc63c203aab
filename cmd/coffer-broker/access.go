package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/access"
	attestcheck "github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/identity"
)

// Access says who may do what. Without it a certificate's role decides, nobody
// signs in, and no approval counts.
type Access struct {
	// Policies is the folder of the policy set. It is read at the start, when it
	// has to hold, and on SIGHUP, when a set that does not hold changes nothing.
	Policies string `json:"policies"`
	// Maintainers are those whose signatures of a set count, Threshold how many
	// of them must have signed.
	Maintainers []Maintainer `json:"maintainers"`
	Threshold   int          `json:"threshold"`
	// Issuers are the OpenID providers whose people may call.
	Issuers []identity.Configured `json:"issuers"`
}

// Maintainer is one maintainer of policies.
type Maintainer struct {
	Name string `json:"name"`
	// Key is an SSH public key, as in an authorized_keys file.
	Key string `json:"key"`
}

// gate is the configured access of one broker.
type gate struct {
	access.Authorizer
	trust    access.Trust
	folder   string
	verifier *identity.Verifier
}

func newGate(c Config) (*gate, error) {
	g := &gate{folder: c.Access.Policies, trust: access.Trust{Broker: c.ID, Threshold: c.Access.Threshold}}
	if g.folder == "" {
		return nil, errors.New("access: no folder of policies")
	}
	for _, m := range c.Access.Maintainers {
		keys, err := sshsig.ParseKeys([]byte(m.Key))
		if err != nil || len(keys) != 1 {
			return nil, errors.Join(fmt.Errorf("maintainer %s: want one key", m.Name), err)
		}
		g.trust.Maintainers = append(g.trust.Maintainers, access.Maintainer{Name: m.Name, Key: keys[0]})
	}
	own, err := c.TLS.HTTPClient(daemon.RoleIssuer)
	if err != nil {
		return nil, err
	}
	client, issuers, err := identity.Client(own, c.Access.Issuers)
	if err != nil {
		return nil, err
	}
	g.verifier, err = identity.New(issuers, client, time.Now)
	return g, err
}

// load puts the folder's set into force. It is logged first: the log refuses one
// that is older than the last.
func (g *gate) load(ctx context.Context, b *broker.Broker, log *slog.Logger) error {
	files, err := access.ReadFiles(os.DirFS(g.folder))
	if err != nil {
		return fmt.Errorf("policy set in %s: %w", g.folder, err)
	}
	set, err := access.Open(files, g.trust)
	if err != nil {
		return fmt.Errorf("policy set in %s: %w", g.folder, err)
	}
	by := broker.Actor{Role: "maintainers", Name: strings.Join(set.Signers(), "+")}
	if err := b.LogPolicySet(ctx, by, set.Serial(), set.Digest(), func() error { return g.Use(set) }); err != nil {
		return fmt.Errorf("policy set in %s: %w", g.folder, err)
	}
	log.LogAttrs(ctx, slog.LevelInfo, "policy set in force", slog.Uint64("serial", set.Serial()), slog.String("digest", string(set.Digest())), slog.Any("signers", set.Signers()))
	return nil
}

// reload loads the set again on every SIGHUP until ctx ends.
func (g *gate) reload(ctx context.Context, b *broker.Broker, log *slog.Logger) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		defer signal.Stop(hup)
		for {
			select {
			case <-ctx.Done():
				return
			case <-hup:
				if err := g.load(ctx, b, log); err != nil {
					log.LogAttrs(ctx, slog.LevelError, "policy set refused; the one before stays in force", slog.String("error", err.Error()))
				}
			}
		}
	}()
}

// identify says who sent a request: whose certificate it came with, or whose
// token it brings. One of them: with both nobody could tell which counts.
func (g *gate) identify(r *http.Request) (broker.Actor, error) {
	token, err := identity.Bearer(r)
	if err != nil {
		return broker.Actor{}, err
	}
	switch {
	case token != "" && daemon.HasCertificate(r):
		var l attestcheck.List
		l.Fail("caller.identity", "a client certificate or a token", "both", "leave one of them out")
		return broker.Actor{}, attestcheck.Refuse("authenticate", l)
	case token == "":
		return identify(r)
	}
	p, err := g.verifier.Verify(r.Context(), token)
	if errors.Is(err, identity.ErrUnavailable) {
		return broker.Actor{}, fmt.Errorf("%w: %w", broker.ErrUnavailable, err)
	}
	if err != nil {
		return broker.Actor{}, err
	}
	return broker.Actor{Role: broker.RoleUser, Name: p.Name, Groups: p.Groups, ACR: p.ACR, Assurance: p.Assurance, SignedIn: p.SignedIn, Network: address(r)}, nil
}

// address is where a request came from, "" if that cannot be read.
func address(r *http.Request) string {
	a, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return ""
	}
	return a.Addr().Unmap().String()
}

// identify says who a client certificate is of. Its key is one factor.
func identify(r *http.Request) (broker.Actor, error) {
	role, name, err := daemon.Identity(r)
	if err != nil {
		return broker.Actor{}, err
	}
	id, err := daemon.SPIFFEID(r)
	if err != nil {
		return broker.Actor{}, err
	}
	return broker.Actor{Role: role, Name: name, ID: id, Assurance: int(access.AssuranceSingle), Network: address(r)}, nil
}
