package nvidia

import (
	"os"
	"path/filepath"
	"testing"
)

func TestNearNode(t *testing.T) {
	sys := t.TempDir()
	for name, node := range map[string]string{"0000:01:00.0": "0\n", "0000:41:00.0": "3\n", "0000:81:00.0": "-1\n", "0000:c1:00.0": "east\n"} {
		dir := filepath.Join(sys, "bus/pci/devices", name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "numa_node"), []byte(node), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for bus, want := range map[string]int{
		"00000000:01:00.0": 1, "00000000:41:00.0": 4, "00000000:81:00.0": 0, "00000000:C1:00.0": 0, "00000000:02:00.0": 0, "": 0, "../../x": 0,
	} {
		if got := nearNode(sys, pciName([]byte(bus))); got != want {
			t.Errorf("%q: %d, want %d", bus, got, want)
		}
	}
}
