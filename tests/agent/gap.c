/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program of one thread that looks for free addresses, gives them back, and maps memory there a moment later. It does so while
 * its agent starts, and again in a child. Exit status 1 after saying what was wrong.
 */
#define _GNU_SOURCE
#include "../check.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#define LEN (256UL << 20)
#define START_MS 400
#define MOMENT_MS 2

static double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void map_where_nothing_is(void)
{
	for (double end = now_ms() + START_MS; now_ms() < end;) {
		void *p = mmap(NULL, LEN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		double until = now_ms() + MOMENT_MS;

		CHECK(p != MAP_FAILED && !munmap(p, LEN));
		while (now_ms() < until)
			;
		CHECK(mmap(p, LEN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1,
			   0) == p);
		CHECK(!munmap(p, LEN));
	}
}

int main(void)
{
	volatile char *block = malloc(20UL << 20); /* this starts the agent */
	int status;
	pid_t child;

	map_where_nothing_is();
	block[0] = 1;
	child = fork();
	map_where_nothing_is();
	if (!child)
		_exit(0);
	CHECK(waitpid(child, &status, 0) == child && !status);
	return 0;
}
