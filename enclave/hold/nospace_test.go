package hold

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// What fails for want of room says so to the agent, by its code.
func TestNoSpaceHasACode(t *testing.T) {
	for name, row := range map[string]struct {
		err  error
		want string
	}{
		"a full disk":                    {fmt.Errorf("write: %w", unix.ENOSPC), holdapi.CodeNoSpace},
		"a quota":                        {fail(holdapi.CodeIO, "write: %w", unix.EDQUOT), holdapi.CodeNoSpace},
		"another error of a disk":        {unix.EIO, holdapi.CodeIO},
		"what was refused for something": {fail(holdapi.CodeRefused, "write: %w", unix.ENOSPC), holdapi.CodeRefused},
	} {
		res := failed(row.err)
		if res.Code != row.want {
			t.Errorf("%s: %s, want %s", name, res.Code, row.want)
		}
		told := fmt.Errorf("reseal: %w", &holdapi.Error{Op: "reseal", Code: res.Code, Message: res.Error})
		if errors.Is(told, unix.ENOSPC) != (row.want == holdapi.CodeNoSpace) || errors.Is(told, unix.EIO) {
			t.Errorf("%s: %v", name, told)
		}
	}
}
