package gate

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"time"
)

// maxHello bounds a ClientHello with its records, in bytes. crypto/tls bounds the
// message to 64 KiB.
const maxHello = 96 << 10

// Extensions that hide the name which the client asks for: encrypted_client_hello
// (RFC 9849, 5) and the drafts' encrypted_server_name before it.
const (
	extensionECH  = 0xfe0d
	extensionESNI = 0xffce
)

// errSeen ends the handshake once the ClientHello has been read.
var errSeen = errors.New("seen")

// readHello reads a TLS ClientHello from r, however it is cut into records and
// packets, and returns the bytes that were read; or the rule that refuses it.
// crypto/tls does the parsing: it refuses a repeated extension and a second name.
func readHello(r io.Reader, host string) (io.Reader, string) {
	c := &helloConn{r: r}
	var info *tls.ClientHelloInfo
	err := tls.Server(c, &tls.Config{ //nolint:gosec // it reads one message and answers none
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			info = h
			return nil, errSeen
		},
	}).Handshake()
	switch {
	case info == nil || !errors.Is(err, errSeen):
		return nil, RuleNoTLS
	case slices.Contains(info.Extensions, extensionECH) || slices.Contains(info.Extensions, extensionESNI):
		return nil, RuleHidden
	case info.ServerName == "":
		return nil, RuleNoName
	case strings.ToLower(info.ServerName) != host:
		return nil, RuleOtherName
	}
	return bytes.NewReader(c.read.Bytes()), ""
}

// helloConn keeps what is read from it and drops what is written.
type helloConn struct {
	r    io.Reader
	read bytes.Buffer
}

func (c *helloConn) Read(p []byte) (int, error) {
	if c.read.Len() >= maxHello {
		return 0, errors.New("the ClientHello is too large")
	}
	n, err := c.r.Read(p[:min(len(p), maxHello-c.read.Len())])
	c.read.Write(p[:n])
	return n, err
}

func (c *helloConn) Write(p []byte) (int, error)      { return len(p), nil }
func (c *helloConn) Close() error                     { return nil }
func (c *helloConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c *helloConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c *helloConn) SetDeadline(time.Time) error      { return nil }
func (c *helloConn) SetReadDeadline(time.Time) error  { return nil }
func (c *helloConn) SetWriteDeadline(time.Time) error { return nil }
