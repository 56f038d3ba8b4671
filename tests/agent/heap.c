/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The heap that brk(2) moves. "sbrk": the program's own part of it, as an allocator has it that takes its memory there. "malloc":
 * glibc's small blocks. "trim": the same, given back behind everybody's back. "storm SECONDS": many threads, blocks of all sizes,
 * and a heap that grows and shrinks, here and in children; every block is checked, and what calloc gives is zero. "islands": malloc
 * discards what was merged and written since. "short": all of the heap is freed while there is no memory to unmerge it; for a cgroup of
 * 128 MiB.
 */
#define _GNU_SOURCE
#include "segments.h"

#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1UL << 20)
#define PAGE 4096UL

static int patience = 2000;

static void until_merged(const char *what, const void *p, const void *q)
{
	size_t least = (size_t)((const char *)q - (const char *)p) / 10 * 9;

	for (int i = 0; i < patience && from_segments((uintptr_t)p, (uintptr_t)q) < least; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	printf("%s: %s\n", what, from_segments((uintptr_t)p, (uintptr_t)q) >= least ? "merged" : "left alone");
	fflush(stdout);
}

static bool is_all(const char *p, size_t n, char with)
{
	return !n || (p[0] == with && !memcmp(p, p + 1, n - 1));
}

static void own(void)
{
	const size_t len = 32 * MIB;
	char *p;

	free(malloc(60000)); /* what libc needs here lies below */
	p = sbrk(0);
	sbrk((intptr_t)(-(uintptr_t)p % PAGE));
	p = sbrk((intptr_t)len);
	memset(p, 'x', len);
	until_merged("taken", p, p + len);
	sbrk(-(intptr_t)(len / 2));
	sbrk((intptr_t)(len / 2));
	printf("zeros: %d, kept: %d\n", is_all(p + len / 2, len / 2, 0), is_all(p, len / 2, 'x'));
	memset(p + len / 2, 'y', len / 2);
	until_merged("taken again", p, p + len);
	printf("intact: %d\n", is_all(p, len / 2, 'x') && is_all(p + len / 2, len / 2, 'y'));
}

enum { BLOCKS = 32000, SIZE = 1000 };

static void small_blocks(bool behind)
{
	int (*trim)(size_t) = malloc_trim;
	static char *block[BLOCKS];
	unsigned long wrong = 0;
	char *last;

	from_segments(0, 0); /* stdio's blocks lie below ours, and malloc keeps them for the next time */
	if (behind)	     /* as Python programs do it */
		*(void **)&trim = dlsym(dlopen("libc.so.6", RTLD_LAZY), "malloc_trim");
	for (int i = 0; i < BLOCKS; i++)
		memset(block[i] = malloc(SIZE), i % 100 + 1, SIZE);
	last = block[BLOCKS - BLOCKS / 50];
	until_merged("malloc", block[BLOCKS / 50], last);
	for (int turn = 0; turn < 20; turn++) {
		for (int i = BLOCKS / 2; i < BLOCKS; i++) {
			wrong += !is_all(block[i], SIZE, (char)(i % 100 + 1));
			free(block[i]);
		}
		trim(0);
		for (int i = BLOCKS / 2; i < BLOCKS; i++) {
			block[i] = calloc(1, SIZE);
			wrong += !is_all(block[i], SIZE, 0);
			memset(block[i], i % 100 + 1, SIZE);
		}
	}
	for (int i = 0; i < BLOCKS; i++)
		wrong += !is_all(block[i], SIZE, (char)(i % 100 + 1));
	for (int i = 0; i < BLOCKS; i++)
		free(block[i]);
	trim(0);
	printf("wrong: %lu, given back: %d\n", wrong, last >= (char *)sbrk(0));
}

static void islands(void)
{
	static char *block[BLOCKS];
	char *first, *last;

	from_segments(0, 0);
	for (int i = 0; i < BLOCKS; i++)
		memset(block[i] = malloc(SIZE), i % 100 + 1, SIZE);
	first = block[BLOCKS / 4]; /* freed first, so malloc keeps some of these (tcache) */
	last = block[BLOCKS - BLOCKS / 50];
	until_merged("malloc", block[BLOCKS / 50], last);
	for (int i = 0; i < BLOCKS; i++)
		block[i][0]++;
	nanosleep(&(struct timespec){.tv_sec = 1}, NULL); /* the agent looks */
	for (int i = BLOCKS / 4; i < BLOCKS / 2; i++)
		free(block[i]);
	malloc_trim(0);
	for (int i = 0; i < BLOCKS / 4; i++)
		free(block[i]);
	for (int i = BLOCKS / 2; i < BLOCKS; i++)
		free(block[i]);
	for (int i = 0; i < 20 && (char *)sbrk(0) >= first + MIB; i++) { /* somebody may hold a page for a moment */
		nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
		malloc_trim(0);
	}
	printf("given back: %d\n", (char *)sbrk(0) < first + MIB);
}

static void fill(void *p, size_t len)
{
	static uint32_t r = 1;

	for (size_t i = 0; i < len / 4; i++)
		((uint32_t *)p)[i] = r = r * 1664525 + 1013904223;
}

static void short_of_memory(void)
{
	enum { PAGES = 64 * 256, ROOM = PAGE - 16 };
	static char *block[PAGES];
	size_t more = 48 * MIB;
	char *first;

	from_segments(0, 0);
	for (int i = 0; i < PAGES; i++) {
		block[i] = malloc(ROOM);
		if (i % 50 < 2)
			memset(block[i], 'x', ROOM);
		else
			fill(block[i], ROOM);
	}
	first = block[0];
	for (int i = 0; i < patience && from_segments((uintptr_t)first, (uintptr_t)sbrk(0)) < MIB; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	printf("merged: %d\n", from_segments((uintptr_t)first, (uintptr_t)sbrk(0)) >= MIB);
	fflush(stdout);
	fill(malloc(more), more);
	for (int i = 0; i < PAGES; i++)
		free(block[i]);
	more = 48 * MIB;
	fill(malloc(more), more);
	printf("alive\n");
}

static _Atomic unsigned long wrong;
static _Atomic bool over;

static void *storm(void *arg)
{
	enum { EACH = 3000 };
	struct {
		char *p;
		size_t len;
		char with;
	} *b = calloc(EACH, sizeof(*b));
	uint32_t r = (uint32_t)(uintptr_t)arg;

	for (uint32_t turn = 0; !over; turn++) {
		for (uint32_t i = 0; i < EACH; i++) {
			bool zeroed = (r = r * 1103515245 + 12345) >> 31;

			wrong += !is_all(b[i].p, b[i].len, b[i].with);
			free(b[i].p);
			b[i].p = NULL;
			b[i].len = 0;
			if (turn % 4 == 3) /* all goes, and malloc gives the end of the heap back */
				continue;
			b[i].len = (r >> 12) % (i % 16 ? 2000 : 40000) + 1;
			b[i].p = zeroed ? calloc(1, b[i].len) : malloc(b[i].len);
			wrong += zeroed && !is_all(b[i].p, b[i].len, 0);
			b[i].with = (char)(r >> 20 & 3);
			memset(b[i].p, b[i].with, b[i].len);
		}
		if (turn % 4 == 3 && arg == (void *)1)
			malloc_trim(0);
		if (turn % 4 == 1)
			nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
	}
	return NULL;
}

/* Of a child, whose heap is as the threads left it, who are not there. */
static int churn(void)
{
	static char *block[BLOCKS];
	unsigned long bad = 0;

	for (int turn = 0; turn < 4; turn++) {
		for (int i = 0; i < BLOCKS / 8; i++) {
			block[i] = calloc(1, SIZE);
			bad += !is_all(block[i], SIZE, 0);
			memset(block[i], i % 100 + 1, SIZE);
		}
		for (int i = 0; i < BLOCKS / 8; i++) {
			bad += !is_all(block[i], SIZE, (char)(i % 100 + 1));
			free(block[i]);
		}
	}
	return bad || wrong;
}

static void fork_one(void)
{
	pid_t child = fork();
	int status;

	if (!child)
		_exit(churn());
	if (child < 0 || waitpid(child, &status, 0) != child || status)
		atomic_fetch_add(&wrong, 1);
}

static void storms(unsigned seconds)
{
	pthread_t thread[3];
	char *first = malloc(1);
	unsigned long most = 0;

	mallopt(M_ARENA_MAX, 1); /* all of them on the heap */
	for (uintptr_t i = 0; i < 3; i++)
		pthread_create(&thread[i], NULL, storm, (void *)(i + 1));
	for (unsigned i = 0; i < seconds * 10; i++) {
		unsigned long now = from_segments((uintptr_t)first, (uintptr_t)sbrk(0));

		most = now > most ? now : most;
		nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
		if (i % 8 == 7)
			fork_one();
	}
	over = true;
	for (int i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
	printf("merged: %s, wrong: %lu\n", most > MIB / 4 ? "some" : "nothing", wrong);
}

int main(int argc, char **argv)
{
	static char buffer[1024];
	const char *what = argc > 1 ? argv[1] : "";

	setvbuf(stdout, buffer, _IOFBF, sizeof(buffer)); /* no block of stdio's lies above ours */
	if (argc > 2 && !strcmp(argv[2], "alone"))
		patience = 100;
	if (!strcmp(what, "sbrk"))
		own();
	else if (!strcmp(what, "malloc") || !strcmp(what, "trim"))
		small_blocks(!strcmp(what, "trim"));
	else if (!strcmp(what, "islands"))
		islands();
	else if (!strcmp(what, "short"))
		short_of_memory();
	else
		storms(argc > 2 ? (unsigned)atoi(argv[2]) : 5);
	return 0;
}
