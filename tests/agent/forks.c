/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Forks one child after the other, which takes long each time, for it has many mappings.
 *
 * Usage: forks MAPPINGS. Prints the address of its mergeable memory; then, for each line "SECONDS" on its standard input, forks
 * for so long and prints how often it did, and how many of its pages are not what they were.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv)
{
	size_t n = argc > 1 ? strtoul(argv[1], NULL, 10) : 1;
	char *memory = mmap(NULL, 2 * n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char line[64];

	if (memory == MAP_FAILED)
		return 1;
	signal(SIGCHLD, SIG_IGN);
	madvise(memory, 2 * n * PAGE, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < n; i++) {
		*(uint64_t *)(memory + 2 * i * PAGE) = i + 1;
		if (mprotect(memory + (2 * i + 1) * PAGE, PAGE, PROT_READ) ||
		    madvise(memory + 2 * i * PAGE, PAGE, MADV_MERGEABLE))
			return 1;
	}
	printf("%lu\n", (unsigned long)memory);
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		double end = now() + strtod(line, NULL);
		unsigned long forks = 0, wrong = 0;

		for (; now() < end; forks++)
			if (!fork())
				_exit(0);
		for (size_t i = 0; i < n; i++)
			wrong += *(uint64_t *)(memory + 2 * i * PAGE) != i + 1;
		printf("%lu %lu\n", forks, wrong);
		fflush(stdout);
	}
	return 0;
}
