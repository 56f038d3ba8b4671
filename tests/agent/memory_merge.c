/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tests prctl(PR_SET_MEMORY_MERGE): what it returns, who inherits it, and (with the argument "merged") what it merges.
 * Without that argument the output under the kernel and under the agent must be the same. With the argument "told" it
 * says nothing itself, and prints what is merged of such a program.
 */
#define _GNU_SOURCE
#include "segments.h"

#include <errno.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif
#define LENGTH (64UL << 12)

static char *self;

static void say(const char *what, int ret)
{
	printf("%s: %d %s\n", what, ret, ret < 0 ? strerrorname_np(errno) : "");
	fflush(stdout);
}

static int get(void)
{
	return prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0);
}

static void wait_for(pid_t pid)
{
	int status;

	waitpid(pid, &status, 0);
}

static void fork_and_exec(void)
{
	char *const argv[] = {self, "again", NULL};
	char *const no_words[] = {getenv("LD_PRELOAD") ? getenv("LD_PRELOAD") - strlen("LD_PRELOAD=") : NULL,
				  getenv("SAMEPAGE_SOCKET") ? getenv("SAMEPAGE_SOCKET") - strlen("SAMEPAGE_SOCKET=") : NULL,
				  NULL};
	pid_t pid = fork();

	if (!pid) {
		say("forked", get());
		execve(self, argv, no_words);
		_exit(1);
	}
	wait_for(pid);
	/* libc executes this one without passing any name that could be stood in front of. */
	posix_spawn(&pid, self, NULL, NULL, argv, no_words);
	wait_for(pid);
}

static char *map(char with)
{
	char *p = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	memset(p, with, LENGTH);
	return p;
}

static unsigned long merged(const char *p)
{
	return from_segments((uintptr_t)p, (uintptr_t)p + LENGTH);
}

static void until_merged(const char *what, const char *p)
{
	for (int i = 0; i < 6000 && merged(p) < LENGTH; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	printf("%s: %lu bytes merged\n", what, merged(p));
}

static bool is_all(const char *p, char with)
{
	for (unsigned long i = 0; i < LENGTH; i++)
		if (p[i] != with)
			return false;
	return true;
}

static void merging(void)
{
	char *before = map('b'), *after, *part = map('p');

	munmap(part, LENGTH / 2);
	say("set", prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0));
	after = map('a');
	until_merged("mapped before", before);
	until_merged("mapped after", after);
	say("unmergeable", madvise(after, LENGTH, MADV_UNMERGEABLE));
	printf("then: %lu and %lu bytes merged\n", merged(before), merged(after));
	say("cleared", prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0));
	printf("then: %lu and %lu bytes merged\n", merged(before), merged(after));
	printf("intact: %d %d %d\n", is_all(before, 'b'), is_all(after, 'a'), part[LENGTH - 1] == 'p');
}

static void block(const char *what, size_t len)
{
	char *p = malloc(len);

	memset(p, 'x', len);
	for (int i = 0; i < 100 && !merged(p); i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	printf("%s: %s\n", what, merged(p) ? "merged" : "left alone");
}

/* What somebody else said for it, in $SAMEPAGE_MEMORY. */
static void told(void)
{
	const size_t all = 16 << 20; /* worth a thread */
	char *p = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *kept = p + LENGTH;

	memset(p, 'm', all);
	block("1 MiB", 1 << 20);
	block("96 KiB", 96 << 10);
	block("32 KiB", 32 << 10);
	printf("mapped: %s\n", merged(p) ? "merged" : "left alone");
	say("the kernel's flag", get());
	say("cleared", prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0));
	say("unmergeable", madvise(p, LENGTH, MADV_UNMERGEABLE));
	nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
	printf("then: %s\n", merged(p) ? "merged" : "left alone");
	printf("beside it: %s\n", merged(kept) ? "merged" : "left alone");
	printf("intact: %d %d\n", is_all(p, 'm'), is_all(kept, 'm'));
}

int main(int argc, char **argv)
{
	self = argv[0];
	if (argc > 1 && !strcmp(argv[1], "again")) {
		say("executed", get());
		return 0;
	}
	if (argc > 1 && !strcmp(argv[1], "merged")) {
		merging();
		return 0;
	}
	if (argc > 1 && !strcmp(argv[1], "told")) {
		told();
		return 0;
	}
	say("at first", get());
	say("set with more", prctl(PR_SET_MEMORY_MERGE, 1, 1, 0, 0));
	say("set with more", prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 1));
	say("get with more", prctl(PR_GET_MEMORY_MERGE, 1, 0, 0, 0));
	say("get with more", prctl(PR_GET_MEMORY_MERGE, 0, 0, 1, 0));
	say("set", prctl(PR_SET_MEMORY_MERGE, 5, 0, 0, 0));
	say("get", get());
	say("set again", prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0));
	fork_and_exec();
	say("cleared", prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0));
	say("get", get());
	fork_and_exec();
	say("cleared again", prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0));
	return 0;
}
