/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Prints what the memory calls return and what memory holds afterwards, in a form that does not depend on addresses.
 * The output is the same without samepage, under it, and under it with every page merged.
 *
 * Usage: calls [merged] [raw]
 *   merged  wait until a service has merged the pages before each call
 *   raw     make the calls through syscall(2)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define ARENA (64UL << 20)
#define RW (PROT_READ | PROT_WRITE)
#define PRIVATE (MAP_PRIVATE | MAP_ANONYMOUS)
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68

static bool merged, raw;
static char *arena, *base; /* base: where every region starts, amid reserved addresses */
static size_t pages;	   /* of the region */

#define CALL(name, ...) (raw ? syscall(SYS_##name, ##__VA_ARGS__) : (long)name(__VA_ARGS__))

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* ---- what is there --------------------------------------------------------------------------------- */

static unsigned char original(size_t page)
{
	return (unsigned char)(page % 250 + 3);
}

/* -: not readable, 0: zeros, o: what was filled in, w: written since, ?: something else */
static char look(const char *at, size_t page)
{
	static int pipes[2] = {-1};
	unsigned char copy[PAGE];
	bool same = true;

	if (pipes[0] < 0 && pipe(pipes))
		die("pipe");
	if (write(pipes[1], at, PAGE) != (ssize_t)PAGE)
		return '-';
	if (read(pipes[0], copy, PAGE) != (ssize_t)PAGE)
		die("read");
	for (size_t i = 1; i < PAGE; i++)
		same &= copy[i] == copy[0];
	if (!same)
		return '?';
	return copy[0] == 0 ? '0' : copy[0] == original(page) ? 'o' : copy[0] == 1 ? 'w' : '?';
}

static void show(const char *what, const char *at, size_t n)
{
	printf("  %s ", what);
	for (size_t i = 0; i < n; i++)
		putchar(look(at + i * PAGE, i));
	putchar('\n');
}

#define UNTOUCHED EL2HLT

static void say(const char *what, long ret)
{
	int err = errno;

	if (ret == -1)
		printf("%s: %s\n", what, strerrorname_np(err));
	else if ((char *)ret >= arena && (char *)ret < arena + ARENA)
		printf("%s: base%+ld\n", what, (ret - (long)base) / (long)PAGE);
	else
		printf("%s: %s\n", what, ret ? "elsewhere" : "0");
	if (ret != -1 && err != UNTOUCHED)
		printf("  errno became %d\n", err);
}

#define DO(name, ...)                                                                                                  \
	do {                                                                                                           \
		errno = UNTOUCHED;                                                                                     \
		say(#name "(" #__VA_ARGS__ ")", CALL(name, __VA_ARGS__));                                              \
	} while (0)

/* ---- a region to try it on --------------------------------------------------------------------------- */

/* Every page of it is mapped from a memfd. */
static bool is_merged(uintptr_t start, uintptr_t end)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	unsigned long from, to, inode;
	uintptr_t found = 0;
	char line[4096];

	while (maps && fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %*s %*s %*s %lu", &from, &to, &inode) == 3 && inode && to > start &&
		    from < end)
			found += (to < end ? to : end) - (from > start ? from : start);
	if (maps)
		fclose(maps);
	return found == end - start;
}

static void wait_merged(char *at, size_t n)
{
	for (int tries = 0; merged && !is_merged((uintptr_t)at, (uintptr_t)at + n * PAGE); tries++) {
		if (tries > 2000) {
			fprintf(stderr, "not merged after 10 s\n");
			exit(2);
		}
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	}
}

static void fill(char *at, size_t n)
{
	for (size_t i = 0; i < n; i++)
		memset(at + i * PAGE, original(i), PAGE);
}

/* n mergeable pages at base, reserved addresses to both sides. */
static void region(size_t n)
{
	munlockall();
	if (mmap(arena, ARENA, PROT_NONE, PRIVATE | MAP_FIXED | MAP_NORESERVE, -1, 0) != arena ||
	    mmap(base, n * PAGE, RW, PRIVATE | MAP_FIXED, -1, 0) != base)
		die("mmap");
	fill(base, n);
	if (madvise(base, n * PAGE, MADV_MERGEABLE))
		die("MADV_MERGEABLE");
	wait_merged(base, n);
	pages = n;
}

static void hole(size_t from, size_t n)
{
	if (munmap(base + from * PAGE, n * PAGE))
		die("munmap");
}

static void child(void (*body)(void))
{
	pid_t pid;
	int status;

	fflush(stdout);
	pid = raw ? (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) : fork();
	if (!pid) {
		body();
		fflush(stdout);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	printf("  child %d\n", status);
}

/* ---- the calls ---------------------------------------------------------------------------------------- */

static void discarding(void)
{
	region(8);
	DO(madvise, base + PAGE, 3 * PAGE, MADV_DONTNEED);
	show("discarded", base, 8);
	memset(base + PAGE, 1, PAGE);
	memset(base + 6 * PAGE, 1, PAGE);
	show("written", base, 8);
	DO(madvise, base, 8 * PAGE, MADV_DONTNEED);
	show("discarded", base, 8);

	region(8);
	DO(madvise, base + 1, PAGE, MADV_DONTNEED);
	DO(madvise, base, 0, MADV_DONTNEED);
	DO(madvise, base, -PAGE + 1, MADV_DONTNEED);
	DO(madvise, base, -1UL, MADV_DONTNEED);
	DO(madvise, base, 8 * PAGE, 12345);
	show("as before", base, 8);
	DO(madvise, base, PAGE + 1, MADV_DONTNEED);
	show("two pages", base, 8);
	hole(4, 2);
	DO(madvise, base, 8 * PAGE, MADV_DONTNEED);
	show("around a hole", base, 8);

	region(8);
	DO(madvise, base, 4 * PAGE, MADV_FREE);
	memset(base, 1, 8 * PAGE);
	show("freed and written", base, 8);
	DO(madvise, base, 8 * PAGE, MADV_REMOVE);
	show("not removed", base, 8);

	region(8);
	memset(base + 2 * PAGE, 1, PAGE);
	DO(mprotect, base, 8 * PAGE, PROT_NONE);
	DO(madvise, base, 4 * PAGE, MADV_DONTNEED);
	DO(mprotect, base, 8 * PAGE, RW);
	show("discarded unseen", base, 8);
	memset(base, 1, 8 * PAGE);
	show("written", base, 8);

	region(8);
	DO(mlock, base + 2 * PAGE, 2 * PAGE);
	DO(madvise, base, 8 * PAGE, MADV_DONTNEED);
	show("up to what is locked", base, 8);
	DO(madvise, base, 8 * PAGE, MADV_DONTNEED_LOCKED);
	show("all", base, 8);
}

static void unmapping(void)
{
	region(8);
	DO(munmap, base + 2 * PAGE, 2 * PAGE);
	show("unmapped", base, 8);
	DO(mmap, base + 2 * PAGE, PAGE, RW, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0);
	DO(mmap, base + PAGE, PAGE, RW, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0);
	DO(mmap, base + 5 * PAGE, 2 * PAGE, RW, PRIVATE | MAP_FIXED, -1, 0);
	DO(mmap, base + 7 * PAGE, PAGE, RW, MAP_PRIVATE | MAP_FIXED, -1, 0);
	show("mapped anew", base, 8);
	DO(munmap, base + 1, PAGE);
	DO(munmap, base, 0);
	DO(munmap, base, -PAGE);
	DO(mmap, base + 1, PAGE, RW, PRIVATE | MAP_FIXED, -1, 0);
	DO(mmap, base, 0, RW, PRIVATE | MAP_FIXED, -1, 0);
	show("as before", base, 8);
	DO(munmap, base, 8 * PAGE);
	show("gone", base, 8);
}

static void protecting(void)
{
	region(8);
	DO(mprotect, base + PAGE, 2 * PAGE, PROT_READ);
	show("readable", base, 8);
	DO(mprotect, base + 3 * PAGE, PAGE, PROT_NONE);
	show("one is not", base, 8);
	DO(mprotect, base + 1, PAGE, RW);
	DO(mprotect, base, PAGE, 0x10000);
	DO(mprotect, base, 8 * PAGE, RW);
	memset(base + 2 * PAGE, 1, PAGE);
	show("writable", base, 8);
	hole(6, 1);
	DO(mprotect, base, 8 * PAGE, PROT_READ);
	DO(madvise, base, 2 * PAGE, MADV_DONTNEED);
	show("readable up to a hole", base, 8);
}

static void resizing(void)
{
	region(8);
	memset(base + PAGE, 1, PAGE);
	DO(mremap, base, 8 * PAGE, 6 * PAGE, 0);
	show("shrunk", base, 8);
	DO(mremap, base, 6 * PAGE, 7 * PAGE, 0);
	show("grown", base, 8);
	DO(mremap, base, 7 * PAGE, 9 * PAGE, 0);
	show("no room", base, 9);
	DO(mremap, base, 7 * PAGE, 7 * PAGE, 0);
	hole(7, 8);
	DO(mremap, base, 7 * PAGE, 12 * PAGE, MREMAP_MAYMOVE);
	show("grown", base, 12);
	memset(base + 11 * PAGE, 1, PAGE);
	show("written", base, 12);
	DO(madvise, base, 12 * PAGE, MADV_DONTNEED);
	show("discarded", base, 12);

	region(8);
	memset(base + 3 * PAGE, 1, PAGE);
	{
		char *p = (char *)CALL(mremap, base, 8 * PAGE, 20 * PAGE, MREMAP_MAYMOVE);

		printf("moved: %d\n", p != MAP_FAILED && p != base);
		show("there", p, 20);
		show("here", base, 8);
		memset(p + 5 * PAGE, 1, PAGE);
		show("written", p, 20);
		DO(madvise, p + 2 * PAGE, 10 * PAGE, MADV_DONTNEED);
		show("discarded", p, 20);
		DO(munmap, p, 20 * PAGE);
	}

	region(8);
	DO(mremap, base, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base + 16 * PAGE);
	show("there", base + 16 * PAGE, 8);
	show("here", base, 8);
	DO(mremap, base + 16 * PAGE, 8 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base);
	show("back", base, 8);
	DO(mremap, base + 1 * PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base + 32 * PAGE);
	show("without its middle", base, 8);
	DO(madvise, base, 4 * PAGE, MADV_DONTNEED);
	show("around a hole", base, 8);

	region(8);
	memset(base + 2 * PAGE, 1, PAGE);
	DO(mremap, base, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, base + 16 * PAGE);
	show("there", base + 16 * PAGE, 8);
	show("here", base, 8);
	memset(base, 1, PAGE);
	show("written", base, 8);
	DO(madvise, base + 16 * PAGE, 4 * PAGE, MADV_DONTNEED);
	show("discarded", base + 16 * PAGE, 8);

	region(8);
	DO(mremap, base, 0, 8 * PAGE, MREMAP_MAYMOVE);
	DO(mremap, base, 8 * PAGE, 0, MREMAP_MAYMOVE);
	DO(mremap, base + 1, 8 * PAGE, 8 * PAGE, 0);
	DO(mremap, base, 8 * PAGE, 8 * PAGE, 8);
	DO(mremap, base, 8 * PAGE, 8 * PAGE, MREMAP_FIXED, base + 16 * PAGE);
	DO(mremap, base, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base + 4 * PAGE);
	DO(mremap, base, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base + 16 * PAGE + 1);
	DO(mremap, base, 8 * PAGE, 9 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
	DO(mremap, base, 8 * PAGE, 8 * PAGE, MREMAP_DONTUNMAP);
	hole(6, 4);
	DO(mremap, base, 8 * PAGE, 16 * PAGE, MREMAP_MAYMOVE);
	DO(mremap, base + 6 * PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE);
	show("as before", base, 8);
}

static void look_and_discard(void)
{
	show("child's", base, 8);
	memset(base + PAGE, 1, PAGE);
	DO(madvise, base + 2 * PAGE, 2 * PAGE, MADV_DONTNEED);
	DO(mremap, base, 8 * PAGE, 6 * PAGE, 0);
	show("child's", base, 8);
}

/* Read-only, and before an agent could have joined. */
static void unmerge_in_child(void)
{
	DO(madvise, base, 8 * PAGE, MADV_UNMERGEABLE);
	show("child's", base, 8);
}

static void forking(void)
{
	region(8);
	child(look_and_discard);
	show("parent's", base, 8);
	mprotect(base, 8 * PAGE, PROT_READ);
	child(unmerge_in_child);
	mprotect(base, 8 * PAGE, RW);
	DO(madvise, base, 4 * PAGE, MADV_DONTFORK);
	child(look_and_discard);
	DO(madvise, base, 4 * PAGE, MADV_DOFORK);
	DO(madvise, base, 2 * PAGE, MADV_DONTNEED);
	child(look_and_discard);
	show("parent's", base, 8);
}

static void merging(void)
{
	char *shared = mmap(NULL, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	for (int i = 0; i < 2; i++) {
		int advice = i ? MADV_UNMERGEABLE : MADV_MERGEABLE;

		region(8);
		puts(i ? "unmergeable" : "mergeable");
		DO(madvise, base, 8 * PAGE, advice);
		DO(madvise, base + 1, PAGE, advice);
		DO(madvise, base, 1, advice);
		DO(madvise, base, 0, advice);
		DO(madvise, base + 1, 0, advice);
		DO(madvise, base, -PAGE + 1, advice);
		DO(madvise, base, -PAGE, advice);
		DO(madvise, NULL, PAGE, advice);
		DO(madvise, shared, PAGE, advice);
		hole(2, 2);
		DO(madvise, base, 8 * PAGE, advice);
		show("as before", base, 8);
		memset(base + 5 * PAGE, 1, PAGE);
		DO(madvise, base, 8 * PAGE, MADV_DONTNEED);
		show("discarded", base, 8);
	}
	munmap(shared, PAGE);
	puts("prctl");
	DO(prctl, PR_GET_MEMORY_MERGE, 0, 0, 0, 0);
	DO(prctl, PR_GET_MEMORY_MERGE, 1, 0, 0, 0);
	DO(prctl, PR_SET_MEMORY_MERGE, 1, 1, 0, 0);
	DO(prctl, PR_SET_MEMORY_MERGE, 1, 0, 0, 1);
	DO(prctl, PR_SET_MEMORY_MERGE, 0, 0, 0, 0);
	DO(prctl, PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
	printf("is on: %ld\n", CALL(prctl, PR_GET_MEMORY_MERGE, 0, 0, 0, 0));
	{
		char *p = mmap(base + 64 * PAGE, 8 * PAGE, RW, PRIVATE | MAP_FIXED, -1, 0);

		fill(p, 8);
		wait_merged(p, 8);
		show("a mapping made since", p, 8);
		DO(prctl, PR_SET_MEMORY_MERGE, 0, 0, 0, 0);
		show("unmerged", p, 8);
	}
	printf("is on: %ld\n", CALL(prctl, PR_GET_MEMORY_MERGE, 0, 0, 0, 0));
	DO(prctl, 99999, 0, 0, 0, 0);
}

/* What was locked in the parent is not in a child, where the rest may have been merged. */
static void discard_in_child(void)
{
	DO(madvise, base, 8 * PAGE, MADV_DONTNEED);
	show("discarded", base, 8);
}

static void locking(void)
{
	region(8);
	DO(mlock, base + 1, PAGE);
	DO(munlock, base, 8 * PAGE);
	DO(mlock, base + 2 * PAGE, 3 * PAGE); /* in the middle of one mapping: whoever keeps books joins it again */
	DO(munlock, base + 3 * PAGE, PAGE);
	DO(munlock, base + 2 * PAGE, 3 * PAGE);
	DO(mlock2, base, 2 * PAGE, MLOCK_ONFAULT);
	DO(mlock2, base, 2 * PAGE, 2);
	child(discard_in_child);
	DO(madvise, base, 8 * PAGE, MADV_DONTNEED);
	hole(4, 1);
	DO(mlock, base, 8 * PAGE);
	DO(munlock, base, 8 * PAGE);
	DO(mremap, base, 8 * PAGE, 6 * PAGE, 0);
	DO(mlock, base, -PAGE);
	DO(mlockall, 0);
	DO(mlockall, 64);
	say("munlockall()", raw ? syscall(SYS_munlockall) : munlockall());
	show("as before", base, 8);
}

static void growing_locked(void)
{
	region(8);
	memset(base + 3 * PAGE, 1, PAGE); /* where it was merged, that makes more than one mapping of it */
	hole(8, 4);
	DO(mlock, base, 8 * PAGE);
	DO(mremap, base, 8 * PAGE, 10 * PAGE, 0);
	DO(madvise, base + 8 * PAGE, 2 * PAGE, MADV_DONTNEED);
	DO(mremap, base, 10 * PAGE, 12 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base + 32 * PAGE);
	DO(madvise, base + 42 * PAGE, 2 * PAGE, MADV_DONTNEED);
	show("grown", base + 32 * PAGE, 12);

	/* Unlocked as far as there is anything. */
	region(8);
	memset(base + PAGE, 1, PAGE);
	DO(mlock, base, 8 * PAGE);
	hole(4, 1);
	DO(munlock, base, 8 * PAGE);
	DO(madvise, base, 4 * PAGE, MADV_DONTNEED);
	DO(madvise, base + 5 * PAGE, 3 * PAGE, MADV_DONTNEED);
	show("discarded", base, 8);
}

static void wiping(void)
{
	char *p = mmap(NULL, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	region(8);
	memset(base + 3 * PAGE, 1, PAGE);
	memset(base + 5 * PAGE, 1, PAGE);
	DO(madvise, p, PAGE, MADV_WIPEONFORK);
	DO(madvise, base, 4 * PAGE, MADV_WIPEONFORK);
	child(look_and_discard);
	show("parent's", base, 8);
	DO(madvise, base, 8 * PAGE, MADV_KEEPONFORK);
	DO(madvise, base, 8 * PAGE, MADV_WILLNEED);
	DO(madvise, base, 8 * PAGE, MADV_COLD);
	DO(madvise, base, 8 * PAGE, MADV_DONTDUMP);
	DO(madvise, base, 8 * PAGE, MADV_DODUMP);
	DO(madvise, base, 8 * PAGE, MADV_NOHUGEPAGE);
	DO(madvise, base, 8 * PAGE, MADV_POPULATE_READ);
	DO(madvise, base, 8 * PAGE, MADV_POPULATE_WRITE);
	show("as before", base, 8);
	munmap(p, PAGE);
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		merged |= !strcmp(argv[i], "merged");
		raw |= !strcmp(argv[i], "raw");
	}
	setvbuf(stdout, malloc(1 << 16), _IOFBF, 1 << 16);
	arena = mmap(NULL, ARENA, PROT_NONE, PRIVATE | MAP_NORESERVE, -1, 0);
	if (arena == MAP_FAILED)
		die("mmap");
	base = arena + ARENA / 2;
	discarding();
	unmapping();
	protecting();
	resizing();
	forking();
	merging();
	locking();
	growing_locked();
	wiping();
	return 0;
}
