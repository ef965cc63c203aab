package runner

import (
	"context"
	"crypto/sha512"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/device"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// Job is a job that was admitted. Only Submit and an agent's restart make one.
type Job struct {
	id        string
	submitter string
	spec      jobspec.Spec
	plan      plan.Plan
	canonical []byte
	digest    plan.Digest
	admitted  bool // its names were resolved by this agent
	image     sandbox.Image
	signature []byte // of the image, as the bundle has it; nil where nobody must sign
	sbom      []byte // the image's bill of materials, as the bundle has it; nil for none
	env       []string
	runDir    string
	feed      *feed
	cancel    context.CancelCauseFunc
	redacted  []byte
	lease     leaseState
	reattest  reattesting

	submitted time.Time
	attempt   int
	retryOf   string // the first attempt's id, empty for itself
	notBefore time.Time
	gang      gangState
	spent     time.Duration // of the budget, by the attempts before this one
	roomAt    time.Time     // when it got its room; zero before
	before    plan.Digest   // of the statement of the attempt before
	place     *place

	// What follows belongs to the goroutine that runs the job.
	placed bool // the job has entered the queue
	gpus   *device.Use
	holder *holder.Holder
	// opening is the holder while it may be decrypting; anybody may load it.
	opening  atomic.Pointer[holder.Holder]
	sandbox  *sandbox.Sandbox
	egress   *jobEgress // nil without egress
	record   record
	timeline []bundle.Step
	at       bundle.Stage
	exitCode int

	// The pumps write logs, seen and checkpoints; conclude reads them after
	// waiting for the pumps.
	pumps       sync.WaitGroup
	logs        [2]logDigest // stdout, stderr
	seen        uint64       // newest checkpoint that watchers know of
	pumped      bool         // the pumps have begun
	endRecorded bool         // Values has how the job ended
	checkpoints bundle.Step
	anchors     *anchors
	metrics     metrics
	watching    watching
	reported    reported
	traceLost   chan struct{} // closed by the event pump, also when it fails
	finished    chan struct{} // closed by conclude
}

func newJob(id, submitter string) *Job {
	return &Job{
		id: id, submitter: submitter, attempt: 1, gang: gangState{ready: make(chan struct{})}, anchors: newAnchors(), traceLost: make(chan struct{}), finished: make(chan struct{}),
		logs: [2]logDigest{{hash: sha512.New384()}, {hash: sha512.New384()}},
	}
}

// record is what the stages left behind for the bundle; none of it is secret.
type record struct {
	Sandbox []byte `json:"sandbox,omitempty"`
	// ImageSignature and ImageSBOM are those of which Sandbox speaks.
	ImageSignature []byte   `json:"imageSignature,omitempty"`
	ImageSBOM      []byte   `json:"imageSbom,omitempty"`
	Evidence       []byte   `json:"evidence,omitempty"`
	Result         string   `json:"result,omitempty"`
	Releases       []string `json:"releases,omitempty"`
	// ResultSeconds and LeaseSeconds are the last release's (receipt.Release).
	ResultSeconds int64 `json:"resultSeconds,omitempty"`
	LeaseSeconds  int64 `json:"leaseSeconds,omitempty"`
	// Approved is one for each grant of Releases, if the broker said.
	Approved []bundle.Approved `json:"approved,omitempty"`
	// Resume is what the job went on from, if its plan says so.
	Resume *bundle.Resume `json:"resume,omitempty"`
	// Reseal is what the job sealed anew, without the records of the files.
	Reseal *bundle.Reseal `json:"reseal,omitempty"`
}

// assets lists the assets whose keys the job needs, inputs first, each once.
func (j *Job) assets() []string {
	var out []string
	for _, in := range j.plan.Inputs {
		if !slices.Contains(out, in.Asset) {
			out = append(out, in.Asset)
		}
	}
	if c := j.plan.Checkpoints; c != nil && !slices.Contains(out, c.Asset) {
		out = append(out, c.Asset)
	}
	if r := j.plan.Reseal; r != nil {
		out = append(out, r.Asset, r.To)
	}
	return out
}

// assetDigest is the digest that the plan has for an asset; empty for checkpoints
// and for what the job is to seal.
func (j *Job) assetDigest(asset string) plan.Digest {
	for _, in := range j.plan.Inputs {
		if in.Asset == asset {
			return in.Digest
		}
	}
	if r := j.plan.Reseal; r != nil && r.Asset == asset && !r.Checkpoint {
		return r.Digest
	}
	return ""
}

// row is the job as the journal has it when it is new.
func (j *Job) row(key string, file plan.Digest) journal.Job {
	return journal.Job{
		ID: j.id, Name: j.spec.Name, IdempotencyKey: key, FileDigest: file, JobFile: j.redacted, Plan: j.canonical, PlanDigest: j.digest,
		Submitter: j.submitter, State: journal.Queued, Stage: string(bundle.StageAdmit), Submitted: j.submitted,
		Attempt: j.attempt, RetryOf: j.retryOf, NotBefore: j.notBefore, Priority: j.spec.Priority,
	}
}
