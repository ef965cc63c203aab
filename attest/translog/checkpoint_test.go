package translog_test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	cosignature "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"

	"github.com/coffer-run/coffer/attest/translog"
)

const logOrigin = "broker.test/log"

type key struct{ private, public string }

func newKey(t testing.TB, name string) key {
	t.Helper()
	private, public, err := note.GenerateKey(rand.Reader, name)
	if err != nil {
		t.Fatal(err)
	}
	return key{private, public}
}

func signed(t testing.TB, text string, log key, witnesses ...key) []byte {
	t.Helper()
	var signers []note.Signer
	if log.private != "" {
		s, err := note.NewSigner(log.private)
		if err != nil {
			t.Fatal(err)
		}
		signers = append(signers, s)
	}
	for _, w := range witnesses {
		s, err := cosignature.NewSignerForCosignatureV1(w.private)
		if err != nil {
			t.Fatal(err)
		}
		signers = append(signers, s)
	}
	b, err := note.Sign(&note.Note{Text: text}, signers...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func text(size uint64, root []byte) string {
	return fmt.Sprintf("%s\n%d\n%s\n", logOrigin, size, base64.StdEncoding.EncodeToString(root))
}

func TestTrustRefusesKeys(t *testing.T) {
	log, w1, w2 := newKey(t, logOrigin), newKey(t, "w1.test"), newKey(t, "w2.test")
	// The same key under another name, and another key under the same name.
	renamed := key{public: renameKey(t, w1.private, "w9.test")}
	namesake := newKey(t, "w1.test")
	asWitness := key{public: renameKey(t, log.private, "w8.test")}
	for name, try := range map[string]struct {
		log       string
		witnesses []string
		quorum    int
		good      bool
	}{
		"the log alone":              {log.public, nil, 0, true},
		"two witnesses":              {log.public, []string{w1.public, w2.public}, 2, true},
		"with a newline":             {log.public + "\n", []string{w1.public + "\n"}, 1, true},
		"no key":                     {"", nil, 0, false},
		"a private key":              {log.private, nil, 0, false},
		"a witness's cosigning key":  {cosigning(t, w1), nil, 0, false},
		"no quorum":                  {log.public, []string{w1.public}, 0, false},
		"a quorum of nobody":         {log.public, nil, 1, false},
		"more than there are":        {log.public, []string{w1.public}, 2, false},
		"fewer than none":            {log.public, []string{w1.public}, -1, false},
		"one twice":                  {log.public, []string{w1.public, w1.public}, 2, false},
		"one twice in two forms":     {log.public, []string{w1.public, cosigning(t, w1)}, 2, false},
		"one under two names":        {log.public, []string{w1.public, renamed.public}, 2, false},
		"two of one name":            {log.public, []string{w1.public, namesake.public}, 2, false},
		"the log as its own witness": {log.public, []string{log.public}, 1, false},
		"the log under another name": {log.public, []string{asWitness.public}, 1, false},
		"a witness that is no key":   {log.public, []string{"w1.test+00000000+AAAA"}, 1, false},
	} {
		if _, err := translog.NewTrust(try.log, try.witnesses, try.quorum); (err == nil) != try.good {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (translog.Trust{}).Open(signed(t, text(1, make([]byte, 32)), log)); err == nil {
		t.Error("the zero trust opened a checkpoint")
	}
}

func cosigning(t *testing.T, k key) string {
	t.Helper()
	s, err := cosignature.VKeyToCosignatureV1(k.public)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// renameKey returns the public half of a private key under another name.
func renameKey(t *testing.T, private, name string) string {
	t.Helper()
	parts := strings.SplitN(private, "+", 5)
	parts[2] = name
	public, err := translog.PublicKey(strings.Join(parts, "+"))
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func TestCheckpointsHaveOneForm(t *testing.T) {
	log := newKey(t, logOrigin)
	trust, err := translog.NewTrust(log.public, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	root := bytes.Repeat([]byte{7}, 32)
	if c, err := trust.Open(signed(t, text(9, root), log)); err != nil || c.Size != 9 || !bytes.Equal(c.Root, root) || c.Witnessed {
		t.Errorf("%+v, %v", c, err)
	}
	for name, s := range map[string]string{
		"another origin":           strings.Replace(text(9, root), logOrigin, "other/log", 1),
		"a size with zeros":        strings.Replace(text(9, root), "\n9\n", "\n009\n", 1),
		"a size that is no number": strings.Replace(text(9, root), "\n9\n", "\n9x\n", 1),
		"a short root":             text(9, root[:20]),
		"a long root":              text(9, append(root, 1)),
		"a line more":              text(9, root) + "more\n",
		"two lines":                logOrigin + "\n9\n",
		"nothing":                  "\n",
	} {
		if _, err := trust.Open(signed(t, s, log)); err == nil {
			t.Errorf("opened %s", name)
		}
	}
	if _, err := trust.Open(append(signed(t, text(9, root), log), bytes.Repeat([]byte("x"), translog.MaxCheckpoint)...)); err == nil {
		t.Error("opened one that is too large")
	}
}

func TestEveryBitOfACheckpointCounts(t *testing.T) {
	log, w := newKey(t, logOrigin), newKey(t, "w.test")
	trust, err := translog.NewTrust(log.public, []string{w.public}, 1)
	if err != nil {
		t.Fatal(err)
	}
	good := signed(t, text(9, bytes.Repeat([]byte{7}, 32)), log, w)
	want, err := trust.Open(good)
	if err != nil || !want.Witnessed {
		t.Fatal(err)
	}
	for i := range good {
		for bit := range 8 {
			b := bytes.Clone(good)
			b[i] ^= 1 << bit
			// The last digit of base64 has bits that stand for nothing.
			if bytes.HasPrefix(good[i+1:], []byte("=")) {
				continue
			}
			if c, err := trust.Open(b); err == nil && c.Witnessed {
				t.Errorf("byte %d bit %d: %q is witnessed", i, bit, b)
			}
		}
		if c, err := trust.Open(good[:i]); err == nil && c.Witnessed {
			t.Errorf("cut to %d bytes: witnessed", i)
		}
	}
}

// TestProofs compares with every tree up to 20 entries, by the definitions.
func TestProofs(t *testing.T) {
	entries := chain(t, 20)
	for n := 1; n <= len(entries); n++ {
		c := translog.Checkpoint{Origin: logOrigin, Size: uint64(n), Root: rootOf(t, entries[:n])}
		for m := 0; m <= n; m++ {
			old := translog.Checkpoint{Origin: logOrigin, Size: uint64(m), Root: rootOf(t, entries[:m])}
			proof := consistency(t, m, entries[:n])
			if err := c.Follows(old, proof); err != nil {
				t.Errorf("%d follows %d: %v", n, m, err)
			}
			other := old
			other.Root = bytes.Repeat([]byte{1}, 32)
			if err := c.Follows(other, proof); err == nil {
				t.Errorf("%d follows another tree of %d", n, m)
			}
			if m < n {
				if err := old.Follows(c, proof); err == nil {
					t.Errorf("%d follows %d", m, n)
				}
			}
			for k := range proof {
				bad := append([][]byte(nil), proof...)
				bad[k] = bytes.Repeat([]byte{1}, 32)
				if err := c.Follows(old, bad); err == nil {
					t.Errorf("%d follows %d by another proof", n, m)
				}
			}
		}
		other := c
		other.Origin = "other/log"
		if err := other.Follows(c, nil); err == nil {
			t.Error("one log follows another")
		}
	}
	c := translog.Checkpoint{Origin: logOrigin, Size: 1, Root: translog.LeafHash(entries[0].Body)}
	if err := c.Includes(entries[0], nil); err != nil {
		t.Error(err)
	}
	edited := entries[0]
	edited.Body = bytes.Replace(edited.Body, []byte("alice"), []byte("mallo"), 1)
	if err := c.Includes(edited, nil); err == nil {
		t.Error("an edited entry is in the tree")
	}
	if err := c.Includes(entries[1], nil); err == nil {
		t.Error("an entry beyond the tree is in it")
	}
}

func chain(t testing.TB, n int) []translog.Entry {
	t.Helper()
	head := translog.Genesis("broker.test")
	var out []translog.Entry
	for i := range n {
		e, h, err := translog.Append(head, translog.Body{TimeMillis: 1, Kind: translog.KindAsset, Actor: "owner/alice", Asset: &translog.Asset{Name: fmt.Sprint("a", i), Kind: "weights"}})
		if err != nil {
			t.Fatal(err)
		}
		out, head = append(out, e), h
	}
	return out
}

func rootOf(t testing.TB, l []translog.Entry) []byte {
	t.Helper()
	tree := translog.NewTree()
	for _, e := range l {
		if err := tree.Add(e.Body); err != nil {
			t.Fatal(err)
		}
	}
	root, err := tree.Root()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// consistency is the definition of RFC 9162, section 2.1.4.1.
func consistency(t testing.TB, m int, l []translog.Entry) [][]byte {
	t.Helper()
	var sub func(m int, l []translog.Entry, whole bool) [][]byte
	sub = func(m int, l []translog.Entry, whole bool) [][]byte {
		if m == len(l) {
			if whole {
				return nil
			}
			return [][]byte{rootOf(t, l)}
		}
		k := 1
		for 2*k < len(l) {
			k *= 2
		}
		if m <= k {
			return append(sub(m, l[:k], whole), rootOf(t, l[k:]))
		}
		return append(sub(m-k, l[k:], false), rootOf(t, l[:k]))
	}
	if m == 0 {
		return nil
	}
	return sub(m, l, true)
}

func TestParseWitnessRequest(t *testing.T) {
	h := base64.StdEncoding.EncodeToString(make([]byte, 32))
	r, err := translog.ParseWitnessRequest([]byte("old 7\n" + h + "\n" + h + "\n\nlog\n9\nroot\n\nsig\n"))
	if err != nil || r.Old != 7 || len(r.Proof) != 2 || string(r.Checkpoint) != "log\n9\nroot\n\nsig\n" {
		t.Errorf("%+v, %v", r, err)
	}
	for name, s := range map[string]string{
		"nothing":              "",
		"no empty line":        "old 7\n" + h + "\n",
		"no old size":          h + "\n\nlog\n",
		"a size with zeros":    "old 07\n\nlog\n",
		"a size with a sign":   "old +7\n\nlog\n",
		"a size too large":     "old 99999999999999999999\n\nlog\n",
		"a hash too short":     "old 7\nAAAA\n\nlog\n",
		"a hash in other form": "old 7\n" + strings.TrimRight(h, "=") + "\n\nlog\n",
		"too many hashes":      "old 7\n" + strings.Repeat(h+"\n", translog.MaxProofHashes+1) + "\nlog\n",
		"too much":             "old 7\n\n" + strings.Repeat("x", translog.MaxWitnessRequest),
	} {
		if _, err := translog.ParseWitnessRequest([]byte(s)); err == nil {
			t.Errorf("took %s", name)
		}
	}
}

func FuzzParseWitnessRequest(f *testing.F) {
	h := base64.StdEncoding.EncodeToString(make([]byte, 32))
	f.Add([]byte("old 7\n" + h + "\n\nlog\n9\nroot\n\nsig\n"))
	f.Add([]byte("old 0\n\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := translog.ParseWitnessRequest(b)
		if err != nil {
			return
		}
		out := fmt.Sprintf("old %d\n", r.Old)
		for _, h := range r.Proof {
			out += base64.StdEncoding.EncodeToString(h) + "\n"
		}
		if again, err := translog.ParseWitnessRequest([]byte(out + "\n" + string(r.Checkpoint))); err != nil || again.Old != r.Old || len(again.Proof) != len(r.Proof) || !bytes.Equal(again.Checkpoint, r.Checkpoint) {
			t.Errorf("%q reads as %+v and again as %+v, %v", b, r, again, err)
		}
	})
}

func FuzzOpenCheckpoint(f *testing.F) {
	log, w := newKey(f, logOrigin), newKey(f, "w.test")
	trust, err := translog.NewTrust(log.public, []string{w.public}, 1)
	if err != nil {
		f.Fatal(err)
	}
	good := signed(f, text(9, bytes.Repeat([]byte{7}, 32)), log, w)
	f.Add(good)
	f.Add([]byte(text(0, nil)))
	body := text(9, bytes.Repeat([]byte{7}, 32))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := trust.Open(b); err == nil && (c.Size != 9 || !strings.HasPrefix(string(b), body)) {
			t.Errorf("opened what nobody signed: %q", b)
		}
	})
}
