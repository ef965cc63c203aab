package tpm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/coffer-run/coffer/attest/vtpm"
)

// File is one of the agent's files to measure.
type File struct {
	// Name is what the event log calls it: "agent", "holder", "runsc", ...
	Name string
	Path string
}

// Events digests files in their order.
func Events(files []File) ([]vtpm.Event, error) {
	out := make([]vtpm.Event, 0, len(files))
	for _, f := range files {
		d, err := digest(f.Path)
		if err != nil {
			return nil, fmt.Errorf("measure %s: %w", f.Name, err)
		}
		out = append(out, vtpm.Event{PCR: vtpm.AgentPCR, Name: f.Name, Digest: d, MeasuredBy: vtpm.MeasuredBySelf})
	}
	return out, nil
}

func digest(path string) (vtpm.Digest, error) {
	f, err := os.Open(path) // #nosec G304 -- the agent names its own files
	if err != nil {
		return vtpm.Digest{}, err
	}
	defer f.Close() //nolint:errcheck // read only
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return vtpm.Digest{}, err
	}
	return vtpm.Digest(h.Sum(nil)), nil
}

// Measure extends PCR 14 with events that this boot has not seen and returns the
// encoded event log, which is also kept at logPath.
//
// Where firmware and boot loader left PCR 14 is what their log says, and zero
// without one: shim measures into it the lists of keys that the machine's owner
// enrolled. The event log is durable before the first extension, so at any later
// moment, and after kill -9 at any moment, PCR 14 is the replay of a beginning of
// the log; the rest is extended then. A PCR as the boot left it is a new boot:
// the old log is dropped. Any other value is an error. A file that changed since
// it was measured in this boot is measured again: the log lists everything that
// ran.
func (t *TPM) Measure(ctx context.Context, logPath string, events []vtpm.Event) ([]byte, error) {
	if len(events) == 0 {
		return nil, errors.New("measure: nothing to measure")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	log, err := do(ctx, t, func(tr transport.TPM) ([]byte, error) { return measure(tr, logPath, t.start, events) })
	if err != nil {
		return nil, fmt.Errorf("measure: %w", err)
	}
	t.log = log
	return log, nil
}

func measure(tr transport.TPM, logPath string, start [32]byte, events []vtpm.Event) ([]byte, error) {
	pcrs, err := readPCRs(tr, vtpm.AgentPCR)
	if err != nil {
		return nil, err
	}
	pcr := pcrs[vtpm.AgentPCR]

	var stored []vtpm.Event
	done := 0
	if pcr != start {
		stored, err = loadLog(logPath)
		if err != nil {
			return nil, fmt.Errorf("PCR %d is %x, the boot's log leaves it at %x, and the agent's event log cannot be read; if shim measured into it, name the firmware's log, or restart the machine: %w",
				vtpm.AgentPCR, pcr, start, err)
		}
		for done = 1; done <= len(stored) && vtpm.Replay(start, stored[:done]) != pcr; done++ {
		}
		if done > len(stored) {
			return nil, fmt.Errorf("PCR %d is %x: neither %x, where the boot's log leaves it, nor what the %d events of %s lead to from there; something else extended it in this boot; restart the machine",
				vtpm.AgentPCR, pcr, start, len(stored), logPath)
		}
	}

	last := map[string]vtpm.Digest{}
	for _, e := range stored {
		last[e.Name] = e.Digest
	}
	all := stored
	for _, e := range events {
		if d, seen := last[e.Name]; !seen || d != e.Digest {
			all = append(all, e)
			last[e.Name] = e.Digest
		}
	}
	log, err := vtpm.EncodeLog(all)
	if err != nil {
		return nil, err
	}
	if err := storeLog(logPath, log); err != nil {
		return nil, fmt.Errorf("store event log: %w", err)
	}
	for _, e := range all[done:] {
		x := e.Extension()
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)}, //nolint:gosec // 14
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
				{HashAlg: tpm2.TPMAlgSHA256, Digest: x[:]},
			}},
		}.Execute(tr)
		if err != nil {
			return nil, fmt.Errorf("extend PCR %d with %s: %w", e.PCR, e.Name, err)
		}
	}
	pcrs, err = readPCRs(tr, vtpm.AgentPCR)
	if err != nil {
		return nil, err
	}
	if got, want := pcrs[vtpm.AgentPCR], vtpm.Replay(start, all); got != want {
		return nil, fmt.Errorf("PCR %d is %x after measuring, its event log replays to %x; restart the machine", vtpm.AgentPCR, got, want)
	}
	return log, nil
}

// firmwareLog reads what the kernel keeps of the log of firmware and boot loader,
// and where that left PCR 14. Whether it explains the other PCRs is for the
// verifier.
func firmwareLog(path string) (log []byte, left [32]byte, err error) {
	f, err := os.Open(path) // #nosec G304 -- the configuration names it
	if err != nil {
		return nil, left, err
	}
	defer f.Close() //nolint:errcheck // read only
	// The kernel's files of this kind say that they have no size.
	if log, err = io.ReadAll(io.LimitReader(f, vtpm.MaxTCGLog+1)); err != nil {
		return nil, left, err
	}
	l, err := vtpm.ParseTCGLog(log)
	if err != nil {
		return nil, left, fmt.Errorf("%s: %w", path, err)
	}
	return log, l.Replay()[vtpm.AgentPCR], nil
}

func loadLog(path string) ([]vtpm.Event, error) {
	f, err := os.Open(path) // #nosec G304 -- the agent names its own file
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing", path)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, vtpm.MaxLog+1))
	if err != nil {
		return nil, err
	}
	return vtpm.ParseLog(b)
}

// storeLog replaces the log as a whole, durably.
func storeLog(path string, log []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(log)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir) // #nosec G304 -- the folder of the agent's own file
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
