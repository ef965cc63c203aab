package bundle

// Devices is what the driver said of a job's GPUs when the job could begin to use
// them, and after they were cleared. The agent asked; nothing signs it but the
// statement.
type Devices struct {
	// Launch and End are absent where the job did not come so far, or the driver
	// did not answer.
	Launch *DeviceState `json:"launch,omitempty"`
	End    *DeviceState `json:"end,omitempty"`
	// Cleared: the GPUs were reset after the job and hold nothing of it.
	Cleared bool `json:"cleared"`
}

// DeviceState is how the driver stood.
type DeviceState struct {
	// CCMode is on, off, devtools or unknown.
	CCMode string `json:"ccMode"`
	// Ready: the driver takes work.
	Ready bool `json:"ready"`
	// AttackerAdvantage is the exponent of two at which the driver changes the keys
	// of its encrypted copies (nvml.h); absent where it does not say.
	AttackerAdvantage uint64        `json:"attackerAdvantage,omitempty"`
	GPUs              []DeviceUsage `json:"gpus"`
}

// DeviceUsage is what one GPU holds, in bytes.
type DeviceUsage struct {
	UUID             string `json:"uuid"`
	UsedBytes        int64  `json:"usedBytes"`
	ProtectedBytes   int64  `json:"protectedBytes"`
	UnprotectedBytes int64  `json:"unprotectedBytes"`
	Processes        int    `json:"processes"`
}
