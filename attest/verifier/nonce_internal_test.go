package verifier

import (
	"errors"
	"testing"
	"time"
)

func TestSeenForgetsOnlyWhatExpired(t *testing.T) {
	s := newSeen()
	now := time.Unix(1_800_000_000, 0)
	id := func(i int) (n [32]byte) { n[0], n[1], n[2] = byte(i), byte(i>>8), byte(i>>16); return n }
	for i := range 1000 {
		expires := now.Add(NonceLifetime)
		if first, err := s.add("caller", id(i), expires, now); err != nil || !first {
			t.Fatalf("nonce %d at its first use: %v, %v", i, first, err)
		}
		// As long as the nonce could be accepted, its second use is known.
		if first, err := s.add("caller", id(i), expires, expires.Add(-time.Second)); err != nil || first {
			t.Fatalf("nonce %d just before its expiry: %v, %v", i, first, err)
		}
		now = now.Add(time.Second)
	}
	kept := 0
	for _, set := range s.sets {
		kept += len(set.used)
	}
	// Two lifetimes of nonces at one a second.
	if limit := 2*int(NonceLifetime/time.Second) + 1; kept > limit {
		t.Errorf("%d nonces are kept, want at most %d", kept, limit)
	}
}

// One caller fills its own share of the memory and no other's.
func TestSeenIsShared(t *testing.T) {
	s := newSeen()
	now := time.Unix(1_800_000_000, 0)
	expires := now.Add(NonceLifetime)
	id := func(i int) (n [32]byte) { n[0], n[1], n[2] = byte(i), byte(i>>8), byte(i>>16); return n }
	for i := range maxSeenByCaller {
		if first, err := s.add("hostile", id(i), expires, now); err != nil || !first {
			t.Fatal(first, err)
		}
	}
	if _, err := s.add("hostile", id(maxSeenByCaller), expires, now); !errors.Is(err, ErrBusy) {
		t.Errorf("a caller beyond its share: %v", err)
	}
	if first, err := s.add("honest", id(maxSeenByCaller), expires, now); err != nil || !first {
		t.Errorf("another caller: %v, %v", first, err)
	}
	// What one caller used is used for all, and no way around a full share.
	if first, err := s.add("honest", id(0), expires, now); err != nil || first {
		t.Errorf("another caller's nonce: %v, %v", first, err)
	}
	if first, err := s.add("hostile", id(maxSeenByCaller), expires, now); err != nil || first {
		t.Errorf("a used nonce beyond the share: %v, %v", first, err)
	}
	later := expires.Add(NonceLifetime)
	if first, err := s.add("hostile", id(maxSeenByCaller+1), later.Add(NonceLifetime), later); err != nil || !first {
		t.Errorf("after a lifetime: %v, %v", first, err)
	}
}

func TestSeenDoesNotForgetWhenFull(t *testing.T) {
	s := newSeen()
	now := time.Unix(1_800_000_000, 0)
	expires := now.Add(NonceLifetime)
	id := func(i int) (n [32]byte) { n[0], n[1], n[2] = byte(i), byte(i>>8), byte(i>>16); return n }
	for i := range maxSeen {
		if _, err := s.add("", id(i), expires, now); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.add("caller", id(maxSeen), expires, now); !errors.Is(err, ErrBusy) {
		t.Errorf("a full memory: %v", err)
	}
	if first, err := s.add("caller", id(0), expires, now); err != nil || first {
		t.Errorf("a nonce known to a full memory: %v, %v", first, err)
	}
	if first, err := s.add("caller", id(maxSeen), expires.Add(2*NonceLifetime), expires.Add(NonceLifetime)); err != nil || !first {
		t.Errorf("after a lifetime: %v, %v", first, err)
	}
}
