package hold

import (
	"testing"

	"golang.org/x/sys/unix"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

func TestOpensThatAreTold(t *testing.T) {
	o, err := newOpens([]string{"/etc/shadow", "/root/.ssh/**", "/dev/tpm*"})
	if err != nil {
		t.Fatal(err)
	}
	in := func(cwd string) *pb.ContextData { return &pb.ContextData{Cwd: cwd} }
	for name, tt := range map[string]struct {
		m    *pb.Open
		path string
		told bool
	}{
		"the file":                         {&pb.Open{Pathname: "/etc/shadow"}, "/etc/shadow", true},
		"by dots":                          {&pb.Open{Pathname: "/tmp/..//etc/./shadow"}, "/etc/shadow", true},
		"another file":                     {&pb.Open{Pathname: "/etc/shadow.bak"}, "/etc/shadow.bak", false},
		"below a folder":                   {&pb.Open{Pathname: "/root/.ssh/a/b"}, "/root/.ssh/a/b", true},
		"from the working folder":          {&pb.Open{Fd: unix.AT_FDCWD, Pathname: ".ssh/id", ContextData: in("/root")}, "/root/.ssh/id", true},
		"from an open folder":              {&pb.Open{Fd: 7, FdPath: "/root/.ssh", Pathname: "id", ContextData: in("/tmp")}, "/root/.ssh/id", true},
		"without openat":                   {&pb.Open{Pathname: "shadow", ContextData: in("/etc")}, "/etc/shadow", true},
		"the working folder is not asked":  {&pb.Open{Fd: 7, FdPath: "/tmp", Pathname: "shadow", ContextData: in("/etc")}, "/tmp/shadow", false},
		"a path that could not be read":    {&pb.Open{Fd: unix.AT_FDCWD, ContextData: in("/")}, "/", false},
		"more dots than folders":           {&pb.Open{Fd: unix.AT_FDCWD, Pathname: "../../etc/shadow", ContextData: in("/x")}, "/etc/shadow", true},
		"a pattern within one name":        {&pb.Open{Pathname: "/dev/tpmrm0"}, "/dev/tpmrm0", true},
		"a pattern does not go into one's": {&pb.Open{Pathname: "/dev/tpm/0"}, "/dev/tpm/0", false},
	} {
		if p, told := o.look(tt.m); p != tt.path || told != tt.told {
			t.Errorf("%s: %s, told %t", name, p, told)
		}
	}
	for _, bad := range []string{"", "etc/shadow", "/a/../b", "/a/**/b", "/a**"} {
		if _, err := newOpens([]string{bad}); err == nil {
			t.Errorf("pattern %q is taken", bad)
		}
	}
	if _, err := newOpens(make([]string, holdapi.MaxPatterns+1)); err == nil {
		t.Error("too many patterns are taken")
	}
	if p, told := opens(nil).look(&pb.Open{Pathname: "/etc/shadow"}); told {
		t.Errorf("%s is told to nobody who asked", p)
	}
}
