// Package emulate puts an emulated SEV-SNP chip and emulated GPUs below the real
// collectors. The devices and their keys live in the emulator's process; this
// package is the protocol between the two, and the client that looks like the
// kernel's configfs-tsm.
//
// Trusted: nothing. Evidence made here verifies only under a simulation's trust
// anchors, whatever it says of itself.
//
// The protocol is one JSON object per line over a unix socket, a request and its
// response for each connection. Unknown fields are errors on both sides.
package emulate

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// MaxMessage bounds one request or response line, in bytes.
	MaxMessage = 256 << 10
	// Timeout bounds one exchange.
	Timeout = 10 * time.Second
)

// Operations.
const (
	OpSNPReport = "snp-report"
	OpGPUs      = "gpus"
	OpGPUReport = "gpu-report"
	OpSetReady  = "set-ready"
	// OpUnprotected, OpRotation and OpClear set a GPU's memory for staged copies,
	// the driver's threshold for changing keys, and reset a GPU.
	OpUnprotected = "unprotected"
	OpRotation    = "rotation"
	OpClear       = "clear"
	// OpFlip flips one bit of the next GPU report. It is an attack, and refused
	// unless the emulator's configuration allows faults.
	OpFlip = "flip"
	// OpRollback has the chip report older firmware than its certificate is for, or
	// its own again. It is an attack too.
	OpRollback = "rollback"
	// OpXID has a GPU tell of a critical error. OpDriver has the machine's driver be
	// another version, as after a reload. Both are faults.
	OpXID    = "xid"
	OpDriver = "driver"
)

// Request asks the emulator for one thing.
type Request struct {
	Op string `json:"op"`
	// ReportData (64 bytes) and VMPL are for OpSNPReport.
	ReportData []byte `json:"reportData,omitempty"`
	VMPL       uint32 `json:"vmpl,omitempty"`
	// UUID is for OpGPUReport, OpUnprotected and OpClear, Nonce (32 bytes) for the
	// first.
	UUID  string `json:"uuid,omitempty"`
	Nonce []byte `json:"nonce,omitempty"`
	// Ready is for OpSetReady.
	Ready bool `json:"ready,omitempty"`
	// Bytes is for OpUnprotected, Advantage for OpRotation.
	Bytes     uint64 `json:"bytes,omitempty"`
	Advantage uint64 `json:"advantage,omitempty"`
	// Rollback is for OpRollback.
	Rollback bool `json:"rollback,omitempty"`
	// XID, with UUID, is for OpXID, Driver for OpDriver; empty is its own again.
	XID    uint64 `json:"xid,omitempty"`
	Driver string `json:"driver,omitempty"`
	// Bit is for OpFlip: bit Bit%8 of byte Bit/8.
	Bit int `json:"bit,omitempty"`
}

// Response answers it. Error is empty on success.
type Response struct {
	Error        string `json:"error,omitempty"`
	Report       []byte `json:"report,omitempty"`
	Certificates []byte `json:"certificates,omitempty"`
	GPUs         *GPUs  `json:"gpus,omitempty"`
}

// GPUs is what NVML would say about the machine's GPUs.
type GPUs struct {
	DriverVersion string `json:"driverVersion"`
	// CCMode is "on", "off" or "devtools".
	CCMode string `json:"ccMode"`
	Ready  bool   `json:"ready"`
	// Advantage is the exponent of two at which keys are changed.
	Advantage uint64 `json:"advantage"`
	Devices   []GPU  `json:"devices"`
}

// GPU is one emulated GPU.
type GPU struct {
	UUID                 string `json:"uuid"`
	Name                 string `json:"name"`
	VBIOSVersion         string `json:"vbiosVersion"`
	MemoryBytes          uint64 `json:"memoryBytes"`
	ProtectedMemoryBytes uint64 `json:"protectedMemoryBytes"`
	// UnprotectedBytes are for staged copies. UsedBytes stay behind a job that used
	// the GPU, until it is cleared.
	UnprotectedBytes uint64 `json:"unprotectedBytes"`
	UsedBytes        uint64 `json:"usedBytes"`
	// XIDs are the critical errors that the GPU told of, oldest first.
	XIDs []uint64 `json:"xids,omitempty"`
	// Chain is the device's certificates as PEM, leaf first.
	Chain []byte `json:"chain"`
}

// Client reaches an emulator.
type Client struct {
	socket string
}

// Dial returns a client of the emulator at socket. It connects for each request.
func Dial(socket string) *Client { return &Client{socket: socket} }

// Do exchanges one request for its response. An emulator's refusal is an error.
func (c *Client) Do(ctx context.Context, req Request) (*Response, error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, fmt.Errorf("reach device emulator: %w", err)
	}
	defer conn.Close() //nolint:errcheck // the answer is complete or refused below
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := Write(conn, req); err != nil {
		return nil, fmt.Errorf("device emulator: %s: %w", req.Op, errors.Join(err, ctx.Err()))
	}
	var resp Response
	if err := Read(conn, &resp); err != nil {
		return nil, fmt.Errorf("device emulator: %s: %w", req.Op, errors.Join(err, ctx.Err()))
	}
	if resp.Error != "" {
		return nil, fmt.Errorf("device emulator: %s: %s", req.Op, resp.Error)
	}
	return &resp, nil
}

// Write sends v as one line.
func Write(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) >= MaxMessage {
		return fmt.Errorf("message has %d bytes, at most %d are allowed", len(b), MaxMessage)
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// Read receives one line into v.
func Read(r io.Reader, v any) error {
	line, err := bufio.NewReaderSize(io.LimitReader(r, MaxMessage), 4<<10).ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read message: %w", err)
	}
	return plan.Decode(line, MaxMessage, v)
}
