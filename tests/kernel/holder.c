/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A statically linked program with MIB of memory that is the same in each process that runs it, once initialised. Answers
 * each line on stdin: "check" with whether all of it still is what was written, "write" after it wrote one page in 16.
 *
 *	holder MIB
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static uint64_t *memory;
static size_t words, writes;

static uint64_t word(size_t i)
{
	uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ULL;

	return (x ^ x >> 29) + (i / 512 % 16 ? 0 : writes);
}

int main(int argc, char **argv)
{
	char line[64];

	words = strtoul(argv[argc - 1], NULL, 10) << 20 >> 3;
	memory = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t i = 0; i < words; i++)
		memory[i] = word(i);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		size_t wrong = 0;

		if (!strcmp(line, "write\n")) {
			writes++;
			for (size_t i = 0; i < words; i++)
				if (i / 512 % 16 == 0)
					memory[i] = word(i);
		}
		for (size_t i = 0; i < words; i++)
			wrong += memory[i] != word(i);
		printf("%zu\n", wrong);
		fflush(stdout);
	}
	return 0;
}
