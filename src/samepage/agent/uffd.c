/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel's calls, one function each, with what each kernel version can do. Sources: userfaultfd(2),
 * ioctl_userfaultfd(2), PAGEMAP_SCAN(2const), Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst.
 */
#include "agent.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct kernel kernel = KERNEL_CLOSED;

/* Newer than the headers of Debian 12 (6.1). Values from the uAPI of Linux 6.8. */
#define FEATURE_WP_HUGETLBFS_SHMEM (1 << 12) /* 5.19 */
#define FEATURE_WP_UNPOPULATED (1 << 13)     /* 6.4 */
#define FEATURE_WP_ASYNC (1 << 15)	     /* 6.7 */
#define FEATURE_MOVE (1 << 16)		     /* 6.8 */

struct move_request {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define MOVE_REQUEST _IOWR(UFFDIO, 0x05, struct move_request)
#define MOVE_MODE_DONTWAKE 1

struct scan_request { /* struct pm_scan_arg */
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_REQUEST _IOWR('f', 16, struct scan_request)
#define SCAN_WP_MATCHING 1
#define SCAN_CHECK_WPASYNC 2

/* What the kernel is asked again and again for at most, where it says that it could not just now. */
#define TRIES 64

#define DEV_NEW _IO(0xAA, 0x00) /* USERFAULTFD_IOC_NEW, 6.1 */

/* ---- NUMA nodes ------------------------------------------------------------------------------------- */

#define PREFERRED 1 /* MPOL_PREFERRED, include/uapi/linux/mempolicy.h */
#define NODES_MAX 1024

static bool several_nodes(void)
{
	int file = open("/sys/devices/system/node/online", O_RDONLY | O_CLOEXEC);
	char buf[64] = "";
	ssize_t got = file < 0 ? 0 : read(file, buf, sizeof(buf) - 1);

	if (file >= 0)
		close(file);
	return got > 0 && (memchr(buf, '-', (size_t)got) || memchr(buf, ',', (size_t)got));
}

int page_nodes(uintptr_t start, size_t n, int *node)
{
	void *page[SECTION_MAX];

	for (size_t i = 0; i < n; i++) {
		page[i] = (void *)(start + i * PAGE_SIZE);
		node[i] = settings.flags & SP_WELCOME_TWO_NODES ? (int)((start >> PAGE_SHIFT) + i) & 1 : 0;
	}
	/* move_pages(2) that moves nothing but asks where they are. */
	if (kernel.numa && real.syscall(SYS_move_pages, 0, n, page, NULL, node, 0))
		return -errno;
	return 0;
}

void prefer_node(int node)
{
	static unsigned long before[NODES_MAX / 64], mask[NODES_MAX / 64];
	static int mode = -1;

	if (!kernel.numa || node >= NODES_MAX)
		return;
	if (mode < 0 && real.syscall(SYS_get_mempolicy, &mode, before, (unsigned long)NODES_MAX, NULL, 0))
		return;
	memset(mask, 0, sizeof(mask));
	if (node >= 0)
		mask[node / 64] = 1UL << node % 64;
	real.syscall(SYS_set_mempolicy, node < 0 ? mode : PREFERRED, node < 0 ? before : mask,
		     (unsigned long)NODES_MAX);
}

/* ---- opening --------------------------------------------------------------------------------------- */

static int new_uffd(int dev, uint64_t features, bool *user_mode_only)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	int own = -1, fd = -1;

	*user_mode_only = false;
	if (dev < 0)
		dev = own = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev >= 0)
		fd = real.ioctl(dev, DEV_NEW, O_CLOEXEC | O_NONBLOCK);
	if (own >= 0)
		close(own);
	if (fd < 0)
		fd = (int)real.syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		fd = (int)real.syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
		*user_mode_only = true;
	}
	if (fd >= 0 && real.ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* Write-protection does not stop who holds a page already, so it takes somebody who chose it, and a kernel that tells who does. */
static bool may_protect(void)
{
	return settings.flags & SP_WELCOME_SWAP_WP && only_small_pages() && migration_tells();
}

static enum sp_swap way_to_swap(bool user_only, bool wp_user_only)
{
	const uint32_t no_move = SP_WELCOME_NO_MOVE | SP_WELCOME_SWAP_WP;

	if (kernel.move >= 0 && !(settings.flags & no_move) && scratch_works())
		return user_only ? SP_SWAP_QUIET : SP_SWAP_MOVE;
	if (kernel.wp < 0 || wp_user_only)
		return SP_SWAP_NONE;
	return may_protect() ? SP_SWAP_WP : SP_SWAP_QUIET_WP;
}

int kernel_open(int dev)
{
	const uint64_t sync_wp = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
	const uint64_t move =
		sync_wp | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC | FEATURE_MOVE | UFFD_FEATURE_MINOR_SHMEM;
	bool user_only = false, wp_user_only = false;
	struct page_region one;
	uintptr_t walked;
	struct pm_walk any = {.must = PAGE_IS_PRESENT};

	kernel.pagemap = open("/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC);
	kernel.mem = open("/proc/thread-self/mem", O_RDONLY | O_CLOEXEC);
	kernel.maps = open("/proc/thread-self/maps", O_RDONLY | O_CLOEXEC);
	kernel.overcommit = open("/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC);
	kernel.schedstat = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
	if (kernel.pagemap < 0 || kernel.mem < 0 || kernel.maps < 0)
		return -errno;
	kernel.numa = several_nodes();
	kernel.scan = !(settings.flags & SP_WELCOME_LIKE_6_1);
	if (kernel.scan &&
	    pagemap_walk(PAGE_ALIGN_DOWN(&one), PAGE_ALIGN_DOWN(&one) + PAGE_SIZE, &any, &one, 1, &walked) < 0)
		kernel.scan = false;

	kernel.move = new_uffd(dev, move, &user_only);
	if (kernel.move < 0) /* no minor faults on this architecture: islands stay */
		kernel.move = new_uffd(dev, move & ~(uint64_t)UFFD_FEATURE_MINOR_SHMEM, &user_only);
	kernel.tracking = kernel.move >= 0 && kernel.scan;
	kernel.wp = settings.flags & SP_WELCOME_LIKE_5_10
			    ? -1
			    : new_uffd(dev, sync_wp | FEATURE_WP_HUGETLBFS_SHMEM, &wp_user_only);
	kernel.wp_files = kernel.wp >= 0;
	if (kernel.wp < 0)
		kernel.wp = new_uffd(dev, sync_wp, &wp_user_only);

	if (!windows_open())
		return -ENOMEM;
	kernel.swap = way_to_swap(user_only, wp_user_only);
	kernel.protects = kernel.swap == SP_SWAP_WP || kernel.swap == SP_SWAP_QUIET_WP;
	if (settings.flags & SP_WELCOME_NO_TRACKING)
		kernel.tracking = false;
	if (wp_user_only && kernel.wp >= 0) { /* a system call that met it would fail with EFAULT */
		close(kernel.wp);
		kernel.wp = -1;
	}
	return 0;
}

void kernel_close(void)
{
	int *fds[] = {&kernel.move, &kernel.wp,		&kernel.pagemap,  &kernel.mem,
		      &kernel.maps, &kernel.overcommit, &kernel.schedstat};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
	windows_close();
	kernel.swap = SP_SWAP_NONE;
	kernel.tracking = false;
}

/* ---- pagemap --------------------------------------------------------------------------------------- */

#define PM_PRESENT (1ULL << 63)
#define PM_SWAPPED (1ULL << 62)
#define PM_FILE (1ULL << 61)
#define PM_EXCLUSIVE (1ULL << 56)

/* The same answer from /proc/self/pagemap, 8 bytes a page, where PAGEMAP_SCAN is missing. It cannot tell
 * what was written, so everything was; nor the zero page, whose content says it. */
static int walk_entries(uintptr_t start, uintptr_t end, const struct pm_walk *w, struct page_region *v, int n,
			uintptr_t *walked)
{
	uint64_t entry[512], found = 0;
	int used = 0;

	for (uintptr_t at = start; at < end;) {
		uint64_t want = (end - at) >> PAGE_SHIFT;
		ssize_t got;

		if (want > 512)
			want = 512;
		got = pread(kernel.pagemap, entry, want * 8, (off_t)((at >> PAGE_SHIFT) * 8));
		if (got < 8)
			return got < 0 ? -errno : -EIO;
		for (ssize_t i = 0; i < got / 8; i++, at += PAGE_SIZE) {
			uint64_t c = PAGE_IS_WRITTEN;

			c |= entry[i] & PM_PRESENT ? PAGE_IS_PRESENT : 0;
			c |= entry[i] & PM_SWAPPED ? PAGE_IS_SWAPPED : 0;
			c |= entry[i] & PM_FILE ? PAGE_IS_FILE : 0;
			if ((c & w->must) != w->must || (c & w->must_not) || (w->any && !(c & w->any)))
				continue;
			if (used && v[used - 1].end == at &&
			    v[used - 1].categories == (c & ~(uint64_t)PAGE_IS_WRITTEN)) {
				v[used - 1].end = at + PAGE_SIZE;
			} else if (used == n) {
				*walked = at;
				return used;
			} else {
				v[used++] = (struct page_region){at, at + PAGE_SIZE, c & ~(uint64_t)PAGE_IS_WRITTEN};
			}
			if (++found == w->max_pages) {
				*walked = at + PAGE_SIZE;
				return used;
			}
		}
	}
	*walked = end;
	return used;
}

int pagemap_walk(uintptr_t start, uintptr_t end, const struct pm_walk *w, struct page_region *v, int n,
		 uintptr_t *walked)
{
	bool quick = w->must == PAGE_IS_WRITTEN && !w->must_not && !w->any;
	struct scan_request r = {
		.size = sizeof(r),
		.flags = w->protect ? SCAN_WP_MATCHING : 0,
		.start = start,
		.end = end,
		.vec = (uintptr_t)v,
		.vec_len = (uint64_t)n,
		.max_pages = w->max_pages,
		.category_inverted = w->must_not,
		.category_mask = w->must | w->must_not,
		.category_anyof_mask = w->any,
		/* As little as can be: for PAGE_IS_FILE, say, the kernel looks at every page it is of. */
		.return_mask = quick ? PAGE_IS_WRITTEN : PAGE_IS_HUGE,
	};
	long got;

	if (!kernel.scan)
		return walk_entries(start, end, w, v, n, walked);
	for (int tries = 0;; tries++) {
		got = real.ioctl(kernel.pagemap, SCAN_REQUEST, &r);
		if (got >= 0 || errno != EINTR || tries == TRIES)
			break;
	}
	*walked = got < 0 ? start : r.walk_end;
	return got < 0 ? -errno : (int)got;
}

int page_kinds(uintptr_t start, size_t n, uint8_t *kind)
{
	uint64_t entry[SECTION_MAX];

	if (pread(kernel.pagemap, entry, n * 8, (off_t)((start >> PAGE_SHIFT) * 8)) != (ssize_t)(n * 8))
		return -EIO;
	for (size_t i = 0; i < n; i++)
		kind[i] = !(entry[i] & PM_PRESENT)  ? PAGE_ABSENT
			  : entry[i] & PM_FILE	    ? PAGE_FILE
			  : entry[i] & PM_EXCLUSIVE ? PAGE_OWN
						    : PAGE_FORKED;
	return 0;
}

int page_holds(uintptr_t start, size_t n, bool *holds)
{
	uint64_t entry[SECTION_MAX];

	if (pread(kernel.pagemap, entry, n * 8, (off_t)((start >> PAGE_SHIFT) * 8)) != (ssize_t)(n * 8))
		return -EIO;
	for (size_t i = 0; i < n; i++)
		holds[i] = entry[i] & (PM_PRESENT | PM_SWAPPED);
	return 0;
}

/* ---- userfaultfd ------------------------------------------------------------------------------------ */

int uffd_register(int uffd, uintptr_t start, uintptr_t len, uint64_t mode)
{
	struct uffdio_register r = {.range = {start, len}, .mode = mode};

	return real.ioctl(uffd, UFFDIO_REGISTER, &r) ? -errno : 0;
}

int uffd_unregister(int uffd, uintptr_t start, uintptr_t len)
{
	struct uffdio_range r = {start, len};
	int err = real.ioctl(uffd, UFFDIO_UNREGISTER, &r) ? -errno : 0;

	/* The kernel wakes those who wait for a missing page, but before it takes the range out of our hands: whoever
	 * faults in between, under the lock of one mapping only (6.7 and later), would sleep for ever. Those who wait
	 * to write it does not wake at all. Once it returned, nobody can fall asleep there any more. */
	uffd_wake(uffd, start, len);
	return err;
}

void uffd_release(int *uffd, uintptr_t start, uintptr_t len)
{
	for (int tries = 0; tries < TRIES && *uffd >= 0; tries++) {
		if (!uffd_unregister(*uffd, start, len))
			return;
		real.syscall(SYS_sched_yield);
	}
	/* ENOMEM, for a mapping that had to be cut; EINVAL, for one that somebody else put here. Whoever touches a missing
	 * page there would sleep for ever. Closing it cannot fail, takes all ranges out of its hands, and wakes everybody. */
	if (*uffd >= 0)
		close(*uffd);
	*uffd = -1;
	if (uffd == &kernel.move) {
		kernel.tracking = false;
		kernel.swap = SP_SWAP_NONE;
	} else if (kernel.protects) {
		kernel.swap = SP_SWAP_NONE;
	}
}

bool uffd_holds(uintptr_t start, uintptr_t len)
{
	struct page_region one;
	struct scan_request r = {
		.size = sizeof(r),
		.flags = SCAN_CHECK_WPASYNC,
		.start = start,
		.end = start + len,
		.vec = (uintptr_t)&one,
		.vec_len = 1,
		.category_mask = PAGE_IS_PRESENT,
		.return_mask = PAGE_IS_PRESENT,
	};

	return real.ioctl(kernel.pagemap, SCAN_REQUEST, &r) >= 0 || errno != EPERM;
}

/* Where the first mapping of [start, end) ends, or `end`; 0: nothing is mapped at `start`. */
static uintptr_t first_mapping_end(uintptr_t start, uintptr_t end)
{
	struct vma vma;

	return vma_find(kernel.maps, start, &vma) && vma.start <= start ? min_addr(vma.end, end) : 0;
}

static int protect_at_once(uintptr_t start, uintptr_t len, bool on)
{
	struct uffdio_writeprotect w = {.range = {start, len}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
	int err;

	if (settings.flags & SP_WELCOME_LIKE_6_1) {
		vma_forget();
		if (first_mapping_end(start, start + len) < start + len)
			return -ENOENT;
	}
	for (int tries = 0;; tries++) { /* EAGAIN: a mapping was changing under it, 5.7 and later */
		err = real.ioctl(kernel.wp, UFFDIO_WRITEPROTECT, &w) ? -errno : 0;
		if (err != -EAGAIN || tries == TRIES)
			return err;
	}
}

int uffd_protect(uintptr_t start, uintptr_t len, bool on)
{
	int err = protect_at_once(start, len, on);

	if (err != -ENOENT)
		return err;
	/* Before 6.4 it takes a range of one mapping only. */
	for (uintptr_t at = start, stop; at < start + len; at = stop) {
		vma_forget(); /* registering may have cut mappings */
		stop = first_mapping_end(at, start + len);
		if (!stop)
			return -ENOENT;
		err = protect_at_once(at, stop - at, on);
		if (err)
			return err;
	}
	return 0;
}

void uffd_wake(int uffd, uintptr_t start, uintptr_t len)
{
	struct uffdio_range r = {start, len};

	for (int tries = 0; tries < TRIES && real.ioctl(uffd, UFFDIO_WAKE, &r); tries++)
		;
}

int uffd_move(uintptr_t dst, uintptr_t src, uintptr_t len)
{
	struct move_request m = {.dst = dst, .src = src, .len = len, .mode = MOVE_MODE_DONTWAKE};

	if (real.ioctl(kernel.move, MOVE_REQUEST, &m))
		return -errno;
	return m.move == (int64_t)len ? 0 : -EAGAIN;
}

int uffd_copy(uintptr_t dst, uintptr_t src, uintptr_t len)
{
	struct uffdio_copy c = {.dst = dst, .src = src, .len = len, .mode = UFFDIO_COPY_MODE_DONTWAKE};

	if (real.ioctl(kernel.move, UFFDIO_COPY, &c))
		return -errno;
	return c.copy == (int64_t)len ? 0 : -EAGAIN;
}

void track(uintptr_t start, uintptr_t end)
{
	if (kernel.tracking)
		uffd_register(kernel.move, start, end - start, UFFDIO_REGISTER_MODE_WP);
}

void untrack(uintptr_t start, uintptr_t end)
{
	scan_disturb();
	if (kernel.move >= 0)
		uffd_unregister(kernel.move, start, end - start);
}
