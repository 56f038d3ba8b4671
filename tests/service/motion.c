/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program with `keep` MiB that stay the same, mapped by itself, whose thread fills further memory, maps and unmaps it, while it
 * works. It is told what to do by lines on stdin, and says "done" after each:
 *
 *   keep           make what stays the same
 *   work, rest     begin and end that
 *   malloc, advise make 8 MiB more that stay the same: a large allocation, or a mapping advised MADV_MERGEABLE
 *   huge           work in huge pages from now on
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB (1UL << 20)
#define CHURN (16 * MIB)

static atomic_bool working, huge;

static char *map(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		abort();
	return p;
}

/* No page is like another, but each is like that of another process with the same seed. */
static void fill(char *p, size_t len, uint64_t seed)
{
	for (size_t i = 0; i < len; i += sizeof(seed)) {
		seed = seed * 6364136223846793005u + 1442695040888963407u;
		memcpy(p + i, &seed, sizeof(seed));
	}
}

static void *work(void *unused)
{
	while (1) {
		char *p;

		while (!working)
			usleep(10000);
		p = map(CHURN);
		if (huge)
			madvise(p, CHURN, MADV_HUGEPAGE);
		for (size_t i = 0; i < CHURN; i += 4096)
			p[i] = 1;
		munmap(p, CHURN);
	}
	return unused;
}

int main(int argc, char **argv)
{
	size_t keep = (argc > 1 ? strtoul(argv[1], NULL, 0) : 1) * MIB;
	pthread_t thread;
	char line[80], *p;

	pthread_create(&thread, NULL, work, NULL);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "keep\n")) {
			fill(map(keep), keep, 1);
		} else if (!strcmp(line, "malloc\n")) {
			p = malloc(8 * MIB);
			fill(p, 8 * MIB, 2);
		} else if (!strcmp(line, "advise\n")) {
			p = map(8 * MIB);
			madvise(p, 8 * MIB, MADV_MERGEABLE);
			fill(p, 8 * MIB, 3);
		} else if (!strcmp(line, "huge\n")) {
			huge = true;
		} else {
			working = !strcmp(line, "work\n");
		}
		puts("done");
		fflush(stdout);
	}
	return 0;
}
