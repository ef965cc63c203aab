package verifier

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/receipt"
)

const (
	nonceVersion = 1
	nonceRandom  = 32
	// version, expiry, random bytes; the tag follows.
	nonceBody = 1 + 8 + nonceRandom
	nonceSize = nonceBody + sha256.Size
	// maxSeen bounds the nonces remembered for one lifetime. At 48 bytes each
	// that is under 30 MB.
	maxSeen = 1 << 18
	// maxSeenByCaller is one caller's share of it: over 60 appraisals a second.
	maxSeenByCaller = maxSeen / 16
)

// Challenge returns a new nonce: version, expiry and 32 random bytes under a
// tag that only holders of the nonce key can make for this verifier's name. No
// state is kept until it is used.
func (v *Verifier) Challenge() (nonce string, expires time.Time, err error) {
	expires = v.clock().Add(NonceLifetime).Truncate(time.Second)
	body := make([]byte, nonceBody, nonceSize)
	body[0] = nonceVersion
	binary.BigEndian.PutUint64(body[1:], uint64(expires.Unix())) //nolint:gosec // a time after 1970
	if _, err := rand.Read(body[9:]); err != nil {
		return "", time.Time{}, fmt.Errorf("make nonce: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(nonceTag(v.keys.Load().nonces[0], v.id, body)), expires, nil
}

// nonceTag appends the tag to body. The verifier's name is the audience.
func nonceTag(key []byte, id string, body []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write(body)
	m.Write([]byte(id))
	return m.Sum(body)
}

// useNonce checks a nonce and marks it as used. Whatever comes of the
// appraisal, the nonce is spent. Results have its SHA-256 in hex.
func (v *Verifier) useNonce(ctx context.Context, token string, now time.Time, l *check.List) (string, error) {
	const hint = "ask this verifier for a nonce, and attest with it once"
	sum := sha256.Sum256([]byte(token))
	name := hex.EncodeToString(sum[:])
	expires, err := v.openNonce(token)
	if err != nil {
		l.Fail("nonce.authentic", "a nonce that this verifier made", err.Error(), hint)
		return name, nil
	}
	l.Pass("nonce.authentic", "made here")
	if !now.Before(expires) || expires.After(now.Add(NonceLifetime+receipt.Leeway)) {
		l.Fail("nonce.fresh", "a nonce that is valid at "+now.UTC().Format(time.RFC3339), "valid until "+expires.UTC().Format(time.RFC3339), hint)
		return name, nil
	}
	l.Pass("nonce.fresh", "valid until "+expires.UTC().Format(time.RFC3339))
	first, err := v.seen.add(endorse.CallerOf(ctx), sum, expires, now)
	if err != nil {
		return "", err
	}
	if !first {
		l.Fail("nonce.unused", "a nonce that was not used before", "used before", hint)
		return name, nil
	}
	l.Pass("nonce.unused", "first use here")
	return name, nil
}

func (v *Verifier) openNonce(token string) (time.Time, error) {
	if len(token) != base64.RawURLEncoding.EncodedLen(nonceSize) {
		return time.Time{}, errors.New("not of a nonce's length")
	}
	// Strict: the unused low bits of the last character must be zero, or one
	// nonce would have several spellings and could be used as often.
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil {
		return time.Time{}, errors.New("not base64url")
	}
	if b[0] != nonceVersion {
		return time.Time{}, fmt.Errorf("version %d: want %d", b[0], nonceVersion)
	}
	for _, k := range v.keys.Load().nonces {
		if hmac.Equal(nonceTag(k, v.id, b[:nonceBody:nonceBody]), b) {
			return time.Unix(int64(binary.BigEndian.Uint64(b[1:])), 0), nil //nolint:gosec // the tag says that it was made here
		}
	}
	return time.Time{}, errors.New("not made by this verifier")
}

// seen remembers used nonces until they expire, in one set per lifetime so that
// whole sets are dropped.
type seen struct {
	mu   sync.Mutex
	sets map[int64]*nonces // guarded by mu
}

type nonces struct {
	used map[[sha256.Size]byte]struct{}
	by   map[string]int // how many each caller used
}

func newSeen() *seen { return &seen{sets: map[int64]*nonces{}} }

// add reports whether the nonce is new. A full memory is an error, for the
// caller who filled its share of it (nobody has none), or else for all: forgetting one nonce early
// would allow its second use.
func (s *seen) add(caller string, nonce [sha256.Size]byte, expires, now time.Time) (bool, error) {
	period := int64(NonceLifetime / time.Second)
	s.mu.Lock()
	defer s.mu.Unlock()
	all, own := 0, 0
	for i, set := range s.sets {
		// All nonces of set i expire before (i+1) periods.
		if (i+1)*period <= now.Unix() {
			delete(s.sets, i)
			continue
		}
		all += len(set.used)
		own += set.by[caller]
	}
	i := expires.Unix() / period
	set := s.sets[i]
	if set == nil {
		set = &nonces{used: map[[sha256.Size]byte]struct{}{}, by: map[string]int{}}
		s.sets[i] = set
	}
	if _, used := set.used[nonce]; used {
		return false, nil
	}
	switch {
	case caller != "" && own >= maxSeenByCaller:
		return false, fmt.Errorf("%w: %d nonces in use by %.120q alone", ErrBusy, own, caller)
	case all >= maxSeen:
		return false, fmt.Errorf("%w: %d nonces in use", ErrBusy, all)
	}
	set.used[nonce] = struct{}{}
	set.by[caller]++
	return true, nil
}
