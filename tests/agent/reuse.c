/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frees large blocks and allocates them again, and measures how many page faults that costs and how much stays
 * resident.
 *
 * reuse WHAT    prints "faults N" and "resident N" (KiB); exit status 1 after saying what was wrong
 */
#define _GNU_SOURCE
#include "../check.h"

#include <malloc.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1UL << 20)

static long resident(void)
{
	FILE *file = fopen("/proc/self/statm", "r");
	long all, pages;

	CHECK(file && fscanf(file, "%ld %ld", &all, &pages) == 2);
	fclose(file);
	return pages * 4;
}

static unsigned next(void)
{
	static unsigned state = 1;

	state = state * 1103515245 + 12345;
	return state >> 8;
}

/* Blocks of 1 to 6 MiB, so many of them at a time. */
static void at_random(int slots)
{
	char *p[64] = {NULL};

	for (int i = 0; i < 1000; i++) {
		int slot = (int)next() % slots;
		size_t size = MIB + next() % (5 * MIB);

		free(p[slot]);
		p[slot] = malloc(size);
		memset(p[slot], 1, size);
	}
	for (int i = 0; i < slots; i++)
		free(p[i]);
}

static void same_sizes(void)
{
	for (int round = 0; round < 3; round++) {
		char *p[4];

		for (int i = 0; i < 4; i++)
			memset(p[i] = malloc(30 * MIB), 1, 30 * MIB);
		for (int i = 0; i < 4; i++)
			free(p[i]);
	}
}

static void growing(void)
{
	for (int round = 0; round < 10; round++) {
		size_t size = MIB, done = 0;
		char *p = malloc(size);

		for (; size < 24 * MIB; size += size / 8 + 4096) {
			memset(p + done, round + 1, size - done);
			done = size;
			p = realloc(p, size + size / 8 + 4096);
		}
		for (size_t i = 0; i < done; i += 4096)
			CHECK(p[i] == round + 1);
		free(p);
	}
}

/* As programs do that must not fault once they are warm. */
static void tuned(void)
{
	mallopt(M_TRIM_THRESHOLD, -1);
	mallopt(M_MMAP_MAX, 0);
	for (int i = 0; i < 100; i++) {
		char *p = malloc(20 * MIB), *q = malloc(20 * MIB);

		memset(p, 1, 20 * MIB);
		memset(q, 1, 20 * MIB);
		free(p);
		free(q);
	}
}

/* Memory that was used reads as zeros again, cleared blocks are not cleared of what is fresh, and a child has its own. */
static void zeroed(void)
{
	for (size_t size = MIB; size < 20 * MIB; size += MIB + 4096) {
		unsigned char *p = malloc(size), *q;
		int status;
		pid_t pid;

		memset(p, 0xff, size);
		free(p);
		q = calloc(1, size + 3 * MIB);
		for (size_t i = 0; i < size + 3 * MIB; i++)
			CHECK(!q[i]);
		memset(q, 1, size + 3 * MIB);
		pid = fork();
		free(q);
		p = calloc(size / 8, 8);
		for (size_t i = 0; i < size / 8 * 8; i++)
			CHECK(!p[i]);
		free(p);
		if (!pid)
			_exit(0);
		CHECK(waitpid(pid, &status, 0) == pid && !status);
	}
}

/* 20 blocks of 4 MiB, and every other one is freed; which leaves holes. */
static void holes(bool keep_working)
{
	char *p[20];

	free(memset(malloc(4 * MIB), 1, 4 * MIB)); /* there may be more of its size */
	for (int i = 0; i < 20; i++)
		memset(p[i] = malloc(4 * MIB), 1, 4 * MIB);
	for (int i = 0; i < 20; i += 2)
		free(p[i]);
	for (int i = 0; keep_working && i < 20000; i++)
		free(malloc(MIB + (size_t)i % 7 * 4096));
}

/* How many MiB of small blocks a limit leaves room for, when as many of large ones as it allows were freed. */
static void limited(void)
{
	struct rlimit limit = {128 * MIB, 128 * MIB};
	char *p[32];
	size_t small = 0;
	int n = 0;

	free(memset(malloc(4 * MIB), 1, 4 * MIB));
	setrlimit(RLIMIT_DATA, &limit);
	while (n < 32 && (p[n] = malloc(4 * MIB)))
		n++;
	for (int i = 0; i < n - 1; i++)
		free(p[i]);
	CHECK(!malloc(200 * MIB));
	while (malloc(MIB / 4))
		small++;
	CHECK(small / 4 > 80);
}

static bool is_merged(const char *p, size_t size)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	uintptr_t from, to, at = (uintptr_t)p;
	char line[512];
	bool found = false;

	while (fgets(line, sizeof(line), maps))
		if (strstr(line, "samepage") && sscanf(line, "%lx-%lx", &from, &to) == 2)
			found |= from < at + size && at < to;
	fclose(maps);
	return found;
}

/* Blocks that were merged, also while they were free, are anonymous memory when they are given out again. */
static void merged(void)
{
	const struct timespec nap = {.tv_nsec = 10000000};
	char *above, *p = malloc(8 * MIB);

	free(memset(p, 1, 8 * MIB));
	for (int i = 0; i < 8; i++) {
		p = malloc(8 * MIB);
		above = malloc(8 * MIB);
		memset(p, i, 8 * MIB);
		memset(above, i, 8 * MIB);
		if (i % 2)
			for (int k = 0; k < 500 && !is_merged(p, 8 * MIB); k++)
				nanosleep(&nap, NULL);
		CHECK(i % 2 == 0 || is_merged(p, 8 * MIB));
		free(p);
		for (int k = 0; k < 30; k++)
			nanosleep(&nap, NULL);
		p = calloc(2, 4 * MIB);
		for (size_t k = 0; k < 8 * MIB; k++)
			CHECK(!p[k]);
		memset(p, 77, 8 * MIB);
		free(p);
		free(above);
	}
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	struct rusage usage;

	if (!strncmp(what, "random", 6))
		at_random(atoi(what + 6));
	else if (!strcmp(what, "same"))
		same_sizes();
	else if (!strcmp(what, "growing"))
		growing();
	else if (!strcmp(what, "tuned"))
		tuned();
	else if (!strcmp(what, "zeroed"))
		zeroed();
	else if (!strcmp(what, "limited"))
		limited();
	else if (!strcmp(what, "merged"))
		merged();
	else
		holes(!strcmp(what, "holes, and work"));
	if (!strcmp(what, "holes, and trim"))
		CHECK(malloc_trim(0) == 1);
	getrusage(RUSAGE_SELF, &usage);
	printf("faults %ld\nresident %ld\n", usage.ru_minflt, resident());
	return 0;
}
