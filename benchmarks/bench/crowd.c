/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process with memory in very many pieces, of which every second page is the same in all such processes.
 *
 *     crowd areas N     only those pages are mergeable, so each is an area of its own
 *     crowd forks N     all are; after a line "[M]" on its standard input it forks M children
 *
 * It prints "true" when the memory, or a child, is there, and ends with its standard input; its children end with it.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096UL

static void fork_children(long n)
{
	for (; n > 0; n--) {
		if (fork() == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			pause();
			_exit(0);
		}
	}
}

int main(int argc, char **argv)
{
	size_t n = argc > 2 ? strtoul(argv[2], NULL, 10) : 1;
	int areas = argc > 1 && !strcmp(argv[1], "areas");
	long count;
	char line[64];
	char *memory = mmap(NULL, 2 * n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return 1;
	madvise(memory, 2 * n * PAGE, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < n; i++) {
		*(uint64_t *)(memory + 2 * i * PAGE) = (i + 1) * 0x9e3779b97f4a7c15;
		if (areas && madvise(memory + 2 * i * PAGE, PAGE, MADV_MERGEABLE))
			return 1;
		if (!areas)
			*(uint64_t *)(memory + (2 * i + 1) * PAGE) = ((uint64_t)getpid() << 40) + i;
	}
	if (!areas && madvise(memory, 2 * n * PAGE, MADV_MERGEABLE))
		return 1;
	puts("true");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "[%ld]", &count) == 1)
			fork_children(count);
		puts("true");
		fflush(stdout);
	}
	return 0;
}
