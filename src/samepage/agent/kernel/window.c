/* SPDX-License-Identifier: Apache-2.0 */
/* The windows: the only places where the agent thread maps anything. */
#include "kernel/window.h"
#include "base/check.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"
#include "kernel/kernel.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BALLAST 32 /* mappings of a page each */
#define WINDOWS (2 * WINDOW + VIEW_SPACE + COPY_WINDOW + BALLAST * PAGE_SIZE)
#define GIVE_TRIES 16

static bool holed; /* a part of the windows is no longer ours: never unmap them */

bool range_mapped(uintptr_t start, size_t len)
{
	/* Only says whether all of the range is mapped. */
	return !real.syscall(SYS_msync, start, len, MS_ASYNC);
}

void windows_unlock(void)
{
	real.munlock((void *)kernel.scratch, WINDOWS);
}

bool window_drop(uintptr_t start, size_t len)
{
	if (!real.madvise((void *)start, len, MADV_DONTNEED))
		return true;
	/* EINVAL: somebody locked all memory of the process. */
	windows_unlock();
	return !real.madvise((void *)start, len, MADV_DONTNEED);
}

bool window_fill(uintptr_t start, size_t len, int prot, int fd, off_t offset)
{
	int flags = MAP_PRIVATE | MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_ANONYMOUS | MAP_NORESERVE : 0);
	void *p = real.mmap((void *)start, len, prot, flags, fd, offset);

	if (p == (void *)start)
		return true;
	if (p != MAP_FAILED) /* a kernel before 4.17 takes the address for a hint */
		real.munmap(p, len);
	return false;
}

int window_give(uintptr_t from, size_t len, uintptr_t to)
{
	int err = 0;

	/* This can fail after it unmapped the target only if the kernel itself has no memory; the next attempt then has
	 * nothing to unmap. */
	for (int tries = 0; tries < GIVE_TRIES; tries++) {
		if (real.mremap((void *)from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) == (void *)to)
			return 0;
		err = -errno;
		if (range_mapped(to, len))
			break;
		real.syscall(SYS_sched_yield);
	}
	return err;
}

void window_lost(void)
{
	holed = true;
	kernel.swap = SP_SWAP_NONE;
	kernel.view = kernel.copy = kernel.huge = 0;
}

static bool limited(int resource)
{
	struct rlimit limit;

	return real.syscall(SYS_prlimit64, 0, resource, NULL, &limit) || limit.rlim_cur != RLIM_INFINITY;
}

bool mappings_limited(void)
{
	return limited(RLIMIT_AS) || limited(RLIMIT_DATA);
}

bool mappings_charged(void)
{
	char mode = '2'; /* vm.overcommit_memory=2: the kernel promises no more memory than there is */

	return pread(kernel.overcommit, &mode, 1, 0) != 1 || mode == '2';
}

/* Whether the limit allows `bytes` more than the process has; `pages` is a field of statm. */
static bool leaves(int resource, const char *pages, uint64_t bytes)
{
	struct rlimit limit;

	if (real.syscall(SYS_prlimit64, 0, resource, NULL, &limit))
		return false;
	return limit.rlim_cur == RLIM_INFINITY || (strtoul(pages, NULL, 10) << PAGE_SHIFT) + bytes <= limit.rlim_cur;
}

bool limits_leave(uint64_t bytes)
{
	char statm[160], *data = statm;
	int file = open("/proc/thread-self/statm", O_RDONLY | O_CLOEXEC);
	ssize_t got = file < 0 ? -1 : read(file, statm, sizeof(statm) - 1);

	if (file >= 0)
		close(file);
	if (got <= 0)
		return false;
	statm[got] = 0;
	for (int field = 0; field < 5 && data; field++) /* size resident shared text lib data: data and stack */
		data = strchr(data + 1, ' ');
	return data && leaves(RLIMIT_AS, statm, bytes) && leaves(RLIMIT_DATA, data, bytes);
}

bool windows_matter(uint64_t bytes)
{
	return mappings_limited() && limits_leave(bytes > WINDOWS ? bytes - WINDOWS : 0);
}

void *window_reset(uintptr_t start, size_t len, int prot, int fd, off_t offset)
{
	int flags = MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED);
	void *p = real.mmap((void *)start, len, prot, flags, fd, offset);

	if (p == MAP_FAILED)
		return NULL;
	real.madvise(p, len, MADV_DONTFORK);
	return p;
}

static bool new_scratch(uintptr_t start)
{
	if (!window_reset(start, WINDOW, PROT_READ | PROT_WRITE, -1, 0))
		return false;
	/* A huge page here would be in the way of pages moved here. */
	real.madvise((void *)start, WINDOW, MADV_NOHUGEPAGE);
	/* If a debugger dumped the process and read a page that is not there, the kernel would put zeros there. */
	real.madvise((void *)start, WINDOW, MADV_DONTDUMP);
	return kernel.move < 0 || !uffd_register(kernel.move, start, WINDOW, UFFDIO_REGISTER_MODE_WP);
}

void window_ballast(bool on)
{
	uintptr_t start = kernel.copy + COPY_WINDOW;

	if (!kernel.copy)
		return;
	real.mprotect((void *)start, BALLAST * PAGE_SIZE, PROT_NONE);
	for (size_t i = 0; on && i < BALLAST; i += 2)
		real.mprotect((void *)(start + i * PAGE_SIZE), PAGE_SIZE, PROT_READ);
}

void huge_reset(void)
{
	if (kernel.huge && !new_scratch(kernel.huge))
		kernel.huge = 0;
}

/* Whether mremap(2) can move a mapping of a file and leave an empty one behind (5.13). An older kernel would refuse
 * only after it has unmapped what was at the target. */
static bool views_stay(void)
{
	bool old = settings.flags & SP_WELCOME_LIKE_5_10;
	int fd = old ? -1 : new_memfd();
	void *to = (void *)kernel.copy;
	bool stays;

	if (fd < 0)
		return false;
	stays = !ftruncate(fd, (off_t)PAGE_SIZE) &&
		real.mmap((void *)kernel.view, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0) !=
			MAP_FAILED &&
		real.mremap((void *)kernel.view, PAGE_SIZE, PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
			    to) == to;
	close(fd);
	window_reset(kernel.view, PAGE_SIZE, PROT_NONE, -1, 0);
	window_reset(kernel.copy, PAGE_SIZE, PROT_NONE, -1, 0);
	return stays;
}

/*
 * The agent thread maps nothing but in this range. A program with one thread may unmap memory and map something at the same
 * place a moment later; no mapping of ours may land in between. So one of the program's own threads reserves the range.
 *
 * It lies far below all that the kernel maps where it likes, which is from the top of the address space down, or from
 * a third of it up. So no mapping of another thread's lands in a hole that window_give() leaves, nor in one that stays
 * because somebody killed the child that made the step.
 */
static uintptr_t range;

/* Randomized as libraries are. */
static void *low_address(void)
{
	return (void *)PAGE_ALIGN_DOWN((uintptr_t)&range >> 2);
}

void windows_reserve(void)
{
	uintptr_t slack;
	char *p;

	if (range)
		return;
	p = real.mmap(low_address(), WINDOWS + WINDOW, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return;
	/* Align the copy window so that huge pages fit into it. */
	slack = -(uintptr_t)p % WINDOW;
	if (slack)
		real.munmap(p, slack);
	real.munmap(p + slack + WINDOWS, WINDOW - slack);
	range = (uintptr_t)p + slack;
	real.madvise((void *)range, WINDOWS, MADV_DONTFORK);
}

void windows_give_up(void)
{
	if (range)
		real.munmap((void *)range, WINDOWS);
	range = 0;
}

bool windows_open(void)
{
	if (!range || !window_reset(range, WINDOWS, PROT_NONE, -1, 0))
		return false;
	kernel.scratch = range;
	kernel.huge = kernel.scratch + WINDOW;
	kernel.view = kernel.huge + WINDOW;
	kernel.copy = kernel.view + VIEW_SPACE;
	huge_reset();
	kernel.views_stay = views_stay();
	window_ballast(true);
	return new_scratch(kernel.scratch);
}

bool scratch_works(void)
{
	bool works = false;
	uintptr_t page = kernel.copy;

	if (!window_reset(page, PAGE_SIZE, PROT_READ | PROT_WRITE, -1, 0))
		return false;
	*(volatile char *)page = 1;
	if (!uffd_register(kernel.move, page, PAGE_SIZE, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP))
		works = !uffd_move(kernel.scratch, page, PAGE_SIZE);
	window_reset(page, PAGE_SIZE, PROT_NONE, -1, 0);
	real.madvise((void *)kernel.scratch, PAGE_SIZE, MADV_DONTNEED);
	return works;
}

void windows_close(void)
{
	if (holed)
		range = 0;
	else if (kernel.scratch)
		window_reset(range, WINDOWS, PROT_NONE, -1, 0);
	holed = false;
	kernel.scratch = kernel.huge = kernel.view = kernel.copy = 0;
}

void windows_forked(void)
{
	/* The view is the only window that a child inherits with something in it. */
	if (kernel.view && !holed)
		real.munmap((void *)kernel.view, VIEW_SPACE);
	holed = false;
	range = 0;
}

#ifdef SAMEPAGE_CHECK

/* No page of the application's is left in them. mlockall(2) fills them with zeros. */
void check_windows(void)
{
	const struct pm_walk any = {.any = PAGE_IS_PRESENT | PAGE_IS_SWAPPED};
	const uintptr_t windows[] = {kernel.scratch, kernel.huge};
	struct page_region v;

	for (size_t i = 0; i < sizeof(windows) / sizeof(windows[0]); i++) {
		uintptr_t at = windows[i], end = at + WINDOW;

		while (at && at < end && pagemap_walk(at, end, &any, &v, 1, &at) > 0)
			for (uintptr_t page = v.start; page < v.end; page += PAGE_SIZE)
				VM_BUG_ON(memcmp((void *)page, zero_page, PAGE_SIZE));
	}
}

#endif
