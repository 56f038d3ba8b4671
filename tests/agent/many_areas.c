/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes many areas, and joins and parts them: frees every other block and allocates it again, cuts holes into one area,
 * fills gaps between many. Checks every byte that must still be there.
 *
 * Usage: many_areas blocks|neighbours|holes|stacks|limit COUNT. `stacks` prints how many microseconds of CPU time each
 * took. Exit status 0, or 1 after saying what was wrong.
 */
#define _GNU_SOURCE
#include "../check.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define BLOCK (64UL << 10)
#define RW (PROT_READ | PROT_WRITE)
#define ANONYMOUS (MAP_PRIVATE | MAP_ANONYMOUS)

static size_t count;

/* Adjacent blocks, of which every other is freed: each hole makes two areas of one. */
static void every_other_block(void)
{
	unsigned char **block = malloc(count * sizeof(*block));

	for (size_t i = 0; i < count; i++) {
		CHECK((block[i] = malloc(BLOCK)));
		block[i][0] = block[i][BLOCK - 1] = (unsigned char)(i | 1);
	}
	for (size_t i = 0; i < count; i += 2)
		free(block[i]);
	for (size_t i = 1; i < count; i += 2) {
		CHECK(block[i][0] == (unsigned char)(i | 1) && block[i][BLOCK - 1] == (unsigned char)(i | 1));
		free(block[i]);
	}
	free(block);
}

/* The agent's books must not reach into what the program maps right behind them. */
static void blocks_and_neighbours(void)
{
	unsigned char **block = malloc(count * sizeof(*block)), **page = malloc(count * sizeof(*page));

	for (size_t i = 0; i < count; i++) {
		CHECK((block[i] = malloc(BLOCK)));
		page[i] = mmap(NULL, PAGE, RW, ANONYMOUS, -1, 0);
		CHECK(page[i] != MAP_FAILED);
		block[i][0] = block[i][BLOCK - 1] = page[i][0] = page[i][PAGE - 1] = (unsigned char)(i | 1);
	}
	for (size_t round = 0; round < 2; round++)
		for (size_t i = round; i < count; i += 2) {
			CHECK(block[i][0] == (unsigned char)(i | 1) && block[i][BLOCK - 1] == (unsigned char)(i | 1));
			free(block[i]);
			block[i] = malloc(BLOCK);
			block[i][0] = block[i][BLOCK - 1] = (unsigned char)(i | 1);
		}
	for (size_t i = 0; i < count; i += 2)
		free(block[i]);
	for (size_t i = 0; i < count; i++) {
		for (size_t at = 1; at < PAGE - 1; at++)
			CHECK(page[i][at] == 0);
		CHECK(page[i][0] == (unsigned char)(i | 1) && page[i][PAGE - 1] == (unsigned char)(i | 1));
		munmap(page[i], PAGE);
	}
	for (size_t i = 1; i < count; i += 2) {
		CHECK(block[i][0] == (unsigned char)(i | 1));
		free(block[i]);
	}
	free(block);
	free(page);
}

/* One area becomes `count` of one page each by holes, then one again by filling all gaps with one call. */
static void holes_and_gaps(void)
{
	unsigned char *p = mmap(NULL, 2 * count * PAGE, RW, ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	CHECK(!madvise(p, 2 * count * PAGE, MADV_MERGEABLE));
	for (size_t i = 0; i < 2 * count; i++)
		p[i * PAGE] = (unsigned char)(i | 1);
	for (size_t i = 0; i < count; i++)
		CHECK(!munmap(p + (2 * i + 1) * PAGE, PAGE));
	for (size_t i = 0; i < count; i++)
		CHECK(p[2 * i * PAGE] == (unsigned char)(2 * i | 1));
	for (size_t i = 0; i < count; i++)
		CHECK(mmap(p + (2 * i + 1) * PAGE, PAGE, RW, ANONYMOUS | MAP_FIXED, -1, 0) == p + (2 * i + 1) * PAGE);
	CHECK(!madvise(p, 2 * count * PAGE, MADV_MERGEABLE));
	for (size_t i = 0; i < 2 * count; i++)
		CHECK(p[i * PAGE] == (i % 2 ? 0 : (unsigned char)(i | 1)));
	for (size_t i = 0; i < count; i++)
		CHECK(!mprotect(p + (2 * i + 1) * PAGE, PAGE, PROT_READ));
	CHECK(!munmap(p, 2 * count * PAGE));
}

static size_t merged_pages(void)
{
	unsigned long start, end;
	char line[512];
	size_t n = 0;
	FILE *f = fopen("/proc/self/maps", "r");

	while (f && fgets(line, sizeof(line), f))
		if (strstr(line, "samepage") && sscanf(line, "%lx-%lx", &start, &end) == 2)
			n += (end - start) / PAGE;
	if (f)
		fclose(f);
	return n;
}

/* From now on no mapping is to be had that is not in place of another. */
static void no_more_memory(void)
{
	static int file = -1;
	char text[64] = "";
	struct rlimit limit;

	if (file < 0)
		file = open("/proc/self/statm", O_RDONLY);
	CHECK(pread(file, text, sizeof(text) - 1, 0) > 0 && !getrlimit(RLIMIT_AS, &limit));
	limit.rlim_cur = strtoul(text, NULL, 10) * PAGE;
	CHECK(!setrlimit(RLIMIT_AS, &limit));
}

/* Holes in merged memory, until there is no room for them in the agent's books, and none to be had. What is left is what it
 * was, reads as zeros once it is discarded, and is protected as the program said. */
static void holes_without_memory(void)
{
	const size_t pages = 2 * count, first = pages / 100 * 85, last = first + 400; /* where no hole could be noted */
	unsigned char *p = mmap(NULL, pages * PAGE, RW, ANONYMOUS, -1, 0);
	int zeros = open("/dev/zero", O_RDONLY);

	CHECK(p != MAP_FAILED && zeros >= 0);
	for (size_t i = 0; i < pages; i++)
		memset(p + i * PAGE, (int)(i % 250) + 1, PAGE);
	CHECK(!madvise(p, pages * PAGE, MADV_MERGEABLE));
	for (int i = 0; i < 300 && merged_pages() < pages * 9 / 10; i++)
		usleep(100000);
	CHECK(merged_pages() >= pages * 9 / 10);
	for (size_t i = 1; i < pages; i += 2) {
		CHECK(!munmap(p + i * PAGE, PAGE));
		no_more_memory();
	}
	for (size_t i = 0; i < pages; i += 2)
		CHECK(p[i * PAGE] == i % 250 + 1 && p[i * PAGE + PAGE - 1] == i % 250 + 1);
	for (size_t i = first; i < last; i += 2) {
		if (i % 4)
			CHECK(!mprotect(p + i * PAGE, PAGE, PROT_READ));
		CHECK(!madvise(p + i * PAGE, PAGE, MADV_DONTNEED));
	}
	for (size_t i = first; i < last; i += 2) {
		CHECK(!p[i * PAGE] && !p[i * PAGE + PAGE - 1]);
		CHECK(read(zeros, p + i * PAGE, 1) == (i % 4 ? -1 : 1));
	}
}

/* As coroutines have them: a mapping whose first page is a guard. */
static void stacks(void)
{
	char **p = malloc(count * sizeof(*p));
	struct timespec t;

	for (size_t i = 0; i < count; i++) {
		p[i] = mmap(NULL, BLOCK, RW, ANONYMOUS, -1, 0);
		CHECK(p[i] != MAP_FAILED && !mprotect(p[i], PAGE, PROT_NONE));
	}
	for (size_t i = 0; i < count; i++)
		CHECK(!munmap(p[i], BLOCK));
	free(p);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	printf("%f\n", ((double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3) / (double)count);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	count = strtoul(argv[2], NULL, 0);
	if (!strcmp(argv[1], "blocks"))
		every_other_block();
	else if (!strcmp(argv[1], "neighbours"))
		blocks_and_neighbours();
	else if (!strcmp(argv[1], "stacks"))
		stacks();
	else if (!strcmp(argv[1], "limit"))
		holes_without_memory();
	else
		holes_and_gaps();
	return 0;
}
