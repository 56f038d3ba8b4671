/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Restoring islands: pages that were merged and then written become ordinary anonymous memory again.
 *
 * An island is private memory inside a mapping of a segment. UFFDIO_MOVE does not take it from there, so it has to be
 * copied. A page that something else holds must not be copied: a device that it is pinned for (O_DIRECT, a registered
 * buffer of io_uring) would go on with the old page, which nobody sees any more. holders.c finds that out.
 *
 * One critical section: the pages move to the window, page tables and all. Their mapping stays behind empty, registered
 * for minor faults, so that a thread that touches it sleeps (registered for missing faults, it would get the segment's
 * page). In the window nobody can take hold of the pages any more. If mbind(2) says that nobody did before, they are
 * copied to fresh memory, which replaces the empty mapping; else they move back.
 */
#include "base/lock.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"
#include "kernel/headroom.h"
#include "kernel/holders.h"
#include "kernel/window.h"
#include "pages/swap.h"
#include "pages/unstopped.h"

#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RESTORE_MAX 128UL /* pages in one critical section: half a millisecond */
#define RESTORE_MIN 8UL	  /* if one of so few is held, all of them are left */
#define HOME_TRIES 1000
#define COPY_TRIES 4
#define SLICE_NS 1000000UL	/* roughly how long the lock is held at a time */
#define STEP_TAKES (64UL << 10) /* for a child process (run_unstopped()) */
#define NEAR_EACH (32UL << 20)	/* how much others may take meanwhile, for each CPU */

/* ---- there and back -------------------------------------------------------------------------------------- */

/* The end of the segment mapping that `at` lies in; `at` if there is none that may be written. */
static uintptr_t mapping_end(uintptr_t at)
{
	struct vma vma;

	vma_forget(); /* mappings were moved since */
	if (!vma_find(kernel.maps, at, &vma) || vma.start > at || !vma.ino || vma.shared || !vma.read || !vma.write)
		return at;
	return vma.end;
}

/* Fills the place in the window again from which a mapping was moved away. */
static void refill(uintptr_t start, uintptr_t len)
{
	if (!window_fill(start, len, PROT_NONE, -1, 0))
		window_lost();
}

/* Moves the pages of [start, start + len) to the window, mapping by mapping; the mappings stay, empty. Returns how far
 * it came. */
static uintptr_t leave_home(uintptr_t start, uintptr_t len)
{
	uintptr_t done = 0, stop;

	while (done < len && (stop = mapping_end(start + done)) > start + done) {
		uintptr_t n = min_addr(stop - start, len) - done, to = kernel.view + done;

		if (real.mremap((void *)(start + done), n, n, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
				(void *)to) == MAP_FAILED) {
			if (!range_mapped(to, n))
				refill(to, n);
			break;
		}
		done += n;
	}
	return done;
}

/* Fills the empty mapping at [start + done, start + len) with copies of the pages in the window, one by one. Returns
 * how far it came. */
static uintptr_t copy_home(uintptr_t start, uintptr_t done, uintptr_t len)
{
	while (done < len && !uffd_copy(start + done, kernel.view + done, PAGE_SIZE))
		done += PAGE_SIZE;
	return done;
}

/* Finds what of [at, end) in the window holds nothing to be brought home, and fills it again if nothing is mapped there.
 * Returns where that ends; `at` if there is none, or the kernel does not say. */
static uintptr_t empty_end(uintptr_t at, uintptr_t end)
{
	struct vma vma;

	vma_forget();
	if (!vma_find(kernel.maps, at, &vma) || (vma.start <= at && vma.ino))
		return at;
	if (vma.start <= at)
		return min_addr(vma.end, end);
	refill(at, min_addr(vma.start, end) - at);
	return min_addr(vma.start, end);
}

/* Moves the pages in the window back over [start, start + len), with their mappings. That takes no more mappings than
 * there were, but other threads may have taken them meanwhile. After some tries copies will do, if the pages are
 * `unheld`. A child that was killed may have brought home some of them. */
static void go_home(uintptr_t start, uintptr_t len, bool unheld)
{
	const struct timespec nap = {.tv_nsec = 1000000};
	const uintptr_t view = kernel.view;
	uintptr_t done = 0, stop;

	unmigrated(view, len);
	for (int tries = 0; done < len; tries++) {
		while (done < len) {
			stop = mapping_end(view + done);
			if (stop > view + done) {
				stop = min_addr(stop, view + len);
				if (window_give(view + done, stop - view - done, start + done))
					break;
				refill(view + done, stop - view - done);
			} else {
				stop = empty_end(view + done, view + len);
				if (stop == view + done)
					break;
			}
			done = stop - view;
		}
		if (unheld && tries >= COPY_TRIES)
			done = copy_home(start, done, len);
		if (done < len && tries == HOME_TRIES)
			strand();
		if (done < len && tries)
			real.syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &nap, NULL);
	}
}

/* ---- fresh memory ---------------------------------------------------------------------------------------- */

/* The part of the copy window that is mapped for fresh pages and not given away yet. Neighbours in the window become
 * neighbours in an area, so that the kernel makes one mapping of them. */
static struct {
	uintptr_t at, end;
} fresh;

/* Faults in `len` bytes of new memory on the NUMA node of the page `near`. 0: there is none to be had. */
static uintptr_t fresh_pages(uintptr_t len, uintptr_t near)
{
	int node, err;

	/* A page under migration is there twice for a moment, and the kernel may make the new memory a huge page. */
	if (!kernel.copy || !room_for(len + WINDOW, settings.reserve + NEAR_EACH * online_cpus()))
		return 0;
	if (fresh.end - fresh.at < len) {
		fresh.at = fresh.end = 0;
		if (mappings_limited() && !limits_leave(2 * COPY_WINDOW))
			return 0;
		if (real.mmap((void *)kernel.copy, COPY_WINDOW, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
			return 0;
		real.madvise((void *)kernel.copy, COPY_WINDOW, MADV_DONTFORK);
		fresh.at = kernel.copy;
		fresh.end = fresh.at + COPY_WINDOW;
	}
	if (kernel.numa && !page_nodes(near, 1, &node))
		prefer_node(node);
	err = real.madvise((void *)fresh.at, len, MADV_POPULATE_WRITE);
	prefer_node(-1);
	return err ? 0 : fresh.at;
}

/* ---- the critical section -------------------------------------------------------------------------------- */

static bool all_own(uintptr_t start, uintptr_t len)
{
	uint8_t kind[RESTORE_MAX];
	size_t n = len >> PAGE_SHIFT;

	if (page_kinds(start, n, kind))
		return false;
	for (size_t i = 0; i < n; i++)
		if (kind[i] != PAGE_OWN)
			return false;
	return true;
}

/* libc may have discarded islands in its heap (malloc_trim(3)), which then show the segment's page: makes them private again. False:
 * one is shared with a fork, or swapped out, or there is no memory. */
static bool make_own(uintptr_t start, uintptr_t len)
{
	uint8_t kind[RESTORE_MAX];
	bool holds[RESTORE_MAX];
	size_t n = len >> PAGE_SHIFT;

	if (page_kinds(start, n, kind) || page_holds(start, n, holds))
		return false;
	for (size_t i = 0; i < n; i++)
		if (kind[i] == PAGE_FORKED || (kind[i] == PAGE_ABSENT && holds[i]) ||
		    (kind[i] != PAGE_OWN && populate_write(start + (i << PAGE_SHIFT), PAGE_SIZE)))
			return false;
	return all_own(start, len);
}

/* Replaces [start, start + len), whose pages are in the window, by a copy of them. Returns 0, or -errno with the pages
 * still in the window. *unheld: nobody else holds one of them. */
static int replace(const struct area *a, uintptr_t start, uintptr_t len, uintptr_t copy, bool *unheld)
{
	int err;

	if (!all_own(kernel.view, len))
		return -EBUSY;
	err = migrate(kernel.view, len);
	if (err)
		return err;
	*unheld = true;
	memcpy((void *)copy, (void *)kernel.view, len);
	/* ENOMEM: the mapping would have to be cut. Without DOFORK, a child would lack the memory. */
	if (real.madvise((void *)copy, len, MADV_DOFORK))
		return -ENOMEM;
	area_readvise(a, copy, copy + len);
	if (window_give(copy, len, start))
		return -ENOMEM;
	refill(copy, len);
	fresh.at += len;
	return 0;
}

/* What is out of its place. */
static struct {
	uintptr_t start, len; /* len 0: nothing */
} now;

/* Notes what became of [start, start + len) (0 or -errno), and keeps threads away no more. */
static void end_section(uintptr_t start, uintptr_t len, int err)
{
	if (!err)
		page_set(PAGE_SEGMENT, start >> PAGE_SHIFT, (start + len) >> PAGE_SHIFT, false);
	page_set(PAGE_ISLAND, start >> PAGE_SHIFT, (start + len) >> PAGE_SHIFT, err);
	uffd_release(&kernel.move, start, len);
	now.len = 0;
	if (kernel.view)
		window_reset(kernel.view, len, PROT_NONE, -1, 0);
	if (!err)
		track(start, start + len);
}

/* Restores [start, start + len) of an area, which are islands. Returns 0 or -errno; -EIO: somebody holds one of
 * them. */
static int restore_section(const struct area *a, uintptr_t start, uintptr_t len)
{
	uintptr_t copy, came;
	bool unheld = false;
	int err = -EBUSY;

	copy = fresh_pages(len, start);
	if (!copy)
		return -ENOMEM;
	if (!all_own(start, len) && !make_own(start, len))
		return -EBUSY;
	if (uffd_register(kernel.move, start, len, UFFDIO_REGISTER_MODE_MINOR)) {
		uffd_unregister(kernel.move, start, len);
		return -EINVAL;
	}
	now.start = start;
	now.len = len;
	came = leave_home(start, len);
	if (came == len)
		err = replace(a, start, len, copy, &unheld);
	if (err)
		go_home(start, came, unheld);
	end_section(start, len, err);
	return err;
}

/* Finishes a step that was killed in the middle. If the copy was put in place, it was put as a whole. If it was not,
 * the pages in the window are the only ones. */
static void restore_recover(void)
{
	struct vma vma;
	bool replaced;

	if (!now.len)
		return;
	vma_forget();
	replaced = vma_find(kernel.maps, now.start, &vma) && vma.start <= now.start && !vma.ino;
	if (!replaced)
		go_home(now.start, now.len, false);
	end_section(now.start, now.len, replaced ? 0 : -EBUSY);
}

/* ---- the walk -------------------------------------------------------------------------------------------- */

static bool may_restore(const struct area *a)
{
	/* Under mlockall(MCL_FUTURE) the kernel fills every new mapping at once. */
	if ((a->flags | area_new_flags()) & (AREA_LOCKED | AREA_EXCLUDED) || a->prot != (PROT_READ | PROT_WRITE))
		return false;
	return kernel.swap == SP_SWAP_MOVE || (kernel.swap == SP_SWAP_QUIET && (a->flags & AREA_QUIET));
}

/* A walk over [vpn, end), at most `most` pages a step: fewer after a failure, more after a success. */
struct walk {
	uint64_t vpn, end, most;
	struct sp_restored *out;
};

/* One step under the lock: restores the next islands. */
static void restore_step(struct walk *w)
{
	uint64_t first = page_next(PAGE_ISLAND, w->vpn, w->end, true), stop;
	const struct area *a = area_next(first << PAGE_SHIFT);
	int err = -EINVAL;

	w->vpn = w->end;
	if (first == w->end || !a)
		return;
	if (a->start > first << PAGE_SHIFT) {
		w->vpn = a->start >> PAGE_SHIFT;
		return;
	}
	stop = page_next(PAGE_ISLAND, first, min_addr(w->end, min_addr(first + w->most, a->end >> PAGE_SHIFT)), false);
	if (kernel.view && kernel.move >= 0 && may_restore(a))
		err = restore_section(a, first << PAGE_SHIFT, (stop - first) << PAGE_SHIFT);
	if (!err) {
		w->out->pages_restored += stop - first;
		w->most = min_addr(2 * w->most, RESTORE_MAX);
	} else if (err != -ENOMEM && err != -EINVAL && stop - first > RESTORE_MIN) {
		w->most = (stop - first) / 4 > RESTORE_MIN ? (stop - first) / 4 : RESTORE_MIN;
		stop = first;
	} else {
		w->out->pages_left += stop - first;
	}
	w->vpn = err == -ENOMEM ? w->end : stop;
}

/* Makes steps for one hold of the lock. */
static void restore_slice(void *arg)
{
	struct walk *w = arg;
	uint64_t began = thread_cpu_ns();

	do {
		restore_step(w);
	} while (w->vpn < w->end && !mmap_lock_contended() && !thread_woke() && step_goes_on(began, SLICE_NS));
}

uintptr_t restore_islands(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_restored *out)
{
	struct walk w = {start >> PAGE_SHIFT, end >> PAGE_SHIFT, RESTORE_MAX, out};
	uint64_t before = out->pages_restored;
	bool ended = true, room = true;

	if (traced() || kernel.move < 0 || !kernel.views_stay || !kernel.view || !kernel.copy || !migration_tells())
		return end;
	fresh.at = fresh.end = 0;
	while (ended && room && w.vpn < w.end && out->pages_restored - before < max_pages) {
		agent_mmap_lock();
		page_disturb();
		room = room_to_merge(STEP_TAKES);
		if (room) {
			ended = run_unstopped(restore_slice, &w);
			if (!ended)
				restore_recover();
		}
		agent_mmap_unlock();
	}
	if (kernel.copy)
		window_reset(kernel.copy, COPY_WINDOW, PROT_NONE, -1, 0);
	return ended && room ? w.vpn << PAGE_SHIFT : end;
}
