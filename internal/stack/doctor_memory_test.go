package stack

import "testing"

func TestInitOnFree(t *testing.T) {
	const built = "\nCONFIG_X=y\nCONFIG_INIT_ON_FREE_DEFAULT_ON=y\n"
	for name, c := range map[string]struct {
		cmdline, config string
		on              bool
	}{
		"nobody says":               {"quiet", "", false},
		"on the command line":       {"quiet init_on_free=1 x", "", true},
		"switched off there":        {"init_on_free=0", built, false},
		"the last word counts":      {"init_on_free=1 init_on_free=0", "", false},
		"for the first program":     {"quiet -- init_on_free=1", "", false},
		"another word":              {"no_init_on_free=1 init_on_free", "", false},
		"built so":                  {"quiet", built, true},
		"built without":             {"quiet", "\n# CONFIG_INIT_ON_FREE_DEFAULT_ON is not set\n", false},
		"on alloc is another thing": {"init_on_alloc=1", "\nCONFIG_INIT_ON_ALLOC_DEFAULT_ON=y\n", false},
	} {
		if on, found := initOnFree(c.cmdline, []byte(c.config)); on != c.on || found == "" {
			t.Errorf("%s: %v, %q", name, on, found)
		}
	}
}
