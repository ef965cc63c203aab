package stack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

const (
	// keyStoreProgram is the plugin of the stack's own key store, and makes its
	// file.
	keyStoreProgram = "coffer-keystore-local"
	// ownKeyStore is the name of that store, and ownKey the key in it.
	ownKeyStore = "local"
	ownKey      = "default"
	// maxKeyStores bounds the key stores that a stack is given.
	maxKeyStores = 32
)

// brokerKeyStore is a key store of the broker's configuration.
type brokerKeyStore struct {
	Name   string      `json:"name"`
	Plugin agentPlugin `json:"plugin"`
	Key    string      `json:"key,omitempty"`
	Env    []string    `json:"env,omitempty"`
}

// localKeyStoreConfig is the configuration of keyStoreProgram.
type localKeyStoreConfig struct {
	Store          string `json:"store"`
	File           string `json:"file"`
	PassphraseFile string `json:"passphraseFile"`
}

// kekFile is the key-encryption key of a stack that was made without key stores.
// One that has it keeps it: data keys are wrapped under it.
func (l Layout) kekFile() string { return l.path("broker", "kek.key") }

// database is the broker's.
func (l Layout) database() string { return l.path("broker", "broker.db") }

func (l Layout) keyStore(name string) string { return l.path("broker", "keystore", name) }

// givenKeyStores is the folder of the key stores that the stack is given: each
// *.json in it is one of the broker's.
func (l Layout) givenKeyStores() string { return l.path("keystores") }

func there(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// ownStore makes the stack's own key store, unless it is there or the stack has a
// key-encryption key.
func (s *starter) ownStore(ctx context.Context) (string, error) {
	kek, err := there(s.kekFile())
	if err != nil || kek {
		return s.kekFile(), err
	}
	made, err := there(s.keyStore("keys.json"))
	if err != nil {
		return "", err
	}
	passphrase := s.keyStore("passphrase")
	locked, err := there(passphrase)
	if err != nil {
		return "", err
	}
	used, err := there(s.database())
	switch {
	case err != nil:
		return "", err
	case !made && used:
		return "", fmt.Errorf("%s is gone, and without it every sealed file of this stack: put it back, or begin anew with `coffer down --dir %s --purge`", s.keyStore("keys.json"), s.Dir)
	case made && !locked:
		return "", fmt.Errorf("%s is gone, and without it every sealed file of this stack: put it back", passphrase)
	case !locked:
		if err := os.MkdirAll(filepath.Dir(passphrase), 0o700); err != nil {
			return "", err
		}
		if err := keyfile.Write(passphrase, []byte(rand.Text()+"\n")); err != nil {
			return "", err
		}
	}
	config := localKeyStoreConfig{Store: ownKeyStore, File: s.keyStore("keys.json"), PassphraseFile: passphrase}
	if err := writeJSON(s.config(keyStoreProgram), config); err != nil {
		return "", err
	}
	if made {
		return ownKeyStore, nil
	}
	cmd := exec.CommandContext(ctx, s.tools.our(keyStoreProgram), "--config", s.config(keyStoreProgram), "create", ownKey) // #nosec G204 -- the operator names the folder
	cmd.Env = s.env
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make key store %s: %w: %s", config.File, err, strings.TrimSpace(string(out)))
	}
	return ownKeyStore, nil
}

// setKeyStores gives c the stack's own key store, or its key-encryption key, and
// the key stores in the folder of given ones. Each plugin carries the stack's
// mark, so that `down` finds one whose broker was killed.
func (l Layout) setKeyStores(t tools, c *brokerConfig) error {
	c.KEKFile, c.DefaultKeyStore, c.KeyStores = "", "", nil
	kek, err := there(l.kekFile())
	if err != nil {
		return err
	}
	if kek {
		c.KEKFile = l.kekFile()
	} else {
		program := t.our(keyStoreProgram)
		sum, err := fileSHA256(program)
		if err != nil {
			return err
		}
		c.DefaultKeyStore = ownKeyStore
		c.KeyStores = []brokerKeyStore{{Name: ownKeyStore, Plugin: agentPlugin{Path: program, SHA256: sum, Args: []string{"--config", l.config(keyStoreProgram)}}}}
	}
	given, err := l.readKeyStores()
	if err != nil {
		return err
	}
	c.KeyStores = append(c.KeyStores, given...)
	for i := range c.KeyStores {
		k := &c.KeyStores[i]
		k.Env = append(k.Env, stackVariable+"="+l.ID)
	}
	return nil
}

// readKeyStores looks whether the broker would take what is given, as far as it
// can: a running broker is not stopped for one that would not start.
func (l Layout) readKeyStores() ([]brokerKeyStore, error) {
	files, err := filepath.Glob(filepath.Join(l.givenKeyStores(), "*.json"))
	if err != nil {
		return nil, err
	}
	if len(files) > maxKeyStores {
		return nil, fmt.Errorf("%s has %d key stores: want at most %d", l.givenKeyStores(), len(files), maxKeyStores)
	}
	var out []brokerKeyStore
	taken := map[string]bool{ownKeyStore: true}
	for _, f := range files {
		fi, err := os.Stat(f)
		if err != nil {
			return nil, err
		}
		if fi.Mode().Perm()&0o022 != 0 {
			return nil, fmt.Errorf("key store %s has mode %v, so that others could make the broker run anything: `chmod go-w` it if nobody has written to it yet", f, fi.Mode().Perm())
		}
		var k brokerKeyStore
		if err := readJSON(f, &k); err != nil {
			return nil, err
		}
		if taken[k.Name] {
			return nil, fmt.Errorf("key store %s: the name %.80q is taken", f, k.Name)
		}
		taken[k.Name] = true
		sum, err := fileSHA256(k.Plugin.Path)
		if err != nil {
			return nil, fmt.Errorf("key store %s: %w", f, err)
		}
		if sum != k.Plugin.SHA256 {
			return nil, fmt.Errorf("key store %s: the checksum of %s is %s, and not %.80q", f, k.Plugin.Path, sum, k.Plugin.SHA256)
		}
		out = append(out, k)
	}
	return out, nil
}

// checkKeyStores finds given key stores that the broker would not take.
func (l Layout) checkKeyStores() Finding {
	given, err := l.readKeyStores()
	if err != nil {
		return Finding{Name: "key stores", Outcome: Fail, Found: err.Error(), Advice: "repair what is named, or take it out of " + l.givenKeyStores()}
	}
	names := []string{ownKeyStore}
	if kek, err := there(l.kekFile()); err == nil && kek {
		names[0] = l.kekFile()
	}
	for _, k := range given {
		names = append(names, k.Name)
	}
	return Finding{Name: "key stores", Outcome: OK, Found: strings.Join(names, ", ")}
}

// takeKeyStores writes the broker's configuration anew with the key stores and the
// witnesses that the stack has.
func (l Layout) takeKeyStores(t tools) error {
	var c brokerConfig
	if err := readJSON(l.config(brokerName), &c); err != nil {
		return err
	}
	if err := l.setKeyStores(t, &c); err != nil {
		return err
	}
	if err := l.setWitnesses(&c); err != nil {
		return err
	}
	return writeJSON(l.config(brokerName), c)
}
