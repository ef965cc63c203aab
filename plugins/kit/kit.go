// Package kit is what the main function of a plugin calls.
package kit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

// ServeGPU serves a GPU plugin until its host ends it, and ends the process
// itself when the host is gone. It returns only if it cannot serve.
func ServeGPU(impl contract.GPU, stderr io.Writer) error {
	if impl == nil {
		return errors.New("serve GPU plugin: no implementation")
	}
	return serve("GPU", "cofferd", contract.GPUName, &contract.GPUPlugin{Impl: impl}, plugin.DefaultGRPCServer, stderr)
}

// ServeKeyStore serves a key store plugin as ServeGPU does a GPU plugin.
func ServeKeyStore(impl keystore.Store, stderr io.Writer) error {
	if impl == nil {
		return errors.New("serve key store plugin: no implementation")
	}
	server := func(opts []grpc.ServerOption) *grpc.Server {
		return plugin.DefaultGRPCServer(append(opts, grpc.MaxRecvMsgSize(keystore.MaxMessage)))
	}
	return serve("key store", "coffer-broker", keystore.PluginName, &keystore.Plugin{Impl: impl}, server, stderr)
}

// WriteKeys writes what a store says of its keys, a line for each, for people who look
// after it.
func WriteKeys(ctx context.Context, s keystore.Store, w io.Writer) error {
	info, err := s.Info(ctx)
	if err != nil {
		return err
	}
	for _, k := range info.Keys {
		state := "enabled"
		if k.Disabled {
			state = "disabled"
		}
		if _, err := fmt.Fprintf(w, "%s  versions %d to %d  %s\n", k.ID, k.Oldest, k.Newest, state); err != nil {
			return err
		}
	}
	return nil
}

// Hosted reports whether a host started this process as its plugin. It is for
// programs that can do something else; Serve functions look for themselves.
func Hosted() bool {
	hs := contract.Handshake()
	return os.Getenv(hs.MagicCookieKey) == hs.MagicCookieValue
}

func serve(kind, host, name string, p plugin.Plugin, server func([]grpc.ServerOption) *grpc.Server, stderr io.Writer) error {
	if !Hosted() {
		return fmt.Errorf("this is a plugin of %s, which starts it itself", host)
	}
	if os.Getenv("PLUGIN_CLIENT_CERT") == "" {
		return fmt.Errorf("serve %s plugin: the host gave no certificate to authenticate itself by", kind)
	}
	if err := watchHost(os.Getenv(contract.LifelineEnv)); err != nil {
		return fmt.Errorf("serve %s plugin: %w", kind, err)
	}
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: contract.Handshake(),
		Plugins:         plugin.PluginSet{name: p},
		GRPCServer:      server,
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
