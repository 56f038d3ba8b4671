/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finds mappings in /proc/self/maps as on a kernel before 6.11. Checks what it finds, and how often it reads the file.
 *
 * Usage: maps_reader COUNT. Exit status 0, or 1 after saying what was wrong.
 */
#include "../check.h"
#include "base/lock.h"
#include "base/maps.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned long reads;

static long counted_syscall(long number, ...)
{
	va_list args;
	long a, b, c, d;

	va_start(args, number);
	a = va_arg(args, long);
	b = va_arg(args, long);
	c = va_arg(args, long);
	d = va_arg(args, long);
	va_end(args);
	reads += number == SYS_read;
	return syscall(number, a, b, c, d);
}

struct real real = {.syscall = counted_syscall, .ioctl = ioctl};
struct sp_welcome settings = {.flags = SP_WELCOME_NO_MAP_QUERY};
uint64_t mmap_lock_held = 1;

/* Of vma_limit(), which is not asked. */
ssize_t read_file(const char *path, char *buf, size_t size)
{
	(void)path, (void)buf, (void)size;
	return -1;
}

static char *memory;
static size_t count;

/* Pages that may be read, and pages that may be written: each is a mapping. */
static void is_page(const struct vma *v, size_t i)
{
	CHECK(v->start == (uintptr_t)memory + i * PAGE_SIZE && v->end == v->start + PAGE_SIZE);
	CHECK(v->read && v->write == i % 2 && !v->exec && !v->shared && !v->ino && !v->offset);
}

static uintptr_t page(size_t i)
{
	return (uintptr_t)memory + i * PAGE_SIZE;
}

static unsigned long reads_of(int maps, size_t from, size_t to, bool resume)
{
	struct vma v;

	reads = 0;
	for (size_t i = from; i < to; i++) {
		if (resume) {
			mmap_lock_held++;
			vma_resume();
		}
		CHECK(vma_find(maps, page(i), &v));
		is_page(&v, i);
	}
	return reads;
}

int main(int argc, char **argv)
{
	int maps = maps_open();
	unsigned long whole = 0;
	struct vma v;

	count = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
	memory = mmap(NULL, (count + 2) * PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(maps >= 0 && count > 1000 && memory != MAP_FAILED);
	memory += PAGE_SIZE; /* the pages around keep others out */
	CHECK(!mprotect(memory, count * PAGE_SIZE, PROT_READ));
	for (size_t i = 1; i < count; i += 2)
		CHECK(!mprotect(memory + i * PAGE_SIZE, PAGE_SIZE, PROT_READ | PROT_WRITE));

	/* To the end: one after the other takes no more reads. */
	CHECK(!vma_find(maps, UINTPTR_MAX - PAGE_SIZE, &v));
	whole = reads;
	CHECK(whole > count / 100);
	CHECK(reads_of(maps, 0, count, false) <= whole);
	mmap_lock_held++;
	CHECK(reads_of(maps, 0, count, true) <= whole);

	/* The same again, and backwards. */
	CHECK(vma_find(maps, page(500), &v) && vma_find(maps, page(500), &v));
	is_page(&v, 500);
	CHECK(vma_find(maps, page(10), &v));
	is_page(&v, 10);
	CHECK(vma_find(maps, 0, &v) && v.start < (uintptr_t)memory);

	/* Somebody held the lock, and changed what had been read already. */
	CHECK(vma_find(maps, page(20), &v));
	mmap_lock_held++;
	CHECK(!munmap(memory + 21 * PAGE_SIZE, PAGE_SIZE));
	mmap_lock_held++;
	vma_resume();
	CHECK(vma_find(maps, page(21), &v));
	is_page(&v, 22);

	/* Another file of the same number. */
	CHECK(vma_find(maps, page(30), &v));
	maps_close(maps);
	CHECK(maps_open() == maps);
	CHECK(vma_find(maps, page(31), &v));
	is_page(&v, 31);
	return 0;
}
