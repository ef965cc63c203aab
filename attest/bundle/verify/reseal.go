package verify

import (
	"bytes"
	"fmt"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// reseals reports whether the plan is that of a job without a container.
func (v *verification) reseals() bool { return v.pl != nil && v.pl.Reseal != nil }

// resealGroup holds what a job without a container sealed anew against its plan.
func (v *verification) resealGroup() {
	if _, there := v.b.Parts[bundle.ResealPart]; !there && !v.reseals() {
		return
	}
	g := v.group("reseal", "What it sealed anew")
	defer v.done("reseal", g)
	// That no container was there to see anything is the holder's to say.
	for _, p := range []bundle.Part{bundle.HolderStatus, bundle.Trace} {
		if _, ok := v.part(p); !ok && v.reseals() && v.reached(bundle.StageReseal) {
			g.Fail("reseal."+string(p), "the part "+string(p), "none that can be relied on", "the record is not complete")
		}
	}
	b, ok := v.part(bundle.ResealPart)
	switch {
	case !ok && v.reached(bundle.StageReseal):
		g.Fail("reseal.record", "what the job sealed anew", "nothing that can be relied on", "the record is not complete")
		return
	case !ok:
		g.Skip("reseal.record", "the job sealed nothing that was committed")
		return
	case !v.reseals():
		g.Fail("reseal.plan", "a plan that reseals", "another, or none that can be relied on", "the job did what nobody approved")
		return
	}
	p, err := bundle.Decode[bundle.Reseal](b)
	if err != nil {
		g.Fail("reseal.form", "a re-sealing", err.Error(), "")
		return
	}
	r, err := receipt.ParseResealRecord(p.Record)
	if err != nil {
		g.Fail("reseal.form", "a re-sealing record", err.Error(), "")
		return
	}
	if err := receipt.VerifyReseal(v.session, p.Record, p.Signature); err != nil {
		g.Fail("reseal.signature", "a signature by the session key in the evidence", "none that holds", "the record is not the attested job's")
		return
	}
	g.Pass("reseal.signature", fmt.Sprintf("%d files, %d bytes", r.Files, r.Bytes))
	v.resealing(g, "reseal", r.Resealing)
	v.resealedFiles(g, p, r)
	v.resealed = &resealed{record: r, digest: plan.Sum(p.Record)}
	v.resealWord(g, p, r)
	g.Skip("reseal.plaintext", "that both are of one plaintext: the attested holder's signed word; the sealed files are not in the bundle")
}

// resealing holds what a record says that it is of against statement and plan.
func (v *verification) resealing(g *check.List, id string, r receipt.Resealing) {
	want := v.pl.Reseal
	g.Equal(id+".job", v.st.JobID, r.JobID, "the record is another job's")
	g.Equal(id+".plan", string(v.st.PlanDigest), string(r.Plan), "the record is another plan's")
	g.Equal(id+".from", want.Asset+" "+string(want.Digest), r.From+" "+string(r.FromDigest), "another source than the plan's")
	g.Equal(id+".to", want.To, r.To, "sealed under another key than the plan's")
}

// resealedFiles checks the records of the files, of which the job's record has the
// digest.
func (v *verification) resealedFiles(g *check.List, p bundle.Reseal, r receipt.ResealRecord) {
	if len(p.Files) == 0 && r.Files > bundle.MaxResealFiles {
		g.Skip("reseal.files", fmt.Sprintf("%d files are too many for a bundle: the job's record has the digest of their records", r.Files))
		return
	}
	var records [][]byte
	total, last := int64(0), ""
	about := check.List{}
	for _, f := range p.Files {
		records = append(records, f.Record)
		one, err := receipt.ParseResealFile(f.Record)
		if err == nil {
			err = receipt.VerifyReseal(v.session, f.Record, f.Signature)
		}
		if err != nil {
			g.Fail("reseal.files", "records of files that the session key in the evidence signed", err.Error(), "")
			return
		}
		v.resealing(&about, "reseal.file", one.Resealing)
		if len(one.ID) < len(last) || len(one.ID) == len(last) && one.ID <= last {
			about.Fail("reseal.file.order", "a file after "+last, one.ID, "files were reordered")
		}
		total, last = total+one.Bytes, one.ID
	}
	if failed := about.Failed(); len(failed) > 0 {
		*g = append(*g, failed...)
		return
	}
	switch {
	case len(p.Files) != r.Files || total != r.Bytes:
		g.Fail("reseal.files", fmt.Sprintf("%d files of %d bytes", r.Files, r.Bytes), fmt.Sprintf("%d of %d", len(p.Files), total), "files were left out or added")
	case receipt.ResealRecords(records) != r.Records:
		g.Fail("reseal.files", "the records of which the job's record has the digest", "others", "records were exchanged")
	default:
		g.Pass("reseal.files", fmt.Sprintf("%d, each signed", len(p.Files)))
	}
}

// resealed is a record that the session key signed, and the broker's word on it, nil
// if none holds.
type resealed struct {
	record receipt.ResealRecord
	digest plan.Digest
	word   *receipt.Resealed
}

// resealWord checks the broker's word that the new asset has the digest.
func (v *verification) resealWord(g *check.List, p bundle.Reseal, r receipt.ResealRecord) {
	issuer, err := issuerOf(p.Receipt)
	if err == nil && v.result != nil && issuer != v.result.Audience {
		err = fmt.Errorf("the word of %.80q, and the keys were released by %.80q", issuer, v.result.Audience)
	}
	var w receipt.Resealed
	if err == nil {
		keys, pinned, kerr := v.keys(v.trust.BrokerKeys, bundle.BrokerKeys, issuer)
		if err = kerr; err == nil {
			if w, err = receipt.VerifyResealed(keys, p.Receipt, p.Record, r); err == nil {
				byKeys(g, "reseal.countersignature", pinned, issuer)
				v.resealed.word = &w
				return
			}
		}
	}
	g.Fail("reseal.countersignature", "the broker's word that "+r.To+" has this digest", err.Error(), "")
}

// logReseal holds the broker's word against the log, and every logged re-sealing of
// the job against the record.
func (v *verification) logReseal(g *check.List, bodies []translog.Body) {
	const id = "log.reseal"
	hashes := map[uint64][]byte{}
	for _, e := range v.b.Log.Entries {
		hashes[e.Index] = e.Hash
	}
	found := 0
	for _, b := range bodies {
		if b.Kind != translog.KindReseal {
			continue
		}
		found++
		if v.resealed == nil {
			if !v.reached(bundle.StageReseal) {
				// An agent that was killed before it had the broker's answer.
				g.Skip(id, "the broker set the digest of "+b.Reseal.Asset+", and the job ended before it knew")
				continue
			}
			g.Fail(id, "a record for the logged re-sealing", "none for "+b.Reseal.Asset, "a re-sealing was left out")
			continue
		}
		r, w := v.resealed.record, v.resealed.word
		if b.Reseal.Plan != r.Plan || b.Reseal.From != r.From || b.Reseal.FromDigest != r.FromDigest || b.Reseal.Asset != r.To || b.Reseal.Digest != r.Digest || b.Reseal.Record != v.resealed.digest ||
			w != nil && (w.LogIndex != b.Index || !bytes.Equal(w.LogHash, hashes[b.Index])) {
			g.Fail(id, "the same in record, receipt and log", "a difference", "")
			return
		}
	}
	switch {
	case v.resealed == nil:
	case found != 1:
		g.Fail(id, "one entry that the digest was set", fmt.Sprint(found), "the broker said what it did not log")
	default:
		v.brokersWord(g, id, "logged once")
	}
}
