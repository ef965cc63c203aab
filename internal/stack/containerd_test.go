package stack

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	containers "github.com/containerd/containerd/api/services/containers/v1"
	version "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// bareContainerd is a containerd without containers.
type bareContainerd struct {
	containers.UnimplementedContainersServer
	version.UnimplementedVersionServer
}

func (bareContainerd) List(context.Context, *containers.ListContainersRequest) (*containers.ListContainersResponse, error) {
	return &containers.ListContainersResponse{}, nil
}

func (bareContainerd) Version(context.Context, *emptypb.Empty) (*version.VersionResponse, error) {
	return &version.VersionResponse{Version: "v2"}, nil
}

// A start that was killed leaves a containerd that is not there yet.
func TestTasksOfAContainerdThatBegins(t *testing.T) {
	// What stands for it, so long as it runs.
	sleeper := func(t *testing.T) process {
		t.Helper()
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
		started, err := startTime(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		return process{Name: containerdName, PID: cmd.Process.Pid, Start: started}
	}
	// A socket that nobody listens on yet, as bind(2) leaves it.
	layout := func(t *testing.T) Layout {
		t.Helper()
		l := Layout{Run: t.TempDir()}
		if err := os.MkdirAll(filepath.Dir(l.containerdSocket()), 0o700); err != nil {
			t.Fatal(err)
		}
		s, err := net.ListenUnix("unix", &net.UnixAddr{Name: l.containerdSocket()})
		if err != nil {
			t.Fatal(err)
		}
		s.SetUnlinkOnClose(false)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return l
	}
	t.Run("it listens later", func(t *testing.T) {
		l, p := layout(t), sleeper(t)
		s := grpc.NewServer()
		containers.RegisterContainersServer(s, bareContainerd{})
		version.RegisterVersionServer(s, bareContainerd{})
		t.Cleanup(s.Stop)
		go func() {
			time.Sleep(100 * time.Millisecond)
			_ = os.Remove(l.containerdSocket())
			if c, err := net.Listen("unix", l.containerdSocket()); err == nil {
				_ = s.Serve(c)
			}
		}()
		if detail, err := l.removeTasks(t.Context(), p); err != nil || detail != "none left" {
			t.Errorf("%q, %v", detail, err)
		}
	})
	t.Run("it ends instead", func(t *testing.T) {
		l, p := layout(t), sleeper(t)
		go func() {
			time.Sleep(50 * time.Millisecond)
			_ = p.signal(9)
		}()
		if detail, err := l.removeTasks(t.Context(), p); err != nil || detail != "" {
			t.Errorf("%q, %v", detail, err)
		}
	})
	t.Run("it does neither", func(t *testing.T) {
		l, p := layout(t), sleeper(t)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := l.removeTasks(ctx, p); err == nil || errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "reach containerd") {
			t.Errorf("%v", err)
		}
	})
}
