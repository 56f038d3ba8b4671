/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rejoining: merged pages become a part of the mapping before them again.
 *
 * A page that is merged alone cuts a mapping in three, and a break leaves the cuts: the kernel joins anonymous mappings
 * only if their page offsets (vm_pgoff) continue, and memory that was faulted in in a window keeps the window's offsets
 * wherever it is moved. So the page before the merged ones is moved to the window with its mapping. There the mapping
 * is grown, so its offsets continue, and the new part is filled with the segment's bytes. Then all of it moves home in
 * one piece. Only the segment's pages are copied: if somebody holds a page of the application's, that very page is in
 * its place afterwards.
 *
 * This is one critical section. Both mappings leave empty ones behind, registered for missing and for minor faults, so
 * that threads that touch them sleep.
 *
 * It runs when the application was refused a mapping. Then there is none for this, either; so the agent keeps some in
 * reserve, which it gives up meanwhile (window_ballast()).
 */
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
#include <time.h>
#include <unistd.h>

#define PIECE_MAX 16UL	    /* pages: a longer piece is worth its mappings */
#define PIECES_EACH 4096UL  /* joined at most for one refused call, */
#define EACH_NS 500000000L  /* and for no longer than this */
#define SLICE_NS 20000000UL /* roughly how long the lock is held at a time */
#define NEARLY 64UL	    /* so few mappings below the limit */
#define HOME_TRIES 1000
#define NEAR_EACH (32UL << 20) /* how much others may take meanwhile, for each CPU */
#define MODE_MISSING_WP (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)

/* What is out of its place: a page and the merged ones behind it. */
static struct {
	uintptr_t start, len; /* len 0: nothing */
	bool hole;	      /* in the window, nothing behind the page is mapped by us */
} now;

/* Moves a mapping to a window, and leaves an empty one at home. */
static bool leave_home(uintptr_t start, uintptr_t len, uintptr_t to)
{
	return real.mremap((void *)start, len, len, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, (void *)to) !=
	       MAP_FAILED;
}

/* Fills a place in a window again where nothing is mapped. */
static void refill(uintptr_t start, uintptr_t len)
{
	if (len && !window_fill(start, len, PROT_NONE, -1, 0))
		window_lost();
}

/* Moves it home. This may take tries: other threads may have taken the mappings that it needs. */
static void go_home(uintptr_t from, uintptr_t len, uintptr_t to)
{
	const struct timespec nap = {.tv_nsec = 1000000};

	for (int tries = 0; window_give(from, len, to); tries++) {
		if (tries == HOME_TRIES)
			strand();
		real.syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &nap, NULL);
	}
	refill(from, len);
}

/* Whether the n pages in the window are the segment's. A page that was written meanwhile is the application's. */
static bool all_merged(uintptr_t start, size_t n)
{
	uint8_t kind[PIECE_MAX];

	if (page_kinds(start, n, kind))
		return false;
	for (size_t i = 0; i < n; i++)
		if (kind[i] != PAGE_FILE && kind[i] != PAGE_ABSENT) /* a page that is swapped out is as good: nobody
								     * holds it */
			return false;
	return true;
}

static bool grow(uintptr_t page, uintptr_t len)
{
	now.hole = true;
	if (real.munmap((void *)(page + PAGE_SIZE), len - PAGE_SIZE)) {
		now.hole = false;
		return false;
	}
	if (real.mremap((void *)page, PAGE_SIZE, len, 0) == MAP_FAILED)
		return false;
	now.hole = false;
	return true;
}

static bool holds(uintptr_t page)
{
	bool there;

	for (int tries = 0; page_holds(page, 1, &there); tries++)
		if (tries == HOME_TRIES)
			strand();
	return there;
}

/* Whether the page that belongs at `home` is in the window. If nothing is mapped there any more, something of another
 * thread's may be. */
static bool is_away(uintptr_t page, uintptr_t home)
{
	return holds(page) && !holds(home);
}

/* Ends the critical section, however far it came; also one that was killed in the middle. Returns whether the pages are
 * joined. */
static bool end_section(void)
{
	const uintptr_t page = kernel.copy, merged = kernel.view, behind = now.start + PAGE_SIZE;
	const uintptr_t rest = now.len - PAGE_SIZE;
	bool away = is_away(page, now.start), joined;
	struct vma vma;

	vma_forget();
	joined = !away && vma_find(kernel.maps, behind, &vma) && vma.start <= behind && !vma.ino;
	if (away)
		go_home(page, PAGE_SIZE, now.start);
	else if (joined || !range_mapped(page, PAGE_SIZE))
		refill(page, joined ? now.len : PAGE_SIZE);
	if (!joined && now.hole)
		refill(page + PAGE_SIZE, rest);
	else if (!joined && kernel.copy)
		window_reset(page + PAGE_SIZE, rest, PROT_NONE, -1, 0);
	vma_forget();
	if (!joined && vma_find(kernel.maps, merged, &vma) && vma.start <= merged && vma.ino)
		go_home(merged, rest, behind);
	else if (kernel.view)
		window_reset(merged, rest, PROT_NONE, -1, 0);
	if (joined)
		page_set(PAGE_SEGMENT, behind >> PAGE_SHIFT, (behind + rest) >> PAGE_SHIFT, false);
	uffd_release(&kernel.move, now.start, now.len);
	track(now.start, joined ? now.start + now.len : behind);
	now.len = now.hole = 0;
	return joined;
}

/* Joins [start, start + len): a page at the end of its mapping, and merged pages in one other mapping. */
static bool join(uintptr_t start, uintptr_t len)
{
	const uintptr_t behind = start + PAGE_SIZE, rest = len - PAGE_SIZE;

	if (uffd_register(kernel.move, start, PAGE_SIZE, MODE_MISSING_WP))
		return false;
	if (uffd_register(kernel.move, behind, rest, UFFDIO_REGISTER_MODE_MINOR)) {
		uffd_release(&kernel.move, start, PAGE_SIZE);
		track(start, behind);
		return false;
	}
	now.start = start;
	now.len = len;
	if (leave_home(start, PAGE_SIZE, kernel.copy) && leave_home(behind, rest, kernel.view) &&
	    all_merged(kernel.view, rest >> PAGE_SHIFT) && grow(kernel.copy, len)) {
		memcpy((void *)(kernel.copy + PAGE_SIZE), (void *)kernel.view, rest);
		window_give(kernel.copy, len, start);
	}
	return end_section();
}

/* ---- the walk -------------------------------------------------------------------------------------------- */

static bool may_join(const struct area *a)
{
	return !((a->flags | area_new_flags()) & (AREA_LOCKED | AREA_EXCLUDED | AREA_UNMERGING)) &&
	       a->prot == (PROT_READ | PROT_WRITE);
}

/* Whether merged pages [vpn, end) can be joined with the page before them. */
static bool is_piece(uint64_t vpn, uint64_t end)
{
	uintptr_t start = (vpn - 1) << PAGE_SHIFT, behind = vpn << PAGE_SHIFT, stop = end << PAGE_SHIFT;
	const struct area *a = area_next(start);
	struct vma vma;
	uint8_t kind;

	if (end - vpn > PIECE_MAX || page_next(PAGE_ISLAND, vpn, end, true) < end || page_test(PAGE_SEGMENT, vpn - 1))
		return false;
	if (!a || a->start > start || a->end < stop || !may_join(a) || page_kinds(start, 1, &kind) || kind != PAGE_OWN)
		return false;
	vma_forget(); /* mappings were moved since */
	if (!vma_find(kernel.maps, start, &vma) || vma.start > start || vma.end != behind || vma.ino || vma.shared ||
	    !vma.read || !vma.write)
		return false;
	return vma_find(kernel.maps, behind, &vma) && vma.start == behind && vma.end == stop && vma_is_segment(&vma) &&
	       vma.read && vma.write;
}

struct walk {
	uint64_t vpn, end, joined;
	bool refused; /* there is no memory */
};

/* Joins the next piece, under the lock. */
static void join_next(struct walk *w)
{
	uint64_t first = page_next(PAGE_SEGMENT, w->vpn, w->end, true);
	uint64_t stop = first < w->end ? page_next(PAGE_SEGMENT, first, w->end, false) : first;

	w->vpn = stop;
	if (first == w->end || !first || kernel.move < 0 || !kernel.copy || !kernel.view || !is_piece(first, stop))
		return;
	w->refused = !room_for((stop - first) * PAGE_SIZE, settings.reserve + NEAR_EACH * online_cpus());
	if (!w->refused)
		w->joined += join((first - 1) << PAGE_SHIFT, (stop - first + 1) << PAGE_SHIFT);
}

static void join_slice(void *arg)
{
	struct walk *w = arg;
	uint64_t began = thread_cpu_ns();

	do {
		join_next(w);
	} while (w->vpn < w->end && !w->refused && !mmap_lock_contended() && !thread_woke() &&
		 step_goes_on(began, SLICE_NS));
}

/* Goes round all memory, starting where it stopped the last time. Returns how many pieces it joined. */
static uint64_t join_pieces(void)
{
	static uint64_t from;
	const uint64_t last = ADDRESS_END >> PAGE_SHIFT;
	struct walk w = {.vpn = from, .end = last};
	int64_t began = now_ms();
	bool ended = true;

	for (int rounds = 0; rounds < 2 && ended && !w.refused; rounds++) {
		while (ended && w.vpn < w.end && !w.refused && w.joined < PIECES_EACH &&
		       now_ms() - began < EACH_NS / 1000000) {
			agent_mmap_lock();
			page_disturb();
			ended = run_unstopped(join_slice, &w);
			if (!ended && now.len)
				w.joined += end_section();
			agent_mmap_unlock();
		}
		if (w.vpn < w.end || !from)
			break;
		w.vpn = 0;
		w.end = from;
	}
	from = w.vpn < last ? w.vpn : 0;
	return w.joined;
}

static unsigned long mappings_left(void)
{
	unsigned long max = vma_limit(), segments, used = vma_count(&segments);

	return used < max ? max - used : 0;
}

void rejoin(void *arg)
{
	static int64_t in_vain; /* when it last joined nothing; 0: it did */
	bool *joined = arg;

	*joined = false;
	/* Counting mappings takes a millisecond for each thousand, so don't do it again at once if it was in vain. */
	if ((in_vain && now_ms() - in_vain < 1000) || kernel.swap != SP_SWAP_MOVE || !kernel.views_stay || traced())
		return;
	if (mappings_left() < NEARLY) {
		window_ballast(false);
		*joined = join_pieces();
		window_ballast(true);
	}
	in_vain = *joined ? 0 : now_ms();
}
