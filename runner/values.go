package runner

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/bootkey"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
)

const (
	valuesPurpose = "coffer/v1 submission"
	// maxValues bounds a file of sealed values, in bytes.
	maxValues = 2*jobspec.MaxSize + 1<<20
)

// Values keeps what a waiting job needs and the journal cannot be believed about:
// who submitted it, and its environment values. There is one sealed file for each
// job, under a key of this boot: the disk has it only sealed, nobody can make one,
// and after a boot nobody can open it. A nil *Values keeps nothing.
type Values struct {
	dir string
	key *bootkey.Key
}

// submission is what is kept of one job.
type submission struct {
	Submitter string `json:"submitter"`
	Attempt   int    `json:"attempt"`
	RetryOf   string `json:"retryOf,omitempty"`
	// Spent is what was used of the job's budget before Began, which is when this
	// attempt got its room, and zero before.
	Spent time.Duration `json:"spentNanos,omitempty"`
	Began time.Time     `json:"began,omitzero"`
	// Before is the digest of the statement of the attempt before.
	Before plan.Digest       `json:"before,omitempty"`
	Env    map[string]string `json:"env,omitempty"`
	// Outcome is how the job ended, from when its record is being made.
	Outcome *journal.Job `json:"outcome,omitempty"`
}

// OpenValues returns the values below dir, which is made if it is not there.
func OpenValues(dir string, key *bootkey.Key) (*Values, error) {
	if key == nil {
		return nil, errors.New("keep submissions: no key")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("keep submissions: %w", err)
	}
	return &Values{dir, key}, nil
}

func (v *Values) path(job string) string { return filepath.Join(v.dir, job) }

// partial is the file of a job that is being written.
func (v *Values) partial(job string) string { return v.path("." + job) }

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("drop submission: %w", err)
	}
	return nil
}

// keep seals what is kept of a job.
func (v *Values) keep(job string, p plan.Digest, s submission) error {
	if v == nil {
		return nil
	}
	aead, err := v.key.AEAD([]byte(job), valuesPurpose)
	if err != nil {
		return fmt.Errorf("keep submission: %w", err)
	}
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("keep submission: %w", err)
	}
	sealed := aead.Seal(nil, nil, b, []byte(p)) // #nosec G407 -- the cipher draws the nonce
	whole := v.partial(job)
	err = os.WriteFile(whole, sealed, 0o600)
	if err == nil {
		err = os.Rename(whole, v.path(job))
	}
	if err != nil {
		// A full disk keeps part of a file, which would be nobody's.
		return errors.Join(fmt.Errorf("keep submission: %w", err), remove(whole))
	}
	return nil
}

// conclude keeps how a job ended, so that whoever concludes it says the same.
func (v *Values) conclude(job string, p plan.Digest, end journal.Job) error {
	if v == nil {
		return nil
	}
	return v.edit(job, p, func(s *submission) { s.Outcome = &end })
}

// edit changes what is kept of a job.
func (v *Values) edit(job string, p plan.Digest, change func(*submission)) error {
	s, err := v.get(job, p)
	if err != nil {
		return err
	}
	change(&s)
	return v.keep(job, p, s)
}

// errValues means that what was kept of a job is lost.
var errValues = errors.New("who submitted it, and its environment, cannot be known any more: the machine was started anew, or they were never kept; submit it again")

// get opens what is kept of a job. What belongs to another job or plan is not
// found.
func (v *Values) get(job string, p plan.Digest) (submission, error) {
	if v == nil {
		return submission{}, errValues
	}
	aead, err := v.key.AEAD([]byte(job), valuesPurpose)
	if err != nil {
		return submission{}, fmt.Errorf("open submission: %w", err)
	}
	st, err := os.Stat(v.path(job))
	if err != nil || st.Size() > maxValues {
		return submission{}, errValues
	}
	sealed, err := os.ReadFile(v.path(job))
	if err != nil {
		return submission{}, errValues
	}
	b, err := aead.Open(nil, nil, sealed, []byte(p))
	if err != nil {
		return submission{}, errValues
	}
	var s submission
	if err := json.Unmarshal(b, &s); err != nil {
		return submission{}, fmt.Errorf("open submission: %w", err)
	}
	return s, nil
}

// drop forgets a job's values.
func (v *Values) drop(job string) error {
	if v == nil {
		return nil
	}
	// An agent that was killed in the middle has left the second.
	return errors.Join(remove(v.path(job)), remove(v.partial(job)))
}

// only drops the values of all jobs but these.
func (v *Values) only(jobs map[string]bool) error {
	if v == nil {
		return nil
	}
	files, err := os.ReadDir(v.dir)
	if err != nil {
		return fmt.Errorf("drop submissions: %w", err)
	}
	var errs []error
	for _, f := range files {
		if !jobs[f.Name()] {
			errs = append(errs, v.drop(f.Name()))
		}
	}
	return errors.Join(errs...)
}
