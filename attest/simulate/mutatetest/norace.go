//go:build !race

package mutatetest

const raceDetector = false
