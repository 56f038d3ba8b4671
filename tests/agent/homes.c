/*
 * Has memory that a test merges and breaks, one request at a time, while threads touch it all the time.
 *
 * It is a huge page with SMALL pages behind it; every page holds words of its own. Commands, a line each:
 *
 *   renew      maps it all afresh, whole, as it was at the beginning; says where it is
 *   change     gives every ninth page, and others, another content
 *   overwrite  gives every page another content
 *   pause      keeps the readers from it until it is renewed
 *   check      says how many pages hold a wrong word, and how often the readers came round since the last time
 *   advise     gives it advice (MADV_DONTFORK) that all of it must have from then on
 *   squat      maps pages elsewhere all the time from now on, wherever there is room, by system calls that pass no
 *              wrapper; a page of these that holds another word than its own counts as wrong
 *   crowd      makes as many mappings as the kernel allows, and gives them back
 *   discard    gives all of it up (MADV_DONTNEED); says how many pages are not zeros then
 */
#define _GNU_SOURCE
#include "arch/arch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096UL
#define HUGE 512UL
#define SMALL 256UL
#define PAGES (HUGE + SMALL)

static uint64_t *area;
static _Atomic uint64_t want[PAGES]; /* the first word of each page */
static _Atomic unsigned long rounds, wrong;
static atomic_bool paused = true, idle;

static uint64_t *page_at(size_t page)
{
	return area + page * (PAGE / 8);
}

static bool page_is_right(size_t page)
{
	uint64_t word = atomic_load(&want[page]);
	const uint64_t *p = page_at(page);

	for (size_t i = 0; i < PAGE / 8; i++)
		if (p[i] != word + i)
			return false;
	return true;
}

static void write_page(size_t page, uint64_t word)
{
	uint64_t *p = page_at(page);

	for (size_t i = 0; i < PAGE / 8; i++)
		p[i] = word + i;
	atomic_store(&want[page], word);
}

static void *reader(void *arg)
{
	(void)arg;
	for (;;) {
		for (size_t page = 0; page < PAGES; page++) {
			while (atomic_load(&paused)) {
				atomic_store(&idle, true);
				usleep(20);
			}
			if (*(volatile uint64_t *)page_at(page) != atomic_load(&want[page]))
				atomic_fetch_add(&wrong, 1);
		}
		atomic_fetch_add(&rounds, 1);
		usleep(50);
	}
	return NULL;
}

static void pause_readers(bool on)
{
	atomic_store(&idle, false);
	atomic_store(&paused, on);
	while (on && !atomic_load(&idle))
		usleep(20);
}

static void renew(void)
{
	mmap(area, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	madvise(area, HUGE * PAGE, MADV_HUGEPAGE);
	madvise(page_at(HUGE), SMALL * PAGE, MADV_NOHUGEPAGE);
	for (size_t page = 0; page < PAGES; page++)
		write_page(page, (page + 1) << 32);
	madvise(area, PAGES * PAGE, MADV_MERGEABLE);
}

static unsigned long check(void)
{
	unsigned long bad = atomic_exchange(&wrong, 0);

	for (size_t page = 0; page < PAGES; page++)
		bad += !page_is_right(page);
	return bad;
}

/* Not by libc, whose functions are the agent's. */
static uintptr_t bare_page(void)
{
	return (uintptr_t)raw_syscall(SYS_mmap, 0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

#define BELOW (64UL << 20)
#define SQUATTED 1024

static void *squatter(void *arg)
{
	uintptr_t page[SQUATTED] = {0};

	(void)arg;
	for (size_t i = 0;; i = (i + 1) % SQUATTED) {
		if (page[i]) {
			if (*(volatile uintptr_t *)page[i] != page[i])
				atomic_fetch_add(&wrong, 1);
			raw_syscall(SYS_munmap, (long)page[i], PAGE, 0, 0, 0, 0);
		}
		page[i] = bare_page();
		if (page[i] % PAGE) /* an error: there may be a crowd */
			page[i] = 0;
		else
			*(volatile uintptr_t *)page[i] = page[i];
		usleep(5);
	}
	return NULL;
}

static void squat(void)
{
	pthread_t thread;

	/* The kernel takes the highest gap. Then there is none above the area, nor above the agent's windows. */
	while (bare_page() > (uintptr_t)area - BELOW)
		;
	pthread_create(&thread, NULL, squatter, NULL);
}

#define CROWD 70000UL

static void crowd(void)
{
	char *at = mmap(NULL, 2 * CROWD * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	for (size_t i = 0; i < CROWD && !mprotect(at + 2 * i * PAGE, PAGE, PROT_READ); i++)
		;
	munmap(at, 2 * CROWD * PAGE);
}

static unsigned long discard(void)
{
	unsigned long left = 0;

	madvise(area, PAGES * PAGE, MADV_DONTNEED);
	for (size_t page = 0; page < PAGES; page++)
		left += *page_at(page) != 0;
	return left;
}

static void obey(const char *line)
{
	if (!strcmp(line, "renew\n")) {
		pause_readers(true);
		renew();
		pause_readers(false);
		puts("renewed");
	} else if (!strcmp(line, "change\n")) {
		pause_readers(true);
		for (size_t page = 0; page < PAGES; page++)
			if (page % 9 == 4 || (page > HUGE + 100 && page < HUGE + 120))
				write_page(page, ~((page + 1) << 32));
		pause_readers(false);
		puts("changed");
	} else if (!strcmp(line, "overwrite\n")) {
		pause_readers(true);
		for (size_t page = 0; page < PAGES; page++)
			write_page(page, (page + 1) << 32 | 1UL << 31);
		pause_readers(false);
		puts("overwritten");
	} else if (!strcmp(line, "pause\n")) {
		pause_readers(true);
		puts("paused");
	} else if (!strcmp(line, "advise\n")) {
		madvise(area, PAGES * PAGE, MADV_DONTFORK);
		puts("advised");
	} else if (!strcmp(line, "squat\n")) {
		squat();
		puts("squatting");
	} else if (!strcmp(line, "crowd\n")) {
		crowd();
		puts("crowded");
	} else if (!strcmp(line, "discard\n")) {
		pause_readers(true);
		printf("%lu\n", discard());
	} else {
		unsigned long before = atomic_load(&rounds);

		while (!atomic_load(&paused) && atomic_load(&rounds) < before + 2)
			usleep(50);
		printf("%lu\n", check());
	}
}

int main(void)
{
	char *space = mmap(NULL, (PAGES + 2 * HUGE) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char line[64];
	pthread_t thread;

	area = (uint64_t *)(((uintptr_t)space + HUGE * PAGE - 1) & ~(HUGE * PAGE - 1));
	setvbuf(stdout, NULL, _IOLBF, 0);
	renew();
	pthread_create(&thread, NULL, reader, NULL);
	pause_readers(false);
	printf("%lu\n", (unsigned long)area);
	while (fgets(line, sizeof(line), stdin))
		obey(line);
	return 0;
}
