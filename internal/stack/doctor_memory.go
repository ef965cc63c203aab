package stack

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"slices"
	"strings"
)

// checkInitOnFree asks whether the kernel zeroes pages that come back to it. A
// holder zeroes its own; those of a holder that was killed go back as they are.
func (m machine) checkInitOnFree() Finding {
	cmdline, err := os.ReadFile(m.at("/proc/cmdline"))
	if err != nil {
		return Finding{Name: "init on free", Outcome: Warn, Found: err.Error(), Advice: "coffer needs /proc"}
	}
	on, found := initOnFree(string(cmdline), m.kernelConfig())
	if on {
		return Finding{Name: "init on free", Outcome: OK, Found: found}
	}
	return Finding{
		Name: "init on free", Outcome: Warn, Found: found,
		Advice: "boot with init_on_free=1: the memory of a holder that is killed is zeroed only when somebody else gets it",
	}
}

// initOnFree says whether pages are zeroed as they are freed, by the kernel's
// command line, else by how it was built (CONFIG_INIT_ON_FREE_DEFAULT_ON), of which
// config is empty if nobody says.
func initOnFree(cmdline string, config []byte) (on bool, found string) {
	words := strings.Fields(cmdline)
	// Whatever comes after "--" is for the first program. The last word counts.
	if i := slices.Index(words, "--"); i >= 0 {
		words = words[:i]
	}
	for _, w := range slices.Backward(words) {
		value, ok := strings.CutPrefix(w, "init_on_free=")
		if !ok {
			continue
		}
		return slices.Contains([]string{"1", "y", "Y", "on"}, value), w + " on the kernel's command line"
	}
	if len(config) == 0 {
		return false, "not on the kernel's command line"
	}
	if bytes.Contains(config, []byte("\nCONFIG_INIT_ON_FREE_DEFAULT_ON=y\n")) {
		return true, "the kernel's default"
	}
	return false, "off"
}

// maxConfig bounds a kernel's configuration, in bytes.
const maxConfig = 4 << 20

// kernelConfig is how the running kernel was built, empty if it does not say.
func (m machine) kernelConfig() []byte {
	if f, err := os.Open(m.at("/proc/config.gz")); err == nil {
		defer f.Close()
		if z, err := gzip.NewReader(bufio.NewReader(f)); err == nil {
			if b, err := io.ReadAll(io.LimitReader(z, maxConfig)); err == nil {
				return b
			}
		}
	}
	b, err := os.ReadFile(m.at("/boot/config-" + m.release))
	if err != nil {
		return nil
	}
	return b
}
