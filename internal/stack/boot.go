package stack

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/coffer-run/coffer/internal/emulate/boot"
)

// firmwareLog is where the agent finds the log of the emulated machine's firmware.
func (l Layout) firmwareLog() string { return l.path("tpm", "binary_bios_measurements") }

// booted plays the emulated machine's firmware and boot loader in a software TPM
// that has just started, which is then ready. A TPM in which that broke off never
// is: only its next start empties the PCRs.
func (l Layout) booted(context.Context) error {
	if _, err := os.Stat(l.tpmSocket()); err != nil {
		return err
	}
	tr, err := linuxudstpm.Open(l.tpmSocket())
	if err != nil {
		return fmt.Errorf("software TPM: %w", err)
	}
	return errors.Join(boot.Firmware(tr, boot.Log()), tr.Close())
}
