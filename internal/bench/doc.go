// Package bench measures coffer against what its work must cost at least: the
// signatures, the cipher and the memory that no implementation can do without,
// timed in the same run. Its goals are reported, not enforced.
package bench
