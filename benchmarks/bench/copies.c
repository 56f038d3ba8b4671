/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process like any other of the same `copies MIB`: so much memory in one block, each page of it different, the same in all of
 * them, and mergeable by the kernel, too. It prints "true" when the memory is there, and ends with its standard input.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL

int main(int argc, char **argv)
{
	size_t size = (argc > 1 ? strtoul(argv[1], NULL, 10) : 1) << 20;
	char *memory = malloc(size + PAGE);
	char *first = (char *)(((uintptr_t)memory + PAGE - 1) & -PAGE);

	if (!memory)
		return 1;
	madvise(first, size, MADV_NOHUGEPAGE);
	for (size_t at = 0; at < size; at += sizeof(uint64_t))
		*(uint64_t *)(first + at) = (at + 1) * 0x9e3779b97f4a7c15;
	madvise(first, size, MADV_MERGEABLE);
	puts("true");
	fflush(stdout);
	while (getchar() != EOF)
		;
	return 0;
}
