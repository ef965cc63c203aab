package serve

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	cosignature "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"

	"github.com/coffer-run/coffer/attest/translog"
)

// Observer is a witness (C2SP tlog-witness): it cosigns a log's checkpoint only if
// it follows the one that it cosigned last, so that whoever trusts it knows that
// the log shows everyone one history. It is safe for concurrent use, also by several
// processes over one folder.
type Observer struct {
	dir    string
	signer note.Signer
	log    *slog.Logger
	logs   map[string]translog.Trust
	// mu makes reading, writing and signing one step, and witnessLock does so beside
	// other processes.
	mu sync.Mutex
}

// witnessLock is held by the one that cosigns.
const witnessLock = "cosign.lock"

// alone waits until nobody else cosigns with what the folder has.
func (o *Observer) alone() (done func(), err error) {
	o.mu.Lock()
	f, err := os.OpenFile(filepath.Join(o.dir, witnessLock), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err == nil {
			return func() { _ = f.Close(); o.mu.Unlock() }, nil
		}
		_ = f.Close()
	}
	o.mu.Unlock()
	return nil, fmt.Errorf("lock the witness's folder: %w", err)
}

// NewObserver returns a witness that keeps the last checkpoint of each log in dir,
// which must exist, and follows the logs of these keys (C2SP signed-note).
func NewObserver(dir, key string, logKeys []string, log *slog.Logger) (*Observer, error) {
	if dir == "" || len(logKeys) == 0 || log == nil {
		return nil, errors.New("a witness needs a folder, the keys of logs and a logger")
	}
	s, err := cosignature.NewSignerForCosignatureV1(strings.TrimSpace(key))
	if err != nil {
		return nil, errors.New("witness key: not an Ed25519 private key in the form of C2SP signed-note")
	}
	o := &Observer{dir: dir, signer: s, log: log, logs: map[string]translog.Trust{}}
	for _, k := range logKeys {
		t, err := translog.NewTrust(k, nil, 0)
		if err != nil {
			return nil, err
		}
		if _, twice := o.logs[t.Origin()]; twice {
			return nil, fmt.Errorf("log %s is named twice", t.Origin())
		}
		o.logs[t.Origin()] = t
	}
	return o, nil
}

// conflict is the answer to a request that starts from another size than the last
// one cosigned.
type conflict struct{ last uint64 }

func (c conflict) Error() string { return fmt.Sprintf("the last size cosigned is %d", c.last) }

// answer is an error with the status that the protocol has for it.
type answer struct {
	code int
	err  error
}

func (a answer) Error() string { return a.err.Error() }
func (a answer) Unwrap() error { return a.err }

// Cosign checks a request and returns the line with the cosignature. The
// checkpoint is on disk before that exists.
func (o *Observer) Cosign(ctx context.Context, req translog.WitnessRequest) ([]byte, error) {
	origin, _, _ := strings.Cut(string(req.Checkpoint), "\n")
	trust, ok := o.logs[origin]
	if !ok {
		return nil, answer{http.StatusNotFound, fmt.Errorf("log %.80q is not followed here", origin)}
	}
	c, err := trust.Open(req.Checkpoint)
	if err != nil {
		return nil, answer{http.StatusForbidden, err}
	}
	if req.Old > c.Size {
		return nil, answer{http.StatusBadRequest, fmt.Errorf("old size %d, and the checkpoint has %d", req.Old, c.Size)}
	}
	done, err := o.alone()
	if err != nil {
		return nil, err
	}
	defer done()
	last, known, err := o.last(trust)
	switch {
	case err != nil:
		return nil, err
	case req.Old != last.Size:
		return nil, conflict{last.Size}
	}
	if known {
		if err := c.Follows(last, req.Proof); err != nil {
			o.log.LogAttrs(ctx, slog.LevelError, "the log shows another history than before", slog.String("log", origin), slog.Uint64("last", last.Size), slog.Uint64("size", c.Size), slog.String("error", err.Error()))
			if last.Size == c.Size {
				return nil, answer{http.StatusConflict, err}
			}
			return nil, answer{http.StatusUnprocessableEntity, err}
		}
	} else if len(req.Proof) > 0 {
		return nil, answer{http.StatusUnprocessableEntity, errors.New("a proof from the empty tree has no hashes")}
	}
	if err := writeFile(o.file(origin), req.Checkpoint); err != nil {
		return nil, err
	}
	signed, err := note.Sign(&note.Note{Text: text(req.Checkpoint)}, o.signer)
	if err != nil {
		return nil, fmt.Errorf("cosign: %w", err)
	}
	_, line, _ := strings.Cut(string(signed), "\n\n")
	return []byte(line), nil
}

// text is what a signed note says, without its signatures.
func text(signed []byte) string {
	s, _, _ := strings.Cut(string(signed), "\n\n")
	return s + "\n"
}

func (o *Observer) file(origin string) string {
	sum := sha256.Sum256([]byte(origin))
	return filepath.Join(o.dir, hex.EncodeToString(sum[:])+".checkpoint")
}

// last is the checkpoint of a log that was cosigned last.
func (o *Observer) last(trust translog.Trust) (translog.Checkpoint, bool, error) {
	b, err := os.ReadFile(o.file(trust.Origin()))
	if errors.Is(err, fs.ErrNotExist) {
		return translog.Checkpoint{}, false, nil
	}
	if err != nil {
		return translog.Checkpoint{}, false, fmt.Errorf("read the last checkpoint: %w", err)
	}
	c, err := trust.Open(b)
	if err != nil {
		return translog.Checkpoint{}, false, fmt.Errorf("read the last checkpoint: %w", err)
	}
	return c, true, nil
}

// writeFile puts b into path, whole or not at all, and durably.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".checkpoint-*")
	if err != nil {
		return fmt.Errorf("keep checkpoint: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("keep checkpoint: %w", err), os.Remove(f.Name()))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("keep checkpoint: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// ServeHTTP answers POST /add-checkpoint.
func (o *Observer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/add-checkpoint" {
		http.NotFound(w, r)
		return
	}
	if r.Method != http.MethodPost {
		http.Error(w, "want POST", http.StatusMethodNotAllowed)
		return
	}
	rc := http.NewResponseController(w)
	// Not every ResponseWriter has deadlines; a server's has.
	_ = rc.SetReadDeadline(time.Now().Add(readTimeout))
	_ = rc.SetWriteDeadline(time.Now().Add(writeTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, translog.MaxWitnessRequest))
	if err != nil {
		http.Error(w, "the request could not be read", http.StatusBadRequest)
		return
	}
	req, err := translog.ParseWitnessRequest(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	line, err := o.Cosign(r.Context(), req)
	var a answer
	var c conflict
	switch {
	case err == nil:
		_, _ = w.Write(line)
	case errors.As(err, &c):
		w.Header().Set("Content-Type", "text/x.tlog.size")
		w.WriteHeader(http.StatusConflict)
		_, _ = io.WriteString(w, strconv.FormatUint(c.last, 10)+"\n")
	case errors.As(err, &a):
		http.Error(w, a.Error(), a.code)
	default:
		o.log.LogAttrs(r.Context(), slog.LevelError, "not answered", slog.String("error", err.Error()))
		http.Error(w, "internal error of the witness", http.StatusInternalServerError)
	}
}
