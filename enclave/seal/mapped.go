package seal

import (
	"fmt"
	"runtime/debug"
	"sync"

	"golang.org/x/sys/unix"
)

// mapping is a sealed file where it lies in the page cache, read without a copy.
//
// Whoever could write to the file could change it between the tag's look at it
// and the cipher's, or cut it under the reader. A read lease (fcntl(2),
// F_SETLEASE) is given only while nobody has the file open for writing, and who
// comes to write or cut it has to wait until the lease is taken down. The kernel
// takes it down by itself after some time, so it is asked after each chunk: if
// the lease holds then, it held all the while, and nobody wrote.
type mapping struct {
	fd int
	// mu guards b: held for reading while it is used, for writing when it goes.
	mu sync.RWMutex
	b  []byte
}

// mapFile maps all of a regular file of size bytes, or returns nil where there is
// no lease to have: the file system gives none, the file is another user's, or
// somebody has it open for writing.
func mapFile(fd int, size int64) *mapping {
	if int64(int(size)) != size || size == 0 {
		return nil
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		return nil
	}
	m := &mapping{fd: fd}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err == nil && st.Size == size && m.leased() {
		if m.b, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ, unix.MAP_SHARED); err == nil {
			// A process that locks all its memory (mlockall(2)) would keep the
			// ciphertext beside its plaintext: the kernel may take these pages back.
			if err = unix.Munlock(m.b); err == nil {
				return m
			}
			m.close()
			return nil
		}
	}
	m.giveBack()
	return nil
}

// leased reports whether nobody could write since the lease was given. A lease
// that is being taken down is told as gone.
func (m *mapping) leased() bool {
	kind, err := unix.FcntlInt(uintptr(m.fd), unix.F_GETLEASE, 0)
	return err == nil && kind == unix.F_RDLCK
}

// use calls f with n bytes from off on and reports whether they were the file's
// own for as long as f ran. If not, what f did is void, and the map is not used
// again: a writer waits.
func (m *mapping) use(off int64, n int, f func(b []byte)) (ok bool) {
	m.mu.RLock()
	ok = m.read(off, n, f)
	m.mu.RUnlock()
	if !ok {
		m.close()
	}
	return ok
}

// read is use with m.mu held for reading.
func (m *mapping) read(off int64, n int, f func(b []byte)) (ok bool) {
	if off < 0 || off+int64(n) > int64(len(m.b)) {
		return false
	}
	b := m.b[off : off+int64(n)]
	// Pages that cannot be read are an error here, and a signal below.
	if err := populate(m.b, off, n); err != nil {
		return false
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if _, fault := r.(interface{ Addr() uintptr }); !fault {
				panic(r)
			}
			ok = false
		}
	}()
	f(b)
	return m.leased()
}

// populate faults in the pages that have bytes from off to off+n. A kernel before
// 5.14 cannot, and faults them in one by one.
func populate(b []byte, off int64, n int) error {
	from := off &^ int64(unix.Getpagesize()-1)
	if err := unix.Madvise(b[from:off+int64(n)], unix.MADV_POPULATE_READ); err != nil && err != unix.EINVAL { //nolint:errorlint // a bare errno
		return fmt.Errorf("fault in sealed file: %w", err)
	}
	return nil
}

// yield gives the map up if the lease is being taken down.
func (m *mapping) yield() {
	if m != nil && !m.leased() {
		m.close()
	}
}

func (m *mapping) giveBack() {
	_, _ = unix.FcntlInt(uintptr(m.fd), unix.F_SETLEASE, unix.F_UNLCK)
}

// close takes the map away and lets writers in. It may be called again.
func (m *mapping) close() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.b == nil {
		return
	}
	_ = unix.Munmap(m.b)
	m.b = nil
	m.giveBack()
}
