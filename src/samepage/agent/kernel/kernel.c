/* SPDX-License-Identifier: Apache-2.0 */
/* What this kernel lets the agent's thread do. Sources: userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst. */
#include "kernel/kernel.h"
#include "base/real.h"
#include "base/settings.h"
#include "kernel/holders.h"
#include "kernel/window.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct kernel kernel = KERNEL_CLOSED;

/* Newer than the headers of Debian 12 (6.1). Values from the uAPI of Linux 6.8. */
#define FEATURE_WP_HUGETLBFS_SHMEM (1 << 12) /* 5.19 */
#define FEATURE_WP_UNPOPULATED (1 << 13)     /* 6.4 */
#define FEATURE_WP_ASYNC (1 << 15)	     /* 6.7 */
#define FEATURE_MOVE (1 << 16)		     /* 6.8 */

#define DEV_NEW _IO(0xAA, 0x00) /* USERFAULTFD_IOC_NEW, 6.1 */

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

/* Write-protection does not stop those who hold a page already. So it is used only if the user chose it, and if the
 * kernel tells who holds a page. */
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
	if (kernel.move < 0) /* no minor faults on this architecture: islands stay islands */
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
	if (wp_user_only && kernel.wp >= 0) { /* a system call that met a protected page would fail with EFAULT */
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
