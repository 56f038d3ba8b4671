// SPDX-License-Identifier: Apache-2.0

// Has as many MiB as its argument says, which are the same in each process that runs it, and answers each line with a
// checksum of the line and all of them.
package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"
	"strconv"
)

func main() {
	mib, _ := strconv.Atoi(os.Args[1])
	memory := make([]byte, mib<<20)
	x := uint64(88172645463325252)
	for at := 0; at < len(memory); at += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(memory[at:], x)
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		sum := fnv.New64a()
		sum.Write(lines.Bytes())
		sum.Write(memory)
		fmt.Printf("answer %x\n", sum.Sum64())
	}
}
