/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads end while they hold robust mutexes, one on each page of a block that is being merged: the next owner of each
 * must learn that the last one died. Other threads have their stacks in such a block: each must be joined.
 */
#define _GNU_SOURCE
#include "segments.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MUTEXES 1024
#define STACK (4 * PAGE)
#define STACKS 256
#define SECONDS 4

static unsigned char *block;
static time_t end;

static void begin(size_t len)
{
	block = aligned_alloc(PAGE, len);
	memset(block, 'x', len);
	madvise(block, len, MADV_NOHUGEPAGE);
	madvise(block, len, MADV_MERGEABLE);
	end = time(NULL) + SECONDS;
}

static void say(void)
{
	printf("%lu\n", (unsigned long)block);
	fflush(stdout);
}

static pthread_mutex_t *mutex(int i)
{
	return (pthread_mutex_t *)(block + i * PAGE);
}

static void *hold_all(void *arg)
{
	for (int i = 0; i < MUTEXES; i++)
		pthread_mutex_lock(mutex(i));
	return arg;
}

static int told(void)
{
	int n = 0;

	for (int i = 0; i < MUTEXES; i++) {
		n += pthread_mutex_trylock(mutex(i)) == EOWNERDEAD;
		pthread_mutex_consistent(mutex(i));
		pthread_mutex_unlock(mutex(i));
	}
	return n;
}

static void mutexes(void)
{
	pthread_mutexattr_t attr;
	int wrong = 0;

	begin(MUTEXES * PAGE);
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	for (int i = 0; i < MUTEXES; i++)
		pthread_mutex_init(mutex(i), &attr);
	say();
	while (time(NULL) < end && !wrong) {
		pthread_t thread;

		pthread_create(&thread, NULL, hold_all, NULL);
		pthread_join(thread, NULL);
		wrong = MUTEXES - told();
	}
	printf("not told of %d\n", wrong);
	fflush(stdout);
	pause();
}

static void *nothing(void *arg)
{
	return arg;
}

static void stacks(void)
{
	int left = 0;

	begin(STACKS * STACK);
	say();
	for (int i = 0; time(NULL) < end && !left; i++) {
		struct timespec patience;
		pthread_attr_t attr;
		pthread_t thread;

		pthread_attr_init(&attr);
		pthread_attr_setstack(&attr, block + i % STACKS * STACK, STACK);
		pthread_create(&thread, &attr, nothing, NULL);
		clock_gettime(CLOCK_REALTIME, &patience);
		patience.tv_sec += 5;
		left += pthread_timedjoin_np(thread, NULL, &patience) != 0;
	}
	printf("not joined %d\n", left);
	fflush(stdout);
	pause();
}

/* By the older call, which says where a stack ends. */
static void stack_end(void)
{
	const size_t len = 4096 * PAGE, room = 16 * PAGE;
	int (*set_end)(pthread_attr_t *, void *); /* linking to it by name warns */
	unsigned char *stack_end;
	pthread_attr_t attr;

	begin(len);
	stack_end = block + len / 2;
	*(void **)&set_end = dlsym(RTLD_DEFAULT, "pthread_attr_setstackaddr");
	pthread_attr_init(&attr);
	set_end(&attr, stack_end);
	for (int i = 0; i < 3000 && from_segments((uintptr_t)block, (uintptr_t)block + len) < len - 2 * room; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	printf("merged: %d, of the stack's end: %zu\n",
	       from_segments((uintptr_t)block, (uintptr_t)block + len) >= len - 2 * room,
	       (size_t)from_segments((uintptr_t)stack_end - room, (uintptr_t)stack_end));
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "mutexes"))
		mutexes();
	if (argc > 1 && !strcmp(argv[1], "stacks"))
		stacks();
	if (argc > 1 && !strcmp(argv[1], "end"))
		stack_end();
	return 0;
}
