// SPDX-License-Identifier: Apache-2.0

// As becomes.c, statically linked by Go.
package main

import (
	"os"
	"syscall"
)

var memory []byte

func main() {
	memory = make([]byte, 20<<20)
	for i := range memory {
		memory[i] = 1
	}
	var b [1]byte
	for b[0] != '\n' {
		if n, _ := os.Stdin.Read(b[:]); n != 1 {
			os.Exit(1)
		}
	}
	syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
	os.Exit(1)
}
