package tpm

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
)

const (
	// commandTimeout bounds one command to a TPM behind a socket. The kernel
	// bounds commands to a device itself.
	commandTimeout = 30 * time.Second
	// maxResponse is the response buffer that the PC Client platform demands.
	maxResponse = 4096
	headerSize  = 10
)

// socket speaks to a TPM in its own process over a unix socket, with one
// connection per command, so that neither side's restart is noticed by the
// other. go-tpm's transport of that kind has no deadline and reads once.
type socket struct {
	path string
}

func (s *socket) Send(command []byte) ([]byte, error) {
	d := net.Dialer{Timeout: commandTimeout}
	conn, err := d.Dial("unix", s.path)
	if err != nil {
		return nil, fmt.Errorf("reach TPM: %w", err)
	}
	defer conn.Close() //nolint:errcheck // the answer is complete or refused below
	if err := conn.SetDeadline(time.Now().Add(commandTimeout)); err != nil {
		return nil, fmt.Errorf("reach TPM: %w", err)
	}
	if _, err := conn.Write(command); err != nil {
		return nil, fmt.Errorf("send TPM command: %w", err)
	}
	// TPM 2.0 Part 1, section 18.3: tag (2), size of the whole response (4), code (4).
	buf := make([]byte, headerSize, maxResponse)
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, fmt.Errorf("read TPM response: %w", err)
	}
	n := binary.BigEndian.Uint32(buf[2:6])
	if n < headerSize || n > maxResponse {
		return nil, fmt.Errorf("read TPM response: %d bytes announced, %d to %d are possible", n, headerSize, maxResponse)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(conn, buf[headerSize:]); err != nil {
		return nil, fmt.Errorf("read TPM response: %w", err)
	}
	return buf, nil
}

func (s *socket) Close() error { return nil }

// dial opens the device or socket at path.
func dial(path string) (tr transport.TPMCloser, shared bool, err error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, false, fmt.Errorf("open TPM: %w", err)
	}
	if fi.Mode()&os.ModeSocket != 0 {
		return &socket{path: path}, false, nil
	}
	d, err := linuxtpm.Open(path)
	if err != nil {
		return nil, false, fmt.Errorf("open TPM: %w", err)
	}
	return d, true, nil
}
