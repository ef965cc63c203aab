// Package vault is a key store over the transit engine of HashiCorp Vault or
// OpenBao. Data keys are encrypted and decrypted by the server, under keys that
// stay there.
//
// Trusted: the server, by the certificate authority configured. Checked: that a
// key which data keys are wrapped under cannot be exported or backed up in the
// clear, as the server says, and that a wrapped key is of the key, the version
// and the associated data that it is opened for. Not checked: whether the server
// tells the truth. Data keys pass through this process's memory.
//
// A derived key gets the associated data as its context, and is rewrapped by the
// server; any other gets it as associated_data, which transit/rewrap does not
// take, so that Rewrap decrypts and encrypts.
package vault

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

const (
	// requestTimeout bounds one request, and callTimeout one call with all of its
	// requests: less than the host waits, so that a slow server is not taken for a
	// plugin that hangs.
	requestTimeout = 8 * time.Second
	callTimeout    = 20 * time.Second
	// maxAnswer bounds one answer, in bytes.
	maxAnswer = 64 << 10
	// renewalPause is how long a failed renewal waits for the next, and the
	// shortest pause between two.
	renewalPause = 30 * time.Second

	associatedLabel = "coffer/v1 transit key store\x00"
)

// keyName is what transit takes for a key's name, without what paths mean.
var keyName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$`)

// Config says which keys of which server.
type Config struct {
	// Store is the store's name.
	Store string
	// Address is the server's, https.
	Address string
	// CAFile holds the authorities, PEM, of the server's certificate. Empty means
	// the system's.
	CAFile string
	// Namespace is that of Vault Enterprise or OpenBao, if any.
	Namespace string
	// Mount is where the transit engine is, usually transit.
	Mount string
	// Token returns the token as it is now: it is asked again when the server
	// takes the one before no longer.
	Token func() (string, error)
	// Keys are the names of the keys on offer; the first is the default.
	Keys []string
	Log  *slog.Logger
}

// Store is a key store over one transit engine.
type Store struct {
	cfg    Config
	end    context.CancelFunc
	ended  chan struct{}
	client *api.Client

	// mu makes one change of the token at a time.
	mu sync.Mutex
}

var _ keystore.Store = (*Store)(nil)

// Open makes a client and keeps its token renewed until Close, or until ctx ends.
// It does not wait for the server.
func Open(ctx context.Context, c Config) (*Store, error) {
	if err := keystore.CheckName("store's name", c.Store); err != nil {
		return nil, err
	}
	u, err := url.Parse(c.Address)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("transit key store: address %q: want https://HOST", c.Address)
	case !keyName.MatchString(c.Mount):
		return nil, fmt.Errorf("transit key store: mount %q: want a name", c.Mount)
	case c.Token == nil || c.Log == nil:
		return nil, errors.New("transit key store: no token or no log")
	case len(c.Keys) == 0 || len(c.Keys) > keystore.MaxKeys:
		return nil, fmt.Errorf("transit key store: %d keys: want 1 to %d", len(c.Keys), keystore.MaxKeys)
	}
	for i, k := range c.Keys {
		if !keyName.MatchString(k) || len(k) > keystore.MaxName || slices.Contains(c.Keys[:i], k) {
			return nil, fmt.Errorf("transit key store: key %q is no name, or is named twice", k)
		}
	}
	config := api.DefaultConfig()
	if config.Error != nil {
		return nil, fmt.Errorf("transit key store: %w", config.Error)
	}
	config.Address, config.Timeout, config.MaxRetries, config.DisableRedirects = c.Address, requestTimeout, 1, true
	config.MinRetryWait, config.MaxRetryWait = 50*time.Millisecond, 200*time.Millisecond
	if err := config.ConfigureTLS(&api.TLSConfig{CACert: c.CAFile}); err != nil {
		return nil, fmt.Errorf("transit key store: certificate authorities %s: %w", c.CAFile, err)
	}
	config.HttpClient.Transport = limited{config.HttpClient.Transport}
	client, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("transit key store: %w", err)
	}
	token, err := c.Token()
	if err != nil {
		return nil, fmt.Errorf("transit key store: %w", err)
	}
	client.SetToken(token)
	if c.Namespace != "" {
		client.SetNamespace(c.Namespace)
	}
	ctx, end := context.WithCancel(ctx)
	s := &Store{cfg: c, client: client, end: end, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		s.renew(ctx)
	}()
	return s, nil
}

// Close ends the renewals. The token stays: it is not the store's.
func (s *Store) Close() error {
	s.end()
	<-s.ended
	return nil
}

// limited bounds answers.
type limited struct{ http.RoundTripper }

func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// renew keeps the token alive: at half of its time each.
func (s *Store) renew(ctx context.Context) {
	for {
		wait := renewalPause
		secret, err := s.client.Auth().Token().RenewSelfWithContext(ctx, 0)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			// A token that cannot be renewed may be good, and another may be there.
			s.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "token was not renewed", slog.Any("error", err))
			s.reload()
		case secret != nil && secret.Auth != nil:
			wait = max(time.Duration(secret.Auth.LeaseDuration)*time.Second/2, time.Second)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// reload takes the token as it is now, and reports whether it is another.
func (s *Store) reload() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	token, err := s.cfg.Token()
	if err != nil || token == s.client.Token() {
		return false
	}
	s.client.SetToken(token)
	return true
}

// ask sends one request, and again if the server refused the token and there is
// another by now.
func (s *Store) ask(ctx context.Context, read bool, path, key string, body map[string]any) (*api.Secret, error) {
	full := s.cfg.Mount + "/" + path + "/" + key
	for again := false; ; again = true {
		used := s.client.Token()
		var secret *api.Secret
		var err error
		if read {
			secret, err = s.client.Logical().ReadWithContext(ctx, full)
		} else {
			secret, err = s.client.Logical().WriteWithContext(ctx, full, body)
		}
		if again || code(err) != http.StatusForbidden || !s.reload() && used == s.client.Token() {
			return secret, err
		}
	}
}

// code returns the status of an answer that is an error, 0 if there was none.
func code(err error) int {
	var r *api.ResponseError
	if errors.As(err, &r) {
		return r.StatusCode
	}
	return 0
}

// key is what the server says of a key.
type key struct {
	Type          string `json:"type"`
	Derived       bool   `json:"derived"`
	Convergent    bool   `json:"convergent_encryption"`
	Exportable    bool   `json:"exportable"`
	Backup        bool   `json:"allow_plaintext_backup"`
	Latest        uint32 `json:"latest_version"`
	MinDecryption uint32 `json:"min_decryption_version"`
	SoftDeleted   bool   `json:"soft_deleted"`
}

// look asks the server for a key. One that is not there any more is disabled.
func (s *Store) look(ctx context.Context, keyID string) (*key, error) {
	if !slices.Contains(s.cfg.Keys, keyID) {
		return nil, fmt.Errorf("%w: key %s is not among those of this store", keystore.ErrMismatch, keyID)
	}
	secret, err := s.ask(ctx, true, "keys", keyID, nil)
	if err != nil {
		return nil, s.passing(ctx, keyID, err)
	}
	if secret == nil || secret.Data == nil {
		return nil, fmt.Errorf("%w: the server has no key %s", keystore.ErrDisabled, keyID)
	}
	b, err := json.Marshal(secret.Data)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", keyID, err)
	}
	k := &key{}
	if err := json.Unmarshal(b, k); err != nil {
		return nil, fmt.Errorf("key %s: answer: %w", keyID, err)
	}
	if k.SoftDeleted {
		return nil, fmt.Errorf("%w: %s is deleted", keystore.ErrDisabled, keyID)
	}
	if k.Latest == 0 {
		return nil, fmt.Errorf("key %s: answer names no version", keyID)
	}
	return k, nil
}

// passing sorts an error that says nothing about a wrapped key.
func (s *Store) passing(ctx context.Context, keyID string, err error) error {
	if code(err) == http.StatusForbidden {
		// The token is good, so it is the key that it may not use.
		if _, self := s.client.Auth().Token().LookupSelfWithContext(ctx); self == nil {
			return fmt.Errorf("%w: %s: the server denies its use: %w", keystore.ErrDisabled, keyID, err)
		}
		return fmt.Errorf("%w: the server takes the token no longer: %w", keystore.ErrBackend, err)
	}
	return fmt.Errorf("%w: %w", keystore.ErrBackend, err)
}

// refusal tells why the server did not decrypt: by the key as it is, not by the
// text of the answer.
func (s *Store) refusal(ctx context.Context, w *keystore.Wrapped, err error) error {
	if c := code(err); c != http.StatusBadRequest && c != http.StatusNotFound {
		return s.passing(ctx, w.Key, err)
	}
	k, lookErr := s.look(ctx, w.Key)
	switch {
	case lookErr != nil:
		return lookErr
	case w.Version < k.MinDecryption:
		return fmt.Errorf("%w: version %d of %s: decryption begins at %d", keystore.ErrDisabled, w.Version, w.Key, k.MinDecryption)
	}
	return fmt.Errorf("%w under %s: %w", keystore.ErrMismatch, w.Key, err)
}

// usable says whether data keys may be wrapped under k.
func (k *key) usable(keyID string) error {
	switch {
	case k.Exportable || k.Backup:
		return fmt.Errorf("key %s can leave the server: it is exportable, or may be backed up in the clear", keyID)
	case k.Convergent:
		return fmt.Errorf("key %s has convergent encryption, which tells equal data keys", keyID)
	case k.Type != "aes256-gcm96" && k.Type != "chacha20-poly1305":
		return fmt.Errorf("key %s is of type %q: want aes256-gcm96 or chacha20-poly1305", keyID, k.Type)
	}
	return nil
}

// Info asks the server for each key.
func (s *Store) Info(ctx context.Context) (*keystore.Info, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	i := &keystore.Info{Name: s.cfg.Store, Kind: keystore.KindVault, RewrapsInside: true}
	for _, id := range s.cfg.Keys {
		k, err := s.look(ctx, id)
		if errors.Is(err, keystore.ErrDisabled) {
			i.Keys = append(i.Keys, keystore.Key{ID: id, Disabled: true})
			continue
		}
		if err != nil {
			return nil, err
		}
		i.MaterialCanLeave = i.MaterialCanLeave || k.Exportable || k.Backup
		i.RewrapsInside = i.RewrapsInside && k.Derived
		i.Keys = append(i.Keys, keystore.Key{ID: id, Newest: k.Latest, Oldest: min(max(k.MinDecryption, 1), k.Latest)})
	}
	return i, nil
}

// Wrap asks the server to encrypt key.
func (s *Store) Wrap(ctx context.Context, keyID string, key *keystore.DataKey, associated []byte) (*keystore.Wrapped, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// Looked at first: to encrypt under a key that is not there makes one, if the
	// token may.
	k, err := s.look(ctx, keyID)
	if err != nil {
		return nil, err
	}
	if err := k.usable(keyID); err != nil {
		return nil, err
	}
	body := k.bound(keyID, associated)
	body["plaintext"] = base64.StdEncoding.EncodeToString(key.Reveal())
	secret, err := s.ask(ctx, false, "encrypt", keyID, body)
	if err != nil {
		return nil, s.passing(ctx, keyID, err)
	}
	return wrapped(keyID, secret)
}

// Unwrap asks the server to decrypt a data key.
func (s *Store) Unwrap(ctx context.Context, w *keystore.Wrapped, associated []byte) (*keystore.DataKey, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := check(w); err != nil {
		return nil, err
	}
	// Looked at each time, not remembered: what its owner changes counts at once.
	k, err := s.look(ctx, w.Key)
	if err != nil {
		return nil, err
	}
	return s.unwrap(ctx, k, w, associated)
}

func (s *Store) unwrap(ctx context.Context, k *key, w *keystore.Wrapped, associated []byte) (*keystore.DataKey, error) {
	body := k.bound(w.Key, associated)
	body["ciphertext"] = string(w.Ciphertext)
	secret, err := s.ask(ctx, false, "decrypt", w.Key, body)
	if err != nil {
		return nil, s.refusal(ctx, w, err)
	}
	text, ok := field(secret, "plaintext")
	if !ok {
		return nil, fmt.Errorf("%w: unwrap under %s: the answer has no plaintext", keystore.ErrBackend, w.Key)
	}
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%w: unwrap under %s: the answer is not base64", keystore.ErrBackend, w.Key)
	}
	return keystore.NewDataKey(b)
}

// Rewrap asks the server for the same data key under the newest version.
func (s *Store) Rewrap(ctx context.Context, w *keystore.Wrapped, associated []byte) (*keystore.Wrapped, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := check(w); err != nil {
		return nil, err
	}
	k, err := s.look(ctx, w.Key)
	if err != nil {
		return nil, err
	}
	if !k.Derived {
		key, err := s.unwrap(ctx, k, w, associated)
		if err != nil {
			return nil, err
		}
		defer key.Destroy()
		return s.Wrap(ctx, w.Key, key, associated)
	}
	if err := k.usable(w.Key); err != nil {
		return nil, err
	}
	body := k.bound(w.Key, associated)
	body["ciphertext"] = string(w.Ciphertext)
	secret, err := s.ask(ctx, false, "rewrap", w.Key, body)
	if err != nil {
		return nil, s.refusal(ctx, w, err)
	}
	return wrapped(w.Key, secret)
}

// Health asks the server for the first key.
func (s *Store) Health(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := s.look(ctx, s.cfg.Keys[0])
	if errors.Is(err, keystore.ErrDisabled) {
		return nil // it is the server that is asked after
	}
	return err
}

// bound starts a request with what ties it to the associated data.
func (k *key) bound(keyID string, associated []byte) map[string]any {
	h := sha256.New()
	h.Write([]byte(associatedLabel))
	h.Write([]byte{byte(len(keyID))})
	h.Write([]byte(keyID))
	h.Write(associated)
	field := "associated_data"
	if k.Derived {
		field = "context"
	}
	return map[string]any{field: base64.StdEncoding.EncodeToString(h.Sum(nil))}
}

func field(secret *api.Secret, name string) (string, bool) {
	if secret == nil {
		return "", false
	}
	text, ok := secret.Data[name].(string)
	return text, ok
}

func wrapped(keyID string, secret *api.Secret) (*keystore.Wrapped, error) {
	text, ok := field(secret, "ciphertext")
	if !ok {
		return nil, fmt.Errorf("%w: wrap under %s: the answer has no ciphertext", keystore.ErrBackend, keyID)
	}
	version, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("wrap under %s: answer: %w", keyID, err)
	}
	return &keystore.Wrapped{Key: keyID, Version: version, Ciphertext: []byte(text)}, nil
}

// check holds a wrapped key against what the server made: it reads some others
// as the same, as base64 with line breaks in it.
func check(w *keystore.Wrapped) error {
	version, err := parse(string(w.Ciphertext))
	if err == nil && version != w.Version {
		err = fmt.Errorf("it is of version %d, not %d", version, w.Version)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", keystore.ErrMismatch, err)
	}
	return nil
}

// parse returns the version of a ciphertext: vault:v1:BASE64.
func parse(text string) (uint32, error) {
	bad := errors.New("not a ciphertext of the transit engine")
	rest, ok := strings.CutPrefix(text, "vault:v")
	number, payload, found := strings.Cut(rest, ":")
	if !ok || !found {
		return 0, bad
	}
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != number {
		return 0, bad
	}
	b, err := base64.StdEncoding.Strict().DecodeString(payload)
	if err != nil || len(b) == 0 || base64.StdEncoding.EncodeToString(b) != payload {
		return 0, bad
	}
	return uint32(n), nil
}
