package verify_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	cosignature "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/translog"
)

// root and path are the definitions of RFC 9162, sections 2.1.1 and 2.1.3.1,
// written down as they stand: a second opinion on the library's.
func root(leaves [][]byte) []byte {
	if len(leaves) == 1 {
		h := sha256.Sum256(append([]byte{0}, leaves[0]...))
		return h[:]
	}
	k := split(len(leaves))
	h := sha256.Sum256(append(append([]byte{1}, root(leaves[:k])...), root(leaves[k:])...))
	return h[:]
}

func path(m int, leaves [][]byte) [][]byte {
	if len(leaves) == 1 {
		return nil
	}
	k := split(len(leaves))
	if m < k {
		return append(path(m, leaves[:k]), root(leaves[k:]))
	}
	return append(path(m-k, leaves[k:]), root(leaves[:k]))
}

func split(n int) int {
	k := 1
	for 2*k < n {
		k *= 2
	}
	return k
}

type noteKey struct{ private, public string }

func newNoteKey(t *testing.T, name string) noteKey {
	t.Helper()
	private, public, err := note.GenerateKey(rand.Reader, name)
	must(t, err)
	return noteKey{private, public}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// prove returns what the log would say of all entries of a bundle.
func prove(t *testing.T, b *bundle.Bundle, log []translog.Entry, key noteKey, origin string, witnesses ...noteKey) translog.Proofs {
	t.Helper()
	var leaves [][]byte
	for _, e := range log {
		leaves = append(leaves, e.Body)
	}
	var p translog.Proofs
	for _, e := range b.Log.Entries {
		p.Hashes = append(p.Hashes, path(int(e.Index), leaves))
	}
	signers := []note.Signer{}
	if key.private != "" {
		s, err := note.NewSigner(key.private)
		must(t, err)
		signers = append(signers, s)
	}
	for _, w := range witnesses {
		s, err := cosignature.NewSignerForCosignatureV1(w.private)
		must(t, err)
		signers = append(signers, s)
	}
	var err error
	p.Checkpoint, err = note.Sign(&note.Note{Text: fmt.Sprintf("%s\n%d\n%s\n", origin, len(leaves), base64.StdEncoding.EncodeToString(root(leaves)))}, signers...)
	must(t, err)
	return p
}

func TestTheLogsTree(t *testing.T) {
	l := newLab(t)
	other, err := l.Append(translog.Body{Kind: translog.KindAsset, Asset: &translog.Asset{Name: "x", Kind: "weights"}})
	must(t, err)
	file := build(t, newJob(t, l, bundletest.Options{}))
	for i := range 3 {
		_, err := l.Append(translog.Body{Kind: translog.KindAsset, Asset: &translog.Asset{Name: fmt.Sprint(i), Kind: "weights"}})
		must(t, err)
	}
	b, err := bundle.Parse(file)
	must(t, err)
	origin := translog.KeyName(bundletest.BrokerID)
	key, wrong, foreign := newNoteKey(t, origin), newNoteKey(t, origin), newNoteKey(t, "broker.other/log")
	w1, w2, w3 := newNoteKey(t, "w1.test"), newNoteKey(t, "w2.test"), newNoteKey(t, "w3.test")
	good := prove(t, b, l.Entries, key, origin, w1, w2)
	with := func(change func(p *translog.Proofs)) []byte {
		p := translog.Proofs{Checkpoint: bytes.Clone(good.Checkpoint)}
		for _, h := range good.Hashes {
			p.Hashes = append(p.Hashes, append([][]byte(nil), h...))
		}
		change(&p)
		out, err := b.WithProofs(p)
		must(t, err)
		return out
	}
	proven := with(func(*translog.Proofs) {})
	edited := func(t *testing.T) []byte {
		// A broker that has signed receipts for another history than its log has.
		log := append([]translog.Entry(nil), l.Entries...)
		log[2] = other
		out, err := b.WithProofs(prove(t, b, log, key, origin))
		must(t, err)
		return out
	}
	type want struct {
		inclusion, witness check.Outcome
		verdict            verify.Verdict
		says               string
	}
	none, pass, fail := check.NotChecked, check.Pass, check.Fail
	for name, try := range map[string]struct {
		file      []byte
		key       string
		witnesses []string
		quorum    int
		want      want
	}{
		"nobody is named":                  {proven, "", nil, 0, want{none, none, verify.Verified, "no key of the log is named"}},
		"the log's key":                    {proven, key.public, nil, 0, want{pass, none, verify.Verified, "no witness is named"}},
		"witnesses":                        {proven, key.public, []string{w1.public, w2.public}, 2, want{pass, pass, verify.Verified, "2 of the 2 named"}},
		"one of two":                       {proven, key.public, []string{w1.public, w3.public}, 1, want{pass, pass, verify.Verified, "1 of the 2 named"}},
		"two of two, and one cosigned":     {proven, key.public, []string{w1.public, w3.public}, 2, want{pass, none, verify.Unknown, "not witnessed"}},
		"a witness that did not":           {proven, key.public, []string{w3.public}, 1, want{pass, none, verify.Unknown, "not witnessed"}},
		"no checkpoint yet":                {file, key.public, nil, 0, want{none, none, verify.Unknown, "not yet"}},
		"no checkpoint yet, and witnesses": {file, key.public, []string{w1.public}, 1, want{none, none, verify.Unknown, "not witnessed"}},
		"no checkpoint, nobody named":      {file, "", nil, 0, want{none, none, verify.Verified, "no key of the log is named"}},

		"another key of that name": {proven, wrong.public, nil, 0, want{fail, "", verify.Failed, "checkpoint"}},
		"another log's key":        {proven, foreign.public, nil, 0, want{fail, "", verify.Failed, "checkpoint"}},
		"another broker's log":     {with(func(p *translog.Proofs) { *p = prove(t, b, l.Entries, foreign, "broker.other/log") }), foreign.public, nil, 0, want{fail, none, verify.Failed, "one of broker.other"}},
		"another history":          {edited(t), key.public, nil, 0, want{fail, "", verify.Failed, "another history"}},
		"a proof of another entry": {with(func(p *translog.Proofs) { p.Hashes[0], p.Hashes[1] = p.Hashes[1], p.Hashes[0] }), key.public, nil, 0, want{fail, "", verify.Failed, "not in the tree"}},
		"a hash changed":           {with(func(p *translog.Proofs) { p.Hashes[0][0] = bytes.Repeat([]byte{1}, 32) }), key.public, nil, 0, want{fail, "", verify.Failed, "not in the tree"}},
		"a hash left out":          {with(func(p *translog.Proofs) { p.Hashes[0] = p.Hashes[0][1:] }), key.public, nil, 0, want{fail, "", verify.Failed, "not in the tree"}},
		"far too many hashes":      {with(func(p *translog.Proofs) { p.Hashes[0] = make([][]byte, 1000) }), key.public, nil, 0, want{fail, "", verify.Failed, "1000 hashes"}},
		"signed by witnesses alone": {with(func(p *translog.Proofs) { *p = prove(t, b, l.Entries, noteKey{}, origin, w1) }), key.public, []string{w1.public}, 1,
			want{fail, "", verify.Failed, "no signature by the log"}},
		"a size edited": {with(func(p *translog.Proofs) {
			p.Checkpoint = []byte(strings.Replace(string(p.Checkpoint), fmt.Sprintf("\n%d\n", len(l.Entries)), fmt.Sprintf("\n%d\n", len(l.Entries)+1), 1))
		}), key.public, nil, 0, want{fail, "", verify.Failed, "checkpoint"}},
		"a witness's word moved to another checkpoint": {with(func(p *translog.Proofs) {
			late := prove(t, b, l.Entries[:len(l.Entries)-1], key, origin)
			_, sigs, _ := strings.Cut(string(p.Checkpoint), "\n\n")
			lines := strings.SplitAfter(sigs, "\n")
			*p = late
			p.Checkpoint = append(p.Checkpoint, lines[1]...)
		}), key.public, []string{w1.public}, 1, want{fail, "", verify.Failed, "checkpoint"}},
	} {
		t.Run(name, func(t *testing.T) {
			trust := pinned(t, l)
			if try.key != "" {
				var err error
				trust.Log, err = translog.NewTrust(try.key, try.witnesses, try.quorum)
				must(t, err)
			}
			r := verify.Verify(try.file, trust)
			inclusion, witness := only(outcomes(r, "log.inclusion")), only(outcomes(r, "log.witness"))
			var said []string
			for _, c := range r.Checks() {
				if strings.HasPrefix(c.ID, "log.") {
					said = append(said, c.Expected+" "+c.Found+" "+c.Hint)
				}
			}
			if r.Verdict != try.want.verdict || inclusion != try.want.inclusion || witness != try.want.witness || !strings.Contains(strings.Join(said, "\n"), try.want.says) {
				t.Errorf("verdict %s, inclusion %s, witness %s, want %+v\n%s", r.Verdict, inclusion, witness, try.want, strings.Join(said, "\n"))
			}
			if try.want.verdict == verify.Failed && len(failedIDs(r)) != 1 {
				t.Errorf("more than the tree failed: %v", failedIDs(r))
			}
		})
	}
	if _, err := b.WithProofs(translog.Proofs{}); err == nil {
		t.Error("no proofs were added")
	}
}

func only(l []check.Outcome) check.Outcome {
	if len(l) != 1 {
		return ""
	}
	return l[0]
}
