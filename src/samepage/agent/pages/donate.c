/* SPDX-License-Identifier: Apache-2.0 */
/* Donating: copies of pages become a segment, a memfd that is sealed so that nobody can ever change it. */
#include "base/descriptors.h"
#include "base/lock.h"
#include "base/real.h"
#include "base/settings.h"
#include "kernel/headroom.h"
#include "pages/swap.h"

#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Appends pages [i, j) at `addr` to the segment, and sets their status. */
static void append(int fd, uintptr_t addr, size_t i, size_t j, uint8_t *status)
{
	int tries = 0;

	while (i < j) {
		ssize_t put = write(fd, (void *)(addr + i * PAGE_SIZE), (j - i) * PAGE_SIZE);
		off_t end;

		if (put < 0 && errno == EINTR && tries++ < 64)
			continue;
		if (put < (ssize_t)PAGE_SIZE) {
			memset(status + i, put < 0 && errno == EFAULT ? GONE : NOMEM, j - i);
			return;
		}
		/* A short write may have ended inside a page; that page does not count. */
		memset(status + i, DONE, (size_t)put / PAGE_SIZE);
		i += (size_t)put / PAGE_SIZE;
		if (put % (ssize_t)PAGE_SIZE) {
			end = lseek(fd, -(put % (ssize_t)PAGE_SIZE), SEEK_CUR);
			if (end < 0 || !descriptors_are_ours() || ftruncate(fd, end)) {
				memset(status + i, NOMEM, j - i);
				return;
			}
		}
	}
}

/* The same, with each copy on the NUMA node of its page: a page that the kernel's KSM shares stays on its node, too. */
static void append_near(int fd, uintptr_t addr, size_t i, size_t j, uint8_t *status)
{
	int node[SECTION_MAX];

	if (!kernel.numa || page_nodes(addr + i * PAGE_SIZE, j - i, node)) {
		append(fd, addr, i, j, status);
		return;
	}
	for (size_t from = i, to; from < j; from = to) {
		for (to = from; to < j && node[to - i] == node[from - i]; to++)
			;
		prefer_node(node[from - i]);
		append(fd, addr, from, to, status);
	}
	prefer_node(-1);
}

/* How many pages to write to a segment after one look at the headroom: 512 KiB, which takes a tenth of a millisecond.
 * Like a fault, a write to a memfd wakes the OOM killer if its cgroup is full. */
#define DONATE_STEP 128UL

static size_t donate_some(int fd, uintptr_t addr, size_t n, uint8_t *status)
{
	uint8_t kind[SECTION_MAX];
	const struct area *a;

	n = n < DONATE_STEP ? n : DONATE_STEP;
	agent_mmap_lock();
	a = area_next(addr);
	if (!a || a->start > addr) {
		n = 1;
		*status = GONE;
	} else {
		n = min_addr(n, (a->end - addr) >> PAGE_SHIFT);
		if (!room_for(n * PAGE_SIZE, settings.reserve))
			memset(status, NOMEM, n);
		else if (!may_swap(a))
			memset(status, REFUSED, n);
		else if (page_kinds(addr, n, kind))
			memset(status, GONE, n);
		else
			for (size_t i = 0, j; i < n; i = j) {
				for (j = i; j < n && kind[j] == kind[i]; j++)
					;
				if (kind[i] == PAGE_OWN)
					append_near(fd, addr, i, j, status);
				else
					memset(status + i, status_of(kind[i]), j - i);
			}
	}
	agent_mmap_unlock();
	return n;
}

static int seal(int fd)
{
	int err, tries = 0;

	do { /* EBUSY: something holds a page for a moment (compaction, another CPU's LRU batch); the kernel has waited
	      * for it */
		err = fcntl(fd, F_ADD_SEALS, SEALS) ? -errno : 0;
	} while (err == -EBUSY && tries++ < 4);
	return err;
}

int donate(const struct sp_area *runs, size_t n, uint8_t *status)
{
	uint64_t pages = 0, done = 0;
	uint8_t *first = status;
	int fd;

	for (size_t i = 0; i < n; i++)
		pages += runs[i].npages;
	agent_mmap_lock();
	fd = room_for(0, pages * PAGE_SIZE + settings.reserve) ? new_memfd() : -1;
	agent_mmap_unlock();
	if (fd < 0) {
		memset(status, NOMEM, pages);
		return -1;
	}
	for (size_t i = 0; i < n; i++)
		for (uint64_t at = 0; at < runs[i].npages;) {
			size_t did = donate_some(fd, (runs[i].vpn + at) << PAGE_SHIFT, runs[i].npages - at, status);

			at += did;
			status += did;
		}
	while (first < status)
		done += *first++ == DONE;
	if (done && descriptors_are_ours() && !seal(fd))
		return fd;
	close(fd);
	memset(status - pages, BUSY, done ? pages : 0);
	return -1;
}
