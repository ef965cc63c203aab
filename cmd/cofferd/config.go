package main

import (
	"errors"
	"strings"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/plugins/host"
)

// Config is the agent's configuration file. Every field is required.
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
	// TSM is "configfs" for the kernel's reports, or "emulated:SOCKET".
	TSM string `json:"tsm"`
	// TPM is a device, /dev/tpmrm0, or a TPM simulator's socket.
	TPM      string  `json:"tpm"`
	Verifier Service `json:"verifier"`
	Broker   Service `json:"broker"`
	// ImageStore says where image content lies: "disk" or "tmpfs".
	ImageStore string `json:"imageStore"`
}

// Service is a remote service and the file with its public keys (JWKS).
type Service struct {
	URL      string `json:"url"`
	ID       string `json:"id"`
	KeysFile string `json:"keysFile"`
}

const emulatedPrefix = "emulated:"

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
	if c.TSM != "configfs" && !strings.HasPrefix(c.TSM, emulatedPrefix) {
		return errors.New("configuration: tsm: want configfs or emulated:SOCKET")
	}
	return nil
}
