package receipt

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// ChallengeSize is the size of a renewal's challenge, in bytes.
	ChallengeSize = 32
	// MinLease and MaxLease bound how long a lease may last.
	MinLease = 5 * time.Second
	MaxLease = time.Hour
	// MaxGrace bounds how long a job that is told to stop may go on.
	MaxGrace = 5 * time.Minute
)

// TypeLease is the token type of leases.
const TypeLease = "lease"

// States of a lease.
const (
	// LeaseRunning lets the job run on for the lease's seconds.
	LeaseRunning = "running"
	// LeaseStop tells the job to stop: something it runs under was taken back.
	LeaseStop = "stop"
)

// Lease is the claims set of a broker's answer to one renewal.
type Lease struct {
	Issuer   string      `json:"iss"`
	IssuedAt int64       `json:"iat"`
	JobID    string      `json:"job"`
	Plan     plan.Digest `json:"plan"`
	// Session is the SHA-384 of the session key (PKIX, DER) of the holder that the
	// lease is for: the one to which the job's latest key was released.
	Session plan.Digest `json:"session"`
	// Challenge is the one that the job's holder made for this renewal. It makes
	// the lease fresh, without the broker's clock.
	Challenge []byte `json:"challenge"`
	State     string `json:"state"`
	// Seconds is how long the job may run without another lease, counted on the
	// holder's own CLOCK_BOOTTIME from when it sent the challenge. 0 in a stop.
	Seconds int64 `json:"seconds"`
	// GraceSeconds is how long a job that is told to stop may go on.
	GraceSeconds int64 `json:"graceSeconds,omitempty"`
	// Reason says why a job stops: a stable code, a colon and a text.
	Reason string `json:"reason,omitempty"`
}

// Duration is how long the lease lasts.
func (l Lease) Duration() time.Duration { return time.Duration(l.Seconds) * time.Second }

// Grace is how long a job that is told to stop may go on.
func (l Lease) Grace() time.Duration { return time.Duration(l.GraceSeconds) * time.Second }

// seconds are compared as such: of a larger number a Duration is another one.
func seconds(d time.Duration) int64 { return int64(d / time.Second) }

func (l Lease) validate() error {
	switch l.State {
	case LeaseRunning:
		if l.Seconds < seconds(MinLease) || l.Seconds > seconds(MaxLease) || l.GraceSeconds != 0 || l.Reason != "" {
			return fmt.Errorf("a running lease lasts %s to %s and has neither grace nor reason", MinLease, MaxLease)
		}
	case LeaseStop:
		if l.Seconds != 0 || l.GraceSeconds < 0 || l.GraceSeconds > seconds(MaxGrace) || l.Reason == "" {
			return fmt.Errorf("a stop lasts no time, has a grace of at most %s and a reason", MaxGrace)
		}
	default:
		return fmt.Errorf("lease state %.40q", l.State)
	}
	return nil
}

// SignLease signs l under the signer's name.
func SignLease(s *Signer, l Lease) (string, error) {
	l.Issuer = s.issuer
	if err := l.validate(); err != nil {
		return "", fmt.Errorf("sign lease: %w", err)
	}
	return s.Sign(TypeLease, l)
}

// VerifyLease checks a broker's answer to the renewal of one job with one
// challenge, by the holder whose session key has the given digest. Everything that it refuses is a *check.Refusal at stage "lease". A
// lease that tells the job to stop is no error: look at its State.
func VerifyLease(keys Keys, token, job string, p, session plan.Digest, challenge []byte) (Lease, error) {
	var r Lease
	var l check.List
	if len(challenge) != ChallengeSize || job == "" || p.Bytes() == nil || session.Bytes() == nil {
		return Lease{}, errors.New("verify lease: expectation is incomplete")
	}
	if err := keys.Open(TypeLease, token, &r); err != nil {
		l.Fail("lease.signature", "a lease signed by "+keys.issuer, err.Error(), "ask the broker again")
		return Lease{}, check.Refuse("lease", l)
	}
	l.Equal("lease.job", job, r.JobID, "")
	l.Equal("lease.plan", string(p), string(r.Plan), "")
	l.Equal("lease.session", string(session), string(r.Session), "")
	if !bytes.Equal(challenge, r.Challenge) {
		l.Fail("lease.challenge", hex.EncodeToString(challenge), hex.EncodeToString(r.Challenge[:min(len(r.Challenge), ChallengeSize)]), "a lease answers one renewal only")
	}
	if err := r.validate(); err != nil {
		l.Fail("lease.form", "a lease as attest/receipt describes it", err.Error(), "use a broker of the same version")
	}
	if len(l.Failed()) > 0 {
		return Lease{}, check.Refuse("lease", l)
	}
	return r, nil
}
