package cache

import (
	"bytes"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

// A manifest whose digest is in the plan is not good for that alone.
func TestRefusedManifests(t *testing.T) {
	s := newStore()
	s.put(t, at, sizes...)
	b := s.objects[at.Object(manifestName)]
	if _, err := parseManifest(b, plan.Sum(b)); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct{ old, new, want string }{
		"a space":                         {`"asset":`, `"asset": `, "canonical"},
		"a field twice":                   {`"asset":"llama"`, `"asset":"x","asset":"llama"`, "canonical"},
		"a field of another version":      {`"asset":`, `"answer":42,"asset":`, "answer"},
		"another version":                 {`/v1"`, `/v2"`, "version"},
		"no asset":                        {`"asset":"llama"`, `"asset":""`, "no asset"},
		"no salt":                         {`"salt":"`, `"salt":"","x":"`, "x"},
		"chunks of no power of two":       {`"chunkSize":65536`, `"chunkSize":65537`, "power of two"},
		"chunks too small":                {`"chunkSize":65536`, `"chunkSize":32768`, "power of two"},
		"chunks that exhaust memory":      {`"chunkSize":65536`, `"chunkSize":33554432`, "power of two"},
		"a negative chunk":                {`"chunkSize":65536`, `"chunkSize":-65536`, "power of two"},
		"an id that is a path":            {`"id":"000001"`, `"id":"../../x"`, "has id"},
		"an id twice":                     {`"id":"000001"`, `"id":"000000"`, "has id"},
		"no root":                         {`"merkleRoot":"sha256:`, `"merkleRoot":"`, "merkle root"},
		"a negative size":                 {`"cipherSize":4112`, `"cipherSize":-4112`, "no size"},
		"a size without a tag":            {`"cipherSize":4112`, `"cipherSize":4111`, "no size"},
		"a size that ends in a tag":       {`"cipherSize":4112`, `"cipherSize":69664`, "no size"},
		"a size that no offset can reach": {`"cipherSize":4112`, `"cipherSize":9000000000000000`, "no size"},
	} {
		changed := bytes.Replace(b, []byte(row.old), []byte(row.new), 1)
		if bytes.Equal(changed, b) {
			t.Fatalf("%s changes nothing", name)
		}
		if _, err := parseManifest(changed, plan.Sum(changed)); !says(err, row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parseManifest(b, ""); err == nil {
		t.Error("no digest holds a manifest")
	}
}
