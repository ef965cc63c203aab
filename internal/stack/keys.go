package stack

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// secretSize is that of the verifier's nonce key, in bytes.
const secretSize = 32

func createSecret(path string) error { return keyfile.CreateSecret(path, secretSize) }

// keys makes what the verifier and the broker need to sign and to wrap. A key
// that is there stays: another one would make every asset and receipt useless.
func (s *starter) keys(context.Context) (string, error) {
	for _, k := range []struct {
		file   string
		create func(path string) error
	}{
		{s.path("verifier", "key.pem"), keyfile.CreateP384},
		{s.path("verifier", "nonce.key"), createSecret},
		{s.path("broker", "key.pem"), keyfile.CreateP384},
		{s.path("issuer", "key.pem"), keyfile.CreateP384},
		{s.path("broker", "owner-wrap.key"), keyfile.CreateHPKE},
		{s.path("broker", "log.key"), func(path string) error { return keyfile.CreateNote(path, translog.KeyName(BrokerID)) }},
	} {
		if _, err := os.Lstat(k.file); errors.Is(err, fs.ErrNotExist) {
			if err := k.create(k.file); err != nil {
				return "", err
			}
		} else if err != nil {
			return "", err
		}
	}
	if err := s.imageSigner(); err != nil {
		return "", err
	}
	for _, p := range []struct{ id, dir string }{{VerifierID, "verifier"}, {BrokerID, "broker"}} {
		if err := publish(p.id, s.path(p.dir, "key.pem"), s.path(p.dir, "jwks.json")); err != nil {
			return "", err
		}
	}
	if err := publishLog(s.path("broker", "log.key"), s.path("broker", logKeyFile)); err != nil {
		return "", err
	}
	return "verifier and broker", nil
}

// publish writes the public half of a signing key as a JSON Web Key Set.
func publish(id, keyFile, jwksFile string) error {
	key, err := keyfile.ReadP384(keyFile)
	if err != nil {
		return err
	}
	signer, err := receipt.NewSigner(id, key)
	if err != nil {
		return err
	}
	jwks, err := signer.JWKS()
	if err != nil {
		return err
	}
	return keyfile.Write(jwksFile, jwks)
}

// logKeyFile has the public key of the evidence log's checkpoints, in the broker's
// folder.
const logKeyFile = "log.vkey"

// publishLog writes the public half of the log's key.
func publishLog(keyFile, publicFile string) error {
	key, err := keyfile.ReadNote(keyFile)
	if err != nil {
		return err
	}
	public, err := translog.PublicKey(key)
	if err != nil {
		return err
	}
	return keyfile.Write(publicFile, []byte(public+"\n"))
}
