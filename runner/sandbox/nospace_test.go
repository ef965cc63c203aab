package sandbox

import (
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
)

func TestFullDiskOfAnotherProgram(t *testing.T) {
	over := func(err error) error { return errgrpc.ToNative(errgrpc.ToGRPC(err)) }
	for name, row := range map[string]struct {
		err  error
		want error // nil: of no full disk
	}{
		"containerd's own":        {over(fmt.Errorf("failed to prepare extraction snapshot: %w", unix.ENOSPC)), unix.ENOSPC},
		"with what it was about":  {over(fmt.Errorf("write /meta.db: %w: unknown", unix.ENOSPC)), unix.ENOSPC},
		"a quota":                 {over(fmt.Errorf("mkdir /x: %w", unix.EDQUOT)), unix.EDQUOT},
		"the kernel's word":       {fmt.Errorf("write: %w", unix.ENOSPC), unix.ENOSPC},
		"another error":           {over(fmt.Errorf("mkdir /x: %w", unix.EACCES)), nil},
		"away":                    {over(fmt.Errorf("dial: %w", errdefs.ErrUnavailable)), nil},
		"none":                    {nil, nil},
		"a file of nearly a name": {over(errors.New("open /no space left on device/x: permission denied")), nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := typed(row.err)
			if full := errors.Is(got, unix.ENOSPC) || errors.Is(got, unix.EDQUOT); full != (row.want != nil) || full && !errors.Is(got, row.want) {
				t.Errorf("%v: %t", got, full)
			}
			if (got == nil) != (row.err == nil) || row.err != nil && (got.Error() != row.err.Error() || !errors.Is(got, row.err)) {
				t.Errorf("%v became %v", row.err, got)
			}
		})
	}
	if err := typed(over(fmt.Errorf("%w: x: %w", errdefs.ErrUnavailable, unix.ENOSPC))); !errdefs.IsUnavailable(err) {
		t.Errorf("%v is another kind of error", err)
	}
}
