package anchor_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"go/parser"
	"go/token"
	"io/fs"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/internal/anchorset"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
)

func TestVendorPinsTheRealRoots(t *testing.T) {
	s := anchor.Vendor()
	if s.Simulated() || s.Empty() {
		t.Error("the vendors' anchors are simulated or empty")
	}
	for p, dir := range map[anchor.Product]string{anchor.Milan: "milan-v2-vcek", anchor.Genoa: "genoa-v3-vcek", anchor.Turin: "turin-v5-vcek"} {
		der := vectortest.ReadPEM(t, "snp/"+dir+"/ark.pem")
		for _, q := range anchor.Products() {
			if s.ARK(q, der) != (p == q) {
				t.Errorf("root key of %s taken for that of %s, or refused", p, q)
			}
		}
		if s.ARK(p, der[:len(der)-1]) || s.ARK(p, vectortest.ReadPEM(t, "snp/"+dir+"/ask.pem")) {
			t.Errorf("another certificate taken for the root key of %s", p)
		}
	}
	device, rim := vectortest.ReadPEM(t, "roots/nvidia_device_root.pem"), vectortest.ReadPEM(t, "roots/nvidia_rim_root.pem")
	if !s.NVIDIADeviceRoot(device) || s.NVIDIADeviceRoot(rim) || !s.NVIDIARIMRoot(rim) || s.NVIDIARIMRoot(device) {
		t.Error("NVIDIA's roots are mixed up or refused")
	}
}

func TestEmptySetTrustsNothing(t *testing.T) {
	var s anchor.Set
	root, _ := ca(t, "root", nil, nil)
	if !s.Empty() || s.Simulated() || s.ARK(anchor.Genoa, nil) || s.NVIDIADeviceRoot(nil) || s.NVIDIARIMRoot(nil) {
		t.Error("the zero set trusts something")
	}
	if _, err := s.WithEKRoots(anchor.Discrete, root); err == nil {
		t.Error("the zero set takes endorsement key roots")
	}
	if err := s.Path([]*x509.Certificate{root, root}); err == nil {
		t.Error("the zero set accepts a chain")
	}
}

func simulation(t *testing.T) anchor.Set {
	t.Helper()
	s, err := anchor.FromSimulation(anchorset.Simulation{ARKs: map[string]anchorset.Fingerprint{"Genoa": {1}}, DeviceRoot: anchorset.Fingerprint{2}, RIMRoot: anchorset.Fingerprint{3}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSimulationMustBeComplete(t *testing.T) {
	if !simulation(t).Simulated() {
		t.Error("a simulation is not called simulated")
	}
	arks := map[string]anchorset.Fingerprint{"Genoa": {1}}
	for name, s := range map[string]anchorset.Simulation{
		"empty":           {},
		"no device root":  {ARKs: arks, RIMRoot: anchorset.Fingerprint{1}},
		"no RIM root":     {ARKs: arks, DeviceRoot: anchorset.Fingerprint{1}},
		"no AMD root":     {DeviceRoot: anchorset.Fingerprint{1}, RIMRoot: anchorset.Fingerprint{1}},
		"unknown product": {ARKs: map[string]anchorset.Fingerprint{"Rome": {1}}, DeviceRoot: anchorset.Fingerprint{1}, RIMRoot: anchorset.Fingerprint{1}},
	} {
		if set, err := anchor.FromSimulation(s); err == nil || !set.Empty() {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestEKRoots(t *testing.T) {
	root, key := ca(t, "root", nil, nil)
	intermediate, _ := ca(t, "intermediate", root, key)
	for name, tt := range map[string]struct {
		set   anchor.Set
		class anchor.Class
		certs []*x509.Certificate
		ok    bool
	}{
		"discrete under the vendors": {anchor.Vendor(), anchor.Discrete, []*x509.Certificate{root}, true},
		"software in a simulation":   {simulation(t), anchor.Software, []*x509.Certificate{root}, true},
		"software under the vendors": {anchor.Vendor(), anchor.Software, []*x509.Certificate{root}, false},
		"unknown class":              {anchor.Vendor(), "good", []*x509.Certificate{root}, false},
		"no class":                   {anchor.Vendor(), "", []*x509.Certificate{root}, false},
		"none":                       {anchor.Vendor(), anchor.Discrete, nil, false},
		"nil":                        {anchor.Vendor(), anchor.Discrete, []*x509.Certificate{nil}, false},
		"intermediate":               {anchor.Vendor(), anchor.Discrete, []*x509.Certificate{intermediate}, false},
	} {
		set, err := tt.set.WithEKRoots(tt.class, tt.certs...)
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil {
			continue
		}
		if c, ok := set.EKRoot(root.Raw); !ok || c != tt.class {
			t.Errorf("%s: root has class %q", name, c)
		}
		if _, ok := set.EKRoot(intermediate.Raw); ok {
			t.Errorf("%s: another certificate is a root", name)
		}
		if _, ok := tt.set.EKRoot(root.Raw); ok {
			t.Errorf("%s: the set that it was derived from changed", name)
		}
		if _, err := set.WithEKRoots(anchor.SVSM, root); err == nil {
			t.Errorf("%s: one root has two classes", name)
		}
	}
}

func TestPath(t *testing.T) {
	s := anchor.Vendor()
	root, rootKey := ca(t, "root", nil, nil)
	mid, midKey := ca(t, "mid", root, rootKey)
	leaf := issue(t, "leaf", mid, midKey, nil)
	otherRoot, otherKey := ca(t, "root", nil, nil)
	impostor, _ := ca(t, "mid", otherRoot, otherKey)
	noCA := issue(t, "mid", root, rootKey, nil)
	noSign := issue(t, "mid", root, rootKey, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true })
	critical := issue(t, "leaf", mid, midKey, func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
	})
	shortRoot, shortKey := ca(t, "short", nil, nil, func(c *x509.Certificate) { c.MaxPathLenZero = true })
	below, belowKey := ca(t, "below", shortRoot, shortKey)
	belowLeaf := issue(t, "leaf", below, belowKey, nil)

	good := []*x509.Certificate{leaf, mid, root}
	for range 2 { // the second time it is remembered
		if err := s.Path(good); err != nil {
			t.Error(err)
		}
	}
	for name, chain := range map[string][]*x509.Certificate{
		"none":                          nil,
		"root alone":                    {root},
		"leaf without its issuer":       {leaf, root},
		"another order":                 {mid, leaf, root},
		"impostor of the issuer's name": {leaf, impostor, otherRoot},
		"another root of the same name": {leaf, mid, otherRoot},
		"issuer that is no CA":          {leaf, noCA, root},
		"issuer that may not sign":      {leaf, noSign, root},
		"unknown critical extension":    {critical, mid, root},
		"path length":                   {belowLeaf, below, shortRoot},
		"too long":                      {leaf, mid, root, root, root, root, root, root, root},
	} {
		if err := s.Path(chain); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := anchor.CheckTimes(good, time.Now()); err != nil {
		t.Error(err)
	}
	for _, at := range []time.Time{time.Now().AddDate(-1, 0, 0), time.Now().AddDate(9, 0, 0)} {
		if err := anchor.CheckTimes(good, at); err == nil {
			t.Errorf("valid at %s", at)
		}
	}
}

// A binary that does not link attest/simulate must have no way to make a
// simulation's set.
func TestSimulateAloneMakesSimulations(t *testing.T) {
	allowed := map[string]bool{"anchor": true, "simulate": true}
	root := filepath.Join("..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			if strings.Contains(i.Path.Value, "attest/internal/anchorset") && !allowed[filepath.Base(filepath.Dir(path))] {
				t.Errorf("%s imports attest/internal/anchorset", path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func ca(t *testing.T, name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, edits ...func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := template(name)
	c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	for _, e := range edits {
		e(c)
	}
	if parent == nil {
		parent, parentKey = c, key
	}
	return sign(t, c, parent, &key.PublicKey, parentKey), key
}

func issue(t *testing.T, name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	c := template(name)
	c.KeyUsage = x509.KeyUsageDigitalSignature
	if edit != nil {
		edit(c)
	}
	return sign(t, c, parent, &parentKey.PublicKey, parentKey)
}

func template(name string) *x509.Certificate {
	return &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0)}
}

func sign(t *testing.T, c, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// What is remembered of a certificate is its content, and nothing that vouches
// for it.
func TestCertificatesAreRememberedByContent(t *testing.T) {
	s := simulation(t)
	root, key := ca(t, "root", nil, nil)
	leaf, _ := ca(t, "leaf", root, key)
	first, err := s.Certificate(leaf.Raw)
	if err != nil || !first.Equal(leaf) {
		t.Fatal("read another certificate:", err)
	}
	again, err := s.Certificate(bytes.Clone(leaf.Raw))
	if err != nil || again != first {
		t.Error("the same bytes were read again:", err)
	}
	other, err := s.Certificate(root.Raw)
	if err != nil || !other.Equal(root) {
		t.Error("another certificate was taken for one that is remembered:", err)
	}
	for i := range leaf.Raw {
		b := bytes.Clone(leaf.Raw)
		b[i] ^= 1
		if c, err := s.Certificate(b); err == nil && (c == first || !bytes.Equal(c.Raw, b)) {
			t.Fatalf("byte %d was changed, and the certificate before was given", i)
		}
	}
	if _, err := s.Certificate(leaf.Raw[:len(leaf.Raw)-1]); err == nil {
		t.Error("half a certificate was read")
	}
	if err := s.Path([]*x509.Certificate{first, again}); err == nil {
		t.Error("a certificate that is remembered was taken for a good chain")
	}
}

// A caller may use its memory again. What is remembered under the name of a
// stranger's certificate must not become the certificate that lies there next: the
// chain would be known for good, and the key the stranger's.
func TestRememberedCertificatesAreNotTheCallersMemory(t *testing.T) {
	s := simulation(t)
	root, key := ca(t, "root", nil, nil)
	good, _ := ca(t, "leaf", root, key)
	if err := s.Path([]*x509.Certificate{good, root}); err != nil {
		t.Fatal(err)
	}
	// Signatures differ in length: this one is to fill the same place.
	strangersRoot, strangersKey := ca(t, "root", nil, nil)
	evil, _ := ca(t, "leaf", strangersRoot, strangersKey)
	for range 200 {
		if len(evil.Raw) == len(good.Raw) {
			break
		}
		evil, _ = ca(t, "leaf", strangersRoot, strangersKey)
	}
	if len(evil.Raw) != len(good.Raw) {
		t.Fatal("no certificate of the same length")
	}
	memory := append(bytes.Clone(evil.Raw), make([]byte, 64<<10)...)
	first, err := s.Certificate(memory[:len(evil.Raw)])
	if err != nil || s.Path([]*x509.Certificate{first, root}) == nil {
		t.Fatal("the stranger's chain is good:", err)
	}
	copy(memory, good.Raw)
	again, err := s.Certificate(evil.Raw)
	if err != nil {
		t.Fatal(err)
	}
	if s.Path([]*x509.Certificate{again, root}) == nil {
		t.Error("the stranger's key is taken for that of a chain that is known")
	}
	if cap(again.Raw) > 4<<10 {
		t.Errorf("a certificate of %d bytes keeps %d", len(again.Raw), cap(again.Raw))
	}
}

// A list is remembered by the text that it was read from, whole, and only if it was
// read.
func TestListsAreRememberedByTheirText(t *testing.T) {
	s := simulation(t)
	root, key := ca(t, "root", nil, nil)
	leaf, _ := ca(t, "leaf", root, key)
	reads := 0
	read := func(b []byte) ([]*x509.Certificate, error) {
		reads++
		switch string(b) {
		case "both":
			return []*x509.Certificate{leaf, root}, nil
		case "root":
			return []*x509.Certificate{root}, nil
		}
		return nil, errors.New("no list")
	}
	long := bytes.Repeat([]byte("x"), 32<<10)
	for _, tc := range []struct {
		text  string
		want  int
		reads int
	}{{"both", 2, 1}, {"both", 2, 1}, {"root", 1, 2}, {"both", 2, 2}, {"root", 1, 2}, {"", 0, 3}, {"", 0, 4}, {string(long), 0, 5}, {string(long), 0, 6}} {
		got, err := s.Certificates([]byte(tc.text), read)
		if len(got) != tc.want || (err == nil) != (tc.want > 0) || reads != tc.reads {
			t.Errorf("%.10q: %d certificates, %v, after %d reads; want %d after %d", tc.text, len(got), err, reads, tc.want, tc.reads)
		}
	}
	// Who appends to a list changes no other's.
	mine, _ := s.Certificates([]byte("root"), read)
	_ = append(mine, leaf)
	if again, _ := s.Certificates([]byte("root"), read); len(again) != 1 {
		t.Error("a remembered list grew")
	}
	if _, err := (anchor.Set{}).Certificates([]byte("both"), read); err != nil || reads != 7 {
		t.Error("an empty set remembers")
	}
}
