package hold_test

import (
	"bytes"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

// Inputs of this size are opened while the container starts.
func TestLargeInput(t *testing.T) {
	files := map[string][]byte{"big": pattern(130 * mib), "small": pattern(1000)}
	key := keys.GenerateDataKey()
	dir, digest := sealed(t, key, "a", files)
	opening := func(t *testing.T) (h *holder, read map[string]<-chan []byte) {
		h = start(t)
		must(t, h.c.Input(t.Context(), holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
		must(t, h.deliver(key, "a"))
		d, err := h.c.Decrypt(t.Context())
		if err != nil || !d.Opening || d.Files != 2 || d.Bytes != 130*mib+1000 {
			t.Fatalf("%+v %v", d, err)
		}
		h.trace().start()
		h.waitStarted()
		read = map[string]<-chan []byte{}
		for name := range files {
			out := make(chan []byte, 1)
			read[name] = out
			c := exec.Command("cat", h.path("inputs/in", name))
			go func() {
				b, _ := c.Output()
				out <- b
			}()
		}
		return h, read
	}
	t.Run("is read whole", func(t *testing.T) {
		h, read := opening(t)
		for name, want := range files {
			if got := <-read[name]; !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, other than sealed", name, len(got))
			}
		}
		if again, err := h.c.Decrypt(t.Context()); err != nil || !again.Opening {
			t.Errorf("asked again: %+v %v", again, err)
		}
		h.until("the inputs to be open", func() bool { return slices.Contains(h.kinds(), "inputs-open") })
		h.finish()
	})
	t.Run("is never read wrong, though the holder is killed", func(t *testing.T) {
		h, read := opening(t)
		must(t, h.cmd.Process.Kill())
		_ = h.cmd.Wait()
		for name, want := range files {
			if got := <-read[name]; !strings.HasPrefix(string(want), string(got)) {
				t.Errorf("%s: %d bytes, other than sealed", name, len(got))
			}
		}
	})
}
