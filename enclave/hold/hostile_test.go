package hold_test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// open is how many descriptors of a file the holder has.
func (h *holder) open(file *os.File) (n int) {
	h.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", h.cmd.Process.Pid)
	fds, err := os.ReadDir(dir)
	must(h.t, err)
	for _, fd := range fds {
		if at, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && at == file.Name() {
			n++
		}
	}
	return n
}

// packets are requests that the holder refuses, or that it has nothing to answer to.
// None may leave a descriptor open, whatever comes with it.
var packets = map[string]string{
	"nothing":                       "",
	"no JSON":                       "\x00\xff",
	"an empty object":               "{}",
	"null":                          "null",
	"a list":                        "[]",
	"brackets":                      strings.Repeat("[", 60<<10),
	"an operation that is none":     `{"op":"open"}`,
	"an operation in other letters": `{"op":"FINISH"}`,
	"data after the request":        `{"op":"status"} {"op":"finish"}`,
	"a field that is none":          `{"op":"status","plan":1}`,
	"a part that is missing":        `{"op":"deliver"}`,
	"a part that is null":           `{"op":"deliver","deliver":null}`,
	"the part of another":           `{"op":"deliver","sign":{"statement":""}}`,
	"two parts":                     `{"op":"sign","sign":{"statement":""},"renew":{"lease":""}}`,
	"a lease that nobody asked for": `{"op":"renew","renew":{"lease":"x"}}`,
	"a folder that is none":         `{"op":"input","input":{"name":"in","asset":"a","digest":""}}`,
	"a sink that is none":           `{"op":"sink","sink":{"asset":"a","plan":"","maxBytes":1}}`,
	"a source that is none":         `{"op":"reseal-source","resealSource":{"asset":"a","digest":""}}`,
	"records before the first":      `{"op":"reseal-status","resealStatus":{"after":-1}}`,
	"a log before its beginning":    `{"op":"logs","logs":{"stream":"stdin","offset":-1,"waitMillis":0}}`,
	"exit before the end":           `{"op":"exit"}`,
	"a number with an exponent":     `{"op":"logs","logs":{"stream":"stdout","offset":1e30,"waitMillis":0}}`,
	"a packet that is too large":    `{"op":"status"` + strings.Repeat(" ", holdapi.MaxMessage) + `}`,
}

// sendNothing sends descriptors in a packet without a byte. Go's own functions add one.
func sendNothing(c *net.UnixConn, rights []byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	m := unix.Msghdr{Control: &rights[0]}
	m.SetControllen(len(rights))
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m)), 0) // #nosec G103 -- sendmsg(2)
	})
	if errno != 0 {
		return errno
	}
	return err
}

// TestPacketsOfAStranger: whatever comes over the holder's sockets, with or without
// descriptors, in any order and from many at a time, changes nothing and stays nowhere.
func TestPacketsOfAStranger(t *testing.T) {
	h := start(t)
	file, err := os.CreateTemp(t.TempDir(), "passed")
	must(t, err)
	defer file.Close()
	send := func(socket, packet string, descriptors int) (holdapi.Response, error) {
		var r holdapi.Response
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
		if err != nil {
			return r, err
		}
		defer c.Close()
		must(t, c.SetDeadline(time.Now().Add(time.Minute)))
		var rights []byte
		if descriptors > 0 {
			fds := make([]int, descriptors)
			for i := range fds {
				fds[i] = int(file.Fd())
			}
			rights = unix.UnixRights(fds...)
		}
		if packet == "" && descriptors > 0 {
			err = sendNothing(c, rights)
		} else {
			_, _, err = c.WriteMsgUnix([]byte(packet), rights, nil)
		}
		if err != nil {
			return r, err
		}
		b := make([]byte, holdapi.MaxMessage)
		n, err := c.Read(b)
		if err != nil {
			return r, err
		}
		return r, json.Unmarshal(b[:n], &r)
	}
	flood := func(when string, without ...string) {
		var wg sync.WaitGroup
		few := make(chan struct{}, 8) // so that all are let in
		for name, packet := range packets {
			if slices.Contains(without, name) {
				continue
			}
			wg.Go(func() {
				few <- struct{}{}
				defer func() { <-few }()
				for _, socket := range []string{h.path(holdapi.SocketName), h.regions()} {
					for _, descriptors := range []int{0, 1, 253} {
						if r, err := send(socket, packet, descriptors); err == nil && r.Error == "" {
							t.Errorf("%s, %s, with %d descriptors to %s is answered", when, name, descriptors, filepath.Base(socket))
						}
					}
				}
			})
		}
		wg.Wait()
		// An answer may go out before the packet's descriptors are closed.
		h.until("descriptors to be closed", func() bool { return h.open(file) == 0 })
	}
	flood("before the end")
	h.finish()
	flood("after the end", "exit before the end")
	if s, err := h.c.Status(t.Context()); err != nil || !s.Scrubbed || len(s.Checkpoints) > 0 {
		t.Errorf("%+v, %v", s, err)
	}
}
