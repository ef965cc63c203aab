package seal

import (
	"crypto/fips140"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// The format works in the FIPS 140-3 mode of Go's toolchain (GODEBUG=fips140=on), and
// is the same there: what is sealed in that mode is what the vectors say.
func TestFIPSMode(t *testing.T) {
	tests := []string{"TestFIPSModeIsOn", "TestVectors", "TestRoundTrip", "TestReadAt", "TestChunkAttacks", "TestKeyCommitment", "TestCheckpointRecord"}
	c := exec.Command(os.Args[0], "-test.v", "-test.run", "^("+strings.Join(tests, "|")+")$") //nolint:gosec // this test again
	c.Env = append(os.Environ(), "GODEBUG=fips140=on")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range tests {
		if !strings.Contains(string(out), "--- PASS: "+name+" ") {
			t.Errorf("%s did not run in FIPS mode", name)
		}
	}
}

// TestFIPSModeIsOn runs in TestFIPSMode's process.
func TestFIPSModeIsOn(t *testing.T) {
	if !fips140.Enabled() {
		t.Skip("FIPS 140-3 mode is off")
	}
}
