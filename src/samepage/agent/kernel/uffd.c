/* SPDX-License-Identifier: Apache-2.0 */
/* Keeping the application's threads away from pages. Source: ioctl_userfaultfd(2). */
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/stalls.h"
#include "base/system.h"
#include "kernel/kernel.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct move_request {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define MOVE_REQUEST _IOWR(UFFDIO, 0x05, struct move_request)
#define MOVE_MODE_DONTWAKE 1

static uint64_t kept_away_since; /* now_ns() when a range was last registered or protected to keep threads away */

int uffd_register(int uffd, uintptr_t start, uintptr_t len, uint64_t mode)
{
	struct uffdio_register r = {.range = {start, len}, .mode = mode};

	if (mode & (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR))
		kept_away_since = now_ns();
	return real.ioctl(uffd, UFFDIO_REGISTER, &r) ? -errno : 0;
}

int uffd_unregister(int uffd, uintptr_t start, uintptr_t len)
{
	struct uffdio_range r = {start, len};
	int err = real.ioctl(uffd, UFFDIO_UNREGISTER, &r) ? -errno : 0;

	/* The kernel wakes threads that wait for a missing page, but it does so before it unregisters the range: a
	 * thread that faults in between, under the lock of one mapping only (6.7 and later), would sleep for ever.
	 * Threads that wait to write it does not wake at all. Once the call has returned, no thread can fall asleep
	 * there any more. */
	uffd_wake(uffd, start, len);
	return err;
}

#define SLEEPERS_MAX 16 /* reported by one read(2) */

void uffd_count_sleepers(int uffd, uintptr_t end, uint64_t since)
{
	static struct {
		unsigned threads;
		uint64_t last, since;
	} behind;
	struct uffd_msg told[SLEEPERS_MAX];
	ssize_t got = sizeof(told);
	unsigned before = 0;

	for (int tries = 0; tries < KERNEL_TRIES && got == sizeof(told); tries++) {
		got = read(uffd, told, sizeof(told));
		for (ssize_t i = 0; i < got / (ssize_t)sizeof(told[0]); i++) {
			if (told[i].event != UFFD_EVENT_PAGEFAULT)
				continue;
			if (told[i].arg.pagefault.address < end) {
				before++;
				continue;
			}
			if (!behind.threads++)
				behind.since = since;
			if (behind.last < told[i].arg.pagefault.address)
				behind.last = told[i].arg.pagefault.address;
		}
	}
	if (before)
		stalls_note(before, now_ns() - since);
	if (behind.threads && behind.last < end) {
		stalls_note(behind.threads, now_ns() - behind.since);
		behind.threads = 0;
		behind.last = 0;
	}
}

void uffd_release(int *uffd, uintptr_t start, uintptr_t len)
{
	if (*uffd >= 0)
		uffd_count_sleepers(*uffd, ADDRESS_END, kept_away_since);
	for (int tries = 0; tries < KERNEL_TRIES && *uffd >= 0; tries++) {
		if (!uffd_unregister(*uffd, start, len))
			return;
		real.syscall(SYS_sched_yield);
	}
	/* ENOMEM: a mapping had to be cut. EINVAL: somebody else put a mapping here. A thread that touches a missing
	 * page there would sleep for ever. Closing the userfaultfd cannot fail, unregisters all ranges, and wakes
	 * everybody. */
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

/* Where the mapping at `start` ends, but at most `end`; 0: nothing is mapped at `start`. */
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
	for (int tries = 0;; tries++) { /* EAGAIN: a mapping changed meanwhile, 5.7 and later */
		err = real.ioctl(kernel.wp, UFFDIO_WRITEPROTECT, &w) ? -errno : 0;
		if (err != -EAGAIN || tries == KERNEL_TRIES)
			return err;
	}
}

int uffd_protect(uintptr_t start, uintptr_t len, bool on)
{
	int err;

	if (on)
		kept_away_since = now_ns();
	err = protect_at_once(start, len, on);
	if (err != -ENOENT)
		return err;
	/* Before 6.4 the ioctl takes a range within one mapping only. */
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

	for (int tries = 0; tries < KERNEL_TRIES && real.ioctl(uffd, UFFDIO_WAKE, &r); tries++)
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
	page_disturb();
	if (kernel.move >= 0)
		uffd_unregister(kernel.move, start, end - start);
}
