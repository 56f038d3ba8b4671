/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tests the agent's books (area.c, area_set.c, planes.c) against a model that keeps every page separately: random
 * ranges are added, changed, removed and moved. With `short`, the set gets memory for no more than 255 areas. Then
 * areas may reach too far, but those are excluded, and no page that is mapped from a segment is forgotten.
 *
 * Usage: areas_model OPERATIONS SEED [short]. Exit status 0, or 1 after saying what was wrong.
 */
#include "base/area.h"
#include "base/check.h"
#include "base/descriptors.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"

#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 4096UL
#define FIRST ((0x7f1234567000UL >> PAGE_SHIFT) & ~0x3ffffUL) /* the first page of a leaf of the planes */
#define BASE (FIRST + 0x3ffffUL - PAGES / 2)		      /* half of them lie in the next */

static struct page {
	bool known, excluded, segment, island;
	unsigned flags;
	int prot;
} model[PAGES];

static size_t largest = SIZE_MAX; /* mapping to be had */
static bool agents;		  /* the agent's thread is at work */

/* ---- what the books need of the rest of the agent ---- */

bool on_agent_thread(void)
{
	return agents;
}

static void *limited_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	CHECK(!agents);
	return len > largest ? MAP_FAILED : mmap(addr, len, prot, flags, fd, offset);
}

struct real real = {.mmap = limited_mmap, .munmap = munmap, .madvise = madvise, .syscall = syscall};

int maps_open(void)
{
	return -1;
}

void maps_close(int file)
{
	(void)file;
}

bool vma_find(int file, uintptr_t addr, struct vma *out)
{
	(void)file, (void)addr, (void)out;
	return false;
}

int vma_prot(const struct vma *v)
{
	return v->read;
}

/* ---- operations ---- */

static uint64_t state;

static uint64_t rnd(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (state >> 11) % below;
}

static uintptr_t address(size_t page)
{
	return (BASE + page) << PAGE_SHIFT;
}

static void forget(size_t from, size_t to)
{
	for (size_t i = from; i < to; i++)
		model[i] = (struct page){0};
}

static void add(size_t from, size_t to)
{
	unsigned flags = rnd(3) ? AREA_ALLOC : AREA_LOCKED;
	int prot = rnd(4) ? PROT_READ | PROT_WRITE : PROT_READ;

	area_remove(address(from), address(to));
	forget(from, to);
	if (area_add(address(from), address(to), flags, prot))
		CHECK(largest < SIZE_MAX);
	else
		for (size_t i = from; i < to; i++)
			model[i] = (struct page){.known = true, .flags = flags, .prot = prot};
}

static void change(size_t from, size_t to)
{
	const unsigned some[] = {AREA_LOCKED, AREA_UNMERGING, AREA_DONTFORK, 0};
	unsigned set = some[rnd(4)], clear = some[rnd(4)];
	int prot = rnd(2) ? (int)rnd(4) : -1;

	area_change(address(from), address(to), set, clear, prot);
	for (size_t i = from; i < to; i++)
		if (model[i].known) {
			model[i].flags = (model[i].flags & ~clear) | set;
			model[i].prot = prot < 0 ? model[i].prot : prot;
		}
}

static void map_segments(size_t from, size_t to)
{
	for (size_t i = from; i < to; i++) {
		const struct area *a = area_next(address(i));

		if (!a || a->start > address(i) || !area_mergeable(a) || !model[i].known)
			continue;
		model[i].segment = true;
		model[i].island = rnd(2);
		page_set(PAGE_SEGMENT, BASE + i, BASE + i + 1, true);
		page_set(PAGE_ISLAND, BASE + i, BASE + i + 1, model[i].island);
	}
}

static void move(size_t from, size_t n, size_t to)
{
	static struct page moved[PAGES];

	if (area_reserve(area_count(address(from), address(from + n)) + 4))
		return; /* mremap fails, and nothing is changed */
	memcpy(moved, model + from, n * sizeof(*moved));
	area_move(address(from), address(from + n), address(to));
	forget(from, from + n);
	memcpy(model + to, moved, n * sizeof(*moved));
}

/* ---- comparing ---- */

static void compare(void)
{
	unsigned long n = 0, listed = 0;
	uintptr_t end = 0;

	for (const struct area *a = area_next(0); a; a = area_next(end), listed++) {
		CHECK(a->start >= end && a->start < a->end);
		end = a->end;
	}
	CHECK(listed == nr_areas);
	for (size_t i = 0; i < PAGES; i++) {
		const struct area *a = area_next(address(i));
		struct page *p = &model[i];

		if (a && a->start > address(i))
			a = NULL;
		if (a && a->flags & AREA_EXCLUDED) {
			CHECK(largest < SIZE_MAX);
			p->excluded = true;
		}
		if (p->excluded) {
			p->excluded = a; /* for as long as it is an area */
		} else {
			CHECK(p->known == (a != NULL));
			CHECK(!a || (a->flags == p->flags && a->prot == p->prot));
			n += a != NULL;
		}
		CHECK(page_test(PAGE_SEGMENT, BASE + i) == p->segment);
		CHECK(page_test(PAGE_ISLAND, BASE + i) == p->island);
		CHECK(!p->segment || a);
		CHECK(area_overlaps(address(i), address(i + 1)) == (a != NULL));
	}
	CHECK(n || largest < SIZE_MAX || operation < 100 || !nr_areas);
}

static void operate(void)
{
	size_t n = 1 + (rnd(16) ? rnd(8) : rnd(PAGES / 4)), from = rnd(PAGES - n), to = rnd(PAGES - n);

	switch (rnd(8)) {
	case 0:
	case 1:
	case 2:
		add(from, from + n);
		break;
	case 3:
		area_remove(address(from), address(from + n));
		forget(from, from + n);
		break;
	case 4:
		map_segments(from, from + n);
		break;
	case 5:
		area_change(address(from), address(from), AREA_LOCKED, 0, 0); /* an empty range is none */
		area_remove(address(from), address(from));
		if (from + n <= to || to + n <= from)
			move(from, n, to);
		break;
	default:
		change(from, from + n);
	}
	check_books();
	area_trim();
}

/* KiB of private memory. */
static size_t resident(void)
{
	char line[256];
	size_t kib = 0;
	FILE *f = fopen("/proc/self/smaps_rollup", "r");

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "Private_Dirty: %zu", &kib) == 1)
			break;
	if (f)
		fclose(f);
	return kib;
}

/* Far more than the set begins with, and then far fewer. */
static void grow_and_shrink(void)
{
	const size_t many = 100000, left = 64; /* one in so many stays */
	size_t n = 0, before = resident();

	for (size_t i = 0; i < many; i++)
		CHECK(!area_add(address(2 * i), address(2 * i + 1), AREA_LOCKED, 0));
	CHECK(nr_areas == many);
	for (size_t i = 0; i < many; i++) {
		if (i % left)
			area_remove(address(2 * i), address(2 * i + 1));
		area_trim();
	}
	for (uintptr_t at = 0; area_next(at); at = area_next(at)->end, n++)
		CHECK(area_next(at)->start == address(2 * n * left));
	CHECK(n == nr_areas && n == (many + left - 1) / left);
	for (size_t i = 0; i < many; i++)
		CHECK(area_overlaps(address(2 * i), address(2 * i + 2)) == (i % left == 0));
	CHECK(resident() < before + 1024);
	area_remove(address(0), address(2 * many));
	CHECK(!nr_areas);
}

/* It cuts areas as long as there is room, and maps nothing; then it excludes whole ones. */
static void agent_at_work(void)
{
	const size_t many = 100000;
	size_t cuts = 0;

	for (size_t i = 0; i < many; i++)
		CHECK(!area_add(address(4 * i), address(4 * i + 3), AREA_LOCKED, 0));
	agents = true;
	for (size_t i = 0; i < many; i++) {
		area_change(address(4 * i + 1), address(4 * i + 2), AREA_EXCLUDED, 0, -1);
		CHECK(area_next(address(4 * i + 1))->flags & AREA_EXCLUDED);
		cuts += !(area_next(address(4 * i))->flags & AREA_EXCLUDED);
	}
	agents = false;
	CHECK(cuts > 1000 && cuts < many);
	CHECK(!area_add(address(4 * many), address(4 * many + 1), AREA_LOCKED, 0));
	area_remove(address(0), address(4 * many + 1));
	CHECK(!nr_areas);
}

/* What was to be mergeable, but lies where the planes do not reach, is left alone. */
static void beyond_the_planes(void)
{
	CHECK(!area_add(ADDRESS_END - PAGE_SIZE, ADDRESS_END + PAGE_SIZE, AREA_ALLOC, 3));
	CHECK(!area_mergeable(area_next(ADDRESS_END)));
	area_remove(ADDRESS_END, ADDRESS_END + PAGE_SIZE);
	area_remove(0, ADDRESS_END);
	CHECK(!nr_areas);
}

static void merging_any(void)
{
	CHECK(!area_add(address(0), address(1), AREA_MAPPED, 3));
	CHECK(!area_add(address(2), address(3), 0, 3));
	CHECK(!any_mergeable());
	area_merge_any(true);
	CHECK(any_mergeable() && area_mergeable(area_next(address(0))) && !area_mergeable(area_next(address(2))));
	page_set(PAGE_SEGMENT, BASE, BASE + 1, true);
	area_merge_any(false);
	area_forget_plain(address(0), address(9));
	CHECK(nr_areas == 1 && area_overlaps(address(0), address(1)));
	area_remove(0, ADDRESS_END);
}

int main(int argc, char **argv)
{
	unsigned long operations = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;

	if (!operations)
		return 2;
	state = strtoul(argv[2], NULL, 0) * 0x9e3779b97f4a7c15u + 1;
	if (argc > 3) {
		CHECK(!page_reserve(BASE, BASE + PAGES));
		CHECK(!page_reserve((ADDRESS_END >> PAGE_SHIFT) - 1, ADDRESS_END >> PAGE_SHIFT));
		largest = 16 << 10; /* the least that the set begins with */
	} else {
		grow_and_shrink();
		agent_at_work();
	}
	beyond_the_planes();
	merging_any();
	for (operation = 0; operation < operations; operation++) {
		operate();
		if (operation % 32 == 0)
			compare();
		if (operation % 8192 == 8191) { /* all at once */
			area_remove(0, ADDRESS_END);
			CHECK(!nr_areas);
			forget(0, PAGES);
		}
	}
	return 0;
}
