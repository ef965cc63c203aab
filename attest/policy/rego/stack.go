package rego

// deepen makes the stack of the calling goroutine large enough for an evaluation
// by the rules that ship. The engine recurses for each expression, and a stack that
// grows meanwhile is copied frame by frame, several times over, which takes as long
// as the rules; while it is shallow there is nothing to copy. A server's goroutine
// begins each request with a small one. It returns the byte at i, so that there is
// a frame.
//
//go:noinline
func deepen(i int) byte {
	var frame [100 << 10]byte
	return frame[i]
}
