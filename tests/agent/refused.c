/*
 * Makes the kernel refuse calls of the agent's while its memory is merged: ./refused HOW. No byte may be wrong, no
 * thread may sleep for ever, and it must not take long.
 *
 * Its inline system calls pass no wrapper of the agent's.
 */
#define _GNU_SOURCE
#include "arch/arch.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define BLOCK (2UL << 20)
#define BLOCKS 12
#define ROUNDS 60

static uint64_t *block[BLOCKS];
static uint64_t seed[BLOCKS];
static atomic_bool stop;
static atomic_ulong touched;

static uint64_t word(uint64_t s, size_t i)
{
	return (s + i / 512) * 0x9e3779b97f4a7c15u + i % 512;
}

static void fill(int b, uint64_t s)
{
	seed[b] = s;
	for (size_t i = 1; i < BLOCK / 8; i++)
		block[b][i] = word(s, i);
}

static void check(const char *when)
{
	for (int b = 0; b < BLOCKS; b++)
		for (size_t i = 1; block[b] && i < BLOCK / 8; i++)
			if (block[b][i] != word(seed[b], i)) {
				printf("%s: block %d word %zu of page %zu is wrong\n", when, b, i % 512, i / 512);
				exit(1);
			}
}

/* Writes the first word of each page of each block, which no other looks at, and reads the rest of it. */
static void *toucher(void *arg)
{
	(void)arg;
	for (unsigned at = 1; !atomic_load(&stop); at = at * 1103515245 + 12345) {
		volatile uint64_t *page = block[at >> 8 & 3] + (at >> 12) % (BLOCK / PAGE) * 512;

		if (at >> 30)
			(void)page[7];
		else if (page != block[at >> 8 & 3])
			(void)page[0];
		atomic_fetch_add(&touched, 1);
		usleep(50);
	}
	return NULL;
}

/* Bytes of [a, b) that lie in blocks. */
static size_t in_blocks(uintptr_t a, uintptr_t b)
{
	size_t bytes = 0;

	for (int i = 0; i < BLOCKS; i++) {
		uintptr_t first = (uintptr_t)block[i], end = first + BLOCK;

		if (block[i] && a < end && b > first)
			bytes += (b < end ? b : end) - (a > first ? a : first);
	}
	return bytes;
}

/* In blocks alone: the agent maps a segment elsewhere, too, while it compares. */
static size_t merged(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[512];
	size_t bytes = 0;

	while (maps && fgets(line, sizeof(line), maps)) {
		uintptr_t a, b;

		if (strstr(line, "samepage (deleted)") && sscanf(line, "%lx-%lx", &a, &b) == 2)
			bytes += in_blocks(a, b);
	}
	if (maps)
		fclose(maps);
	return bytes;
}

static unsigned long status(const char *what)
{
	FILE *file = fopen("/proc/self/status", "r");
	char line[256];
	unsigned long kib = 0;

	while (file && fgets(line, sizeof(line), file))
		if (!strncmp(line, what, strlen(what)))
			kib = strtoul(line + strlen(what) + 1, NULL, 10);
	if (file)
		fclose(file);
	return kib;
}

static void limit(int resource, unsigned long bytes)
{
	struct rlimit to;

	if (getrlimit(resource, &to))
		exit(2);
	to.rlim_cur = bytes;

	if (setrlimit(resource, &to))
		exit(2);
}

/* Uses up vm.max_map_count, but for a few. */
static void many_mappings(int left)
{
	long max = 65530;
	FILE *file = fopen("/proc/sys/vm/max_map_count", "r");
	char *p;

	if (file && fscanf(file, "%ld", &max) != 1)
		exit(2);
	if (file)
		fclose(file);
	if (max > 200000)
		exit(77);
	p = mmap(NULL, 2 * (size_t)max * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	for (long i = 0; i < max && !mprotect(p + 2 * (size_t)i * PAGE, PAGE, PROT_READ); i++)
		;
	munmap(p, 2 * (size_t)left * PAGE);
}

static void refuse(const char *how)
{
	long flags = 0;

	if (!strcmp(how, "data"))
		limit(RLIMIT_DATA, (status("VmData") << 10) + (1 << 20));
	else if (!strcmp(how, "data-below"))
		limit(RLIMIT_DATA, (status("VmData") << 10) / 2);
	else if (!strcmp(how, "as"))
		limit(RLIMIT_AS, (status("VmSize") << 10) + (1 << 20));
	else if (!strcmp(how, "as-below"))
		limit(RLIMIT_AS, (status("VmSize") << 10) / 2);
	else if (!strcmp(how, "mappings"))
		many_mappings(0);
	else if (!strcmp(how, "mappings-few"))
		many_mappings(40);
	else if (!strncmp(how, "memlock", 7))
		limit(RLIMIT_MEMLOCK, 0);
	if (strstr(how, "current"))
		flags |= MCL_CURRENT;
	if (strstr(how, "future"))
		flags |= MCL_FUTURE;
	if (strstr(how, "onfault"))
		flags |= MCL_ONFAULT;
	if (flags && strstr(how, "inline"))
		raw_syscall(SYS_mlockall, flags, 0, 0, 0, 0, 0);
	else if (flags)
		mlockall((int)flags);
	else if (strstr(how, "mlock2"))
		for (int b = 0; b < BLOCKS; b += 2)
			raw_syscall(SYS_mlock2, (long)block[b], BLOCK, strstr(how, "onfault") ? MLOCK_ONFAULT : 0, 0, 0,
				    0);
	if (strstr(how, "unlock"))
		munlockall();
}

int main(int argc, char **argv)
{
	const struct timespec nap = {.tv_nsec = 10000000};
	pthread_t thread;
	size_t most = 0;

	if (argc != 2)
		return 2;
	for (int b = 0; b < BLOCKS; b++) {
		block[b] = malloc(BLOCK);
		fill(b, (uint64_t)b % 3);
	}
	for (int i = 0; merged() < BLOCK * BLOCKS / 2; i++) {
		if (i == 3000)
			return 3;
		nanosleep(&nap, NULL);
	}
	check("merged");
	pthread_create(&thread, NULL, toucher, NULL);
	refuse(argv[1]);
	for (int round = 0; round < ROUNDS; round++) {
		int b = 4 + round % (BLOCKS - 4);
		size_t now;

		check(argv[1]);
		if (round % 3 == 0 && block[b]) {
			fill(b, (uint64_t)round);
		} else {
			void *p;

			free(block[b]);
			p = malloc(BLOCK);
			block[b] = p;
			if (p)
				fill(b, (uint64_t)round);
		}
		nanosleep(&nap, NULL);
		now = merged();
		most = now > most ? now : most;
	}
	check("at the end");
	atomic_store(&stop, true);
	pthread_join(thread, NULL);
	printf("%lu %zu\n", atomic_load(&touched), most / PAGE);
	return 0;
}
