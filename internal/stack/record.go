package stack

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// recordVersion is the only version of run.json there is.
const recordVersion = "coffer.run/run/v1"

// record is run.json: what runs, in the order in which it was started. It is
// written after every start, so that `down` cleans up after a killed `up`.
type record struct {
	Version string `json:"version"`
	// Boot is the kernel's boot id: start times mean nothing in another boot.
	Boot      string    `json:"boot"`
	Processes []process `json:"processes"`
}

func (l Layout) recordFile() string { return l.path("run.json") }

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// readRecord returns the record of this boot, empty if there is none.
func (l Layout) readRecord() (record, error) {
	if err := l.trusted(); err != nil {
		return record{}, err
	}
	boot, err := bootID()
	if err != nil {
		return record{}, err
	}
	empty := record{Version: recordVersion, Boot: boot}
	var r record
	if err := readJSON(l.recordFile(), &r); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return empty, nil
		}
		return record{}, err
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("%s has version %.40q: want %q", l.recordFile(), r.Version, recordVersion)
	}
	if r.Boot != boot {
		return empty, nil
	}
	return r, nil
}

func (l Layout) writeRecord(r record) error { return writeJSON(l.recordFile(), r) }

// writeJSON replaces path by v, whole or not at all.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return keyfile.Write(path, append(b, '\n'))
}

// lock lets one `up` or `down` at a time work on a folder. The kernel drops it
// with its process, so that a killed one blocks nobody.
func (l Layout) lock() (unlock func(), err error) {
	f, err := os.OpenFile(l.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another `coffer up` or `coffer down` is at work in %s: wait for it", l.Dir)
		}
		return nil, fmt.Errorf("lock %s: %w", l.Dir, err)
	}
	return func() { _ = f.Close() }, nil
}
