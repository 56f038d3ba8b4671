/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Watches from outside which pages of a process are in no place while they are merged: ./holes PID ADDRESS PAGES, until its
 * stdin ends. All pages were written before, so a page that /proc/PID/pagemap shows neither present nor swapped out is
 * away.
 *
 * It looks at all pages in turn. Where it finds one that is away it stays for a while with that block of 2 MiB and the next,
 * and takes the time from the first look at which a page is away there to the first at which none is. Prints JSON: how
 * often it looked at everything, and of how many pages that were away at once in such a look, and of the holes by how many
 * us they lasted, how often each was seen.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 512
#define NEXT (2 * BLOCK)
#define STAY_US 20000
#define THERE (3ULL << 62) /* PM_PRESENT | PM_SWAP */
#define BUCKETS 100000

static int pagemap;
static uint64_t first;
static uint32_t away_at_once[BUCKETS], lasted_us[BUCKETS];

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* How many of n pages are away; *at is the last of them. */
static size_t away(size_t page, size_t n, size_t *at)
{
	static uint64_t entry[1 << 16];
	size_t found = 0;

	while (n) {
		size_t some = n < 1 << 16 ? n : 1 << 16;
		ssize_t got = pread(pagemap, entry, some * 8, (off_t)((first + page) * 8));

		if (got != (ssize_t)(some * 8)) {
			perror("pagemap");
			exit(1);
		}
		for (size_t i = 0; i < some; i++)
			if (!(entry[i] & THERE)) {
				found++;
				*at = page + i;
			}
		page += some;
		n -= some;
	}
	return found;
}

static void stay(size_t page, size_t pages)
{
	size_t start = page / BLOCK * BLOCK, n = start + NEXT <= pages ? NEXT : pages - start, at;
	uint64_t until = now_us() + STAY_US, since = 0, now;
	bool whole = away(start, n, &at) == 0; /* the hole it came for is seen from its middle on only */

	while ((now = now_us()) < until || since) {
		bool hole = away(start, n, &at) > 0;

		if (!hole && since && whole)
			lasted_us[now - since < BUCKETS ? now - since : BUCKETS - 1]++;
		whole |= !hole;
		since = !hole ? 0 : since ? since : now;
	}
}

static void show(const char *name, const uint32_t *times)
{
	const char *comma = "";

	printf(", \"%s\": [[", name);
	for (size_t i = 0; i < BUCKETS; i++)
		if (times[i]) {
			printf("%s%zu", comma, i);
			comma = ", ";
		}
	printf("], [");
	comma = "";
	for (size_t i = 0; i < BUCKETS; i++)
		if (times[i]) {
			printf("%s%u", comma, times[i]);
			comma = ", ";
		}
	printf("]]");
}

int main(int argc, char **argv)
{
	struct pollfd end = {.fd = 0, .events = POLLIN};
	size_t pages, at = 0;
	uint64_t looks = 0;
	char path[64];

	if (argc != 4)
		return 2;
	snprintf(path, sizeof(path), "/proc/%s/pagemap", argv[1]);
	pagemap = open(path, O_RDONLY | O_CLOEXEC);
	first = strtoull(argv[2], NULL, 0) / 4096;
	pages = strtoull(argv[3], NULL, 0);
	if (pagemap < 0) {
		perror(path);
		return 1;
	}
	while (poll(&end, 1, 0) == 0) {
		size_t n = away(0, pages, &at);

		away_at_once[n < BUCKETS ? n : BUCKETS - 1]++;
		looks++;
		if (n)
			stay(at, pages);
	}
	printf("{\"looks\": %llu", (unsigned long long)looks);
	show("away_at_once", away_at_once);
	show("lasted_us", lasted_us);
	puts("}");
	return 0;
}
