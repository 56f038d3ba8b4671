/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Breaking: giving merged pages private copies again.
 *
 * A fault that finds the memory cgroup full ends in the OOM killer, even under MADV_POPULATE_WRITE. So before each
 * batch we look whether the memory is there (headroom.c); if not, the answer is ENOMEM, and nothing is faulted in for
 * it. What was done stays done, the rest stays merged, and another call goes on.
 *
 * But others allocate between that look and the last fault of the batch. Far from the limit they cannot take that much
 * in so short a time. Near it the batch is charged in one piece: MADV_COLLAPSE (6.1) makes an empty window of 2 MiB one
 * huge page, and fails if the cgroup has no room for it. For an allocation of so high an order (above
 * PAGE_ALLOC_COSTLY_ORDER) the kernel wakes no killer: neither mem_cgroup_oom() nor __alloc_pages_may_oom(). Then, with
 * the memory in hand, we look whether the reserve is still there; if not, we give the memory back. So no fault depends
 * on a look that may be out of date. If there is no huge page, or less than one is wanted, we look before every 64
 * pages. docs/oom.md says what that leaves open.
 *
 * There are two ways to break a page. *Restore*: write-protect the range, copy the segment's pages into fresh anonymous
 * memory, and mremap that over them: the range is anonymous memory again and can be merged again. Pages that already
 * have a private copy (islands) are left for restore.c, which comes last. *In place*: populate_write() makes the
 * copies, which are then islands. This is used without a userfaultfd that can write-protect mappings of segments
 * synchronously (5.19), or without an agent thread.
 */
#include "base/descriptors.h"
#include "base/lock.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"
#include "kernel/headroom.h"
#include "kernel/window.h"
#include "pages/swap.h"
#include "pages/unstopped.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BATCH_PAGES 256UL      /* 1 MiB: faulted in after one look, if far from the limit */
#define STEP_PAGES 64UL	       /* the same near the limit, if the batch cannot be charged in one piece */
#define NEAR_EACH (32UL << 20) /* near the limit: less than this for each CPU, beside the reserve */
#define MOVING (256UL << 10)   /* more than the kernel takes for mappings and page tables while a window is moved */

/* Faults in copies of pages that may not be written, which populate_write() cannot: writes a byte of each page over
 * itself through /proc, which asks for no permission. Nobody else can write them meanwhile. Returns 0 or -errno. */
static int write_over(uintptr_t start, uintptr_t len)
{
	int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC), err = mem < 0 ? -EFAULT : 0;
	char byte;

	for (uintptr_t at = start; !err && at < start + len; at += PAGE_SIZE)
		if (pread(mem, &byte, 1, (off_t)at) != 1 || real.syscall(SYS_pwrite64, mem, &byte, 1UL, at) != 1)
			err = -EFAULT;
	if (mem >= 0)
		close(mem);
	return err;
}

/* Marks private copies in [start, end) as islands, except for those that are swapped out: under write-protection the
 * kernel also reports a page without a page table entry (a merged one, in a forked child) as swapped. A copy may be
 * copied like a merged page, as long as no device writes to it, and a page that is swapped out is not pinned. False:
 * the kernel does not say. */
static bool find_islands(uintptr_t start, uintptr_t end)
{
	const struct pm_walk w = {.must = PAGE_IS_PRESENT, .must_not = PAGE_IS_FILE};
	struct page_region v[16];

	/* Only the agent thread has the pagemap. Without it, an island is written once more, which changes nothing. */
	while (on_agent_thread() && start < end) {
		uintptr_t from = start;
		int n = pagemap_walk(start, end, &w, v, 16, &start);

		for (int i = 0; i < n; i++)
			page_set(PAGE_ISLAND, v[i].start >> PAGE_SHIFT, v[i].end >> PAGE_SHIFT, true);
		if (n < 0 || (!n && start == from))
			return false;
	}
	return true;
}

/* Finds the first run of pages in [vpn, end) that still are a segment's. False: there is none. */
static bool next_merged(uint64_t *vpn, uint64_t *end)
{
	while (*vpn < *end) {
		uint64_t first = page_next(PAGE_SEGMENT, *vpn, *end, true);
		uint64_t last = page_next(PAGE_SEGMENT, first, *end, false);

		first = page_next(PAGE_ISLAND, first, last, false);
		if (first < last) {
			*vpn = first;
			*end = page_next(PAGE_ISLAND, first, last, true);
			return true;
		}
		*vpn = last;
	}
	return false;
}

/* How many pages of [vpn, end) still are a segment's; counting stops at `enough`. */
static uint64_t count_merged(uint64_t vpn, uint64_t end, uint64_t enough)
{
	uint64_t n = 0, stop = end;

	for (; n < enough && next_merged(&vpn, &stop); vpn = stop, stop = end)
		n += stop - vpn;
	return n < enough ? n : enough;
}

/* Copies [start, start + len), which may be protected against reading, to `to`. Returns 0 or -errno. */
static int copy_out(void *to, uintptr_t start, uintptr_t len, int prot)
{
	if (prot & PROT_READ)
		memcpy(to, (void *)start, len);
	else if (pread(kernel.mem, to, len, (off_t)start) != (ssize_t)len)
		return -EFAULT;
	return 0;
}

/* ---- the memory for it --------------------------------------------------------------------------------- */

/* Pages of the copy window [at, end) that are faulted in and not given away yet. Only the agent thread uses it, and
 * each time goes on where it stopped: if neighbouring pages of the window move to neighbouring pages of an area, the
 * kernel makes them one mapping. A fork does not inherit the pages, since then a write to them would take memory once
 * more. */
static struct {
	uintptr_t at, end;
} stock;

static uint64_t stocked(void)
{
	return (stock.end - stock.at) >> PAGE_SHIFT;
}

static void stock_drop(void)
{
	if (stock.end && kernel.copy)
		window_reset(kernel.copy, COPY_WINDOW, PROT_NONE, -1, 0);
	stock.at = stock.end = 0;
}

/* Maps fresh memory for n pages at a multiple of `align`, with nothing faulted in. False: there is no mapping to be
 * had. */
static bool stock_map(uint64_t n, uintptr_t align)
{
	uintptr_t len = n * PAGE_SIZE, at = (stock.end + align - 1) & ~(align - 1);

	if (!kernel.copy || (mappings_limited() && !limits_leave(COPY_WINDOW)))
		return false;
	if (!stock.end || at + len > kernel.copy + COPY_WINDOW)
		at = kernel.copy;
	/* Not window_reset(): without MAP_NORESERVE, like the memory that it becomes a part of. */
	if (real.mmap((void *)at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	    MAP_FAILED)
		return false;
	real.madvise((void *)at, len, MADV_DONTFORK);
	window_drop(at, len); /* and unlocks it, under mlockall(MCL_FUTURE) */
	stock.at = at;
	stock.end = at + len;
	return true;
}

/* It could not be done this way, but maybe another way. */
#define OTHERWISE (-EOPNOTSUPP)

/* Puts n pages in stock, by single faults. Returns 0, -errno, or OTHERWISE. */
static int stock_pages(uint64_t n)
{
	return stock_map(n, PAGE_SIZE) ? populate_write(stock.at, n * PAGE_SIZE) : OTHERWISE;
}

/* Puts SECTION_MAX pages in stock, in one piece. Returns 0; -ENOMEM: the cgroup has no room; or OTHERWISE. */
static int stock_whole(void)
{
	if (!stock_map(SECTION_MAX, WINDOW))
		return OTHERWISE;
	*(volatile char *)stock.at = 0; /* the kernel does not collapse a range that is quite empty */
	for (int tries = 0; real.madvise((void *)stock.at, WINDOW, MADV_COLLAPSE); tries++) {
		if (errno == EBUSY)
			return -ENOMEM;
		if (errno != EAGAIN || tries == 8) /* EINVAL: no huge pages; ENOMEM: none free */
			return OTHERWISE;
	}
	return 0;
}

/* Whether n pages can be had with the reserve left. Needs the lock. Returns 0 or -ENOMEM. */
static int afford(uint64_t n, struct sp_broken *out)
{
	uint64_t there = headroom(settings.use_swap), left = MOVING + settings.reserve;

	out->bytes_needed = n * PAGE_SIZE;
	out->bytes_available = there > left ? there - left : 0;
	out->unseen = headroom_unknown();
	return there < left + out->bytes_needed ? -ENOMEM : 0;
}

static int look(uint64_t n, struct sp_broken *out)
{
	int err;

	agent_mmap_lock();
	err = afford(n, out);
	agent_mmap_unlock();
	return err;
}

/* Puts at most `want` pages in stock. Returns 0, -errno, or OTHERWISE. *whole: huge pages are worth a try. */
static int stock_up(uint64_t want, bool *whole, struct sp_broken *out)
{
	uint64_t n = want < BATCH_PAGES ? want : BATCH_PAGES;
	int err = look(n, out);

	if (err)
		return err;
	if (out->bytes_available - out->bytes_needed >= NEAR_EACH * online_cpus())
		return stock_pages(n);
	if (want >= SECTION_MAX && *whole) {
		err = look(SECTION_MAX, out);
		if (!err)
			err = stock_whole();
		/* This look counts: nobody can take from us what we have, and the reserve is there. */
		if (!err)
			err = look(0, out);
		if (err != OTHERWISE)
			return err;
		*whole = false;
	}
	return stock_pages(n < STEP_PAGES ? n : STEP_PAGES);
}

/* ---- restoring ----------------------------------------------------------------------------------------- */

/* Moves the first pages in stock over [at, at + len) of an area. Returns 0, or OTHERWISE with the old pages still
 * there. */
static int give(const struct area *a, uintptr_t at, uintptr_t len)
{
	uintptr_t from = stock.at;

	/* ENOMEM: the mapping would have to be cut. Without DOFORK, a child would lack the memory. */
	if (real.madvise((void *)from, len, MADV_DOFORK))
		return OTHERWISE;
	area_readvise(a, from, from + len);
	if (a->prot != (PROT_READ | PROT_WRITE) && real.mprotect((void *)from, len, a->prot))
		return OTHERWISE;
	if (window_give(from, len, at)) {
		if (!range_mapped(at, len))
			strand();
		return OTHERWISE;
	}
	if (!window_fill(from, len, PROT_NONE, -1, 0))
		window_lost();
	stock.at += len;
	return 0;
}

/* Restores pages of one area. All are a segment's, except for new islands, and there are enough pages in stock. Returns
 * 0, -errno, or OTHERWISE. */
static int restore(const struct area *a, uintptr_t start, uintptr_t end, uint64_t *done)
{
	uint64_t last = end >> PAGE_SHIFT, vpn, stop;
	uintptr_t len = end - start;
	int err = 0;

	if (uffd_register(kernel.wp, start, len, UFFDIO_REGISTER_MODE_WP) || uffd_protect(start, len, true)) {
		err = OTHERWISE;
		goto out;
	}
	/* From here on nobody writes: what is not an island now is the segment's page. */
	if (!find_islands(start, end)) {
		err = OTHERWISE;
		goto out;
	}
	for (vpn = start >> PAGE_SHIFT, stop = last; next_merged(&vpn, &stop); vpn = stop, stop = last) {
		uintptr_t at = vpn << PAGE_SHIFT, n = (stop - vpn) << PAGE_SHIFT;

		err = copy_out((void *)stock.at, at, n, a->prot);
		if (!err)
			err = give(a, at, n);
		if (err)
			break;
		page_set(PAGE_SEGMENT, vpn, stop, false);
		*done += stop - vpn;
	}
out:
	uffd_release(&kernel.wp, start, len);
	for (vpn = page_next(PAGE_SEGMENT, start >> PAGE_SHIFT, last, false); vpn < last;
	     vpn = page_next(PAGE_SEGMENT, stop, last, false)) {
		stop = page_next(PAGE_SEGMENT, vpn, last, true);
		track(vpn << PAGE_SHIFT, stop << PAGE_SHIFT);
	}
	return err;
}

/* ---- in place ------------------------------------------------------------------------------------------ */

/* Breaks the merged pages of [vpn, end) of one area. Returns 0 or -errno. */
static int break_in_place(uint64_t vpn, uint64_t end, struct sp_broken *out)
{
	int err = 0;

	for (uint64_t stop = end; !err && next_merged(&vpn, &stop); vpn = stop, stop = end) {
		uint64_t n = stop - vpn < STEP_PAGES ? stop - vpn : STEP_PAGES;

		stop = vpn + n;
		err = afford(n, out);
		if (!err)
			err = (area_next(vpn << PAGE_SHIFT)->prot & PROT_WRITE ? populate_write : write_over)(
				vpn << PAGE_SHIFT, n * PAGE_SIZE);
		if (!err) {
			page_set(PAGE_ISLAND, vpn, stop, true);
			out->pages_unmerged += n;
		}
	}
	return err;
}

/* ---- the walk ------------------------------------------------------------------------------------------ */

/* One step under the lock: breaks at most `max` pages from the first merged page of [*vpn, end) on. `restores`: they
 * are in stock. Returns 0 or -errno. */
static int break_step(uint64_t *vpn, uint64_t end, uint64_t max, bool restores, struct sp_broken *out)
{
	uint64_t stop = end;
	const struct area *a;
	uintptr_t from, to;
	int err = OTHERWISE;

	if (!next_merged(vpn, &stop)) {
		*vpn = end;
		return 0;
	}
	a = area_next(*vpn << PAGE_SHIFT);
	if (!a || a->start > *vpn << PAGE_SHIFT) { /* no longer in an area */
		*vpn = stop;
		return 0;
	}
	if (stop - *vpn > max)
		stop = *vpn + max;
	from = *vpn << PAGE_SHIFT;
	to = min_addr(stop << PAGE_SHIFT, a->end);
	if (area_disown(from, to, on_agent_thread() ? kernel.maps : -1))
		return 0;
	if (restores)
		err = restore(a, from, to, &out->pages_unmerged);
	if (err == OTHERWISE) {
		if (restores)
			stock_drop();
		find_islands(from, to);
		err = break_in_place(*vpn, to >> PAGE_SHIFT, out);
	}
	if (!err)
		*vpn = to >> PAGE_SHIFT;
	return err;
}

/* Called once nothing in a range is merged. Makes pages that were written after merging ordinary memory, too, where
 * that is safe. Returns -EAGAIN if max_pages were restored, and there may be more. */
static int restore_rest(uintptr_t start, uintptr_t end, uint64_t max_pages)
{
	struct sp_restored done = {0};

	restore_islands(start, end, max_pages, &done);
	return done.pages_restored && done.pages_restored >= max_pages ? -EAGAIN : 0;
}

static uint64_t count_rest(uint64_t vpn, uint64_t end)
{
	sigset_t saved;
	uint64_t n;

	any_mmap_lock(&saved);
	n = count_merged(vpn, end, UINT64_MAX);
	any_mmap_unlock(&saved);
	return n;
}

void break_ksm(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out)
{
	uint64_t vpn = start >> PAGE_SHIFT, last = end >> PAGE_SHIFT, begin = vpn;
	bool restores = on_agent_thread() && kernel.wp >= 0 && kernel.wp_files && kernel.copy, whole = true;
	uint64_t cpu = thread_cpu_ns();
	sigset_t saved;
	int err = 0;

	memset(out, 0, sizeof(*out));
	if (restores)
		stock.at = stock.end = 0; /* a forked child would find its parent's */
	while (!err && vpn < last) {
		uint64_t max = max_pages - out->pages_unmerged, want;

		any_mmap_lock(&saved);
		want = count_merged(vpn, last, max < SECTION_MAX ? max + 1 : SECTION_MAX);
		any_mmap_unlock(&saved);
		if (!want)
			break;
		if (!max) {
			err = -EAGAIN;
			break;
		}
		if (want > max)
			want = max;
		if (restores && !stocked())
			err = stock_up(want, &whole, out);
		if (err && err != OTHERWISE)
			break;
		restores = restores && !err;
		if (restores && want > stocked())
			want = stocked();
		restores = restores && kernel.wp >= 0 && kernel.copy;
		any_mmap_lock(&saved);
		page_disturb();
		err = break_step(&vpn, last, want, restores, out);
		any_mmap_unlock(&saved);
	}
	if (on_agent_thread())
		stock_drop();
	if (!err && on_agent_thread())
		err = restore_rest(start, end, max_pages - out->pages_unmerged);
	if (err)
		out->pages_remaining = count_rest(begin, last);
	/* Report what all that remains needs, not just this batch: a user who wants to make room has to know. */
	out->bytes_needed = out->pages_remaining * PAGE_SIZE;
	out->error = -err;
	out->cpu_ns = thread_cpu_ns() - cpu;
}
