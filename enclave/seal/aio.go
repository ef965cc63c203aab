package seal

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// aio writes to a file past the page cache while its caller goes on computing
// (io_submit(2)), one write at a time. A goroutine that waits for the disk would need a
// core to begin on, and all of them seal: it began when the sealing next waited for it.
type aio struct {
	context uintptr
	// under is what of the write under way lies at off; nil if there is none.
	under []byte
	off   int64
}

// iocb is struct iocb of linux/aio_abi.h, 64 bytes: what is not named is zero.
type iocb struct {
	_      [2]uint64 // data, key, flags of the call
	opcode uint16
	_      uint16 // priority
	fildes uint32
	buf    uint64
	nbytes uint64
	offset int64
	_      [2]uint64 // reserved, flags, eventfd
}

// ioEvent is struct io_event of the same header. res is how many bytes were written, or
// an error number below zero.
type ioEvent struct {
	_   [2]uint64 // data, the iocb
	res int64
	_   int64
}

// commandWrite is IOCB_CMD_PWRITE.
const commandWrite = 1

// openAIO errs where the kernel has no such writes, or no more of them to give.
func openAIO() (*aio, error) {
	a := &aio{}
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&a.context)), 0); e != 0 { //nolint:gosec // the kernel writes one word
		return nil, fmt.Errorf("io_setup: %w", e)
	}
	return a, nil
}

// begin hands b to the disk. b must stay mapped, and as it is, until wait.
func (a *aio) begin(f *os.File, b []byte, off int64) error {
	if a.under != nil {
		return errors.New("io_submit: a write is under way")
	}
	cb := &iocb{opcode: commandWrite, fildes: uint32(f.Fd()), buf: uint64(uintptr(unsafe.Pointer(&b[0]))), nbytes: uint64(len(b)), offset: off} //nolint:gosec // a descriptor fits; b is no memory that Go moves
	list := [1]*iocb{cb}
	n, _, e := unix.Syscall(unix.SYS_IO_SUBMIT, a.context, 1, uintptr(unsafe.Pointer(&list))) //nolint:gosec // the kernel has read both when it returns
	runtime.KeepAlive(cb)
	if e != 0 {
		return fmt.Errorf("io_submit: %w", e)
	}
	if n != 1 {
		return fmt.Errorf("io_submit: %d writes begun, want 1", n)
	}
	a.under, a.off = b, off
	return nil
}

// wait returns what of the write under way the disk has not taken, with the error that
// kept it from that, if there is one.
func (a *aio) wait() (rest []byte, off int64, err error) {
	if a.under == nil {
		return nil, 0, nil
	}
	var ev ioEvent
	for {
		n, _, e := unix.Syscall6(unix.SYS_IO_GETEVENTS, a.context, 1, 1, uintptr(unsafe.Pointer(&ev)), 0, 0) //nolint:gosec // the kernel writes one event
		if e == unix.EINTR || e == 0 && n == 0 {
			continue
		}
		if e != 0 {
			// Whether the disk still reads from the buffer cannot be known: nothing may reuse it.
			return nil, 0, fmt.Errorf("io_getevents: %w", e)
		}
		break
	}
	b := a.under
	a.under = nil
	if ev.res < 0 {
		return b, a.off, unix.Errno(-ev.res)
	}
	n := min(int(ev.res), len(b))
	return b[n:], a.off + int64(n), nil
}

// close waits for what is under way, and gives back what the kernel has for it.
func (a *aio) close() error {
	if _, _, e := unix.Syscall(unix.SYS_IO_DESTROY, a.context, 0, 0); e != 0 {
		return fmt.Errorf("io_destroy: %w", e)
	}
	return nil
}
