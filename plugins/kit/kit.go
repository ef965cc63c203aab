// Package kit is what the main function of a plugin calls.
package kit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"

	"github.com/coffer-run/coffer/plugins/contract"
)

// ServeGPU serves a GPU plugin until its host ends it, and ends the process
// itself when the host is gone. It returns only if it cannot serve.
func ServeGPU(impl contract.GPU, stderr io.Writer) error {
	if impl == nil {
		return errors.New("serve GPU plugin: no implementation")
	}
	hs := contract.Handshake()
	if os.Getenv(hs.MagicCookieKey) != hs.MagicCookieValue {
		return errors.New("this is a plugin of cofferd, which starts it itself")
	}
	if os.Getenv("PLUGIN_CLIENT_CERT") == "" {
		return errors.New("serve GPU plugin: the host gave no certificate to authenticate itself by")
	}
	if err := watchHost(os.Getenv(contract.LifelineEnv)); err != nil {
		return fmt.Errorf("serve GPU plugin: %w", err)
	}
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: hs,
		Plugins:         plugin.PluginSet{contract.GPUName: &contract.GPUPlugin{Impl: impl}},
		GRPCServer:      plugin.DefaultGRPCServer,
		Logger:          hclog.New(&hclog.LoggerOptions{Output: stderr, JSONFormat: true, Level: hclog.Warn}),
	})
	return nil
}

// watchHost ends the process when the other end of descriptor fd is closed. A
// host that is killed cannot tell its plugins, but the kernel closes its
// descriptors.
func watchHost(fd string) error {
	n, err := strconv.Atoi(fd)
	if err != nil || n < 3 {
		return fmt.Errorf("%s is %.20q: want a file descriptor", contract.LifelineEnv, fd)
	}
	f := os.NewFile(uintptr(n), "lifeline")
	go func() {
		_, _ = io.Copy(io.Discard, f)
		os.Exit(1)
	}()
	return nil
}
