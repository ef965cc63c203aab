// Command go opens a sealed input of the job that it runs in as memory, without a
// copy, and prints its SHA-256 (docs/formats/regions.md). It shares no code with
// coffer: a job's program can take this file.
//
//	go INPUT/NAME
package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

const (
	socket  = "/run/coffer/regions.sock"
	version = "coffer.run/regions/v1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: go INPUT/NAME")
	}
	at := socket
	if s := os.Getenv("COFFER_REGIONS"); s != "" {
		at = s
	}
	memory, err := region(at, args[0])
	if err != nil {
		return err
	}
	fmt.Printf("%x  %s, %d bytes\n", sha256.Sum256(memory), args[0], len(memory))
	return nil
}

// region returns the file's memory: the holder's own pages, which cannot be
// written to.
func region(socket, name string) ([]byte, error) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("open region: %w", err)
	}
	defer c.Close()
	ask, err := json.Marshal(map[string]string{"version": version, "open": name})
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(ask); err != nil {
		return nil, fmt.Errorf("open region %s: %w", name, err)
	}
	packet, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, rights, _, _, err := c.ReadMsgUnix(packet, control)
	if err != nil {
		return nil, fmt.Errorf("open region %s: %w", name, err)
	}
	var answer struct {
		Size  int
		Error string
	}
	if err := json.Unmarshal(packet[:n], &answer); err != nil {
		return nil, fmt.Errorf("open region %s: %w", name, err)
	}
	if answer.Error != "" {
		return nil, fmt.Errorf("open region %s: %s", name, answer.Error)
	}
	messages, err := unix.ParseSocketControlMessage(control[:rights])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("open region %s: the answer has no descriptor", name)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("open region %s: the answer has no descriptor", name)
	}
	defer unix.Close(fds[0])
	if answer.Size == 0 {
		return nil, nil
	}
	memory, err := unix.Mmap(fds[0], 0, answer.Size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map region %s: %w", name, err)
	}
	return memory, nil
}
