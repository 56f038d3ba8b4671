/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tests the blocks that are kept without the lock (kept.c): threads take, free, resize and allocate blocks, and a signal
 * handler does so in the middle of that. No block may have two users at once, no more than 384 KiB is kept, long blocks
 * are kept only until the next allocation and not if something was done to blocks, and all blocks are found again at the end.
 *
 * Usage: kept_model THREADS ROUNDS. Exit status 0, or 1 after saying what was wrong.
 */
#include "hooks/blocks.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>

#define BLOCKS 256
#define BASE 0x7f0000000000UL

/* Block i lies at BASE + 64 * i pages, and has 16, 17, 40 or 41. */
static _Atomic int users[BLOCKS]; /* 1: in use, or kept */
static _Atomic unsigned long reused, returned;
static _Atomic bool failed, merged;
_Atomic bool blocks_changed;

static uintptr_t start_of(size_t i)
{
	return BASE + 64 * i * PAGE_SIZE;
}

static size_t length_of(size_t i)
{
	return (16 + i % 2 + i / 2 % 2 * 24) * PAGE_SIZE;
}

static size_t number_of(uintptr_t start)
{
	return (start - BASE) / PAGE_SIZE / 64;
}

static void check(bool holds, const char *what)
{
	if (!holds && !atomic_exchange(&failed, true))
		printf("%s\n", what);
}

bool has_segments(uintptr_t start, uintptr_t end)
{
	return start < end && merged;
}

struct block *block_at(const void *p)
{
	return (struct block *)(uintptr_t)p;
}

void block_free(struct block *b)
{
	check(atomic_exchange(&users[number_of((uintptr_t)b)], 0) == 1, "a block was given back that nobody used");
	atomic_fetch_add(&returned, 1);
}

/* From kept.c, or else any free one. */
static uintptr_t get(size_t len)
{
	uintptr_t start = kept_take(len);

	if (start) {
		check(length_of(number_of(start)) == len, "a block has another length");
		atomic_fetch_add(&reused, 1);
		return start;
	}
	kept_release_long();
	for (size_t i = 0; i < BLOCKS; i++) {
		int free = 0;

		if (length_of(i) == len && atomic_compare_exchange_strong(&users[i], &free, 1)) {
			kept_note(start_of(i), len);
			return start_of(i);
		}
	}
	return 0;
}

static _Atomic int holders[BLOCKS];

static void one_round(unsigned *random)
{
	size_t i = (size_t)rand_r(random) % BLOCKS, n;
	uintptr_t start = get(length_of(i));

	if (!start)
		return;
	n = number_of(start);
	check(atomic_fetch_add(&holders[n], 1) == 0, "a block has two users");
	if (rand_r(random) % 16 == 0)
		kept_forget(start); /* as a realloc does */
	atomic_fetch_sub(&holders[n], 1);
	if (!kept_put(start)) {
		kept_forget(start);
		check(!is_kept(start), "a block in use is kept");
		block_free(block_at((const void *)start));
	}
}

static void interrupted(int sig)
{
	static _Thread_local unsigned random = 7;

	(void)sig;
	one_round(&random);
}

static unsigned long rounds;

static void *work(void *arg)
{
	unsigned random = (unsigned)(uintptr_t)arg;

	for (unsigned long i = 0; i < rounds; i++)
		one_round(&random);
	return NULL;
}

/* Whether block i of `len` bytes, freed, is kept. */
static bool keeps_of(size_t i, size_t len)
{
	kept_note(start_of(i), len);
	users[i] = 1;
	if (kept_put(start_of(i)))
		return true;
	kept_forget(start_of(i));
	users[i] = 0;
	return false;
}

static bool keeps(size_t i)
{
	return keeps_of(i, length_of(i));
}

static void check_long_ones(void)
{
	check(keeps(2) && is_kept(start_of(2)), "a long block is not kept");
	check(kept_take(length_of(2)) == start_of(2) && kept_put(start_of(2)), "a long block is not used again");
	check(!keeps(3), "more is kept than may be");
	check(keeps(0), "a short block is not kept");
	kept_release_long();
	check(!is_kept(start_of(2)) && is_kept(start_of(0)), "a short block was let go of, or a long one was not");
	merged = true;
	check(!keeps(2), "a merged block is kept");
	merged = false;
	blocks_changed = true;
	check(!keeps(2), "a block is kept to which something may have been done");
	kept_release();
	/* From libc's threshold on, a block would be a mapping of its own, and gone when it is freed. */
	check(!keeps_of(4, 32 * PAGE_SIZE), "one of 128 KiB is kept to which something may have been done");
	check(keeps_of(4, 31 * PAGE_SIZE), "a shorter one is not kept");
	blocks_changed = false;
	kept_release();
}

int main(int argc, char **argv)
{
	struct itimerval every = {{0, 200}, {0, 200}}, never = {{0, 0}, {0, 0}};
	unsigned threads = argc > 1 ? (unsigned)atoi(argv[1]) : 4;
	size_t kept = 0, used = 0;
	pthread_t ids[64];

	kept_limit(256 << 10);
	check_long_ones();
	rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 100000;
	signal(SIGALRM, interrupted);
	setitimer(ITIMER_REAL, &every, NULL);
	for (unsigned i = 0; i < threads; i++)
		pthread_create(&ids[i], NULL, work, (void *)(uintptr_t)(i + 1));
	for (unsigned i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
	setitimer(ITIMER_REAL, &never, NULL);
	for (size_t i = 0; i < BLOCKS; i++) {
		used += (size_t)users[i];
		kept += users[i] ? length_of(i) : 0;
	}
	check(used && kept <= 384 << 10, "too much is kept, or nothing");
	kept_limit(0);
	for (size_t i = 0; i < BLOCKS; i++)
		check(!users[i], "a block was lost");
	check(reused > rounds / 10, "hardly a block was used again");
	kept_note(start_of(0), length_of(0));
	check(!kept_put(start_of(0)), "a block is kept though none may be");
	return failed;
}
