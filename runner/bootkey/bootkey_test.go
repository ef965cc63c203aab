package bootkey

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKeyOfThisBoot(t *testing.T) {
	name := fmt.Sprintf("coffer-test:%d", os.Getpid())
	a, err := Get(name)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Forget(name); err != nil {
			t.Error(err)
		}
	})
	b, err := Get(name)
	if err != nil || !bytes.Equal(a.b, b.b) {
		t.Errorf("a second call has another key: %v", err)
	}
	if s := fmt.Sprintf("%v %s", a, a); s != "[key of this boot] [key of this boot]" {
		t.Errorf("it prints as %q", s)
	}
	if err := Forget(name); err != nil {
		t.Fatal(err)
	}
	c, err := Get(name)
	if err != nil || bytes.Equal(a.b, c.b) {
		t.Errorf("a key that was forgotten is there again: %v", err)
	}
}

func TestPurposesAreApart(t *testing.T) {
	k := New()
	a, err := k.AEAD([]byte("job"), "one")
	if err != nil {
		t.Fatal(err)
	}
	sealed := a.Seal(nil, nil, []byte("value"), nil)
	for name, other := range map[string]struct {
		k             *Key
		salt, purpose string
	}{"another purpose": {k, "job", "two"}, "another salt": {k, "jab", "one"}, "another boot": {New(), "job", "one"}} {
		o, err := other.k.AEAD([]byte(other.salt), other.purpose)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.Open(nil, nil, sealed, nil); err == nil {
			t.Errorf("%s opens it", name)
		}
	}
	if _, err := (&Key{}).AEAD(nil, "one"); err == nil {
		t.Error("the zero value seals")
	}
}
