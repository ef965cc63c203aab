package attestation

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
	"fmt"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/receipt"
	contract "github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/host"
)

const (
	// renewAfter is how long a result is shown before another one is had.
	renewAfter = receipt.ResultLifetime / 2
	// hurry bounds how often one is had for a store that refuses them.
	hurry = time.Second
	// attestTimeout bounds one run of the program that attests.
	attestTimeout = 20 * time.Second
	maxComplaint  = 4 << 10
)

// Attest gets a result for a request: by Program, or by a test.
type Attest func(ctx context.Context, r Request) (token string, err error)

// Program is the Attest that runs the program of cfg, if it has the configured
// checksum: the request on its standard input, the result on its output.
func Program(cfg host.Config) Attest {
	return func(ctx context.Context, r Request) (string, error) {
		in, err := json.Marshal(r) // #nosec G117 -- public keys
		if err != nil {
			return "", err
		}
		ctx, cancel := context.WithTimeout(ctx, attestTimeout)
		defer cancel()
		cmd, binary, err := host.Command(ctx, cfg)
		if err != nil {
			return "", err
		}
		defer binary.Close() //nolint:errcheck // a memory file
		out, complaint := &bounded{most: contract.MaxResult}, &bounded{most: maxComplaint}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, complaint
		cmd.WaitDelay = time.Second
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("%s: %w: %s", cfg.Path, errors.Join(err, ctx.Err()), bytes.TrimSpace(complaint.b))
		}
		return string(bytes.TrimSpace(out.b)), nil
	}
}

// bounded keeps the beginning of what is written to it.
type bounded struct {
	b    []byte
	most int
}

func (w *bounded) Write(p []byte) (int, error) {
	w.b = append(w.b, p[:min(len(p), w.most-len(w.b))]...)
	return len(p), nil
}

// Prover proves what a broker's machine is, by keys of its own that live as long as
// its process.
type Prover struct {
	attest    Attest
	now       func() time.Time
	session   *ecdsa.PrivateKey
	recipient hpke.PrivateKey
	der       []byte

	mu  sync.Mutex // guards had, and is held while a result is got
	had map[string]had
}

// had is a result, by the store that it is for.
type had struct {
	token string
	at    time.Time
}

var _ contract.Prover = (*Prover)(nil)

// NewProver makes the keys.
func NewProver(attest Attest, now func() time.Time) (*Prover, error) {
	if attest == nil || now == nil {
		return nil, errors.New("prover needs a way to attest and a clock")
	}
	session, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(&session.PublicKey)
	if err != nil {
		return nil, err
	}
	recipient, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		return nil, err
	}
	return &Prover{attest: attest, now: now, session: session, recipient: recipient, der: der, had: map[string]had{}}, nil
}

// Prove implements contract.Prover.
func (p *Prover) Prove(ctx context.Context, store string, message []byte, fresh bool) (string, []byte, error) {
	token, err := p.result(ctx, store, fresh)
	if err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256(message)
	signature, err := ecdsa.SignASN1(rand.Reader, p.session, sum[:])
	return token, signature, err
}

func (p *Prover) result(ctx context.Context, store string, fresh bool) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h, ok := p.had[store]
	if age := p.now().Sub(h.at); ok && age >= 0 && (age < renewAfter && !fresh || age < hurry) {
		return h.token, nil
	}
	token, err := p.attest(ctx, Request{Audience: Audience(store), RecipientKey: p.recipient.PublicKey().Bytes(), SessionKey: p.der})
	if err != nil {
		return "", err
	}
	p.had[store] = had{token, p.now()}
	return token, nil
}

// Open implements contract.Prover.
func (p *Prover) Open(s *contract.Sealed, info []byte) ([]byte, error) {
	return contract.Open(p.recipient, s, info)
}
