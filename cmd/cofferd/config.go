package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/runner"
	"github.com/coffer-run/coffer/runner/source/cache"
	"github.com/coffer-run/coffer/runner/source/object"
	"github.com/coffer-run/coffer/runner/source/sink"
)

// Config is the agent's configuration file. Every field but FirmwareLog, Sources,
// Capacity, WarmRegions, LogBytes and Access is required.
type Config struct {
	// Listen is the API's address.
	Listen string     `json:"listen"`
	TLS    daemon.TLS `json:"tls"`
	// Node is the node's name.
	Node string `json:"node"`
	// StateDir keeps the journal and the event log; RunDir has a folder per
	// running job, on memory.
	StateDir string `json:"stateDir"`
	RunDir   string `json:"runDir"`
	// Cgroup is the group under which every job gets its own.
	Cgroup string `json:"cgroup"`
	// Containerd is its socket; Runsc, Shim and Holder are binaries.
	Containerd string `json:"containerd"`
	Runsc      string `json:"runsc"`
	Shim       string `json:"shim"`
	Holder     string `json:"holder"`
	// GPUPlugin collects GPU evidence. The checksum is required.
	GPUPlugin host.Config `json:"gpuPlugin"`
	// TSM is "configfs" for the kernel's reports, "paravisor" on Azure, where the
	// report lies in the TPM, or "emulated:SOCKET".
	TSM string `json:"tsm"`
	// TPM is a device, /dev/tpmrm0, or a TPM simulator's socket.
	TPM string `json:"tpm"`
	// FirmwareLog is where the kernel keeps the log of firmware and boot loader:
	// /sys/kernel/security/tpm0/binary_bios_measurements. A machine without one
	// cannot show how it booted, and shim must not have measured into PCR 14.
	FirmwareLog string `json:"firmwareLog,omitempty"`

	Verifier Service `json:"verifier"`
	Broker   Service `json:"broker"`
	// ImageStore says where image content lies: "disk" or "tmpfs".
	ImageStore string `json:"imageStore"`
	// GPUSpecs are folders with CDI specifications, as nvidia-ctk generates them
	// (/var/run/cdi). If absent, sandboxes get no GPU device.
	GPUSpecs []string `json:"gpuSpecs,omitempty"`
	// Images says whose images jobs may run, and where they come from.
	Images *Images `json:"images,omitempty"`
	// Sources are the object stores that jobs may have inputs in. None if absent.
	Sources *Sources `json:"sources,omitempty"`
	// Egress lets jobs have the network that their plans allow. None if absent.
	Egress *Egress `json:"egress,omitempty"`
	// Capacity is what jobs may have together. What is absent is the machine's memory,
	// four times its cores, since a job's cores are a limit, and 8 jobs at once.
	Capacity runner.Room `json:"capacity,omitzero"`
	// Queues divide the node between its users. One for everybody if absent.
	Queues []runner.Queue `json:"queues,omitempty"`
	// WarmRegions are sizes, in bytes, of regions that a holder makes ready for the
	// next job's inputs while no job runs. They are a part of the memory of Capacity,
	// and a job that needs it has it first. None if absent.
	WarmRegions []int64 `json:"warmRegions,omitempty"`
	// LogBytes bounds the kept logs of ended jobs; default 1 GiB.
	LogBytes int64 `json:"logBytes,omitempty"`
	// Access lets people call with tokens; without it certificates alone do.
	Access *Access `json:"access,omitempty"`
	// Rules is a file of rules for jobs' traces; those that ship if empty.
	Rules string `json:"rules,omitempty"`
	// Alerts says who is told what the rules find. Only the job's record is if absent.
	Alerts *Alerts `json:"alerts,omitempty"`
}

// Sources are object stores, and the cache of what comes from them.
type Sources struct {
	// CacheDir is a folder of the agent's own, of mode 0700; CacheBytes bounds it.
	// Ciphertext alone is written there.
	CacheDir   string `json:"cacheDir"`
	CacheBytes int64  `json:"cacheBytes"`
	// Buckets lists every bucket that a job may name.
	Buckets []object.Config `json:"buckets"`
}

// Service is a remote service and the file with its public keys (JWKS).
type Service struct {
	URL      string `json:"url"`
	ID       string `json:"id"`
	KeysFile string `json:"keysFile"`
}

const (
	emulatedPrefix = "emulated:"
	paravisorTSM   = "paravisor"
)

func (c Config) validate() error {
	for name, v := range map[string]string{
		"listen": c.Listen, "node": c.Node, "stateDir": c.StateDir, "runDir": c.RunDir, "cgroup": c.Cgroup, "containerd": c.Containerd, "runsc": c.Runsc,
		"shim": c.Shim, "holder": c.Holder, "gpuPlugin.path": c.GPUPlugin.Path, "gpuPlugin.sha256": c.GPUPlugin.SHA256, "tpm": c.TPM,
		"verifier.url": c.Verifier.URL, "verifier.id": c.Verifier.ID, "verifier.keysFile": c.Verifier.KeysFile,
		"broker.url": c.Broker.URL, "broker.id": c.Broker.ID, "broker.keysFile": c.Broker.KeysFile, "imageStore": c.ImageStore,
	} {
		if v == "" {
			return errors.New("configuration: " + name + " is missing")
		}
	}
	if c.TSM != "configfs" && c.TSM != paravisorTSM && !strings.HasPrefix(c.TSM, emulatedPrefix) {
		return errors.New("configuration: tsm: want configfs, paravisor or emulated:SOCKET")
	}
	if err := c.Egress.validate(); err != nil {
		return err
	}
	if err := c.Images.validate(); err != nil {
		return err
	}
	if err := c.Access.validate(); err != nil {
		return err
	}
	if err := c.Alerts.validate(); err != nil {
		return err
	}
	if err := runner.CheckQueues(c.Queues); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if c.LogBytes < 0 {
		return errors.New("configuration: logBytes is negative")
	}
	if s := c.Sources; s != nil && (!filepath.IsAbs(s.CacheDir) || s.CacheBytes <= 0 || len(s.Buckets) == 0) {
		return errors.New("configuration: sources: want cacheDir (an absolute path), cacheBytes and buckets")
	}
	return nil
}

// sinkDir is the folder in CacheDir where checkpoints wait until they are in their
// bucket. The cache's own folders have other names.
const sinkDir = "checkpoints"

// sinks is nil if no bucket takes checkpoints. k is that of cache.
func (c Config) sinks(k *cache.Cache, log *slog.Logger) (*sink.Buckets, error) {
	if k == nil {
		return nil, nil
	}
	buckets, err := object.New(c.Sources.Buckets)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if !buckets.TakesCheckpoints() {
		return nil, nil
	}
	dir := filepath.Join(c.Sources.CacheDir, sinkDir)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make folder for checkpoints: %w", err)
	}
	return sink.OpenBuckets(sink.BucketConfig{Dir: dir, Open: buckets.OpenSink, Fetch: k.Hold, Log: log})
}

// cache is nil if no sources are configured.
func (c Config) cache(log *slog.Logger) (*cache.Cache, error) {
	s := c.Sources
	if s == nil {
		return nil, nil
	}
	buckets, err := object.New(s.Buckets)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return cache.Open(cache.Config{Dir: s.CacheDir, MaxBytes: s.CacheBytes, Open: buckets.Open, Log: log})
}
