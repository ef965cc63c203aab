package serve

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
)

// KBSPrefix is the path of the Confidential Containers KBS attestation protocol.
const KBSPrefix = "/kbs/v0/"

const (
	// kbsVersion is the protocol's version that is spoken here; its minor version
	// decides (kbs_attestation_protocol.md, "Request").
	kbsVersion = "0.4."
	// kbsCookie names the session.
	kbsCookie = "kbs-session-id"
	// kbsErrors is the prefix of error types.
	kbsErrors = "https://github.com/confidential-containers/kbs/errors/"
	// maxKBSEvidence bounds a request with evidence, and maxKBSAuth one that opens a
	// session, in bytes.
	maxKBSEvidence = 1 << 20
	maxKBSAuth     = 16 << 10
	// kbsSessionLife is how long a session lasts, maxKBSSessions how many there are
	// at a time, and maxKBSPeer how many of them one address has.
	kbsSessionLife = 5 * time.Minute
	maxKBSSessions = 4096
	maxKBSPeer     = 64
	// maxKBSAppraisals bounds how many appraisals run at a time.
	maxKBSAppraisals = 8
	// kbsAppraisalTimeout bounds one.
	kbsAppraisalTimeout = 20 * time.Second
	// kbsNonceSize is that of a session's nonce, in bytes.
	kbsNonceSize = 32
)

// KBSEvidence is what a verifier is asked to appraise. The broker parses none of
// Evidence and InitData: it passes on what it received.
type KBSEvidence struct {
	Audience string `json:"audience"`
	Session  string `json:"session"`
	TEE      string `json:"tee"`
	Nonce    string `json:"nonce"`
	// RuntimeData is the client's runtime-data, whose digest the evidence binds.
	RuntimeData json.RawMessage `json:"runtime-data"`
	Evidence    json.RawMessage `json:"tee-evidence"`
	InitData    json.RawMessage `json:"init-data,omitempty"`
}

// KBSVerifier appraises the evidence of KBS clients. Appraise MUST return a token of
// type receipt.TypeKBS, or an error; a *check.Refusal is an answer, every other
// error one that may pass.
type KBSVerifier interface {
	Appraise(ctx context.Context, e KBSEvidence) (token string, err error)
}

// KBSOptions are what KBSHandler needs. All are required.
type KBSOptions struct {
	Broker   *broker.Broker
	Verifier KBSVerifier
	Log      *slog.Logger
	Now      func() time.Time
}

// KBSHandler returns the handler of KBSPrefix. It asks for no certificate: a client
// is known by its evidence alone, and gets a key that only the attested guest can
// open.
func KBSHandler(o KBSOptions) (http.Handler, error) {
	if o.Broker == nil || o.Verifier == nil || o.Log == nil || o.Now == nil {
		return nil, errors.New("KBS handler needs a broker, a verifier, a logger and a clock")
	}
	k := &kbs{o: o, sessions: map[string]*kbsSession{}, appraisals: make(chan struct{}, maxKBSAppraisals)}
	mux := http.NewServeMux()
	for pattern, f := range map[string]func(http.ResponseWriter, *http.Request) error{
		"POST " + KBSPrefix + "auth":                              k.auth,
		"POST " + KBSPrefix + "attest":                            k.attest,
		"GET " + KBSPrefix + "resource/{repository}/{type}/{tag}": k.resource,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := f(w, r); err != nil {
				k.fail(w, r, err)
			}
		})
	}
	return bounded(readTimeout, writeTimeout, mux), nil
}

// kbs has the sessions by their cookies. They live in memory: after a restart
// clients begin anew.
type kbs struct {
	o          KBSOptions
	appraisals chan struct{}
	// mu guards sessions and what they point to.
	mu       sync.Mutex
	sessions map[string]*kbsSession
}

type kbsSession struct {
	broker.KBSSession
	// cookie is a secret of the client; the session's ID stands in logs.
	cookie  string
	peer    string
	expires time.Time
	// spent is set when the nonce was used, and token once the verifier affirmed.
	spent bool
	token string
}

// kbsError is an answer of the protocol.
type kbsError struct {
	code   int
	kind   string
	detail string
}

func (e *kbsError) Error() string { return e.detail }

func (k *kbs) fail(w http.ResponseWriter, r *http.Request, err error) {
	var e *kbsError
	var refusal *check.Refusal
	switch {
	case errors.As(err, &e):
	case errors.As(err, &refusal):
		ids := make([]string, 0, len(refusal.Checks))
		for _, c := range refusal.Checks.Failed() {
			ids = append(ids, c.ID)
		}
		e = &kbsError{http.StatusForbidden, "PolicyDeny", "refused: " + strings.Join(slices.Compact(ids), ", ")}
	case errors.Is(err, broker.ErrNotFound):
		// Whether it exists and is not served here stays untold.
		e = &kbsError{http.StatusNotFound, "ResourceNotFound", "no such resource for this protocol"}
	case errors.Is(err, broker.ErrInvalid):
		e = &kbsError{http.StatusBadRequest, "InvalidRequest", err.Error()}
	case errors.Is(err, broker.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		e = &kbsError{http.StatusServiceUnavailable, "Unavailable", broker.ErrUnavailable.Error()}
	default:
		e = &kbsError{http.StatusInternalServerError, "Internal", "internal error of the broker; its log says which"}
	}
	k.o.Log.LogAttrs(r.Context(), slog.LevelWarn, "not answered", slog.String("call", r.URL.Path), slog.String("caller", peer(r)), slog.String("error", err.Error()))
	unread(w, r)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.code)
	_ = json.NewEncoder(w).Encode(map[string]string{"type": kbsErrors + e.kind, "detail": e.detail})
}

func invalid(format string, args ...any) error {
	return &kbsError{http.StatusBadRequest, "InvalidRequest", fmt.Sprintf(format, args...)}
}

func peer(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// read reads one JSON value, with nothing after it.
func readKBS(r *http.Request, limit int64, v any) error {
	b, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, limit))
	if err != nil {
		return invalid("the request could not be read, or has more than %d bytes", limit)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return invalid("want one JSON value of the protocol")
	}
	return nil
}

// auth opens a session: POST /auth {version, tee, extra-params} -> {nonce, extra-params}.
func (k *kbs) auth(w http.ResponseWriter, r *http.Request) error {
	var req struct {
		Version string          `json:"version"`
		TEE     string          `json:"tee"`
		Extra   json.RawMessage `json:"extra-params"`
	}
	if err := readKBS(r, maxKBSAuth, &req); err != nil {
		return err
	}
	if !strings.HasPrefix(req.Version, kbsVersion) {
		return &kbsError{http.StatusUnauthorized, "ProtocolVersion", fmt.Sprintf("version %.20q: this server speaks %sx", req.Version, kbsVersion)}
	}
	if req.TEE == "" || len(req.TEE) > 64 {
		return invalid("tee %.20q", req.TEE)
	}
	nonce := make([]byte, kbsNonceSize)
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	s := &kbsSession{
		KBSSession: broker.KBSSession{ID: "kbs-" + strings.ToLower(rand.Text()), Nonce: base64.StdEncoding.EncodeToString(nonce), TEE: req.TEE},
		cookie:     rand.Text(), peer: peer(r), expires: k.o.Now().Add(kbsSessionLife),
	}
	if err := k.add(s); err != nil {
		return err
	}
	http.SetCookie(w, &http.Cookie{Name: kbsCookie, Value: s.cookie, Path: "/kbs", MaxAge: int(kbsSessionLife / time.Second), Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	return answerKBS(w, map[string]string{"nonce": s.Nonce, "extra-params": ""})
}

func answerKBS(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
	return nil
}

// add keeps a session. An address that has many gets no more, so that others do.
func (k *kbs) add(s *kbsSession) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	same := 0
	for cookie, old := range k.sessions {
		if !k.o.Now().Before(old.expires) {
			delete(k.sessions, cookie)
		} else if old.peer == s.peer {
			same++
		}
	}
	if same >= maxKBSPeer || len(k.sessions) >= maxKBSSessions {
		return &kbsError{http.StatusTooManyRequests, "TooManySessions", "too many sessions are open: try again later"}
	}
	k.sessions[s.cookie] = s
	return nil
}

// session returns a copy of the session that a request's cookie names.
func (k *kbs) session(r *http.Request) (kbsSession, error) {
	c, err := r.Cookie(kbsCookie)
	if err != nil && r.Header.Get("Authorization") != "" {
		// A token that serves whoever holds it is no proof of the key that it names.
		return kbsSession{}, &kbsError{http.StatusUnauthorized, "TokenVerifierError", "requests with a bearer token are not supported: this server takes the session's cookie alone; begin with auth"}
	}
	if err != nil {
		return kbsSession{}, &kbsError{http.StatusUnauthorized, "MissingCookie", "no session: begin with auth"}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s, ok := k.sessions[c.Value]
	if !ok || !k.o.Now().Before(s.expires) {
		return kbsSession{}, &kbsError{http.StatusUnauthorized, "ExpiredCookie", "the session is over or never was: begin with auth"}
	}
	return *s, nil
}

// attest has a session's evidence appraised: POST /attest {init-data, runtime-data,
// tee-evidence} -> {token}. A session has one try.
func (k *kbs) attest(w http.ResponseWriter, r *http.Request) error {
	s, err := k.session(r)
	if err != nil {
		return err
	}
	var req struct {
		InitData    json.RawMessage `json:"init-data"`
		RuntimeData json.RawMessage `json:"runtime-data"`
		Evidence    json.RawMessage `json:"tee-evidence"`
	}
	if err := readKBS(r, maxKBSEvidence, &req); err != nil {
		return err
	}
	var data struct {
		Nonce string          `json:"nonce"`
		Key   json.RawMessage `json:"tee-pubkey"`
	}
	if err := json.Unmarshal(req.RuntimeData, &data); err != nil || len(req.Evidence) == 0 {
		return invalid("want runtime-data and tee-evidence")
	}
	if data.Nonce != s.Nonce {
		return &kbsError{http.StatusUnauthorized, "InvalidNonce", "the nonce is not this session's"}
	}
	if s.Key, err = broker.KBSKey(data.Key); err != nil {
		return err
	}
	if err := k.spend(s.cookie); err != nil {
		return err
	}
	select {
	case k.appraisals <- struct{}{}:
		defer func() { <-k.appraisals }()
	case <-r.Context().Done():
		return r.Context().Err()
	}
	info, err := k.o.Broker.Info()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), kbsAppraisalTimeout)
	defer cancel()
	token, err := k.o.Verifier.Appraise(ctx, KBSEvidence{
		Audience: info.ID, Session: s.ID, TEE: s.TEE, Nonce: s.Nonce, RuntimeData: req.RuntimeData, Evidence: req.Evidence, InitData: req.InitData,
	})
	if err != nil {
		return err
	}
	if err := k.o.Broker.CheckKBS(s.KBSSession, token); err != nil {
		return err
	}
	k.mu.Lock()
	if kept, ok := k.sessions[s.cookie]; ok {
		kept.Key, kept.token = s.Key, token
	}
	k.mu.Unlock()
	k.o.Log.LogAttrs(r.Context(), slog.LevelInfo, "attested", slog.String("session", s.ID), slog.String("tee", s.TEE), slog.String("caller", s.peer))
	return answerKBS(w, map[string]string{"token": token})
}

// spend takes a session's nonce, once.
func (k *kbs) spend(cookie string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, ok := k.sessions[cookie]
	if !ok || s.spent {
		return &kbsError{http.StatusUnauthorized, "UnAuthenticatedCookie", "a session is attested once: begin with auth"}
	}
	s.spent = true
	return nil
}

// resource answers GET /resource/<owner>/<kind>/<asset> with a flattened JWE.
func (k *kbs) resource(w http.ResponseWriter, r *http.Request) error {
	s, err := k.session(r)
	if err != nil {
		return err
	}
	if s.token == "" {
		return &kbsError{http.StatusUnauthorized, "UnAuthenticatedCookie", "the session is not attested"}
	}
	ctx, cancel := context.WithTimeout(r.Context(), callTimeout)
	defer cancel()
	owner, kind, asset := r.PathValue("repository"), r.PathValue("type"), r.PathValue("tag")
	jwe, err := k.o.Broker.ReleaseKBS(ctx, s.KBSSession, s.token, owner, broker.Kind(kind), asset)
	if err != nil {
		return err
	}
	k.o.Log.LogAttrs(r.Context(), slog.LevelInfo, "released", slog.String("session", s.ID), slog.String("asset", asset), slog.String("caller", s.peer))
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(jwe) // #nosec G705 -- JSON of base64, made by the broker
	return nil
}

// KBSClient asks a verifier over HTTP: it posts a KBSEvidence to URL and takes
// {"token": ...} for an answer.
type KBSClient struct {
	URL  string
	HTTP *http.Client
}

// Appraise implements KBSVerifier.
func (c KBSClient) Appraise(ctx context.Context, e KBSEvidence) (token string, err error) {
	body, err := json.Marshal(e)
	if err != nil {
		return "", fmt.Errorf("%w: evidence: %w", broker.ErrInvalid, err)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL, bytes.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("ask the verifier: %w", err)
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := c.HTTP.Do(r)
	if err != nil {
		return "", fmt.Errorf("%w: ask the verifier: %w", broker.ErrUnavailable, err)
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, receipt.MaxToken+1024))
	if err != nil {
		return "", fmt.Errorf("%w: ask the verifier: %w", broker.ErrUnavailable, err)
	}
	switch {
	case resp.StatusCode >= http.StatusInternalServerError || resp.StatusCode == http.StatusTooManyRequests:
		return "", fmt.Errorf("%w: the verifier answered %s", broker.ErrUnavailable, resp.Status)
	case resp.StatusCode != http.StatusOK:
		var l check.List
		l.Fail("kbs.evidence", "evidence that the verifier affirms", resp.Status, "ask the verifier's operator: its log says why")
		return "", check.Refuse("verify", l)
	}
	var out struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(answer, &out); err != nil || out.Token == "" {
		return "", fmt.Errorf("%w: the verifier's answer has no token", broker.ErrUnavailable)
	}
	return out.Token, nil
}
