package serve

import (
	"log/slog"

	"github.com/transparency-dev/formats/log"
	"k8s.io/klog/v2"
)

// sizeAndRoot reads a checkpoint's text.
func sizeAndRoot(text []byte) (uint64, []byte, error) {
	var c log.Checkpoint
	if _, err := c.Unmarshal(text); err != nil {
		return 0, nil, err
	}
	return c.Size, c.Hash, nil
}

// LibraryLog sends what Tessera has to say to l. It is process-wide: a program
// calls it once, before it makes a Log.
func LibraryLog(l *slog.Logger) { klog.SetSlogLogger(l) }
