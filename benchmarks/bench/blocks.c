/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program that does nothing but allocate and free, for benchmarks.allocators:
 *
 *     blocks one|some|written|small|growing|freed SECONDS
 *
 * one: a block of 64 KiB, freed at once. some: of 64 blocks of 64 KiB to 1 MiB one after the other is freed, and another one
 * allocated. written: the same, and each of their pages is written. small: the same with 100,000 blocks of 16 to 1039 bytes.
 * growing: a block is made larger by realloc, a tenth at a time, up to 32 MiB, and written. freed: 100,000 blocks of 16 to
 * 1039 bytes are written, and all of them freed, once.
 *
 * It says how many ns of CPU each takes, and how many KiB of memory there were at most; for freed, how many there are then.
 */
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define KIB 1024UL
#define SOME 64
#define MANY 100000
#define BATCH 64

static char *block[MANY];
static uint32_t seed = 1;

static uint32_t below(uint32_t n)
{
	seed = seed * 1664525 + 1013904223;
	return (uint32_t)((uint64_t)seed * n >> 32);
}

static double cpu_seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void replace(uint32_t count, size_t least, uint32_t more, size_t write_every)
{
	uint32_t i = below(count);
	size_t len = least + below(more);

	free(block[i]);
	block[i] = malloc(len);
	if (!block[i])
		abort();
	for (size_t at = 0; write_every && at < len; at += write_every)
		block[i][at] = 1;
}

static void grow(void)
{
	size_t len = 4 * KIB;
	char *p = NULL;

	while (len < 32 * KIB * KIB) {
		size_t old = p ? len : 0;

		len += len / 10;
		p = realloc(p, len);
		if (!p)
			abort();
		memset(p + old, 1, len - old);
	}
	free(p);
}

static void fill_and_free(void)
{
	for (uint32_t i = 0; i < MANY; i++) {
		size_t len = 16 + below(1024);

		block[i] = malloc(len);
		if (!block[i])
			abort();
		memset(block[i], 1, len);
	}
	for (uint32_t i = 0; i < MANY; i++)
		free(block[i]);
}

static long resident_kib(void)
{
	char line[128] = "";
	int statm = open("/proc/self/statm", O_RDONLY);
	long total, pages = 0;

	if (read(statm, line, sizeof(line) - 1) > 0)
		sscanf(line, "%ld %ld", &total, &pages);
	close(statm);
	return pages * (sysconf(_SC_PAGESIZE) / (long)KIB);
}

static void once(const char *how)
{
	if (!strcmp(how, "one")) {
		block[0] = malloc(64 * KIB);
		*(volatile char *)block[0] = 1;
		free(block[0]);
	} else if (!strcmp(how, "growing")) {
		grow();
	} else if (!strcmp(how, "freed")) {
		fill_and_free();
	} else if (!strcmp(how, "small")) {
		replace(MANY, 16, 1024, 4 * KIB);
	} else {
		replace(SOME, 64 * KIB, 960 * KIB, strcmp(how, "written") ? 0 : 4 * KIB);
	}
}

int main(int argc, char **argv)
{
	double began = cpu_seconds(), seconds = argc > 2 ? atof(argv[2]) : 1, took;
	struct rusage used;
	bool ends;
	uint64_t n = 0;

	if (argc < 2)
		return 2;
	ends = !strcmp(argv[1], "freed");
	do {
		for (int i = 0; i < (strcmp(argv[1], "growing") && !ends ? BATCH : 1); i++, n++)
			once(argv[1]);
		took = cpu_seconds() - began;
	} while (took < seconds && !ends);
	getrusage(RUSAGE_SELF, &used);
	printf("%.1f %ld\n", took / (double)n * 1e9, ends ? resident_kib() : used.ru_maxrss);
	return 0;
}
