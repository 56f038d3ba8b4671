/* SPDX-License-Identifier: Apache-2.0 */
/* The windows: the only places where the agent thread maps anything. */
#include "agent.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WINDOWS (2 * WINDOW + VIEW_SPACE + COPY_WINDOW)

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
	/* A huge page faulted here would stand in the way of pages moved here. */
	real.madvise((void *)start, WINDOW, MADV_NOHUGEPAGE);
	return kernel.move < 0 || !uffd_register(kernel.move, start, WINDOW, UFFDIO_REGISTER_MODE_WP);
}

void huge_reset(void)
{
	if (kernel.huge && !new_scratch(kernel.huge))
		kernel.huge = 0;
}

/* Whether a view of a file moves, page tables and all, and leaves its mapping behind. A kernel that cannot would say so
 * only when it has unmapped what was at the target. */
static bool view_moves(void)
{
	int fd = (int)real.syscall(SYS_memfd_create, "samepage", 1U /* MFD_CLOEXEC */);
	void *to = (void *)kernel.copy;
	bool moves;

	if (fd < 0)
		return false;
	moves = !ftruncate(fd, (off_t)PAGE_SIZE) &&
		real.mmap((void *)kernel.view, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0) !=
			MAP_FAILED &&
		real.mremap((void *)kernel.view, PAGE_SIZE, PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
			    to) == to;
	close(fd);
	window_reset(kernel.view, PAGE_SIZE, PROT_NONE, -1, 0);
	window_reset(kernel.copy, PAGE_SIZE, PROT_NONE, -1, 0);
	return moves;
}

/* Where a segment's mapping cannot be given an anon_vma (map_view() in merge.c), the process asks the kernel for private file
 * mappings in its cores, too: bit 2, core(5). The price is the program's own text in them. */
static void dump_file_mappings(void)
{
	int fd = open("/proc/self/coredump_filter", O_RDWR | O_CLOEXEC);
	char text[16] = "0x"; /* and "00000033\n" */

	if (fd < 0)
		return;
	if (pread(fd, text + 2, 9, 0) == 9) {
		int last = text[9] <= '9' ? text[9] - '0' : text[9] - 'a' + 10;

		text[9] = "0123456789abcdef"[(last | 1 << 2) & 15];
		real.syscall(SYS_write, fd, text, 11);
	}
	close(fd);
}

/* All that this thread ever maps lies in one range that is its own from the start. A program with one thread
 * may unmap memory and map something at the same place a moment later; nothing of ours may land there. */
bool windows_open(void)
{
	char *p = real.mmap(NULL, WINDOWS + WINDOW, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uintptr_t slack = -(uintptr_t)p % WINDOW;

	if (p == MAP_FAILED)
		return false;
	/* A copy window that huge pages fit into. */
	if (slack)
		real.munmap(p, slack);
	real.munmap(p + slack + WINDOWS, WINDOW - slack);
	kernel.scratch = (uintptr_t)p + slack;
	kernel.huge = kernel.scratch + WINDOW;
	kernel.view = kernel.huge + WINDOW;
	kernel.copy = kernel.view + VIEW_SPACE;
	real.madvise((void *)kernel.scratch, WINDOWS, MADV_DONTFORK);
	huge_reset();
	kernel.moves_views = view_moves();
	if (!kernel.moves_views)
		dump_file_mappings();
	return new_scratch(kernel.scratch);
}

/* Whether `move` really moves: one page of our own there and back. */
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
	if (kernel.scratch)
		real.munmap((void *)kernel.scratch, WINDOWS);
	kernel.scratch = kernel.huge = kernel.view = kernel.copy = 0;
}
