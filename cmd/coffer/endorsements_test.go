package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

// TestEndorsementsImportExport fills a verifier's folder, appraises by it, and
// exports what the result of that lists.
func TestEndorsementsImportExport(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	v, err := simulate.New(simulate.Options{Fast: true, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	put := func(name string, b []byte) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	var root []byte
	for k, b := range endorsetest.New(t, v, now).Answers() {
		name := fmt.Sprintf("src/%d", n)
		if k.Kind == endorse.RIM {
			name = "src/" + k.ID + ".xml"
			c := endorsetest.RIMChain(t, b)
			root = c[len(c)-1].Raw
		}
		put(name, b)
		n++
	}
	put("src/gpu-chain.pem", v.GPUs()[0].ChainPEM())
	_, _, ark := v.Chip().Certificates()
	_, chain := lastPEM(v.GPUs()[0].ChainPEM())
	put("simulation/roots/amd/Genoa/ark.pem", encode(ark))
	put("simulation/roots/nvidia/device_root.pem", encode(chain))
	put("simulation/roots/nvidia/rim_root.pem", encode(root))

	coffer := func(wantErr string, args ...string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		err := run(t.Context(), append([]string{"endorsements"}, args...), nil, &stdout, &stderr)
		said := stderr.String()
		if err != nil {
			said += err.Error()
		}
		if (err != nil) != (wantErr != "") || !strings.Contains(said, wantErr) {
			t.Fatalf("coffer endorsements %v: %v: %s", args, err, said)
		}
		return stdout.String()
	}
	src, folder := filepath.Join(dir, "src"), filepath.Join(dir, "folder")
	sim := filepath.Join(dir, "simulation")

	// Under the vendors' roots nothing of AMD's is taken, and no manifest.
	coffer("root key of Genoa is not the pinned one", "import", src, "--into", filepath.Join(dir, "other"))
	coffer("manifest's signer is not trusted: the root certificate", "import", src, "--into", filepath.Join(dir, "other"))
	changed, err := v.DriverRIM(simulate.RIMOptions{EditSigned: func(s string) string { return strings.Replace(s, `active="True"`, `active="False"`, 1) }})
	if err != nil {
		t.Fatal(err)
	}
	put("changed/NV_GPU_DRIVER_GH100_"+simulate.DefaultDriver+".xml", changed)
	coffer("manifest's signature does not hold: the content is not what was signed", "import", filepath.Join(dir, "changed"), "--into", filepath.Join(dir, "other"), "--simulation-roots", sim)
	if out := coffer("", "ls", "--from", filepath.Join(dir, "other")); strings.Contains(out, "NV_GPU") {
		t.Errorf("a manifest was taken: %s", out)
	}
	if out := coffer("", "import", src, "--into", folder, "--simulation-roots", sim); !strings.Contains(out, fmt.Sprintf("%d added, 0 there already, 0 refused", n)) {
		t.Error(out)
	}
	if out := coffer("", "ls", "--from", folder); strings.Count(out, "\n") != n+1 {
		t.Error(out)
	}

	lib := endorse.NewLibrary()
	if problems, err := lib.Load(os.DirFS(folder), nil); err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	c, err := endorse.Offline(lib, v.Anchors(), now)
	if err != nil {
		t.Fatal(err)
	}
	report, err := v.Chip().Report([64]byte{}, simulate.SNPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	res := c.AppraiseSNP(t.Context(), snp.Evidence{Report: report}, snp.Want{}, v.Anchors(), now)
	if !res.Genuine() {
		t.Fatal(res.Checks.Failed())
	}
	put("bundle.json", bundleWith(t, res.Claims))
	put("without.json", bundleWith(t, map[string]any{}))

	bundleFile, out := filepath.Join(dir, "bundle.json"), filepath.Join(dir, "out")
	if said := coffer("", "export", "--bundle", bundleFile, "--from", folder, "-o", out); !strings.Contains(said, "3 endorsements") {
		t.Error(said)
	}
	exported := endorse.NewLibrary()
	if problems, err := exported.Load(os.DirFS(out), nil); err != nil || len(problems) > 0 || len(exported.All()) != 3 {
		t.Errorf("exported %d, %v, %v", len(exported.All()), problems, err)
	}
	coffer("used no endorsements", "export", "--bundle", filepath.Join(dir, "without.json"), "--from", folder, "-o", out)
	if err := os.RemoveAll(filepath.Join(folder, "crl")); err != nil {
		t.Fatal(err)
	}
	partial := filepath.Join(dir, "partial")
	coffer("no longer has crl vcek/v1/Genoa/crl sha384:", "export", "--bundle", bundleFile, "--from", folder, "-o", partial)
	if _, err := os.Stat(partial); err == nil {
		t.Error("half of an export was written")
	}
}

func bundleWith(t *testing.T, claims map[string]any) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner("verifier", key)
	if err != nil {
		t.Fatal(err)
	}
	token, err := s.Sign(receipt.TypeResult, receipt.Result{Issuer: "verifier", Submods: map[string]receipt.Appraisal{"cpu0": {Claims: claims}}})
	if err != nil {
		t.Fatal(err)
	}
	b := bundle.NewBuilder()
	if err := b.Add(bundle.Result, []byte(token)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Statement("job", plan.Sum(nil), bundle.Outcome{State: bundle.Failed, Stage: bundle.StageStart, Reason: "x"}, []bundle.Step{{Stage: bundle.StageStart, Outcome: bundle.StepFailed}}); err != nil {
		t.Fatal(err)
	}
	file, err := b.Finish([]byte{1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func encode(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// lastPEM returns how many blocks there are, and the last.
func lastPEM(b []byte) (n int, der []byte) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return n, der
		}
		n, der = n+1, block.Bytes
	}
}
