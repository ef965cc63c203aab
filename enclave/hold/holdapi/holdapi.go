// Package holdapi is the protocol between the node agent and a job's holder:
// control by message, bulk data by file descriptor. No key crosses it.
//
// The holder listens on a SOCK_SEQPACKET unix socket, mode 0600. One packet is
// one JSON message of at most MaxMessage bytes; a request may carry descriptors
// (SCM_RIGHTS) as its operation says. Requests on one connection are answered in
// order; Logs and Wait block, so a caller uses a connection of its own for them.
// The holder outlives connections and agents.
package holdapi

import (
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
)

// MaxMessage bounds one packet, in bytes.
const MaxMessage = 192 << 10

// SocketName, TraceName, InputsName, CheckpointsName, StdoutName and StderrName
// are the names under the holder's run directory.
const (
	SocketName      = "holder.sock"
	TraceName       = "trace.sock"
	InputsName      = "inputs"
	CheckpointsName = "checkpoints"
	StdoutName      = "stdout"
	StderrName      = "stderr"
)

// SecretsName is the folder of all secrets under InputsName.
const SecretsName = ".secrets"

// Operations.
const (
	// OpHello asks who the holder is. Hello.
	OpHello = "hello"
	// OpSignRelease signs a release request with the session key. SignRelease.
	OpSignRelease = "sign-release"
	// OpSign signs the SHA-256 of a bundle statement. Sign.
	OpSign = "sign"
	// OpDeliver hands over a wrapped data key. Deliver.
	OpDeliver = "deliver"
	// OpLease begins a renewal of the job's lease: the answer has the challenge for
	// the broker. Lease.
	OpLease = "lease"
	// OpRenew hands over the broker's signed answer to the renewal. Renew, Lease.
	OpRenew = "renew"
	// OpInput hands over one sealed input: descriptor 0 is the sealed folder
	// (O_PATH|O_DIRECTORY). Input.
	OpInput = "input"
	// OpSettle says that all inputs were handed over: a holder with memory that was
	// made ready before takes of it what they need, and gives the rest back.
	OpSettle = "settle"
	// OpSink names where sealed checkpoints go: descriptor 0 is a directory. Sink.
	OpSink = "sink"
	// OpResumeBegin asks what the plan says of resuming: the answer has the
	// challenge for the broker. It comes once the keys are there. ResumeBegin,
	// ResumeRule.
	OpResumeBegin = "resume-begin"
	// OpResume hands over the checkpoint that the job goes on from, before OpDecrypt:
	// descriptor 0 is its sealed folder, unless there is none. Resume.
	OpResume = "resume"
	// OpDecrypt fills the regions of all inputs. Decrypt.
	OpDecrypt = "decrypt"
	// OpStatus asks how things are. Status.
	OpStatus = "status"
	// OpLogs returns log bytes from an offset on, waiting for some. Logs.
	OpLogs = "logs"
	// OpEvents returns trace events and checkpoint commits from a sequence
	// number on, waiting for some. Events.
	OpEvents = "events"
	// OpFinish closes everything: mounts, regions (scrubbed), keys. The holder
	// answers with its final Status and exits when told OpExit.
	OpFinish = "finish"
	// OpExit ends the holder.
	OpExit = "exit"
)

// Request is one packet from the agent.
type Request struct {
	Op          string       `json:"op"`
	SignRelease *SignRelease `json:"signRelease,omitempty"`
	Sign        *Sign        `json:"sign,omitempty"`
	Deliver     *Deliver     `json:"deliver,omitempty"`
	Renew       *Renew       `json:"renew,omitempty"`
	Input       *Input       `json:"input,omitempty"`
	Sink        *Sink        `json:"sink,omitempty"`
	ResumeBegin *ResumeBegin `json:"resumeBegin,omitempty"`
	Resume      *Resume      `json:"resume,omitempty"`
	Logs        *Logs        `json:"logs,omitempty"`
	Events      *Events      `json:"events,omitempty"`

	ResealSource *ResealSource      `json:"resealSource,omitempty"`
	Reseal       *Reseal            `json:"reseal,omitempty"`
	ResealStatus *ResealStatusQuery `json:"resealStatus,omitempty"`
}

// Response is one packet to the agent. Error is empty on success.
type Response struct {
	Error string `json:"error,omitempty"`
	// Code is stable: "refused", "invalid", "state", "io", "full".
	Code        string        `json:"code,omitempty"`
	Hello       *Hello        `json:"hello,omitempty"`
	SignRelease *Signed       `json:"signRelease,omitempty"`
	Sign        *Signed       `json:"sign,omitempty"`
	Lease       *Lease        `json:"lease,omitempty"`
	Decrypt     *Decrypted    `json:"decrypt,omitempty"`
	ResumeRule  *ResumeRule   `json:"resumeRule,omitempty"`
	Status      *Status       `json:"status,omitempty"`
	Logs        *LogChunk     `json:"logs,omitempty"`
	Events      *EventsResult `json:"events,omitempty"`
	Reseal      *ResealStatus `json:"reseal,omitempty"`
}

// Hello is who the holder is.
type Hello struct {
	JobID string `json:"jobId"`
	Pid   int    `json:"pid"`
	// RecipientKey is the HPKE public key (ML-KEM-768+X25519), SessionKey the
	// ECDSA P-256 public key in PKIX DER.
	RecipientKey []byte `json:"recipientKey"`
	SessionKey   []byte `json:"sessionKey"`
}

// SignRelease carries the canonical receipt.ReleaseRequest. The holder parses it
// and signs only requests of that form.
type SignRelease struct {
	Request []byte `json:"request"`
}

// Sign carries the canonical JSON of a bundle statement (attest/bundle), at most
// 128 KiB. The signature is over SHA-256 of the label "coffer/v1 statement", a
// zero byte and the statement, so that it can never pass for a release request.
type Sign struct {
	Statement []byte `json:"statement"`
}

// Signed is an ECDSA P-256 signature, ASN.1.
type Signed struct {
	Signature []byte `json:"signature"`
}

// Deliver is a data key wrapped to the recipient key. LeaseKeys are the broker's
// public keys (JWKS); the one by which leases are signed is named in Info, which
// the key is wrapped under.
type Deliver struct {
	Asset      string `json:"asset"`
	Info       []byte `json:"info"`
	Enc        []byte `json:"enc"`
	Ciphertext []byte `json:"ciphertext"`
	LeaseKeys  []byte `json:"leaseKeys"`
}

// Renew carries a broker's signed lease (attest/receipt).
type Renew struct {
	Lease string `json:"lease"`
}

// States of a Lease.
const (
	// LeaseNone: no key was delivered yet.
	LeaseNone = "none"
	// LeaseRunning: keys may be used.
	LeaseRunning = "running"
	// LeaseStopping: the broker said that the job must stop; keys may be used for
	// as long as the grace lasts.
	LeaseStopping = "stopping"
	// LeaseOver: no key is used any more. The holder kills the job, scrubs its
	// memory and destroys the keys, without being told to.
	LeaseOver = "over"
)

// Reason codes of a Lease that is stopping or over.
const (
	// LeaseRevoked: something that the job runs under was taken back.
	LeaseRevoked = "revoked"
	// LeaseLapsed: no renewal came in time.
	LeaseLapsed = "lease-lapsed"
)

// Lease is what stands between the job and its keys, counted on CLOCK_BOOTTIME.
type Lease struct {
	State  string `json:"state"`
	Code   string `json:"code,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Seconds is how long a renewed lease lasts at most.
	Seconds         int64 `json:"seconds,omitempty"`
	RemainingMillis int64 `json:"remainingMillis,omitempty"`
	// Challenge is that of the renewal under way; only OpLease has it. Absent
	// unless the state is LeaseRunning.
	Challenge []byte `json:"challenge,omitempty"`
}

// Input is one sealed input. Digest is the SHA-384 of its manifest; a folder
// whose manifest has another is refused.
type Input struct {
	// Name is the folder under inputs/ in which its files appear.
	Name   string      `json:"name"`
	Asset  string      `json:"asset"`
	Digest plan.Digest `json:"digest"`
	// Secret: it is one file of at most plan.MaxSecretBytes, which appears in the
	// folder SecretsName under the input's name.
	Secret bool `json:"secret,omitempty"`
}

// Sink says under which asset's key checkpoints are sealed, and what they name.
type Sink struct {
	Asset string      `json:"asset"`
	Plan  plan.Digest `json:"plan"`
	// MaxBytes bounds the plaintext of uncommitted checkpoint files.
	MaxBytes int64 `json:"maxBytes"`
}

// ResumeName is the folder below the checkpoint folder in which the job finds what
// it goes on from.
const ResumeName = "resume"

// ResumeBegin carries the canonical plan, which says where the job resumes.
type ResumeBegin struct {
	Plan []byte `json:"plan"`
}

// ResumeRule is what the plan says, "latest" or a digest. Challenge is for the
// broker; absent where the plan names a digest.
type ResumeRule struct {
	Rule      string `json:"rule"`
	Challenge []byte `json:"challenge,omitempty"`
}

// Resume says what the job goes on from.
type Resume struct {
	// Point is the broker's signed answer (receipt.ResumePoint) where the plan says
	// "latest". Where it says that there is nothing, no descriptor comes with it.
	Point string `json:"point,omitempty"`
	// Nothing repeats that.
	Nothing bool `json:"nothing,omitempty"`
	// Anchor is the countersignature of a checkpoint that the plan names by its
	// digest (receipt.CheckpointHead), empty if it has none.
	Anchor string `json:"anchor,omitempty"`
}

// Decrypted says what opening the inputs took.
type Decrypted struct {
	Files int `json:"files"`
	// Bytes are what lies in memory, or will.
	Bytes int64 `json:"bytes"`
	Nanos int64 `json:"nanos"`
	// Opening: the files are being decrypted still, and whoever opens one waits for
	// it. An event says when they are open, or why they are not.
	Opening bool `json:"opening,omitempty"`
}

// Status is the holder's state.
type Status struct {
	// Started is true once the trace has shown container/start. Until then no
	// input opens and no descriptor is handed out.
	Started bool `json:"started"`
	// TraceLost is true once a trace connection that had been there is gone while the
	// job still runs, or a message of it was lost.
	TraceLost bool `json:"traceLost"`
	// Execs counts executed programs, Dropped trace messages that were lost.
	Execs   int64 `json:"execs"`
	Dropped int64 `json:"dropped"`
	// RegionBytes are held now; Scrubbed says that all were zeroed and checked.
	RegionBytes int64 `json:"regionBytes"`
	Scrubbed    bool  `json:"scrubbed"`
	LogBytes    int64 `json:"logBytes"`
	// LogCut counts log bytes beyond the budget, which were dropped.
	LogCut int64 `json:"logCut"`
	Lease  Lease `json:"lease"`
	// Checkpoints are the last 100 commits; Client.Checkpoints returns all.
	Checkpoints []Checkpoint `json:"checkpoints,omitempty"`
	// Opened is there once decryption has begun of inputs that are held in memory.
	Opened *Opened `json:"opened,omitempty"`
	// Metrics is there if the holder was told of some.
	Metrics *bundle.Metrics `json:"metrics,omitempty"`
}

// Opened is how many bytes of the inputs are decrypted, of how many. A chunk counts
// when it is begun.
type Opened struct {
	Bytes int64 `json:"bytes"`
	Total int64 `json:"total"`
}

// Checkpoint is one commit. Record is its canonical signed record (enclave/seal).
type Checkpoint struct {
	Sequence uint64      `json:"sequence"`
	Name     string      `json:"name"`
	Digest   plan.Digest `json:"digest"`
	Parent   plan.Digest `json:"parent,omitempty"`
	Bytes    int64       `json:"bytes"`
	Nanos    int64       `json:"nanos"`
	// Record is canonical JSON, Signature the session key's over
	// "coffer/v1 checkpoint", a zero byte and Record (SHA-256, ASN.1).
	Record    []byte `json:"record"`
	Signature []byte `json:"signature"`
}

// Logs asks for log bytes of one stream from Offset on, waiting up to WaitMillis.
type Logs struct {
	// Stream is "stdout" or "stderr".
	Stream     string `json:"stream"`
	Offset     int64  `json:"offset"`
	WaitMillis int64  `json:"waitMillis"`
}

// LogChunk is part of a log. EOF means that nothing will follow.
type LogChunk struct {
	Offset int64  `json:"offset"`
	Data   []byte `json:"data"`
	EOF    bool   `json:"eof"`
	// Cut counts what of both streams was dropped so far, in bytes.
	Cut int64 `json:"cut,omitempty"`
}

// Events asks for events after Sequence, waiting up to WaitMillis.
type Events struct {
	After      uint64 `json:"after"`
	WaitMillis int64  `json:"waitMillis"`
}

// EventsResult is a run of events.
type EventsResult struct {
	Events []Event `json:"events"`
}

// Event is something the trace or the sealer saw.
type Event struct {
	Sequence uint64 `json:"sequence"`
	UnixNano int64  `json:"unixNano"`
	// Kind is "container-start", "exec", "operator-exec", "open", "connect", "ptrace",
	// "trace-lost", "checkpoint", "checkpoint-error", "input-error", "resumed"
	// (the job goes on from the checkpoint in Digest), "inputs-open" and "inputs-failed"
	// (what became of inputs that were decrypted while the container started), "lease-stop"
	// (the broker said that the job must stop), "lease-over" (no key is used any
	// more), "job-killed" (the holder ended the job's processes), "scrubbed".
	Kind       string      `json:"kind"`
	Detail     string      `json:"detail,omitempty"`
	Process    string      `json:"process,omitempty"`
	Digest     string      `json:"digest,omitempty"`
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"`
}
