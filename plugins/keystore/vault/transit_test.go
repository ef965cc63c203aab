package vault_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// transit is a simulated server: it answers the part of Vault's API that the
// store uses, as Vault 1.21's builtin/logical/transit and its documentation say,
// with the same bytes. It is not Vault, and has been compared with none.
type transit struct {
	*httptest.Server

	mu       sync.Mutex
	token    string
	ttl      int
	denied   map[string]bool
	keys     map[string]*transitKey
	renewals int
	asked    []string
	// break answers instead, if it is set.
	broken func(http.ResponseWriter, *http.Request) bool
}

type transitKey struct {
	versions      [][]byte
	derived       bool
	exportable    bool
	convergent    bool
	kind          string
	softDeleted   bool
	minDecryption int
}

func serve(t *testing.T) *transit {
	t.Helper()
	s := &transit{token: "s.first", ttl: 3600, keys: map[string]*transitKey{}, denied: map[string]bool{}}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.answer))
	t.Cleanup(s.Close)
	return s
}

func newKey(derived bool) *transitKey {
	k := &transitKey{derived: derived, kind: "aes256-gcm96", minDecryption: 1}
	k.rotate()
	return k
}

func (k *transitKey) rotate() {
	b := make([]byte, 32)
	_, _ = rand.Read(b)
	k.versions = append(k.versions, b)
}

// change changes the server between two requests.
func (s *transit) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *transit) ca(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func fail(w http.ResponseWriter, status int, text string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []string{text}})
}

func data(w http.ResponseWriter, d map[string]any) {
	_ = json.NewEncoder(w).Encode(map[string]any{"data": d})
}

func (s *transit) answer(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	s.asked = append(s.asked, path)
	if s.broken != nil && s.broken(w, r) {
		return
	}
	if r.Header.Get("X-Vault-Token") != s.token {
		fail(w, http.StatusForbidden, "permission denied")
		return
	}
	switch path {
	case "auth/token/renew-self":
		s.renewals++
		_ = json.NewEncoder(w).Encode(map[string]any{"auth": map[string]any{"client_token": s.token, "lease_duration": s.ttl, "renewable": true}})
		return
	case "auth/token/lookup-self":
		data(w, map[string]any{"ttl": s.ttl})
		return
	}
	rest, ok := strings.CutPrefix(path, "transit/")
	op, name, found := strings.Cut(rest, "/")
	if !ok || !found {
		fail(w, http.StatusNotFound, "no handler for route")
		return
	}
	if s.denied[name] {
		fail(w, http.StatusForbidden, "1 error occurred:\n\t* permission denied\n\n")
		return
	}
	k := s.keys[name]
	if op == "keys" {
		if k == nil {
			fail(w, http.StatusNotFound, "")
			return
		}
		data(w, map[string]any{
			"name": name, "type": k.kind, "derived": k.derived, "exportable": k.exportable, "convergent_encryption": k.convergent,
			"latest_version": len(k.versions), "min_decryption_version": k.minDecryption, "min_encryption_version": 0, "soft_deleted": k.softDeleted,
		})
		return
	}
	var body struct {
		Plaintext      string `json:"plaintext"`
		Ciphertext     string `json:"ciphertext"`
		Context        string `json:"context"`
		AssociatedData string `json:"associated_data"`
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	if k == nil && op == "encrypt" {
		// With the capability "create", Vault makes the key.
		k = newKey(body.Context != "")
		s.keys[name] = k
	}
	if k == nil {
		fail(w, http.StatusBadRequest, "encryption key not found")
		return
	}
	context, err := base64.StdEncoding.DecodeString(body.Context)
	if err != nil {
		fail(w, http.StatusBadRequest, "failed to base64-decode context")
		return
	}
	ad, err := base64.StdEncoding.DecodeString(body.AssociatedData)
	if err != nil {
		fail(w, http.StatusBadRequest, "failed to base64-decode associated data")
		return
	}
	if k.derived && len(context) == 0 {
		fail(w, http.StatusBadRequest, "missing 'context' for key derivation; the key was created using a derived key, which means additional, per-request information must be included in order to perform operations with the key")
		return
	}
	if op == "rewrap" {
		ad = nil // it takes none
	}
	plain, err := base64.StdEncoding.DecodeString(body.Plaintext)
	if err != nil {
		fail(w, http.StatusBadRequest, "failed to base64-decode plaintext")
		return
	}
	if op == "decrypt" || op == "rewrap" {
		if plain, err = k.open(body.Ciphertext, context, ad); err != nil {
			fail(w, http.StatusBadRequest, err.Error())
			return
		}
	}
	switch op {
	case "decrypt":
		data(w, map[string]any{"plaintext": base64.StdEncoding.EncodeToString(plain)})
	case "encrypt", "rewrap":
		data(w, map[string]any{"ciphertext": k.seal(plain, context, ad), "key_version": len(k.versions)})
	default:
		fail(w, http.StatusNotFound, "no handler for route")
	}
}

func (k *transitKey) aead(version int, context []byte) cipher.AEAD {
	key := k.versions[version-1]
	if k.derived {
		var err error
		if key, err = hkdf.Key(sha256.New, key, nil, string(context), 32); err != nil {
			panic(err)
		}
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	a, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return a
}

func (k *transitKey) seal(plain, context, ad []byte) string {
	a := k.aead(len(k.versions), context)
	nonce := make([]byte, a.NonceSize())
	_, _ = rand.Read(nonce)
	return fmt.Sprintf("vault:v%d:%s", len(k.versions), base64.StdEncoding.EncodeToString(a.Seal(nonce, nonce, plain, ad)))
}

func (k *transitKey) open(text string, context, ad []byte) ([]byte, error) {
	rest, ok := strings.CutPrefix(text, "vault:v")
	number, payload, found := strings.Cut(rest, ":")
	if !ok || !found {
		return nil, fmt.Errorf("invalid ciphertext: no prefix")
	}
	version, err := strconv.Atoi(number)
	if err != nil {
		return nil, fmt.Errorf("invalid ciphertext: version number could not be decoded")
	}
	if version < 1 || version > len(k.versions) {
		return nil, fmt.Errorf("invalid ciphertext: version is too new")
	}
	if version < k.minDecryption {
		return nil, fmt.Errorf("ciphertext or signature version is disallowed by policy (too old)")
	}
	b, err := base64.StdEncoding.DecodeString(payload)
	if err != nil {
		return nil, fmt.Errorf("invalid ciphertext: could not decode base64")
	}
	a := k.aead(version, context)
	if len(b) < a.NonceSize() {
		return nil, fmt.Errorf("invalid ciphertext length")
	}
	plain, err := a.Open(nil, b[:a.NonceSize()], b[a.NonceSize():], ad)
	if err != nil {
		return nil, fmt.Errorf("cipher: message authentication failed")
	}
	return plain, nil
}

// eventually waits for what another goroutine does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("not seen: %s", what)
}
