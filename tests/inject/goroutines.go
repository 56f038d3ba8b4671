// SPDX-License-Identifier: Apache-2.0

// Goroutines on stacks of Go's own, which grow and move, and compute something that is known, until stdin ends.
package main

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"
)

func deep(n int, x uint64) uint64 {
	var pad [64]uint64
	for i := range pad {
		pad[i] = x + uint64(i)
	}
	if n > 0 {
		x = deep(n-1, x*31+7)
	}
	for i := range pad {
		x += pad[i]
	}
	return x
}

func main() {
	var rounds atomic.Uint64
	want := deep(200, 1)
	wrong := func() {
		fmt.Fprintln(os.Stderr, "wrong")
		os.Exit(1)
	}
	for i := 0; i < 8; i++ {
		go func() {
			for {
				done := make(chan uint64)
				go func() { done <- deep(200, 1) }()
				if <-done != want {
					wrong()
				}
				rounds.Add(1)
				time.Sleep(100 * time.Microsecond)
			}
		}()
	}
	fmt.Println("ready")
	io.ReadAll(os.Stdin)
	fmt.Println("rounds", rounds.Load())
}
