package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coffer-run/coffer/attest/plan"
)

// disks returns the block devices that a job's I/O is bounded on: all that have a
// size, as "major:minor". A disk that comes later is not bounded for jobs that are
// there already.
func disks(sysBlock string) ([]string, error) {
	all, err := os.ReadDir(sysBlock)
	if err != nil {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	var out []string
	for _, d := range all {
		size, err := os.ReadFile(filepath.Join(sysBlock, d.Name(), "size"))
		if err != nil {
			return nil, fmt.Errorf("list disks: %w", err)
		}
		if strings.TrimSpace(string(size)) == "0" {
			continue
		}
		dev, err := os.ReadFile(filepath.Join(sysBlock, d.Name(), "dev"))
		if err != nil {
			return nil, fmt.Errorf("list disks: %w", err)
		}
		out = append(out, strings.TrimSpace(string(dev)))
	}
	return out, nil
}

// blockIO is the OCI form of the limits on each disk, nil if there are none.
func blockIO(limits plan.IO, disks []string) (*specs.LinuxBlockIO, error) {
	if limits == (plan.IO{}) {
		return nil, nil
	}
	if len(disks) == 0 {
		return nil, errors.New("limit I/O: this machine shows no disk to limit it on")
	}
	each := func(rate int64) ([]specs.LinuxThrottleDevice, error) {
		if rate == 0 {
			return nil, nil
		}
		var out []specs.LinuxThrottleDevice
		for _, dev := range disks {
			d := specs.LinuxThrottleDevice{Rate: uint64(rate)} // #nosec G115 -- a plan has no negative limit
			if _, err := fmt.Sscanf(dev, "%d:%d", &d.Major, &d.Minor); err != nil {
				return nil, fmt.Errorf("limit I/O: disk %q: %w", dev, err)
			}
			out = append(out, d)
		}
		return out, nil
	}
	var io specs.LinuxBlockIO
	var errs [4]error
	io.ThrottleReadBpsDevice, errs[0] = each(limits.ReadBytesPerSecond)
	io.ThrottleWriteBpsDevice, errs[1] = each(limits.WriteBytesPerSecond)
	io.ThrottleReadIOPSDevice, errs[2] = each(limits.ReadsPerSecond)
	io.ThrottleWriteIOPSDevice, errs[3] = each(limits.WritesPerSecond)
	return &io, errors.Join(errs[:]...)
}

// ioHolds makes sure that the kernel has taken the limits: the library leaves out
// controllers that a machine lacks, and then nothing would be limited. root is
// where control groups are mounted.
func ioHolds(root, path string, unified bool, io *specs.LinuxBlockIO) error {
	if io == nil {
		return nil
	}
	for _, l := range []struct {
		v1, v2  string
		devices []specs.LinuxThrottleDevice
	}{
		{"read_bps_device", "rbps", io.ThrottleReadBpsDevice}, {"write_bps_device", "wbps", io.ThrottleWriteBpsDevice},
		{"read_iops_device", "riops", io.ThrottleReadIOPSDevice}, {"write_iops_device", "wiops", io.ThrottleWriteIOPSDevice},
	} {
		if len(l.devices) == 0 {
			continue
		}
		file := filepath.Join(root, "blkio", path, "blkio.throttle."+l.v1)
		if unified {
			file = filepath.Join(root, path, "io.max")
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("limit I/O: this kernel cannot: %w", err)
		}
		for _, d := range l.devices {
			rate := strconv.FormatUint(d.Rate, 10)
			if unified {
				rate = l.v2 + "=" + rate
			}
			if !listed(string(b), fmt.Sprintf("%d:%d", d.Major, d.Minor), rate) {
				return fmt.Errorf("limit I/O: the kernel did not take %s on disk %d:%d", rate, d.Major, d.Minor)
			}
		}
	}
	return nil
}

// listed reports whether a line for a device has a field. Version 1 has
// "8:0 1048576", version 2 "8:0 rbps=1048576 wbps=max riops=max wiops=max".
func listed(text, device, field string) bool {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 1 && f[0] == device && slices.Contains(f[1:], field) {
			return true
		}
	}
	return false
}
