package main

import (
	"encoding/binary"
	"path"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/hostarch"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"
)

// opened reads the arguments of openat2(2). What cannot be read, the call cannot read either.
func opened(ctx context.Context, m *pb.Syscall) *pb.Open {
	t := ctx.(*kernel.Task) // as every call's
	out := &pb.Open{ContextData: m.ContextData, Sysno: m.Sysno, Fd: int64(int32(m.Arg1))}
	out.Pathname, _ = t.CopyInString(hostarch.Addr(m.Arg2), unix.PathMax)
	var how [24]byte // struct open_how: flags, mode, resolve
	_, _ = t.CopyInBytes(hostarch.Addr(m.Arg3), how[:])
	if binary.LittleEndian.Uint64(how[16:])&unix.RESOLVE_IN_ROOT != 0 {
		// Below the folder, whatever it says.
		out.Pathname = "." + path.Clean("/"+out.Pathname)
	}
	if file, _ := t.FDTable().Get(int32(m.Arg1)); file != nil {
		defer file.DecRef(t)
		root := t.MountNamespace().Root(t)
		defer root.DecRef(t)
		out.FdPath, _ = t.Kernel().VFS().PathnameWithDeleted(t, root, file.VirtualDentry())
	}
	return out
}
