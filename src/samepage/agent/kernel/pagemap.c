/* SPDX-License-Identifier: Apache-2.0 */
/* What is at pages. Sources: PAGEMAP_SCAN(2const), Documentation/admin-guide/mm/pagemap.rst. */
#include "base/real.h"
#include "kernel/kernel.h"

#include <sys/ioctl.h>
#include <unistd.h>

struct scan_request { /* struct pm_scan_arg */
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_REQUEST _IOWR('f', 16, struct scan_request)
#define SCAN_WP_MATCHING 1
#define SCAN_CHECK_WPASYNC 2

#define PM_PRESENT (1ULL << 63)
#define PM_SWAPPED (1ULL << 62)
#define PM_FILE (1ULL << 61)
#define PM_EXCLUSIVE (1ULL << 56)

/* For kernels without PAGEMAP_SCAN: the same answer from /proc/self/pagemap, 8 bytes a page. That cannot tell which
 * pages were written, so all count as written; nor which are the zero page, but a page's content shows that. */
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
		/* As few as possible: to report PAGE_IS_FILE, say, the kernel has to look at every page. */
		.return_mask = quick ? PAGE_IS_WRITTEN : PAGE_IS_HUGE,
	};
	long got;

	if (!kernel.scan)
		return walk_entries(start, end, w, v, n, walked);
	for (int tries = 0;; tries++) {
		got = real.ioctl(kernel.pagemap, SCAN_REQUEST, &r);
		if (got >= 0 || errno != EINTR || tries == KERNEL_TRIES)
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
