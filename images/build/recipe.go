package main

import (
	"maps"
	"slices"
	"strings"
)

const (
	suite = "bookworm"
	// epoch is the time of every file and record in an image: a build's own time would change the digest.
	epoch = 1789000000
	// user owns nothing and is in no group of a Debian system.
	user = "65532:65532"

	libDir    = "usr/lib/x86_64-linux-gnu"
	pythonDir = "usr/lib/python3.11"
	distDir   = "usr/lib/python3/dist-packages"
)

// recipe says what a system layer is made of. A new image is a new entry in recipes.
type recipe struct {
	// Packages are Debian packages; apt adds what they depend on.
	Packages []string
	// Modules are the files and folders of dist-packages that the image keeps.
	Modules []string
	// Skip names folders that are left out wherever they are in a kept tree.
	Skip []string
	// Files are kept besides Python and the modules.
	Files []string
	// Links are the links that update-alternatives would have made, had it run: a library's name and the file that provides it.
	Links map[string]string
}

var (
	skip  = []string{"__pycache__", "test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "turtledemo", "include"}
	files = []string{
		"bin/sh", "bin/true", "usr/bin/python3",
		// The C library opens libgcc_s by name when a thread is cancelled.
		"lib/x86_64-linux-gnu/libgcc_s.so.1",
	}
	openblas = map[string]string{
		"libblas.so.3":     libDir + "/openblas-pthread/libblas.so.3",
		"liblapack.so.3":   libDir + "/openblas-pthread/liblapack.so.3",
		"libopenblas.so.0": libDir + "/openblas-pthread/libopenblas.so.0",
	}
)

var recipes = map[string]recipe{
	"numpy": {
		Packages: []string{"coreutils", "dash", "libopenblas0-pthread", "python3-numpy"},
		Modules:  []string{"numpy"},
		Skip:     skip,
		Files:    files,
		Links:    openblas,
	},
	"torch": {
		Packages: []string{"coreutils", "dash", "libopenblas0-pthread", "python3-torch"},
		Modules:  []string{"functorch", "numpy", "torch", "typing_extensions.py"},
		// torch/bin is its test suite, but for one program that import torch insists on.
		Skip:  append([]string{"bin"}, skip...),
		Files: append([]string{distDir + "/torch/bin/torch_shm_manager"}, files...),
		Links: openblas,
	},
}

func recipeNames() string { return strings.Join(slices.Sorted(maps.Keys(recipes)), ", ") }

// environment is what every job's process starts with unless its job file says otherwise.
var environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"LANG=C.UTF-8",
	"HOME=/tmp",
	"PYTHONUNBUFFERED=1",
	// The root is read-only: Python would try and fail to write each module's bytecode.
	"PYTHONDONTWRITEBYTECODE=1",
	// Two OpenBLAS threads are several times slower than one under gVisor: they spin on futexes that the sandbox answers. OpenMP's number (OMP_NUM_THREADS) is
	// the job file's to say: the image does not know the job's processors.
	"OPENBLAS_NUM_THREADS=1",
}

// folders are where the sandbox mounts: the root is read-only, so they must exist in the image.
var folders = []string{"checkpoints", "dev", "inputs", "proc", "sys", "tmp"}

// written are the files that coffer writes itself.
var written = map[string]string{
	"etc/passwd":        "root:x:0:0:root:/:/bin/false\njob:x:65532:65532:coffer job:/tmp:/bin/false\n",
	"etc/group":         "root:x:0:\njob:x:65532:\n",
	"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
