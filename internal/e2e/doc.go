// Package e2e tests coffer as its users meet it: the built programs, a real
// containerd, runsc and software TPM, and an attacker who is root on the node.
package e2e
