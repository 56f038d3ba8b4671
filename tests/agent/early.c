/* SPDX-License-Identifier: Apache-2.0 */
/*
 * -DLIBRARY: a library that takes memory in its constructor, as allocators do; the agent's own constructor runs after it.
 * Else the program, which says what became of that memory after it changed half of it again.
 */
#include <stddef.h>

#define LENGTH (8UL << 20)
extern char *early_mapped, *early_taken;

#ifdef LIBRARY
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

char *early_mapped, *early_taken;

__attribute__((constructor)) static void take(void)
{
	early_mapped = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	sbrk((intptr_t)(-(uintptr_t)sbrk(0) % 4096));
	early_taken = sbrk((intptr_t)LENGTH);
	if (early_mapped == MAP_FAILED || early_taken == (void *)-1)
		abort();
	memset(early_mapped, 'm', LENGTH);
	memset(early_taken, 't', LENGTH);
}
#else
#include "segments.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static size_t merged(const char *p)
{
	return from_segments((unsigned long)p, (unsigned long)p + LENGTH);
}

static int is_all(const char *p, size_t n, char with)
{
	return p[0] == with && !memcmp(p, p + 1, n - 1);
}

int main(int argc, char **argv)
{
	int patience = argc > 1 ? atoi(argv[1]) : 1000;

	if (mmap(NULL, 2 * LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED)
		return 1; /* the constructor starts no agent; so much does */
	while (patience-- && (merged(early_mapped) < LENGTH / 10 * 9 || merged(early_taken) < LENGTH / 10 * 9))
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	printf("mapped: %d, taken: %d\n", merged(early_mapped) > LENGTH / 10 * 9,
	       merged(early_taken) > LENGTH / 10 * 9);
	madvise(early_mapped, LENGTH / 2, MADV_DONTNEED);
	memset(early_taken, 'x', LENGTH / 2);
	printf("intact: %d %d %d %d\n", is_all(early_mapped, LENGTH / 2, 0),
	       is_all(early_mapped + LENGTH / 2, LENGTH / 2, 'm'), is_all(early_taken, LENGTH / 2, 'x'),
	       is_all(early_taken + LENGTH / 2, LENGTH / 2, 't'));
	return 0;
}
#endif
