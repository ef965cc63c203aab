package serve_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// brokerFile is what a broker is made of after a restart, and one request to it.
type brokerFile struct {
	DB, Verifier string
	Key, JWKS    []byte
	Ask          broker.Ask
}

const (
	killVar = "COFFER_TEST_KILL_FILE"
	atVar   = "COFFER_TEST_KILL_AT"
)

// killer is a store that kills its process around one commit.
type killer struct {
	broker.Store
	at string
}

func (k killer) Update(ctx context.Context, f func(context.Context, broker.Tx) error) error {
	err := k.Store.Update(ctx, func(ctx context.Context, tx broker.Tx) error {
		err := f(ctx, tx)
		if k.at == "before the commit" {
			kill()
		}
		return err
	})
	if k.at == "after the commit" && err == nil {
		kill()
	}
	return err
}

func kill() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

func (f brokerFile) open(t *testing.T, owner hpke.PrivateKey, wrap func(broker.Store) broker.Store) *broker.Broker {
	t.Helper()
	key, err := x509.ParseECPrivateKey(f.Key)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner("broker.test", key)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := receipt.ParseKeys(f.Verifier, f.JWKS)
	if err != nil {
		t.Fatal(err)
	}
	kms, err := broker.NewLocalKeys(make([]byte, broker.KEKSize))
	if err != nil {
		t.Fatal(err)
	}
	b, err := broker.New(broker.Config{
		ID: "broker.test", Signer: signer, OwnerKey: owner, Keys: kms, Store: wrap(open(t, f.DB)), Access: broker.Roles{}, Verifiers: []receipt.Keys{verifier}, Now: time.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestKilledAroundTheCommit kills a broker with SIGKILL while it releases a key,
// and asks the next one the same.
func TestKilledAroundTheCommit(t *testing.T) {
	node, alice := broker.Actor{Role: "agent", Name: "node-1"}, broker.Actor{Role: "owner", Name: "alice"}
	if path := os.Getenv(killVar); path != "" {
		var f brokerFile
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &f); err != nil {
			t.Fatal(err)
		}
		owner, err := hpke.MLKEM768X25519().GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.open(t, owner, func(s broker.Store) broker.Store { return killer{s, os.Getenv(atVar)} }).Release(t.Context(), node, f.Ask)
		t.Fatalf("still there: %v", err)
	}
	for at, committed := range map[string]int{"before the commit": 0, "after the commit": 1} {
		t.Run(at, func(t *testing.T) {
			dir := t.TempDir()
			key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.MarshalECPrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			verifier, _ := signer(t, "verifier.test")
			jwks, err := verifier.JWKS()
			if err != nil {
				t.Fatal(err)
			}
			owner, err := hpke.MLKEM768X25519().GenerateKey()
			if err != nil {
				t.Fatal(err)
			}
			f := brokerFile{DB: filepath.Join(dir, "broker.db"), Key: der, JWKS: jwks, Verifier: "verifier.test"}
			b := f.open(t, owner, func(s broker.Store) broker.Store { return s })
			digest := plan.Sum([]byte("plan"))
			if _, err := b.CreateAsset(t.Context(), alice, broker.NewAsset{Name: "ckpt", Kind: broker.KindCheckpoints}); err != nil {
				t.Fatal(err)
			}
			g, err := b.CreateGrant(t.Context(), alice, broker.NewGrant{Assets: []string{"ckpt"}, Plan: digest, NotAfter: time.Now().Add(time.Hour), MaxReleases: 1})
			if err != nil {
				t.Fatal(err)
			}
			recipient, err := hpke.MLKEM768X25519().GenerateKey()
			if err != nil {
				t.Fatal(err)
			}
			f.Ask = askFor(t, verifier, recipient, g.ID, digest)
			enc, err := json.Marshal(f)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "broker.json")
			if err := os.WriteFile(path, enc, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledAroundTheCommit$")
			cmd.Env = append(os.Environ(), killVar+"="+path, atVar+"="+at)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("%v: %s", err, out)
			}

			next := f.open(t, owner, func(s broker.Store) broker.Store { return s })
			if v, err := next.GrantAsIs(t.Context(), g.ID); err != nil || v.Used != committed {
				t.Errorf("%d uses, %v; want %d", v.Used, err, committed)
			}
			first, err := next.Release(t.Context(), node, f.Ask)
			if err != nil {
				t.Fatal(err)
			}
			second, err := next.Release(t.Context(), node, f.Ask)
			if err != nil || !bytes.Equal(first.Enc, second.Enc) || !bytes.Equal(first.Ciphertext, second.Ciphertext) {
				t.Errorf("two retries got different ciphertexts, %v", err)
			}
			if v, err := next.GrantAsIs(t.Context(), g.ID); err != nil || v.Used != 1 {
				t.Errorf("counted %d times, %v", v.Used, err)
			}
			if l, err := next.Entries(t.Context(), alice, "job-1"); err != nil || len(l) != 1 {
				t.Errorf("%d log entries, %v", len(l), err)
			}
			if _, err := next.CheckLog(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func askFor(t *testing.T, verifier *receipt.Signer, recipient hpke.PrivateKey, grant string, digest plan.Digest) broker.Ask {
	t.Helper()
	session, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&session.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := receipt.SessionJWK(der)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token, err := verifier.Sign(receipt.TypeResult, receipt.Result{
		Profile: receipt.Profile, Issuer: "verifier.test", Audience: "broker.test", ID: "r1", Nonce: "n1", IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Submods:      map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}},
		Confirmation: receipt.Confirmation{JWK: jwk, Recipient: recipient.PublicKey().Bytes()},
		JobID:        "job-1", PlanDigest: digest, SandboxDigest: plan.Sum(nil), EvidenceDigest: plan.Sum(nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	request, err := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker.test", Grant: grant, Attempt: 1, ResultID: "r1", Asset: "ckpt"}.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(request)
	sig, err := ecdsa.SignASN1(rand.Reader, session, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return broker.Ask{Result: token, Request: request, Signature: sig}
}
