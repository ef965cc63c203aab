// Package pkcs11 is a key store over a PKCS#11 token: a hardware security module,
// or SoftHSM. Data keys are encrypted and decrypted inside the token, under AES
// keys that it does not hand out.
//
// Trusted: the token and its module, a C library in this process. Checked: that a
// key is one that the token says it never hands out (sensitive, not extractable),
// and that a wrapped key is of the key, the version and the associated data that
// it is opened for. Not checked: whether the token tells the truth, and a key's
// CKA_END_DATE. Data keys pass through this process's memory.
//
// A key's id is its CKA_LABEL, and its version the number in its CKA_ID, big
// endian. Its owner disables it by setting CKA_DECRYPT and CKA_ENCRYPT to false,
// or by removing it.
package pkcs11

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

const (
	// maxSessions bounds the sessions that are open with the token.
	maxSessions = 8
	// maxObjects bounds the versions of one key.
	maxObjects = 256
	keySize    = 32
	nonceSize  = 12
	tagSize    = 16

	associatedLabel = "coffer/v1 pkcs11 key store\x00"
)

// Config says which keys of which token.
type Config struct {
	// Store is the store's name.
	Store string
	// Module is the path of the token's library.
	Module string
	// Token is the label of the token. Slot numbers change, labels do not.
	Token string
	PIN   string
	// Keys are the labels of the keys on offer; the first is the default.
	Keys []string
}

// Store is a key store over one token.
type Store struct {
	cfg   Config
	mod   *pkcs11.Ctx
	slots chan struct{} // one for each session that may be in use

	// mu guards what follows.
	mu sync.Mutex
	// generation counts connections: a session of an older one is not used again.
	generation int
	slot       uint
	idle       []pkcs11.SessionHandle
	// anchor stays open: the last session's end is a logout.
	anchor    pkcs11.SessionHandle
	connected bool
	// refused is set once the token refused the PIN, which is not tried again:
	// tokens lock after a few wrong ones.
	refused error
}

var _ keystore.Store = (*Store)(nil)

// Open loads the module and logs in to the token.
func Open(c Config) (*Store, error) {
	if err := keystore.CheckName("store's name", c.Store); err != nil {
		return nil, err
	}
	if c.Token == "" || c.PIN == "" || len(c.Keys) == 0 || len(c.Keys) > keystore.MaxKeys {
		return nil, errors.New("PKCS#11 key store: want a token, a PIN and at least one key")
	}
	for i, k := range c.Keys {
		if err := keystore.CheckName("key's id", k); err != nil {
			return nil, err
		}
		if slices.Contains(c.Keys[:i], k) {
			return nil, fmt.Errorf("PKCS#11 key store: key %s is named twice", k)
		}
	}
	mod := pkcs11.New(c.Module)
	if mod == nil {
		return nil, fmt.Errorf("PKCS#11 module %s does not load", c.Module)
	}
	s := &Store{cfg: c, mod: mod, slots: make(chan struct{}, maxSessions)}
	s.mu.Lock()
	err := s.connect()
	s.mu.Unlock()
	if err != nil {
		mod.Destroy()
		return nil, err
	}
	return s, nil
}

// Close ends the sessions. The module stays loaded until the process ends.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.connected {
		return nil
	}
	for _, h := range append(s.idle, s.anchor) {
		_ = s.mod.CloseSession(h)
	}
	s.idle, s.connected, s.refused = nil, false, errors.New("key store is closed")
	s.generation++
	return nil
}

// connect finds the token by its label and logs in. The caller holds mu.
func (s *Store) connect() error {
	if s.refused != nil {
		return s.refused
	}
	if err := s.mod.Initialize(); err != nil && !is(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return fmt.Errorf("%w: PKCS#11 module %s: %w", keystore.ErrBackend, s.cfg.Module, err)
	}
	slot, err := s.find()
	if err != nil {
		return err
	}
	h, err := s.mod.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return fmt.Errorf("%w: token %s: %w", keystore.ErrBackend, s.cfg.Token, err)
	}
	if err := s.mod.Login(h, pkcs11.CKU_USER, s.cfg.PIN); err != nil && !is(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		_ = s.mod.CloseSession(h)
		err = fmt.Errorf("log in to token %s: %w", s.cfg.Token, err)
		if is(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE) {
			s.refused = err
			return err
		}
		return fmt.Errorf("%w: %w", keystore.ErrBackend, err)
	}
	s.generation++
	s.slot, s.anchor, s.idle, s.connected = slot, h, nil, true
	return nil
}

// find returns the slot of the one token with the configured label.
func (s *Store) find() (uint, error) {
	list, err := s.mod.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("%w: PKCS#11 slots: %w", keystore.ErrBackend, err)
	}
	var found []uint
	for _, slot := range list {
		if info, err := s.mod.GetTokenInfo(slot); err == nil && info.Label == s.cfg.Token {
			found = append(found, slot)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return 0, fmt.Errorf("%w: no token has the label %q", keystore.ErrBackend, s.cfg.Token)
	}
	return 0, fmt.Errorf("%d tokens have the label %q: want one", len(found), s.cfg.Token)
}

// lost are the errors after which a session, or all of them, are gone.
var lost = []uint{
	pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_TOKEN_NOT_PRESENT,
	pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED,
}

func is(err error, codes ...uint) bool {
	var e pkcs11.Error
	return errors.As(err, &e) && slices.Contains(codes, uint(e))
}

// with runs f in a session, and once more in a new connection if the session
// turns out to be gone: a token that was taken out, or moved to another slot, is
// looked for again by its label.
func with[T any](ctx context.Context, s *Store, f func(pkcs11.SessionHandle) (T, error)) (T, error) {
	var none T
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return none, ctx.Err()
	}
	for again := false; ; again = true {
		h, generation, err := s.take()
		if err == nil {
			var v T
			if v, err = f(h); err == nil || !is(err, lost...) {
				s.put(h, generation, err == nil)
				return v, err
			}
			s.drop(generation)
		}
		if again || !is(err, lost...) {
			return none, wrapBackend(err)
		}
	}
}

// wrapBackend marks what is left of the token's own errors as passing ones.
func wrapBackend(err error) error {
	if is(err, lost...) {
		return fmt.Errorf("%w: %w", keystore.ErrBackend, err)
	}
	return err
}

func (s *Store) take() (pkcs11.SessionHandle, int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.connected {
		if err := s.connect(); err != nil {
			return 0, 0, err
		}
	}
	if n := len(s.idle); n > 0 {
		h := s.idle[n-1]
		s.idle = s.idle[:n-1]
		return h, s.generation, nil
	}
	h, err := s.mod.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		s.connected = s.connected && !is(err, lost...)
		return 0, 0, fmt.Errorf("session with token %s: %w", s.cfg.Token, err)
	}
	return h, s.generation, nil
}

// put gives a session back. One in which something failed is closed: what the
// token left of the operation in it is the token's affair.
func (s *Store) put(h pkcs11.SessionHandle, generation int, good bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if good && s.connected && generation == s.generation {
		s.idle = append(s.idle, h)
		return
	}
	_ = s.mod.CloseSession(h)
}

func (s *Store) drop(generation int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if generation != s.generation || !s.connected {
		return
	}
	for _, h := range append(s.idle, s.anchor) {
		_ = s.mod.CloseSession(h)
	}
	s.idle, s.connected = nil, false
}

// object is one version of a key in the token.
type object struct {
	handle           pkcs11.ObjectHandle
	version          uint32
	encrypt, decrypt bool
}

// objects returns the versions of a key in rising order.
func (s *Store) objects(h pkcs11.SessionHandle, keyID string) ([]object, error) {
	if !slices.Contains(s.cfg.Keys, keyID) {
		return nil, fmt.Errorf("%w: key %s is not among those of this store", keystore.ErrMismatch, keyID)
	}
	if err := s.mod.FindObjectsInit(h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, keyID),
	}); err != nil {
		return nil, fmt.Errorf("find key %s: %w", keyID, err)
	}
	handles, _, err := s.mod.FindObjects(h, maxObjects)
	if err = errors.Join(err, s.mod.FindObjectsFinal(h)); err != nil {
		return nil, fmt.Errorf("find key %s: %w", keyID, err)
	}
	var out []object
	for _, o := range handles {
		v, err := s.inspect(h, keyID, o)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b object) int { return int(int64(a.version) - int64(b.version)) })
	for i := 1; i < len(out); i++ {
		if out[i].version == out[i-1].version {
			return nil, fmt.Errorf("key %s is twice in the token with CKA_ID %d", keyID, out[i].version)
		}
	}
	return out, nil
}

func (s *Store) inspect(h pkcs11.SessionHandle, keyID string, o pkcs11.ObjectHandle) (object, error) {
	attrs, err := s.mod.GetAttributeValue(h, o, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_ID, nil),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, nil),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, nil),
	})
	if err != nil {
		return object{}, fmt.Errorf("attributes of key %s: %w", keyID, err)
	}
	if len(attrs) != 5 {
		return object{}, fmt.Errorf("attributes of key %s: the token gave %d of 5", keyID, len(attrs))
	}
	yes := func(i int) bool { return len(attrs[i].Value) == 1 && attrs[i].Value[0] == 1 }
	no := func(i int) bool { return len(attrs[i].Value) == 1 && attrs[i].Value[0] == 0 }
	if !yes(1) || !no(2) {
		return object{}, fmt.Errorf("key %s can leave the token: want CKA_SENSITIVE and not CKA_EXTRACTABLE", keyID)
	}
	id := attrs[0].Value
	if len(id) == 0 || len(id) > 4 {
		return object{}, fmt.Errorf("key %s has a CKA_ID of %d bytes: want its version, 1 to 4 bytes, big endian", keyID, len(id))
	}
	version := binary.BigEndian.Uint32(append(make([]byte, 4-len(id)), id...))
	if version == 0 {
		return object{}, fmt.Errorf("key %s has version 0 as its CKA_ID", keyID)
	}
	return object{handle: o, version: version, encrypt: yes(3), decrypt: yes(4)}, nil
}

func disabled(keyID string) error { return fmt.Errorf("%w: %s", keystore.ErrDisabled, keyID) }

// Info lists the configured keys as the token has them.
func (s *Store) Info(ctx context.Context) (*keystore.Info, error) {
	return with(ctx, s, func(h pkcs11.SessionHandle) (*keystore.Info, error) {
		i := &keystore.Info{Name: s.cfg.Store, Kind: keystore.KindPKCS11}
		for _, id := range s.cfg.Keys {
			objects, err := s.objects(h, id)
			if err != nil {
				return nil, err
			}
			k := keystore.Key{ID: id, Disabled: len(objects) == 0}
			if !k.Disabled {
				newest := objects[len(objects)-1]
				k.Oldest, k.Newest, k.Disabled = objects[0].version, newest.version, !newest.encrypt || !newest.decrypt
			}
			i.Keys = append(i.Keys, k)
		}
		return i, nil
	})
}

// Wrap encrypts key in the token.
func (s *Store) Wrap(ctx context.Context, keyID string, key *keystore.DataKey, associated []byte) (*keystore.Wrapped, error) {
	return with(ctx, s, func(h pkcs11.SessionHandle) (*keystore.Wrapped, error) { return s.wrap(h, keyID, key, associated) })
}

// Unwrap decrypts a data key in the token.
func (s *Store) Unwrap(ctx context.Context, w *keystore.Wrapped, associated []byte) (*keystore.DataKey, error) {
	return with(ctx, s, func(h pkcs11.SessionHandle) (*keystore.DataKey, error) { return s.unwrap(h, w, associated) })
}

// Rewrap decrypts and encrypts in the token; between, the data key is in this
// process's memory.
func (s *Store) Rewrap(ctx context.Context, w *keystore.Wrapped, associated []byte) (*keystore.Wrapped, error) {
	return with(ctx, s, func(h pkcs11.SessionHandle) (*keystore.Wrapped, error) {
		key, err := s.unwrap(h, w, associated)
		if err != nil {
			return nil, err
		}
		defer key.Destroy()
		return s.wrap(h, w.Key, key, associated)
	})
}

// Health looks for the keys.
func (s *Store) Health(ctx context.Context) error {
	_, err := s.Info(ctx)
	return err
}

func bound(keyID string, version uint32, associated []byte) []byte {
	b := append([]byte(associatedLabel), byte(len(keyID)))
	b = append(b, keyID...)
	b = binary.BigEndian.AppendUint32(b, version)
	return append(b, associated...)
}

func (s *Store) wrap(h pkcs11.SessionHandle, keyID string, key *keystore.DataKey, associated []byte) (*keystore.Wrapped, error) {
	objects, err := s.objects(h, keyID)
	if err != nil {
		return nil, err
	}
	if len(objects) == 0 || !objects[len(objects)-1].encrypt {
		return nil, disabled(keyID)
	}
	o := objects[len(objects)-1]
	nonce := make([]byte, nonceSize)
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	params := pkcs11.NewGCMParams(nonce, bound(keyID, o.version, associated), 8*tagSize)
	defer params.Free()
	if err := s.mod.EncryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, o.handle); err != nil {
		return nil, failed("wrap", keyID, err)
	}
	sealed, err := s.mod.Encrypt(h, key.Reveal())
	if err != nil {
		return nil, failed("wrap", keyID, err)
	}
	// Some modules put a nonce of their own in the place of ours.
	used := params.IV()
	if len(used) != nonceSize || len(sealed) != keystore.DataKeySize+tagSize {
		return nil, fmt.Errorf("wrap under %s: the token used a nonce of %d bytes and gave %d: want %d and %d", keyID, len(used), len(sealed), nonceSize, keystore.DataKeySize+tagSize)
	}
	return &keystore.Wrapped{Key: keyID, Version: o.version, Ciphertext: slices.Concat(used, sealed)}, nil
}

func (s *Store) unwrap(h pkcs11.SessionHandle, w *keystore.Wrapped, associated []byte) (*keystore.DataKey, error) {
	objects, err := s.objects(h, w.Key)
	if err != nil {
		return nil, err
	}
	if len(objects) == 0 {
		return nil, disabled(w.Key)
	}
	i := slices.IndexFunc(objects, func(o object) bool { return o.version == w.Version })
	if i < 0 {
		return nil, fmt.Errorf("%w: the token has no version %d of key %s", keystore.ErrMismatch, w.Version, w.Key)
	}
	if !objects[i].decrypt {
		return nil, disabled(w.Key)
	}
	if len(w.Ciphertext) != nonceSize+keystore.DataKeySize+tagSize {
		return nil, fmt.Errorf("%w: it has %d bytes", keystore.ErrMismatch, len(w.Ciphertext))
	}
	params := pkcs11.NewGCMParams(w.Ciphertext[:nonceSize], bound(w.Key, w.Version, associated), 8*tagSize)
	defer params.Free()
	if err := s.mod.DecryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, objects[i].handle); err != nil {
		return nil, failed("unwrap", w.Key, err)
	}
	plain, err := s.mod.Decrypt(h, w.Ciphertext[nonceSize:])
	// What a token says to a wrong tag differs; SoftHSM says CKR_GENERAL_ERROR.
	if is(err, pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_DATA_INVALID) {
		return nil, fmt.Errorf("%w under %s: %w", keystore.ErrMismatch, w.Key, err)
	}
	if err != nil {
		return nil, failed("unwrap", w.Key, err)
	}
	return keystore.NewDataKey(plain)
}

// failed sorts a token's error.
func failed(what, keyID string, err error) error {
	switch {
	case is(err, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID):
		// Its owner was faster than the call.
		return fmt.Errorf("%w: %s: %w", keystore.ErrDisabled, keyID, err)
	case is(err, lost...):
		return fmt.Errorf("%s under %s: %w", what, keyID, err)
	}
	return fmt.Errorf("%w: %s under %s: %w", keystore.ErrBackend, what, keyID, err)
}

// Generate makes the next version of a key in the token: AES-256, sensitive, and
// not extractable. It needs a PIN that may write.
func (s *Store) Generate(ctx context.Context, keyID string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.write(keyID, func(h pkcs11.SessionHandle, objects []object) error {
		next := uint32(1)
		if n := len(objects); n > 0 {
			next = objects[n-1].version + 1
		}
		id := bytes.TrimLeft(binary.BigEndian.AppendUint32(nil, next), "\x00")
		_, err := s.mod.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, keySize),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, keyID),
			pkcs11.NewAttribute(pkcs11.CKA_ID, id),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
			pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
		})
		return err
	})
}

// SetDisabled disables every version of a key, or enables them again.
func (s *Store) SetDisabled(ctx context.Context, keyID string, disabled bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.write(keyID, func(h pkcs11.SessionHandle, objects []object) error {
		if len(objects) == 0 {
			return fmt.Errorf("the token has no key %s", keyID)
		}
		for _, o := range objects {
			if err := s.mod.SetAttributeValue(h, o.handle, []*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, !disabled),
				pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, !disabled),
			}); err != nil {
				return err
			}
		}
		return nil
	})
}

// write runs f in a session that may change the token.
func (s *Store) write(keyID string, f func(pkcs11.SessionHandle, []object) error) error {
	s.mu.Lock()
	slot := s.slot
	s.mu.Unlock()
	h, err := s.mod.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("write to token %s: %w", s.cfg.Token, err)
	}
	defer func() { _ = s.mod.CloseSession(h) }()
	objects, err := s.objects(h, keyID)
	if err != nil {
		return err
	}
	if err := f(h, objects); err != nil {
		return fmt.Errorf("write to token %s: %w", s.cfg.Token, err)
	}
	return nil
}
