package holdapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// RegionsDir is the folder below the run directory that a container may see,
	// with the socket RegionsSocket in it.
	RegionsDir    = "regions"
	RegionsSocket = "regions.sock"
	// RegionsVersion is the only version of the protocol (docs/formats/regions.md).
	RegionsVersion = "coffer.run/regions/v1"
	// MaxRegionRequest bounds one request, in bytes.
	MaxRegionRequest = 4 << 10
)

// RegionRequest asks for one file's memory.
type RegionRequest struct {
	Version string `json:"version"`
	// Open is INPUT/NAME: the input as the job file calls it, and the file's name
	// in it.
	Open string `json:"open"`
}

// RegionReply carries one descriptor, unless Error says why not.
type RegionReply struct {
	// Size is in bytes.
	Size  int64  `json:"size,omitempty"`
	Error string `json:"error,omitempty"`
}

// OpenRegion asks the holder at the given socket for a file's memory. What it
// returns is for reading only: it can be mapped, read and handed on. When the job
// ends it reads zeros.
func OpenRegion(socket, name string) (*os.File, int64, error) {
	q, err := json.Marshal(RegionRequest{Version: RegionsVersion, Open: name})
	if err != nil {
		return nil, 0, err
	}
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return nil, 0, fmt.Errorf("open region: %w", err)
	}
	defer c.Close()
	if _, err := c.Write(q); err != nil {
		return nil, 0, fmt.Errorf("open region %s: %w", name, err)
	}
	b, oob := make([]byte, MaxRegionRequest), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, 0, fmt.Errorf("open region %s: %w", name, err)
	}
	var f *os.File
	if ms, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(ms) == 1 {
		if fds, err := unix.ParseUnixRights(&ms[0]); err == nil && len(fds) == 1 {
			unix.CloseOnExec(fds[0])
			f = os.NewFile(uintptr(fds[0]), name)
		}
	}
	var r RegionReply
	err = json.Unmarshal(b[:n], &r)
	switch {
	case err == nil && r.Error != "":
		err = errors.New(r.Error)
	case err == nil && f == nil:
		err = errors.New("the answer has no descriptor")
	}
	if err != nil {
		if f != nil {
			_ = f.Close()
		}
		return nil, 0, fmt.Errorf("open region %s: %w", name, err)
	}
	return f, r.Size, nil
}
