package plan

// GPUProfile is how sandboxes with GPUs differ from those without.
type GPUProfile struct {
	// Driver is the version of the machine's driver, which the runtime must know.
	Driver string `json:"driver"`
	// Flags are the runtime's for a job with GPUs, besides RuntimeFlags.
	Flags []string `json:"flags"`
}
