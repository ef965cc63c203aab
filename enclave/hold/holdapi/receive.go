package holdapi

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ErrTooMuch is of a packet that is larger, or has more descriptors, than was allowed.
var ErrTooMuch = errors.New("packet is too large, or has too many descriptors")

// Receive reads one packet into b, and at most so many descriptors with it, which are
// the caller's. io.EOF is the end of the connection, or a packet without a byte, after
// which nothing is read. After an error no descriptor is left open: each that came is
// open in this process as soon as the packet is read (unix(7)), whatever is wrong with it.
func Receive(c *net.UnixConn, b []byte, descriptors int) (n int, files []*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(4*(descriptors+1)))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	files, ferr := received(oob[:oobn])
	switch {
	case err != nil:
	case ferr != nil:
		err = fmt.Errorf("descriptors: %w", ferr)
	case n == 0:
		err = io.EOF
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(files) > descriptors:
		err = ErrTooMuch
	}
	if err != nil {
		closeAll(files)
		return 0, nil, err
	}
	return n, files, nil
}

// received are the descriptors of a packet, also after an error.
func received(oob []byte) (files []*os.File, err error) {
	ms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range ms {
		fds, ferr := unix.ParseUnixRights(&m)
		err = errors.Join(err, ferr)
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
