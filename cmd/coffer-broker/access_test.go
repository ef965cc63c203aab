package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/crypto/ssh"
	"golang.org/x/oauth2"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/broker/access"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/identity"
	"github.com/coffer-run/coffer/internal/issuer"
	"github.com/coffer-run/coffer/internal/loopback"
)

const password = "correct horse battery"

// site is a broker with an issuer and a policy set, both served over TLS.
type site struct {
	t        *testing.T
	dir      string
	config   Config
	keys     map[string]ssh.Signer
	issuer   string
	people   *http.Client
	log      lines
	finished chan error
}

// awaits waits until the broker has logged text n times.
func (s *site) awaits(text string, n int) {
	s.t.Helper()
	for range 6000 {
		if strings.Count(s.log.String(), text) >= n {
			return
		}
		select {
		case err := <-s.finished:
			s.t.Fatalf("the broker ended: %v\n%s", err, s.log.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	s.t.Fatalf("%q is not in the log %d times:\n%s", text, n, s.log.String())
}

// policies writes a set into the broker's folder, signed by the named.
func (s *site) policies(serial uint64, approvers string, signers ...string) {
	s.t.Helper()
	files, err := access.DefaultPolicies()
	check(s.t, err)
	files[access.PeopleFile], err = json.Marshal(access.People{Groups: []access.Group{{Name: approvers, Roles: []string{"approver"}}, {Name: "owners", Roles: []string{"owner"}}}})
	check(s.t, err)
	files[access.ManifestFile], err = access.Manifest(s.config.ID, serial, files)
	check(s.t, err)
	for _, n := range signers {
		files[access.SignatureDir+"/"+n+".sig"], err = access.Sign(s.keys[n], files[access.ManifestFile])
		check(s.t, err)
	}
	check(s.t, os.RemoveAll(s.config.Access.Policies))
	for name, b := range files {
		path := filepath.Join(s.config.Access.Policies, name)
		check(s.t, os.MkdirAll(filepath.Dir(path), 0o700))
		check(s.t, os.WriteFile(path, b, 0o600))
	}
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir, c := state(t)
	s := &site{t: t, dir: dir, config: c, keys: map[string]ssh.Signer{}, finished: make(chan error, 1)}
	check(t, pki.Issue(dir, "issuer", "issuer"))
	s.config.Access = &Access{Policies: filepath.Join(dir, "policies"), Threshold: 2}
	for _, n := range []string{"ada", "bea", "cyd"} {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		check(t, err)
		s.keys[n], err = ssh.NewSignerFromKey(key)
		check(t, err)
		s.config.Access.Maintainers = append(s.config.Access.Maintainers, Maintainer{Name: n, Key: string(ssh.MarshalAuthorizedKey(s.keys[n].PublicKey()))})
	}
	s.serveIssuer()
	s.config.Access.Issuers = []identity.Configured{{Issuer: identity.Issuer{URL: s.issuer, Audience: issuer.ClientID, Algorithms: []string{issuer.Algorithm}}, Embedded: true}}
	return s
}

func (s *site) serveIssuer() {
	t := s.t
	hash, err := issuer.HashPassword(password)
	check(t, err)
	file, err := issuer.EncodePeople([]issuer.Person{{Name: "alice", Groups: []string{"approvers"}, Hash: hash}, {Name: "olga", Groups: []string{"owners"}, Hash: hash}})
	check(t, err)
	people, err := issuer.ParsePeople(file)
	check(t, err)
	keyFile := filepath.Join(s.dir, "issuer.key")
	check(t, keyfile.CreateP384(keyFile))
	key, err := keyfile.ReadP384(keyFile)
	check(t, err)
	addr := loopback.Addr(t)
	s.issuer = "https://" + addr
	h, err := issuer.New(issuer.Options{URL: s.issuer, Key: key, People: people, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	check(t, err)
	cfg, err := pki.Files(s.dir, "issuer", "issuer").ServerForPeople()
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- daemon.Serve(ctx, addr, cfg, h, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { cancel(); check(t, <-done) })
	s.people, err = daemon.HTTPClientForPeople(filepath.Join(s.dir, pki.CAFile), daemon.RoleIssuer)
	check(t, err)
	t.Cleanup(s.people.CloseIdleConnections)
	for range 12000 {
		if res, err := s.people.Get(s.issuer + daemon.Health); err == nil {
			check(t, res.Body.Close())
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the issuer does not answer")
}

// token signs a person in by the device flow.
func (s *site) token(name string) string {
	t := s.t
	t.Helper()
	c := oauth2.Config{ClientID: issuer.ClientID, Scopes: []string{"openid"}, Endpoint: oauth2.Endpoint{DeviceAuthURL: s.issuer + "/device_authorization", TokenURL: s.issuer + "/token", AuthStyle: oauth2.AuthStyleInParams}}
	ctx := context.WithValue(t.Context(), oauth2.HTTPClient, s.people)
	d, err := c.DeviceAuth(ctx)
	check(t, err)
	res, err := s.people.PostForm(s.issuer+"/device", url.Values{"user_code": {d.UserCode}, "username": {name}, "password": {password}, "action": {"allow"}})
	check(t, err)
	check(t, res.Body.Close())
	got, err := c.DeviceAccessToken(ctx, d)
	check(t, err)
	raw, _ := got.Extra("id_token").(string)
	return raw
}

// start runs the broker until the test ends.
func (s *site) start() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	path := write(s.t, s.dir, s.config)
	go func() { s.finished <- run(ctx, []string{"--config", path}, nil, nil, &s.log) }()
	return func() { cancel(); check(s.t, <-s.finished) }
}

// client calls the broker with a token, with a certificate, with both or neither.
func (s *site) client(token, role, name string) brokerv1connect.BrokerServiceClient {
	s.t.Helper()
	h, err := daemon.HTTPClientForPeople(filepath.Join(s.dir, pki.CAFile), daemon.RoleBroker)
	if role != "" {
		h, err = pki.Files(s.dir, role, name).HTTPClient(daemon.RoleBroker)
	}
	check(s.t, err)
	s.t.Cleanup(h.CloseIdleConnections)
	return brokerv1connect.NewBrokerServiceClient(h, "https://"+s.config.Listen, connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
			if token != "" {
				r.Header().Set("Authorization", "Bearer "+token)
			}
			return next(ctx, r)
		}
	})))
}

// failedCheck is the id of the check that a call was refused by.
func failedCheck(t *testing.T, err error) string {
	t.Helper()
	r, ok := refusal.Decode(err)
	if !ok || len(r.Checks) == 0 {
		t.Fatalf("want a refusal, got %v", err)
	}
	return r.Checks[0].ID
}

func TestPeopleAndPolicies(t *testing.T) {
	s := newSite(t)
	s.policies(5, "approvers", "ada", "cyd")
	stop := s.start()
	s.awaits(`"msg":"serving"`, 1)
	alice, olga := s.token("alice"), s.token("olga")
	list := func(c brokerv1connect.BrokerServiceClient) error {
		_, err := c.ListGrants(t.Context(), connect.NewRequest(&brokerv1.ListGrantsRequest{}))
		return err
	}
	create := func(c brokerv1connect.BrokerServiceClient, name string) error {
		_, err := c.CreateAsset(t.Context(), connect.NewRequest(&brokerv1.CreateAssetRequest{Name: name, Kind: brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS}))
		return err
	}

	check(t, list(s.client(alice, "", "")))
	check(t, create(s.client(olga, "", ""), "olgas"))
	check(t, create(s.client("", "owner", "alice"), "by-certificate"))
	got, err := s.client("", "agent", "node-1").GetAsset(t.Context(), connect.NewRequest(&brokerv1.GetAssetRequest{Name: "olgas"}))
	check(t, err)
	if got.Msg.GetAsset().GetOwner() != "olga" {
		t.Errorf("asset %v", got.Msg)
	}
	if id := failedCheck(t, create(s.client(alice, "", ""), "alices")); id != "access.denied" {
		t.Error("an approver made an asset:", id)
	}
	if err := list(s.client("", "", "")); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Error("nobody was answered:", err)
	}
	if id := failedCheck(t, list(s.client(alice, "owner", "alice"))); id != "caller.identity" {
		t.Error("two identities:", id)
	}
	parts := strings.Split(alice, ".")
	if id := failedCheck(t, list(s.client(parts[0]+"."+strings.Split(olga, ".")[1]+"."+parts[2], "", ""))); id != "token.signature" {
		t.Error("a forged token:", id)
	}
	if id := failedCheck(t, list(s.client("x.y.z", "agent", "node-1"))); id != "caller.identity" {
		t.Error("rubbish beside a certificate:", id)
	}

	hup := func(text string, n int) {
		t.Helper()
		check(t, syscall.Kill(os.Getpid(), syscall.SIGHUP))
		s.awaits(text, n)
	}
	// Another set takes effect for the next call: alice's group is no longer one.
	s.policies(6, "approvers-2", "bea", "cyd")
	hup("policy set in force", 2)
	if id := failedCheck(t, list(s.client(alice, "", ""))); id != "access.denied" {
		t.Error("a group that is gone counts:", id)
	}
	for i, bad := range []func(){
		func() { s.policies(5, "approvers", "ada", "cyd") },
		func() { s.policies(6, "approvers", "ada", "cyd") },
		func() { s.policies(7, "approvers", "ada") },
		func() {
			s.policies(7, "approvers", "ada", "cyd")
			check(t, os.WriteFile(filepath.Join(s.config.Access.Policies, "more.cedar"), []byte("x"), 0o600))
		},
		func() { check(t, os.RemoveAll(s.config.Access.Policies)) },
	} {
		bad()
		hup("policy set refused", i+1)
		if id := failedCheck(t, list(s.client(alice, "", ""))); id != "access.denied" {
			t.Errorf("bad set %d is in force: %s", i, id)
		}
	}
	stop()
	if s := s.log.String(); strings.Contains(s, alice) || strings.Contains(s, password) {
		t.Error("a secret is in the log")
	}
}

func TestStartRefusesPolicies(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*site)
		want   string
	}{
		"none":                {func(s *site) { check(s.t, os.RemoveAll(s.config.Access.Policies)) }, "no such file"},
		"under-signed":        {func(s *site) { s.policies(1, "approvers", "ada") }, "policy.threshold"},
		"unsigned":            {func(s *site) { s.policies(1, "approvers") }, "policy.threshold"},
		"no threshold":        {func(s *site) { s.config.Access.Threshold = 0 }, "policy.trust"},
		"a key that is none":  {func(s *site) { s.config.Access.Maintainers[0].Key = "x" }, "want one key"},
		"an issuer over http": {func(s *site) { s.config.Access.Issuers[0].URL = "http://127.0.0.1:1" }, "want an https URL"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, c := state(t)
			s := &site{t: t, dir: dir, config: c, keys: map[string]ssh.Signer{}, finished: make(chan error, 1)}
			s.config.Access = &Access{Policies: filepath.Join(dir, "policies"), Threshold: 2, Issuers: []identity.Configured{{Issuer: identity.Issuer{URL: "https://127.0.0.1:1", Audience: "x"}}}}
			for _, n := range []string{"ada", "bea"} {
				_, key, err := ed25519.GenerateKey(rand.Reader)
				check(t, err)
				s.keys[n], err = ssh.NewSignerFromKey(key)
				check(t, err)
				s.config.Access.Maintainers = append(s.config.Access.Maintainers, Maintainer{Name: n, Key: string(ssh.MarshalAuthorizedKey(s.keys[n].PublicKey()))})
			}
			s.policies(1, "approvers", "ada", "bea")
			tc.change(s)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err := run(ctx, []string{"--config", write(t, dir, s.config)}, nil, nil, &s.log)
			if err == nil || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
