package bench

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// startUps is how often the command is started, after once that is not measured.
const startUps = 21

// startUp measures what coffer --help takes, and beside it, in the same rounds, the
// start of a program that does nothing.
func startUp(t *testing.T) []row {
	bin := os.Getenv("COFFER_BIN")
	if bin == "" {
		t.Skip("COFFER_BIN is not set; run make bench")
	}
	run := func(name string, args ...string) func() time.Duration {
		return func() time.Duration {
			cmd := exec.Command(name, args...)
			cmd.Stdout = io.Discard
			began := time.Now()
			if err := cmd.Run(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			return time.Since(began)
		}
	}
	median, _ := rounds(t, startUps, func(s sample) float64 { return float64(s[0]) / float64(s[1]) }, run(filepath.Join(bin, "coffer"), "--help"), run("/bin/true"))
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return []row{
		atMost("coffer --help, start to end", ms(median[0]), "ms", 50),
		info("floor: /bin/true, start to end", ms(median[1]), "ms"),
	}
}
