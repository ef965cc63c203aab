package issuer

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

const (
	// maxPending bounds the sign-ins that wait for somebody, maxTokens the
	// refresh tokens that are remembered, used ones included.
	maxPending = 256
	maxTokens  = 65_536
)

// storage is what the provider remembers. mu guards both maps.
type storage struct {
	people *People
	now    func() time.Time
	key    signingKey

	mu sync.Mutex
	// pending are sign-ins by their device code.
	pending map[string]*pending
	tokens  map[string]*refresh
}

type pending struct {
	userCode string
	state    op.DeviceAuthorizationState
}

// refresh is one refresh token. A used one is remembered: when it comes again,
// somebody has a copy, and the session ends (RFC 9700, section 4.14.2).
type refresh struct {
	session *session
	used    bool
}

func newStorage(people *People, now func() time.Time, key signingKey) *storage {
	return &storage{people: people, now: now, key: key, pending: map[string]*pending{}, tokens: map[string]*refresh{}}
}

// purge forgets what has expired. The caller holds mu.
func (s *storage) purge() {
	now := s.now()
	for code, p := range s.pending {
		if now.After(p.state.Expires) {
			delete(s.pending, code)
		}
	}
	for token, r := range s.tokens {
		if now.Sub(r.session.at) > SessionLifetime {
			delete(s.tokens, token)
		}
	}
}

// StoreDeviceAuthorization implements op.DeviceAuthorizationStorage.
func (s *storage) StoreDeviceAuthorization(_ context.Context, clientID, deviceCode, userCode string, expires time.Time, scopes []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.purge()
	if len(s.pending) >= maxPending {
		return errors.New("too many sign-ins wait")
	}
	for _, p := range s.pending {
		if p.userCode == userCode {
			return op.ErrDuplicateUserCode
		}
	}
	s.pending[deviceCode] = &pending{userCode, op.DeviceAuthorizationState{ClientID: clientID, Scopes: scopes, Expires: expires}}
	return nil
}

// GetDeviceAuthorizatonState implements op.DeviceAuthorizationStorage. What is
// decided is told once.
func (s *storage) GetDeviceAuthorizatonState(_ context.Context, clientID, deviceCode string) (*op.DeviceAuthorizationState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.purge()
	p, ok := s.pending[deviceCode]
	if !ok || p.state.ClientID != clientID {
		return nil, errors.New("no such sign-in")
	}
	if p.state.Done || p.state.Denied {
		delete(s.pending, deviceCode)
	}
	state := p.state
	return &state, nil
}

// decide lets name in, or not, who waits under a user code.
func (s *storage) decide(userCode, name string, allow bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.purge()
	for _, p := range s.pending {
		if p.userCode == userCode && !p.state.Done && !p.state.Denied {
			p.state.Done, p.state.Denied = allow, !allow
			p.state.Subject, p.state.AMR, p.state.AuthTime = name, []string{"pwd"}, s.now()
			return nil
		}
	}
	return errors.New("no such sign-in")
}

// CreateAccessToken implements op.AuthStorage. Nothing takes access tokens.
func (s *storage) CreateAccessToken(context.Context, op.TokenRequest) (id string, expires time.Time, err error) {
	return rand.Text(), s.now().Add(TokenLifetime), nil
}

// CreateAccessAndRefreshTokens implements op.AuthStorage: current is the refresh
// token that this one takes the place of.
func (s *storage) CreateAccessAndRefreshTokens(_ context.Context, r op.TokenRequest, current string) (id, token string, expires time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.purge()
	var of *session
	if current == "" {
		state, ok := r.(*op.DeviceAuthorizationState)
		if !ok || len(s.tokens) >= maxTokens {
			return "", "", time.Time{}, errors.New("no refresh token for this")
		}
		of = &session{user: state.Subject, client: state.ClientID, at: state.AuthTime, scopes: state.Scopes}
	} else {
		held, err := s.take(current)
		if err != nil {
			return "", "", time.Time{}, err
		}
		held.used, of = true, held.session
	}
	token = rand.Text()
	s.tokens[token] = &refresh{session: of}
	return rand.Text(), token, s.now().Add(TokenLifetime), nil
}

// take returns a refresh token that can be used. The caller holds mu.
func (s *storage) take(token string) (*refresh, error) {
	r, ok := s.tokens[token]
	if !ok {
		return nil, op.ErrInvalidRefreshToken
	}
	if len(s.tokens) >= maxTokens {
		return nil, errors.New("too many sessions")
	}
	if r.used {
		for t, o := range s.tokens {
			if o.session == r.session {
				delete(s.tokens, t)
			}
		}
		return nil, op.ErrInvalidRefreshToken
	}
	return r, nil
}

// TokenRequestByRefreshToken implements op.AuthStorage.
func (s *storage) TokenRequestByRefreshToken(_ context.Context, token string) (op.RefreshTokenRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.purge()
	r, err := s.take(token)
	if err != nil {
		return nil, err
	}
	if _, ok := s.people.groups(r.session.user); !ok {
		return nil, op.ErrInvalidRefreshToken
	}
	of := *r.session
	return &of, nil
}

// SigningKey implements op.AuthStorage.
func (s *storage) SigningKey(context.Context) (op.SigningKey, error) { return s.key, nil }

// SignatureAlgorithms implements op.AuthStorage.
func (s *storage) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{jose.ES384}, nil
}

// KeySet implements op.AuthStorage.
func (s *storage) KeySet(context.Context) ([]op.Key, error) {
	return []op.Key{publicKey{s.key}}, nil
}

// GetClientByClientID implements op.OPStorage.
func (s *storage) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	if !known(id) {
		return nil, oidc.ErrInvalidClient()
	}
	return client{id}, nil
}

// SetUserinfoFromScopes implements op.OPStorage, and does nothing.
func (s *storage) SetUserinfoFromScopes(context.Context, *oidc.UserInfo, string, string, []string) error {
	return nil
}

// SetUserinfoFromRequest implements op.CanSetUserinfoFromRequest: it puts the
// person's groups into an ID token, as they are at this moment.
func (s *storage) SetUserinfoFromRequest(_ context.Context, info *oidc.UserInfo, r op.IDTokenRequest, _ []string) error {
	groups, ok := s.people.groups(r.GetSubject())
	if !ok {
		return errors.New("no such person")
	}
	// The provider takes the subject from here too.
	info.Subject = r.GetSubject()
	info.AppendClaims(GroupsClaim, groups)
	return nil
}

// Health implements op.Storage.
func (s *storage) Health(context.Context) error { return nil }
