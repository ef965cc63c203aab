package issuer

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	maxPeopleFile = 1 << 20
	maxPeople     = 10_000
	maxName       = 128
	// attempts is how many wrong passwords a name may have in attemptWindow.
	attempts      = 5
	attemptWindow = time.Minute
)

// cost is bcrypt's: what a password's hash has at least. Tests, which hash often and
// under the race detector, lower it.
var cost = bcrypt.DefaultCost

var (
	errWrong   = errors.New("name or password is wrong")
	errTooMany = errors.New("too many attempts")
)

// Person is one entry of the file of people.
type Person struct {
	Name   string   `json:"name"`
	Groups []string `json:"groups"`
	// Hash is bcrypt's of the password.
	Hash string `json:"hash"`
}

// file is the file of people.
type file struct {
	People []Person `json:"people"`
}

// People are those who may sign in. ParsePeople makes one. It is safe for
// concurrent use.
type People struct {
	byName map[string]Person
	// nobody is the hash that unknown names are checked against, so that they
	// take as long.
	nobody []byte
	// work bounds how many passwords are checked at a time.
	work chan struct{}

	mu     sync.Mutex
	failed map[string][]time.Time
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

// HashPassword returns what goes into the file of people. A password has 12 to
// 72 bytes, which is as many as bcrypt looks at.
func HashPassword(password string) (string, error) {
	if len(password) < 12 || len(password) > 72 {
		return "", errors.New("a password has 12 to 72 bytes")
	}
	h, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	return string(h), err
}

// EncodePeople returns the file of people.
func EncodePeople(people []Person) ([]byte, error) { return plan.Canonical(file{people}) }

// ParsePeople reads the file of people.
func ParsePeople(b []byte) (*People, error) {
	var f file
	if err := plan.Decode(b, maxPeopleFile, &f); err != nil {
		return nil, fmt.Errorf("people: %w", err)
	}
	if len(f.People) == 0 || len(f.People) > maxPeople {
		return nil, fmt.Errorf("people: want 1 to %d", maxPeople)
	}
	p := &People{byName: map[string]Person{}, work: make(chan struct{}, 1), failed: map[string][]time.Time{}}
	for _, one := range f.People {
		if _, twice := p.byName[one.Name]; twice || !nameForm.MatchString(one.Name) {
			return nil, fmt.Errorf("people: name %.80q: no name, or there twice", one.Name)
		}
		if c, err := bcrypt.Cost([]byte(one.Hash)); err != nil || c < cost {
			return nil, fmt.Errorf("people: %s: want a bcrypt hash of cost %d or more", one.Name, cost)
		}
		p.byName[one.Name], p.nobody = one, []byte(one.Hash)
	}
	return p, nil
}

func (p *People) groups(name string) ([]string, bool) {
	one, ok := p.byName[name]
	return slices.Clone(one.Groups), ok
}

// check returns nil if the password is that of name.
func (p *People) check(ctx context.Context, name, password string, now time.Time) error {
	one, known := p.byName[name]
	// Names that nobody has share one count: they fill no memory.
	key := name
	if !known {
		key = ""
	}
	if !p.begin(key, now) {
		return errTooMany
	}
	select {
	case p.work <- struct{}{}:
		defer func() { <-p.work }()
	case <-ctx.Done():
		return ctx.Err()
	}
	hash := []byte(one.Hash)
	if !known {
		hash = p.nobody
	}
	if err := bcrypt.CompareHashAndPassword(hash, []byte(password)); err != nil || !known {
		return errWrong
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.failed, key)
	return nil
}

// begin counts an attempt as a failed one, before it is made: many at once are
// not more than one after the other.
func (p *People) begin(key string, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	recent := slices.DeleteFunc(p.failed[key], func(t time.Time) bool { return now.Sub(t) >= attemptWindow })
	if len(recent) >= attempts {
		p.failed[key] = recent
		return false
	}
	p.failed[key] = append(recent, now)
	return true
}
