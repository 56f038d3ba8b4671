/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Waits until 8 MiB are merged, does with them what HOW says, prints where they are, and aborts. Word i of them is
 * WORD(i).
 *
 * core HOW      of merged written forked moved unmerged hidden shown
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define LENGTH (8UL << 20)
#define WORD(i) (((uint64_t)(i) + 1) * 0x9E3779B97F4A7C15)

static size_t merged(const char *start)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[512];
	size_t bytes = 0;

	while (fgets(line, sizeof(line), maps)) {
		uintptr_t from, to, at = (uintptr_t)start;

		sscanf(line, "%lx-%lx", &from, &to);
		if (strstr(line, "samepage") && from >= at && to <= at + LENGTH)
			bytes += to - from;
	}
	fclose(maps);
	return bytes;
}

static void fill(uint64_t *words)
{
	for (size_t i = 0; i < LENGTH / sizeof(*words); i++)
		words[i] = WORD(i);
}

int main(int argc, char **argv)
{
	const char *how = argc > 1 ? argv[1] : "";
	struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
	char *p = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	fill((uint64_t *)p);
	if (!strcmp(how, "hidden") || !strcmp(how, "shown"))
		madvise(p, LENGTH, MADV_DONTDUMP);
	madvise(p, LENGTH, MADV_MERGEABLE);
	for (int i = 0; i < 6000 && merged(p) < LENGTH / 10 * 9; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	if (merged(p) < LENGTH / 10 * 9) {
		puts("not merged");
		return 1;
	}
	if (!strcmp(how, "written"))
		for (size_t i = 0; i < LENGTH; i += 7 * PAGE)
			*(volatile char *)(p + i) = p[i];
	if (!strcmp(how, "moved"))
		p = mremap(p, LENGTH, 2 * LENGTH, MREMAP_MAYMOVE);
	if (!strcmp(how, "unmerged"))
		madvise(p + LENGTH / 3 / PAGE * PAGE, LENGTH / 3, MADV_UNMERGEABLE);
	if (!strcmp(how, "shown"))
		madvise(p, LENGTH, MADV_DODUMP);
	setrlimit(RLIMIT_CORE, &all);
	printf("%zu\n", (size_t)p);
	fflush(stdout);
	if (!strcmp(how, "forked")) {
		int status;
		pid_t pid = fork();

		if (pid) {
			waitpid(pid, &status, 0);
			return 0;
		}
	}
	abort();
}
