/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who holds a page: a device that it is pinned for (O_DIRECT, a registered buffer of io_uring), a pipe, or anybody else
 * who took a reference to it. No file that an ordinary user may read says so, but page migration shows it. To migrate a
 * page the kernel takes it out of the page tables and counts who still holds it; if anybody does, the page stays.
 * mbind(2) with MPOL_LOCAL and MPOL_MF_MOVE | MPOL_MF_STRICT migrates every page of a range, also to the node it is on,
 * and says EIO when one would not go. (With MPOL_DEFAULT it ignores MPOL_MF_STRICT.) Each process tries once whether
 * that really works, with pages that it holds itself.
 *
 * It shows nothing about parts of a huge page. The kernel skips a huge page that others map too, and does not report
 * that as a failure. Whether others map it, Linux 6.1 reads off the huge page's head, and 6.18 guesses: if the head was
 * discarded, or a child has another part, mbind(2) returns 0 for a part that a device writes to. No call tells whether
 * a page is such a part. So migration is trusted about anonymous memory only in a process that never had a huge page:
 * whoever starts the process forbids them (PR_SET_THP_DISABLE), which holds across fork and exec.
 */
#include "kernel/holders.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"
#include "kernel/kernel.h"
#include "kernel/window.h"

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

int migrate(uintptr_t start, uintptr_t len)
{
	return real.syscall(SYS_mbind, start, len, MPOL_LOCAL, NULL, 0, MPOL_MF_MOVE | MPOL_MF_STRICT) ? -errno : 0;
}

void unmigrated(uintptr_t start, uintptr_t len)
{
	/* No area has a policy of its own, so the default is what was there before. */
	real.syscall(SYS_mbind, start, len, MPOL_DEFAULT, NULL, 0, 0);
}

/* Whether migrate() returns -EIO for a page that a pipe holds, and 0 once the pipe holds it no more. */
static bool try_migrating(uintptr_t page)
{
	struct iovec iov = {(void *)page, PAGE_SIZE};
	int ends[2], held, freed = -EIO;

	if (real.syscall(SYS_pipe2, ends, O_CLOEXEC))
		return false;
	held = real.syscall(SYS_vmsplice, ends[1], &iov, 1, 0) == (long)PAGE_SIZE ? migrate(page, PAGE_SIZE) : -ENOSYS;
	close(ends[0]);
	close(ends[1]);
	for (int tries = 0; held == -EIO && freed == -EIO && tries < 4; tries++)
		freed = migrate(page, PAGE_SIZE);
	return held == -EIO && !freed;
}

/* The same, for a new page of a private mapping of `fd`, or of anonymous memory if `fd` is -1. */
static bool tells(int fd)
{
	const int flags = MAP_PRIVATE | MAP_FIXED | (fd < 0 ? MAP_ANONYMOUS : 0);
	uintptr_t page = kernel.copy;
	bool told = false;

	if (real.mmap((void *)page, PAGE_SIZE, PROT_READ | PROT_WRITE, flags, fd, 0) != MAP_FAILED) {
		*(volatile char *)page = 1;
		told = try_migrating(page);
	}
	window_reset(page, PAGE_SIZE, PROT_NONE, -1, 0);
	return told;
}

/* Direct I/O of most file systems pins pages; these take plain references (iov_iter_get_pages2()). FUSE did up to 6.8. */
static const char *const unpinned[] = {"\tnfs\n", "\tnfs4\n", "\tceph\n", "\tlustre\n"};

static bool is_6_8(void)
{
	char release[8] = "";
	int file = open("/proc/sys/kernel/osrelease", O_RDONLY | O_CLOEXEC);
	ssize_t got = file < 0 ? -1 : read(file, release, sizeof(release) - 1);

	if (file >= 0)
		close(file);
	return got < 4 || !strncmp(release, "6.8.", 4);
}

/* A module is loaded before anything of its kind is mounted. Once one was loaded, this stays true. */
bool reads_unpinned(void)
{
	static bool is;
	char text[4096];
	ssize_t got;
	int file;

	if (is || settings.flags & SP_WELCOME_UNPINNED)
		return true;
	file = open("/proc/filesystems", O_RDONLY | O_CLOEXEC);
	got = file < 0 ? -1 : read(file, text, sizeof(text) - 1);
	if (file >= 0)
		close(file);
	is = got <= 0 || got == sizeof(text) - 1;
	text[got > 0 ? got : 0] = 0;
	for (size_t i = 0; i < sizeof(unpinned) / sizeof(unpinned[0]); i++)
		is |= !!strstr(text, unpinned[i]);
	is |= strstr(text, "\tfuse\n") && is_6_8();
	return is;
}

static _Atomic bool small;

static bool huge_pages_are_forbidden(void)
{
	return real.prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1;
}

void note_page_size(void)
{
	atomic_store(&small, huge_pages_are_forbidden());
}

void note_huge_pages(void)
{
	atomic_store(&small, false);
}

bool only_small_pages(void)
{
	if (!huge_pages_are_forbidden())
		note_huge_pages();
	return atomic_load(&small);
}

bool migration_tells(void)
{
	static int known = -1;
	int fd;

	if (known >= 0)
		return known;
	known = 0;
	fd = new_memfd();
	if (fd < 0)
		return false;
	known = !real.syscall(SYS_ftruncate, fd, PAGE_SIZE) && tells(fd) && tells(-1);
	close(fd);
	return known;
}
