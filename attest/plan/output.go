package plan

import "fmt"

// DefaultLogBytesPerSecond is a job's rate of output where its plan names none.
const DefaultLogBytesPerSecond = 64 << 10

// LogRate is how many bytes a second the job may print on both streams together,
// over more than LogBurst seconds.
func (o Output) LogRate() int64 {
	if o.LogBytesPerSecond == 0 {
		return DefaultLogBytesPerSecond
	}
	return o.LogBytesPerSecond
}

// LogBurst is how many seconds' worth of output a job may print at once.
const LogBurst = 4

func (o Output) validate() error {
	if o.LogBytesPerSecond < 0 {
		return fmt.Errorf("plan log rate %d: want more than 0", o.LogBytesPerSecond)
	}
	return o.validateExit()
}
