package endorse_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

// FuzzRecognize: whatever a file holds, what is recognized is within its bound,
// knows its place, and reads the same when it is read from there.
func FuzzRecognize(f *testing.F) {
	v, err := simulation()
	if err != nil {
		f.Fatal(err)
	}
	for k, b := range endorsetest.New(f, v, start).Answers() {
		f.Add(k.ID+".xml", b)
		if k.Kind == endorse.RIM {
			j, err := json.Marshal(map[string]string{"id": k.ID, "rim": base64.StdEncoding.EncodeToString(b)})
			if err != nil {
				f.Fatal(err)
			}
			f.Add("answer", j)
		}
	}
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		items, err := endorse.Recognize(name, b)
		if err != nil && items != nil {
			t.Error("items beside an error")
		}
		for _, i := range items {
			if len(i.Bytes) > i.Key.Kind.MaxSize() || i.Key.ID == "" || i.Digest.Bytes() == nil {
				t.Errorf("%s of %d bytes", i.Key, len(i.Bytes))
			}
			again, err := endorse.Parse(i.Key.Kind, i.Key.ID, i.Bytes)
			if err != nil || again.Key != i.Key || again.Digest != i.Digest || !bytes.Equal(again.Bytes, i.Bytes) {
				t.Errorf("%s reads as %s, %v", i.Key, again.Key, err)
			}
		}
	})
}

// FuzzDecode: what a bundle carries reads one way only.
func FuzzDecode(f *testing.F) {
	v, err := simulation()
	if err != nil {
		f.Fatal(err)
	}
	var items []endorse.Item
	for k, b := range endorsetest.New(f, v, start).Answers() {
		i, err := endorse.Parse(k.Kind, k.ID, b)
		if err != nil {
			f.Fatal(err)
		}
		items = append(items, i)
	}
	for _, l := range [][]endorse.Item{nil, items[:1], items} {
		b, err := endorse.Encode(l)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		items, err := endorse.Decode(b)
		if err != nil {
			return
		}
		again, err := endorse.Encode(items)
		if err != nil || !bytes.Equal(b, again) {
			t.Errorf("%d endorsements, read in another form: %v", len(items), err)
		}
	})
}

// FuzzParse: answers of services, by the kind that was asked for.
func FuzzParse(f *testing.F) {
	v, err := simulation()
	if err != nil {
		f.Fatal(err)
	}
	for k, b := range endorsetest.New(f, v, start).Answers() {
		f.Add(string(k.Kind), k.ID, b)
	}
	f.Fuzz(func(t *testing.T, kind, id string, b []byte) {
		i, err := endorse.Parse(endorse.Kind(kind), id, b)
		if err != nil {
			return
		}
		if string(i.Key.Kind) != kind {
			t.Errorf("a %s came out as %s", kind, i.Key.Kind)
		}
		if _, err := endorse.NewLibrary().Add(i, time.Time{}); err != nil {
			t.Error(err)
		}
	})
}

// Truncations and changed bytes of each kind, over its whole length: never a
// panic, and never in the place of the whole.
func TestBrokenEndorsements(t *testing.T) {
	w := newWorld(t)
	for k, b := range w.services.Answers() {
		want := mustParse(t, k, b).Digest
		// Prime, so that no field is missed by its alignment.
		step := 7
		if k.Kind == endorse.RIM {
			step = 311
		}
		for n := 0; n < len(b); n += step {
			if i, err := endorse.Parse(k.Kind, k.ID, b[:n]); err == nil && k.Kind != endorse.RIM && !bytes.Equal(bytes.TrimSpace(b), bytes.TrimSpace(i.Bytes)) {
				t.Errorf("%s cut at %d is an endorsement", k, n)
			}
			c := bytes.Clone(b)
			c[n] ^= 0x10
			if i, err := endorse.Parse(k.Kind, k.ID, c); err == nil && i.Digest == want {
				t.Errorf("%s changed at %d has the same digest", k, n)
			}
		}
	}
}

func mustParse(t *testing.T, k endorse.Key, b []byte) endorse.Item {
	t.Helper()
	i, err := endorse.Parse(k.Kind, k.ID, b)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// BenchmarkWarm is an appraisal of SNP and one GPU with all that there is to
// check, when all of it is held and was verified before.
func BenchmarkWarm(b *testing.B) {
	v, err := simulation()
	if err != nil {
		b.Fatal(err)
	}
	lib := endorse.NewLibrary()
	for k, raw := range endorsetest.New(b, v, start).Answers() {
		i, err := endorse.Parse(k.Kind, k.ID, raw)
		if err != nil {
			b.Fatal(err)
		}
		if err := lib.Put(i, start); err != nil {
			b.Fatal(err)
		}
	}
	c, err := endorse.Offline(lib, v.Anchors(), start)
	if err != nil {
		b.Fatal(err)
	}
	report, err := v.Chip().Report(data, simulate.SNPOptions{})
	if err != nil {
		b.Fatal(err)
	}
	crl, _ := lib.Newest(endorse.CRLKey(v.Chip().Product(), snp.VCEK))
	g := v.GPUs()[0]
	gr, err := g.Report(nonce, simulate.GPUOptions{})
	if err != nil {
		b.Fatal(err)
	}
	ev := snp.Evidence{Report: report, Certificates: v.Chip().CertTable()}
	gev := nvgpu.Evidence{Report: gr, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()}
	for _, row := range []struct {
		name string
		run  func() bool
	}{
		{"snp", func() bool {
			return c.AppraiseSNP(b.Context(), ev, snp.Want{ReportData: data}, v.Anchors(), start).Genuine()
		}},
		{"snp-given", func() bool {
			with := ev
			with.CRL = crl.Bytes
			return snp.Appraise(with, snp.Want{ReportData: data}, v.Anchors(), start).Genuine()
		}},
		{"gpu", func() bool {
			return c.AppraiseGPU(b.Context(), gev, nvgpu.Want{Nonce: nonce}, v.Anchors(), start).Genuine()
		}},
		{"gpu-without", func() bool { return nvgpu.Appraise(gev, nvgpu.Want{Nonce: nonce}, v.Anchors(), start).Genuine() }},
	} {
		b.Run(row.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !row.run() {
					b.Fatal("refused")
				}
			}
		})
	}
}
