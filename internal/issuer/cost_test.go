package issuer

import (
	"encoding/json"
	"strings"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

func init() { cost = bcrypt.MinCost + 1 }

func TestWeakHashIsRefused(t *testing.T) {
	h, err := bcrypt.GenerateFromPassword([]byte("password"), cost-1)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string][]Person{"people": {{Name: "alice", Groups: []string{"engineer"}, Hash: string(h)}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParsePeople(b); err == nil || !strings.Contains(err.Error(), "cost") {
		t.Errorf("got %v", err)
	}
}
