package translog_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

const origin = "broker.test"

// makeLog makes a log of n entries, of jobs a and b in turn, ending in a bundle
// entry of each.
func makeLog(t *testing.T, origin string, n int) []translog.Entry {
	t.Helper()
	head := translog.Genesis(origin)
	var out []translog.Entry
	for i := range n {
		var before []byte
		if i > 1 {
			before = out[i-2].Hash
		}
		b := translog.Body{
			TimeMillis: int64(1000 + i), Kind: translog.KindBundle, Actor: "agent/n", Job: string(rune('a' + i%2)), JobSequence: uint64(i/2 + 1), JobPrev: before,
			Bundle: &translog.Bundle{Digest: plan.Sum(fmt.Appendf(nil, "bundle %d", i))},
		}
		e, next, err := translog.Append(head, b)
		if err != nil {
			t.Fatal(err)
		}
		out, head = append(out, e), next
	}
	return out
}

func jobOf(entries []translog.Entry, first int) (out []translog.Entry) {
	for i := first; i < len(entries); i += 2 {
		out = append(out, entries[i])
	}
	return out
}

func clone(in []translog.Entry) []translog.Entry {
	out := make([]translog.Entry, len(in))
	for i, e := range in {
		out[i] = translog.Entry{Index: e.Index, Body: bytes.Clone(e.Body), Hash: bytes.Clone(e.Hash)}
	}
	return out
}

// rehash makes an edited log consistent again from entry i on, as whoever holds
// the database could.
func rehash(t *testing.T, l []translog.Entry, i int) {
	t.Helper()
	for ; i < len(l); i++ {
		var b translog.Body
		if err := plan.Decode(l[i].Body, translog.MaxBody, &b); err != nil {
			t.Fatal(err)
		}
		head := translog.Genesis(origin)
		if i > 0 {
			head = translog.Head{Size: uint64(i), Hash: l[i-1].Hash}
		}
		e, _, err := translog.Append(head, b)
		if err != nil {
			t.Fatal(err)
		}
		l[i] = e
	}
}

func TestVerifyChain(t *testing.T) {
	log := makeLog(t, origin, 8)
	head, err := translog.VerifyChain(origin, log)
	if err != nil || head.Size != 8 || !bytes.Equal(head.Hash, log[7].Hash) {
		t.Fatalf("%v, %v", head, err)
	}
	for name, change := range map[string]func([]translog.Entry) []translog.Entry{
		"body edited": func(l []translog.Entry) []translog.Entry {
			l[3].Body = bytes.Replace(l[3].Body, []byte("agent/n"), []byte("agent/m"), 1)
			return l
		},
		"body edited and rehashed alone": func(l []translog.Entry) []translog.Entry {
			l[3].Body = bytes.Replace(l[3].Body, []byte("agent/n"), []byte("agent/m"), 1)
			l[3].Hash = translog.Hash(l[2].Hash, l[3].Body)
			return l
		},
		"hash edited":   func(l []translog.Entry) []translog.Entry { l[3].Hash[0] ^= 1; return l },
		"last hash":     func(l []translog.Entry) []translog.Entry { l[7].Hash[0] ^= 1; return l },
		"first dropped": func(l []translog.Entry) []translog.Entry { return l[1:] },
		"dropped":       func(l []translog.Entry) []translog.Entry { return append(l[:3], l[4:]...) },
		"dropped and rehashed": func(l []translog.Entry) []translog.Entry {
			l = append(l[:3], l[4:]...)
			rehash(t, l, 3)
			return l
		},
		"reordered": func(l []translog.Entry) []translog.Entry { l[3], l[4] = l[4], l[3]; return l },
		"reordered and rehashed": func(l []translog.Entry) []translog.Entry {
			l[3], l[5] = l[5], l[3]
			rehash(t, l, 3)
			return l
		},
		"repeated":      func(l []translog.Entry) []translog.Entry { return append(l[:4], l[3:]...) },
		"index edited":  func(l []translog.Entry) []translog.Entry { l[3].Index = 4; return l },
		"not canonical": func(l []translog.Entry) []translog.Entry { l[3].Body = append(l[3].Body, ' '); return l },
		"unknown field": func(l []translog.Entry) []translog.Entry {
			l[3].Body = edit(l[3].Body, `"actor"`, `"actress"`)
			return l
		},
		"kind without its": func(l []translog.Entry) []translog.Entry {
			l[3].Body = edit(l[3].Body, `"kind":"bundle"`, `"kind":"revoke"`)
			return l
		},
		"empty body":       func(l []translog.Entry) []translog.Entry { l[3].Body = nil; return l },
		"other log":        func([]translog.Entry) []translog.Entry { return makeLog(t, "other.test", 8) },
		"other log's tail": func(l []translog.Entry) []translog.Entry { return append(l[:4], makeLog(t, "other.test", 8)[4:]...) },
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := translog.VerifyChain(origin, change(clone(log))); err == nil {
				t.Error("verified")
			}
		})
	}
	t.Run("cut short is seen at the head", func(t *testing.T) {
		h, err := translog.VerifyChain(origin, log[:7])
		if err != nil || h.Size == head.Size || bytes.Equal(h.Hash, head.Hash) {
			t.Errorf("%v, %v", h, err)
		}
	})
}

func edit(b []byte, old, text string) []byte { return []byte(strings.Replace(string(b), old, text, 1)) }

func TestVerifyJob(t *testing.T) {
	log := makeLog(t, origin, 8)
	a := jobOf(log, 0)
	if bodies, err := translog.VerifyJob(origin, "a", a); err != nil || len(bodies) != 4 || bodies[3].Index != 6 {
		t.Fatalf("%v, %v", bodies, err)
	}
	for name, change := range map[string]func([]translog.Entry) []translog.Entry{
		"first dropped":       func(l []translog.Entry) []translog.Entry { return l[1:] },
		"middle dropped":      func(l []translog.Entry) []translog.Entry { return append(l[:1], l[2:]...) },
		"reordered":           func(l []translog.Entry) []translog.Entry { l[1], l[2] = l[2], l[1]; return l },
		"body edited":         func(l []translog.Entry) []translog.Entry { l[1].Body = edit(l[1].Body, "agent/n", "agent/m"); return l },
		"another job's entry": func(l []translog.Entry) []translog.Entry { l[1] = log[3]; return l },
		"all another job's":   func([]translog.Entry) []translog.Entry { return jobOf(log, 1) },
		// The forger may write anything, but only the last entry's hash is one
		// that the broker signed.
		"entry replaced by a made-up one that stands apart": func(l []translog.Entry) []translog.Entry {
			l[1] = forge(t, l[1], func(*translog.Body) {})
			return l
		},
		"entry replaced by one at another index": func(l []translog.Entry) []translog.Entry {
			l[1] = forge(t, l[1], func(b *translog.Body) { b.Index, b.Prev = 3, make([]byte, 48) })
			return l
		},
		"first replaced": func(l []translog.Entry) []translog.Entry {
			l[0] = forge(t, l[0], func(b *translog.Body) { b.Index, b.Prev = 1, make([]byte, 48) })
			return l
		},
		"one dropped and a made-up one put in its place behind": func(l []translog.Entry) []translog.Entry {
			l[2] = forge(t, l[2], func(b *translog.Body) { b.JobPrev = l[1].Hash })
			return l
		},
		"other log's entries": func([]translog.Entry) []translog.Entry { return jobOf(makeLog(t, "other.test", 8), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := translog.VerifyJob(origin, "a", change(clone(a))); err == nil {
				t.Error("verified")
			}
		})
	}
	if _, err := translog.VerifyJob(origin, "", nil); err == nil {
		t.Error("verified no job")
	}
}

// forge makes an entry that is sound in itself and records another digest.
func forge(t *testing.T, e translog.Entry, change func(*translog.Body)) translog.Entry {
	t.Helper()
	var b translog.Body
	if err := plan.Decode(e.Body, translog.MaxBody, &b); err != nil {
		t.Fatal(err)
	}
	b.Bundle = &translog.Bundle{Digest: plan.Sum([]byte("made up"))}
	change(&b)
	body, err := plan.Canonical(b)
	if err != nil {
		t.Fatal(err)
	}
	out := translog.Entry{Index: b.Index, Body: body, Hash: translog.Hash(b.Prev, body)}
	if _, err := out.Open(); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestVerifyChainOfJobs(t *testing.T) {
	log := makeLog(t, origin, 4)
	for name, change := range map[string]func(*translog.Body){
		"names another job's entry": func(b *translog.Body) { b.JobPrev = log[2].Hash },
		"names the job's first":     func(b *translog.Body) { b.Job = "a"; b.JobSequence, b.JobPrev = 3, log[0].Hash },
		"names nothing real":        func(b *translog.Body) { b.JobPrev = make([]byte, 48) },
	} {
		t.Run(name, func(t *testing.T) {
			b := translog.Body{TimeMillis: 1, Kind: translog.KindBundle, Actor: "agent/n", Job: "b", JobSequence: 3, JobPrev: log[3].Hash, Bundle: &translog.Bundle{Digest: plan.Sum(nil)}}
			head := translog.Head{Size: 4, Hash: log[3].Hash}
			good, _, err := translog.Append(head, b)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := translog.VerifyChain(origin, append(clone(log), good)); err != nil {
				t.Fatal(err)
			}
			change(&b)
			bad, _, err := translog.Append(head, b)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := translog.VerifyChain(origin, append(clone(log), bad)); err == nil {
				t.Error("verified")
			}
		})
	}
}

// An integer that no double holds is another one in canonical form.
func TestAppendOpensWhatItWrote(t *testing.T) {
	for name, tc := range map[string]struct {
		release translog.Release
		ok      bool
	}{
		"largest integer of all doubles": {translog.Release{Attempt: 1 << 53}, true},
		"integer that is rounded":        {translog.Release{Attempt: 1<<53 + 1}, false},
		"integer that overflows":         {translog.Release{Attempt: 1<<63 - 1}, false},
		"text that is not UTF-8":         {translog.Release{Asset: "a\xff"}, false},
		"text with everything else":      {translog.Release{Asset: "\u2028<&>\x00\u007f\U0001f600\ufffd"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := translog.Body{TimeMillis: 1, Kind: translog.KindRelease, Actor: "agent/n", Job: "a", JobSequence: 1, Release: &tc.release}
			e, _, err := translog.Append(translog.Genesis(origin), b)
			if ok := err == nil; ok != tc.ok {
				t.Fatalf("appended %s: %v", e.Body, err)
			}
			if !tc.ok {
				return
			}
			if got, err := e.Open(); err != nil || !reflect.DeepEqual(*got.Release, tc.release) {
				t.Errorf("opens as %+v, %v", got.Release, err)
			}
		})
	}
}

func TestReceipt(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner(origin, key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := signer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := receipt.ParseKeys(origin, jwks)
	if err != nil {
		t.Fatal(err)
	}
	log := makeLog(t, origin, 4)
	e := log[2]
	good := translog.Receipt{Issuer: origin, IssuedAt: 1, Job: "a", Digest: plan.Sum([]byte("bundle 2")), Index: 2, Hash: e.Hash, Head: translog.Head{Size: 3, Hash: e.Hash}}
	token, err := signer.Sign(translog.TypeReceipt, good)
	if err != nil {
		t.Fatal(err)
	}
	r, err := translog.OpenReceipt(keys, token)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Includes(e); err != nil {
		t.Error(err)
	}
	if err := r.Includes(log[0]); err == nil {
		t.Error("receipt includes another entry")
	}
	if err := r.Includes(makeLog(t, "other.test", 4)[2]); err == nil {
		t.Error("receipt includes the entry of another log")
	}
	if _, err := translog.OpenReceipt(receipt.Keys{}, token); err == nil {
		t.Error("opened without keys")
	}
	for name, change := range map[string]func(*translog.Receipt){
		"claims a witness":     func(r *translog.Receipt) { r.Witnessed = true },
		"head of another size": func(r *translog.Receipt) { r.Head.Size = 4 },
		"head of another hash": func(r *translog.Receipt) { r.Head.Hash = log[1].Hash },
		"no job":               func(r *translog.Receipt) { r.Job = "" },
		"no digest":            func(r *translog.Receipt) { r.Digest = "" },
		"other issuer":         func(r *translog.Receipt) { r.Issuer = "other" },
	} {
		t.Run(name, func(t *testing.T) {
			bad := good
			change(&bad)
			token, err := signer.Sign(translog.TypeReceipt, bad)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := translog.OpenReceipt(keys, token); err == nil {
				t.Error("opened")
			}
		})
	}
	if tok, err := signer.Sign("release", good); err != nil {
		t.Fatal(err)
	} else if _, err := translog.OpenReceipt(keys, tok); err == nil {
		t.Error("opened a token of another type")
	}
	bad := good
	bad.Digest = plan.Sum([]byte("other"))
	if err := bad.Includes(e); err == nil {
		t.Error("receipt of another digest includes the entry")
	}
	bad = good
	bad.Job = "b"
	if err := bad.Includes(e); err == nil {
		t.Error("receipt of another job includes the entry")
	}
}

func TestAppendRefusesIncomplete(t *testing.T) {
	good := translog.Body{TimeMillis: 1, Kind: translog.KindRevoke, Actor: "owner/o", Revoke: &translog.Revoke{Grant: "g", Reason: "r"}}
	head := translog.Genesis(origin)
	if _, _, err := translog.Append(head, good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*translog.Body){
		"no actor":       func(b *translog.Body) { b.Actor = "" },
		"no time":        func(b *translog.Body) { b.TimeMillis = 0 },
		"no part":        func(b *translog.Body) { b.Revoke = nil },
		"two parts":      func(b *translog.Body) { b.Bundle = &translog.Bundle{} },
		"other kind":     func(b *translog.Body) { b.Kind = translog.KindGrant },
		"no kind":        func(b *translog.Body) { b.Kind = "" },
		"job unnumbered": func(b *translog.Body) { b.Job = "a" },
		"link of no job": func(b *translog.Body) { b.JobPrev = make([]byte, 48) },
		"link of a job's first": func(b *translog.Body) {
			b.Job, b.JobSequence, b.JobPrev = "a", 1, make([]byte, 48)
		},
		"no link of a job's second": func(b *translog.Body) { b.Job, b.JobSequence = "a", 2 },
		"short link":                func(b *translog.Body) { b.Job, b.JobSequence, b.JobPrev = "a", 2, make([]byte, 47) },
		"too large": func(b *translog.Body) {
			b.Revoke = &translog.Revoke{Grant: "g", Reason: strings.Repeat("x", translog.MaxBody)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := good
			change(&b)
			if _, _, err := translog.Append(head, b); err == nil {
				t.Error("appended")
			}
		})
	}
	if _, _, err := translog.Append(translog.Head{}, good); err == nil {
		t.Error("appended to the zero head")
	}
}

func FuzzOpen(f *testing.F) {
	e, _, err := translog.Append(translog.Genesis(origin), translog.Body{TimeMillis: 1, Kind: translog.KindRevoke, Actor: "owner/o", Revoke: &translog.Revoke{Grant: "g", Reason: "r"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(e.Index, e.Body, e.Hash)
	f.Fuzz(func(t *testing.T, index uint64, body, hash []byte) {
		b, err := (translog.Entry{Index: index, Body: body, Hash: hash}).Open()
		if err == nil && !bytes.Equal(translog.Hash(b.Prev, body), hash) {
			t.Error("opened with a wrong hash")
		}
	})
}
