/*
 * Has memory with attributes, merged and unmerged. Prints a line for each attribute: its name, whether any of the
 * memory was merged, and the flags that /proc/self/smaps has at the end. With an argument it waits until pages are
 * merged.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096UL
#define LEN (64 * PAGE)
#define MADV_GUARD_INSTALL_ 102
#define DROPPABLE 0x08

struct attribute {
	const char *name;
	int map_flags; /* beside MAP_ANONYMOUS */
	int advice;    /* 0: none */
	bool bound, named;
	bool late; /* given when it is merged */
};

#define ADVICE(what, how) {.name = what, .map_flags = MAP_PRIVATE, .advice = how}, LATE("late-" what, .advice = how)
#define LATE(what, ...) {.name = what, .map_flags = MAP_PRIVATE, .late = true, __VA_ARGS__}

static const struct attribute attributes[] = {
	{.name = "plain", .map_flags = MAP_PRIVATE},
	ADVICE("dontfork", MADV_DONTFORK),
	ADVICE("dontdump", MADV_DONTDUMP),
	ADVICE("hugepage", MADV_HUGEPAGE),
	ADVICE("nohugepage", MADV_NOHUGEPAGE),
	ADVICE("sequential", MADV_SEQUENTIAL),
	ADVICE("random", MADV_RANDOM),
	ADVICE("wipeonfork", MADV_WIPEONFORK),
	ADVICE("cold", 20 /* MADV_COLD */),
	ADVICE("guard", MADV_GUARD_INSTALL_),
	{.name = "stack", .map_flags = MAP_PRIVATE | MAP_STACK},
	{.name = "growsdown", .map_flags = MAP_PRIVATE | MAP_GROWSDOWN},
	{.name = "droppable", .map_flags = DROPPABLE},
	{.name = "bound", .map_flags = MAP_PRIVATE, .bound = true},
	LATE("late-bound", .bound = true),
	{.name = "named", .map_flags = MAP_PRIVATE, .named = true},
	LATE("late-named", .named = true),
};

static bool give(const struct attribute *a, char *p)
{
	if (a->bound) {
		unsigned long mask = 1;

		return !syscall(SYS_mbind, p, LEN, 2 /* MPOL_BIND */, &mask, 64, 0);
	}
	if (a->named)
		return !prctl(0x53564d41 /* PR_SET_VMA */, 0, (unsigned long)p, LEN, (unsigned long)"mine");
	/* A guard in the middle. */
	if (a->advice == MADV_GUARD_INSTALL_)
		return !madvise(p + LEN / 2, PAGE, a->advice);
	return !a->advice || !madvise(p, LEN, a->advice);
}

/* The VmFlags, in order of address, of the mappings in [p, p + LEN); equal neighbours once. Those of write
 * tracking are left out, and "gu", which a mapping keeps that once had a guard anywhere. Whether a part is a segment's. */
static bool flags_of(const char *p, char *out, size_t size, bool policy)
{
	FILE *smaps = fopen("/proc/self/smaps", "r");
	char line[512], last[512] = "";
	bool in = false, merged = false;

	*out = 0;
	while (smaps && fgets(line, sizeof(line), smaps)) {
		uintptr_t start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2) {
			in = start < (uintptr_t)p + LEN && end > (uintptr_t)p;
			merged |= in && strstr(line, "samepage");
		} else if (in && !strncmp(line, "VmFlags:", 8)) {
			char kept[512] = "";

			for (char *word = strtok(line + 8, " \n"); word; word = strtok(NULL, " \n"))
				if (!strstr("uw um sd mg gu", word))
					strcat(strcat(kept, " "), word);
			if (strcmp(kept, last))
				strncat(strncat(out, kept, size - strlen(out) - 1), " |", size - strlen(out) - 1);
			strcpy(last, kept);
		}
	}
	if (smaps)
		fclose(smaps);
	if (policy) {
		int mode = -1;

		syscall(SYS_get_mempolicy, &mode, NULL, 0, p + PAGE, 2 /* MPOL_F_ADDR */);
		sprintf(out + strlen(out), " policy %d", mode);
	}
	return merged;
}

static bool guarded(const struct attribute *a, size_t page)
{
	return a->advice == MADV_GUARD_INSTALL_ && page == LEN / PAGE / 2;
}

static void show(const struct attribute *a, bool merging)
{
	/* Apart from others, which it could become one mapping with. */
	char *space = mmap(NULL, LEN + 64 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *p = space + 32 * PAGE;
	char flags[4096];
	bool merged = false;

	p = mmap(p, LEN, PROT_READ | PROT_WRITE, a->map_flags | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (p == MAP_FAILED || (!a->late && !give(a, p))) {
		printf("%s\t-\tcannot be had\n", a->name);
		return;
	}
	for (size_t page = 0; page < LEN / PAGE; page++)
		if (a->late || !guarded(a, page))
			memset(p + page * PAGE, (int)(page % 50 + 1), PAGE);
	madvise(p, LEN, MADV_MERGEABLE);
	for (int tries = 0; merging && tries < 30 && !merged; tries++) {
		usleep(10000);
		merged = flags_of(p, flags, sizeof(flags), a->bound);
	}
	if (a->late && !give(a, p))
		printf("%s: %s\n", a->name, strerror(errno));
	if (a->late && merging)
		usleep(50000);
	if (madvise(p, LEN, MADV_UNMERGEABLE))
		printf("%s: not unmerged: %s\n", a->name, strerror(errno));
	flags_of(p, flags, sizeof(flags), a->bound);
	for (size_t page = 0; page < LEN / PAGE; page++)
		if (!guarded(a, page) && p[page * PAGE + 7] != (char)(page % 50 + 1))
			printf("%s: page %zu is wrong\n", a->name, page);
	printf("%s\t%s\t%s\n", a->name, merged ? "merged" : "left alone", flags);
	munmap(space, LEN + 64 * PAGE);
}

int main(int argc, char **argv)
{
	(void)argv;
	for (size_t i = 0; i < sizeof(attributes) / sizeof(attributes[0]); i++)
		show(&attributes[i], argc > 1);
	return 0;
}
