package hold

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// alarm rings at a time of CLOCK_BOOTTIME (timerfd_create(2)), also where the
// machine slept meanwhile; Go's own timers stand still then.
type alarm struct {
	f    *os.File
	done chan struct{}
}

// newAlarm calls ring, from one goroutine, each time that the alarm rings.
func newAlarm(ring func()) (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make timer: %w", err)
	}
	a := &alarm{f: os.NewFile(uintptr(fd), "timer"), done: make(chan struct{})}
	go func() {
		defer close(a.done)
		var count [8]byte
		for {
			if _, err := a.f.Read(count[:]); err != nil {
				return
			}
			ring()
		}
	}()
	return a, nil
}

// set has the alarm ring once at the given time, and not at the one before.
func (a *alarm) set(at time.Duration) error {
	raw, err := a.f.SyscallConn()
	if err != nil {
		return fmt.Errorf("set timer: %w", err)
	}
	var serr error
	// Zero would take the timer away.
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(max(1, at.Nanoseconds()))}
	if err := raw.Control(func(fd uintptr) { serr = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME, &spec, nil) }); err != nil {
		serr = err
	}
	if serr != nil {
		return fmt.Errorf("set timer: %w", serr)
	}
	return nil
}

// close ends the goroutine and waits for it.
func (a *alarm) close() {
	_ = a.f.Close()
	<-a.done
}
