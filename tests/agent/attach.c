/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes memory by calls other than mmap(2) and its relatives, and behind libc's back. Prints the same without
 * samepage, under it, and under it with every page merged.
 *
 * attach WHAT [merged] [raw] raw: make the calls through syscall(2)
 */
#define _GNU_SOURCE
#include "arch/arch.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define PAGES 64UL
#define LENGTH (PAGES * PAGE)
#define RW (PROT_READ | PROT_WRITE)
#ifndef SYS_mseal
#define SYS_mseal 462
#endif

static bool merged, raw;

static void nap(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
}

static size_t merged_bytes(const char *p)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	uintptr_t from, to, at = (uintptr_t)p;
	char line[512];
	size_t bytes = 0;

	while (fgets(line, sizeof(line), maps))
		if (strstr(line, "samepage") && sscanf(line, "%lx-%lx", &from, &to) == 2 && from >= at &&
		    to <= at + LENGTH)
			bytes += to - from;
	fclose(maps);
	return bytes;
}

/* Fills the range, and waits until all of it is merged. */
static char *prepare(char *p)
{
	for (size_t i = 0; i < LENGTH; i++)
		p[i] = (char)(i / PAGE % 100 + 1);
	madvise(p, LENGTH, MADV_MERGEABLE);
	for (int i = 0; merged && i < 6000 && merged_bytes(p) < LENGTH; i++)
		nap();
	if (merged && merged_bytes(p) < LENGTH)
		puts("not merged");
	return p;
}

static char *map(void)
{
	return prepare(mmap(NULL, LENGTH, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

/* 0: zeros, o: what was filled in, ?: something else; one letter for each eight pages. */
static void show(const char *p)
{
	for (size_t page = 0; page < PAGES; page += 8) {
		bool zero = true, old = true;

		for (size_t i = page * PAGE; i < (page + 8) * PAGE; i++) {
			zero &= !p[i];
			old &= p[i] == (char)(i / PAGE % 100 + 1);
		}
		putchar(zero ? '0' : old ? 'o' : '?');
	}
	putchar('\n');
}

static void say(const char *what, long ret)
{
	printf("%s: %s\n", what, ret == -1 ? strerrorname_np(errno) : "done");
}

static long advise(int fd, char *p, size_t len, char *q, size_t more, int advice)
{
	struct iovec v[2] = {{p, len}, {q, more}};

	return raw ? syscall(SYS_process_madvise, fd, v, 2L, (long)advice, 0L) : process_madvise(fd, v, 2, advice, 0);
}

static void process_madvise_self(void)
{
	int self = (int)syscall(SYS_pidfd_open, getpid(), 0), other;
	char *p = map();
	pid_t child;

	printf("%ld\n", advise(self, p, LENGTH / 4, p + LENGTH / 2, LENGTH / 8, MADV_DONTNEED) / (long)PAGE);
	show(p);
	prepare(p);
	printf("%ld\n", advise(-10000, p, LENGTH / 8, p + LENGTH / 2, LENGTH / 4, MADV_DONTNEED) / (long)PAGE);
	show(p);
	prepare(p);
	printf("%ld\n", advise(self, p, LENGTH / 8, p + 1, LENGTH / 4, MADV_DONTNEED) / (long)PAGE);
	say("an advice that there is not", advise(self, p, LENGTH / 8, p, LENGTH / 4, 1000));
	say("a descriptor of nobody", advise(1, p, LENGTH / 8, p, LENGTH / 4, MADV_DONTNEED));
	show(p);
	child = fork();
	if (!child)
		for (;;)
			pause();
	other = (int)syscall(SYS_pidfd_open, child, 0);
	prepare(p);
	say("to discard another's", advise(other, p, LENGTH / 8, p, LENGTH / 8, MADV_DONTNEED));
	printf("%ld\n", advise(other, p, LENGTH / 8, p + LENGTH / 4, LENGTH / 8, MADV_COLD) / (long)PAGE);
	show(p);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

static void sealed(void)
{
	char *p = map();

	mprotect(p, LENGTH / 4, PROT_READ);
	say("mseal of bad flags", syscall(SYS_mseal, p, LENGTH, 1L));
	say("mseal", syscall(SYS_mseal, p, LENGTH, 0L));
	say("discard what is read-only", madvise(p, LENGTH / 8, MADV_DONTNEED));
	say("discard", madvise(p + LENGTH / 2, LENGTH / 8, MADV_DONTNEED));
	say("protect", mprotect(p, LENGTH, PROT_NONE));
	say("unmap", munmap(p, LENGTH));
	say("map over", (long)mmap(p, LENGTH, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	say("grow", (long)mremap(p, LENGTH, 2 * LENGTH, MREMAP_MAYMOVE));
	say("shrink", (long)mremap(p, LENGTH, LENGTH / 2, 0));
	show(p);
	for (int i = 0; i < 10; i++)
		nap();
	p[LENGTH - 1] = 0;
	show(p);
}

static void shared_memory(void)
{
	int id = shmget(IPC_PRIVATE, LENGTH / 2, 0600);
	char *p = map(), *q = p + LENGTH / 4;

	say("without SHM_REMAP", (long)(raw ? (void *)syscall(SYS_shmat, id, q, 0L) : shmat(id, q, 0)));
	show(p);
	say("with", (long)(raw ? (void *)syscall(SYS_shmat, id, q, (long)SHM_REMAP) : shmat(id, q, SHM_REMAP)));
	show(p);
	for (size_t i = LENGTH / 4; i < LENGTH / 4 * 3; i++)
		p[i] = (char)(i / PAGE % 100 + 1);
	say("discarding", madvise(p, LENGTH, MADV_DONTNEED));
	show(p);
	shmctl(id, IPC_RMID, NULL);
}

static void the_break(void)
{
	char *p = sbrk(0);

	sbrk((intptr_t)(-(uintptr_t)p % PAGE));
	p = sbrk(LENGTH);
	prepare(p);
	if (raw)
		syscall(SYS_brk, p + LENGTH / 2), syscall(SYS_brk, p + LENGTH);
	else
		say("brk", brk(p + LENGTH / 2)), sbrk(LENGTH / 2);
	show(p);
}

/* Something else is mapped over what was merged, and nobody was told. */
static void mapped_inline(void)
{
	int fd = memfd_create("file", 0), quarter = LENGTH / 4;
	char *p = map(), *q = map(), *file;

	say("", ftruncate(fd, LENGTH));
	file = mmap(NULL, LENGTH, RW, MAP_SHARED, fd, 0);
	raw_syscall(SYS_mmap, (long)p, quarter, RW, MAP_SHARED | MAP_FIXED, fd, 0);
	raw_syscall(SYS_munmap, (long)q, LENGTH, 0, 0, 0, 0);
	q = (char *)raw_syscall(SYS_mmap, (long)q, LENGTH, RW, MAP_SHARED | MAP_FIXED, fd, 0);
	for (int i = 0; i < 30; i++)
		nap();
	for (size_t i = 0; i < LENGTH; i++)
		file[i] = (char)(i / PAGE % 100 + 1);
	say("discard", madvise(p, LENGTH / 2, MADV_DONTNEED));
	show(p);
	say("unmerge", madvise(q, LENGTH, MADV_UNMERGEABLE) * 0);
	memset(file, 0, LENGTH / 2);
	show(p);
	show(q);
	say("move", (long)(q = mremap(q, LENGTH, 2 * LENGTH, MREMAP_MAYMOVE)));
	show(q);
}

/* What is mapped again like that, or protected, is not merged. */
static void changed_inline(void)
{
	char *p = map(), *q = map();

	raw_syscall(SYS_mmap, (long)p, LENGTH, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	raw_syscall(SYS_mprotect, (long)q, LENGTH / 2, PROT_NONE, 0, 0, 0);
	for (int i = 0; i < 30; i++)
		nap();
	show(p);
	say("write", write(open("/dev/zero", O_RDWR), q, PAGE) == (ssize_t)PAGE ? 0 : 0);
	say("read", read(open("/dev/zero", O_RDWR), q, PAGE));
	raw_syscall(SYS_mprotect, (long)q, LENGTH / 2, RW, 0, 0, 0);
	show(q);
}

/* Children that libc knows nothing of, while the agent is at work: each allocates, and finds what was merged. */
static void forked_inline(void)
{
	char *p = map(), *busy = mmap(NULL, 16 * LENGTH, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int failed = 0;

	madvise(busy, 16 * LENGTH, MADV_MERGEABLE);
	for (int i = 0; i < 300; i++) {
		int status;
		pid_t pid;

		memset(busy, i + 1, 16 * LENGTH);
		pid = (pid_t)raw_syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);
		if (!pid) {
			char *mine = malloc(3UL << 20);

			alarm(20);
			memset(mine, 1, 3UL << 20);
			free(mine);
			for (size_t k = 0; k < LENGTH; k++)
				if (p[k] != (char)(k / PAGE % 100 + 1))
					_exit(1);
			if (madvise(p, LENGTH, MADV_DONTNEED) || p[0] || p[LENGTH - 1])
				_exit(2);
			_exit(0);
		}
		failed += waitpid(pid, &status, 0) != pid || status;
	}
	printf("%d failed\n", failed);
	show(p);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} parts[] = {
		{"process_madvise", process_madvise_self},
		{"mseal", sealed},
		{"shmat", shared_memory},
		{"brk", the_break},
		{"mapped inline", mapped_inline},
		{"changed inline", changed_inline},
		{"forked inline", forked_inline},
	};

	for (int i = 2; i < argc; i++) {
		merged |= !strcmp(argv[i], "merged");
		raw |= !strcmp(argv[i], "raw");
	}
	setvbuf(stdout, NULL, _IONBF, 0);
	for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
		if (argc > 1 && !strcmp(argv[1], parts[i].name))
			parts[i].run();
	return 0;
}
