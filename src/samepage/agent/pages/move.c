/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Swapping by move (swap.c explains both ways).
 *
 * While a hole is open, its pages are nowhere else. Hence the one rule of this file: the return value of a call is a
 * hint; where pages are is read from the pagemap. No section ends before every page is at home, or equal to the segment
 * page that is mapped there. Only the originals of the latter, which nobody needs, are left in the scratch.
 */
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
#include <sys/mman.h>

#define MODE_MISSING_WP (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)

/* Moves pages [i, j) of the chunk to scratch [k, k + j - i), row by row, until one does not move. */
static int pull_rows(const struct chunk *c, size_t i, size_t j, size_t k)
{
	int err = 0;

	for (size_t end; i < j && !err; k += end - i, i = end) {
		end = row_end(c, i, j);
		err = uffd_move(scratch_at(c, k), c->addr[i], (end - i) * PAGE_SIZE);
	}
	return err;
}

/* Sets the status of pages [i, j) of the chunk, a row whose first page was too busy to move, as far as they are of the
 * same kind as that one. Returns the first page without a status. */
static size_t why_busy(struct chunk *c, size_t i, size_t j)
{
	uint8_t kind[SECTION_MAX];
	size_t end = i;

	if (page_kinds(c->addr[i], j - i, kind))
		memset(kind, PAGE_ABSENT, j - i);
	if (kind[0] != PAGE_OWN) {
		for (; end < j && kind[end - i] != PAGE_OWN; end++)
			c->status[end] = status_of(kind[end - i]);
		return end;
	}
	/* The page is pinned; or a fork shared it once (unshare()). That may be true of its neighbours, too. */
	for (end = i + 1; !c->unshared && end < j && kind[end - i] == PAGE_OWN; end++)
		;
	memset(c->status + i, BUSY, end - i);
	c->stale = true;
	return end;
}

/* Moves pages [i, j) of the chunk to scratch [0, j - i), as many as possible. here[k]: page i + k arrived. */
static void pull(struct chunk *c, size_t i, size_t j, bool *here)
{
	size_t n = j - i;
	int tries = 0;

	for (size_t at = 0;;) {
		int err = pull_rows(c, i + at, j, at);

		if (!scratch_holds(c->scratch, n, here)) {
			memset(here, 0, n);
			memset(c->status + i, BUSY, n);
			return;
		}
		while (at < n && here[at])
			at++;
		if (at == n)
			return;
		if (err == -EAGAIN && tries++ < 8)
			continue;
		if (err == -EBUSY)
			at = why_busy(c, i + at, row_end(c, i + at, j)) - i;
		else
			c->status[i + at++] = err == -ENOENT ? GONE : BUSY;
		if (at == n)
			return;
	}
}

/* Whether page m of the chunk really left its home. mlockall(2) fills what it locks with zeros, the scratch too, so a
 * zero page there proves nothing. */
static bool left_home(const struct chunk *c, size_t m)
{
	bool there = true;

	return !c->segment || memcmp(c->target[m], zero_page, PAGE_SIZE) ||
	       (!page_holds(c->addr[m], 1, &there) && !there);
}

/* Compares pages [i, j) of the chunk, which are in the scratch from k on if `here` says so, and maps the segment's over
 * those that are equal. */
static void settle(struct chunk *c, size_t i, size_t j, size_t k, const bool *here)
{
	bool equal[SECTION_MAX];

	for (size_t m = i; m < j; m++, k++) {
		bool lost = c->segment && c->segment->lost;

		equal[m] = here[k] && !lost && page_equal(c, m, (void *)scratch_at(c, k)) && left_home(c, m);
		if (here[k] && !equal[m])
			c->status[m] = lost ? NOMAP : DIFFERENT;
	}
	map_equal(c, i, j, equal);
}

static bool all_done(const struct chunk *c, size_t i, size_t j)
{
	while (i < j && c->status[i] == DONE)
		i++;
	return i == j;
}

/* Empties the scratch of page i of the chunk and the following: originals of pages that are done are dropped, the
 * others go home. False: some that are done are still there. */
static bool clear_scratch(struct chunk *c, size_t i, size_t n)
{
	for (size_t k = 0, end; k < n; k = end) {
		bool done = c->status[i + k] == DONE;

		for (end = k + 1; end < n && (c->status[i + end] == DONE) == done; end++)
			;
		if (done)
			window_drop(scratch_at(c, k), (end - k) * PAGE_SIZE);
	}
	return bring_home(c, i, c->scratch, n);
}

/* What is being swapped: the chunk whose pages are registered, and its pages [i, j) that may be out of their place. */
static struct {
	struct chunk *chunk;
	size_t i, j;
	uint64_t since; /* now_ns() */
} now;

static void set_out(struct chunk *c, size_t i, size_t j)
{
	if (i < j) { /* set a status, so that pages that have none yet are not taken for done */
		memset(c->status + i, BUSY, j - i);
		now.since = now_ns();
	}
	now.chunk = c;
	now.i = i;
	now.j = j;
}

static size_t spent; /* pages at the start of the scratch whose contents nobody needs */

/* Gives them back many at a time, since it takes a system call. */
bool scratch_drop(void)
{
	bool dropped = !spent || window_drop(kernel.scratch, spent * PAGE_SIZE);

	if (dropped)
		spent = 0;
	return dropped;
}

bool scratch_ready(size_t n)
{
	return window_drop(kernel.scratch + spent * PAGE_SIZE, min_addr(n, SECTION_MAX - spent) * PAGE_SIZE);
}

/* Wakes the threads that wait for one of pages [i, j), or for a page between them. */
static void wake(const struct chunk *c, size_t i, size_t j)
{
	uffd_count_sleepers(kernel.move, c->addr[j - 1] + PAGE_SIZE, now.since);
	uffd_wake(kernel.move, c->addr[i], c->addr[j - 1] + PAGE_SIZE - c->addr[i]);
}

/*
 * Waits for others that are writing to this process under its mmap_lock, held for reading: /proc/PID/mem and ptrace(2)
 * look a page up and write to it a moment later, with a plain reference that no move notices. madvise() takes the lock
 * for writing and so waits for them, although it changes nothing. Those who come later find no page.
 * Returns false if the lock was not taken (a seccomp filter): then nobody knows.
 */
static bool await_outsiders(void)
{
	return !real.madvise((void *)kernel.scratch, PAGE_SIZE, MADV_DONTFORK);
}

#define HELD_TOGETHER 8 /* pages: if one of so many is held, all of them are left */

/* Clears here[k] for those of n pages in the scratch that a reader holds by a plain reference, and for some around
 * them. Nobody can take a reference any more. If there is no memory for migration, or it is forbidden, clears all. */
static void find_held(const struct chunk *c, size_t n, bool *here)
{
	bool room = room_for(n * PAGE_SIZE + WINDOW, settings.reserve);

	if (!c->unpinned)
		return;
	if (!room || migrate(c->scratch, n * PAGE_SIZE))
		for (size_t k = 0, end; k < n; k = end) {
			end = min_addr(k + HELD_TOGETHER, n);
			if (!room || migrate(scratch_at(c, k), (end - k) * PAGE_SIZE))
				memset(here + k, 0, end - k);
		}
	unmigrated(c->scratch, n * PAGE_SIZE);
}

/* One critical section: pages [i, j) of the chunk. */
static void section_by_move(struct chunk *c, size_t i, size_t j)
{
	bool here[SECTION_MAX];

	/* What is left there of earlier pages would be taken for the new ones. */
	if (spent + (j - i) > SECTION_MAX && !scratch_drop()) {
		memset(c->status + i, REFUSED, j - i);
		return;
	}
	c->scratch = kernel.scratch + spent * PAGE_SIZE;
	set_out(c, i, j);
	pull(c, i, j, here);
	if (!await_outsiders())
		memset(here, 0, sizeof(here));
	find_held(c, j - i, here);
	settle(c, i, j, 0, here);
	if (all_done(c, i, j) || !clear_scratch(c, i, j - i))
		spent += j - i;
	set_out(c, 0, 0);
	wake(c, i, j);
}

/* Where a critical section that begins at page i ends; at most j. */
static size_t section_end(const struct chunk *c, size_t i, size_t j)
{
	size_t end, pieces = 1;

	for (end = i + 1; end < j && end - i < settings.section; end++)
		if (!same_piece(c, end) && ++pieces > PIECES_MAX)
			break;
	return end;
}

/* How many bytes of [start, end), up to the first gap, are in huge pages that page tables map as such. */
static uintptr_t in_huge_page(uintptr_t start, uintptr_t end)
{
	const struct pm_walk w = {.must = PAGE_IS_PRESENT | PAGE_IS_HUGE, .must_not = PAGE_IS_PFNZERO};
	struct page_region r;
	uintptr_t walked;

	return kernel.scan && pagemap_walk(start, end, &w, &r, 1, &walked) == 1 ? r.end - r.start : 0;
}

static bool is_huge_page(const struct chunk *c, size_t i, size_t j)
{
	return kernel.huge && j - i == SECTION_MAX && c->addr[i] % WINDOW == 0 &&
	       in_huge_page(c->addr[i], c->addr[i] + WINDOW) == WINDOW;
}

/*
 * Splits the huge pages that pages [i, j), a row, are parts of, as moving the parts would make the kernel do. A huge
 * page cannot be split while somebody has pinned it, and UFFDIO_MOVE of a part of one did not return, with the
 * mmap_lock held, before the pin was gone (6.12.117 and 6.18.15; 6.18.44 and 7.3 return EBUSY). MADV_COLD of a part of
 * a huge page splits it, too, but gives up. False: one is not split.
 */
static bool splits(const struct chunk *c, size_t i, size_t j)
{
	for (uintptr_t at = c->addr[i], last = c->addr[j - 1] + PAGE_SIZE, end; at < last; at = end) {
		end = min_addr((at | (WINDOW - 1)) + 1, last);
		if (!in_huge_page(at, at + PAGE_SIZE))
			continue;
		real.madvise((void *)at, PAGE_SIZE, MADV_COLD);
		if (in_huge_page(at, at + PAGE_SIZE))
			return false;
	}
	return true;
}

/*
 * Moves a huge page as a whole: moving a part of it makes the kernel split it, which costs as much as all the rest. Its
 * sections are compared and mapped one after the other, and a thread that waits for one goes on as soon as that one is
 * done; so none waits for more than the whole. False: it would not move, and every page is at home.
 */
static bool swap_huge_page(struct chunk *c)
{
	bool here[SECTION_MAX], all;

	c->scratch = kernel.huge;
	if (!window_drop(kernel.huge, WINDOW))
		return false;
	set_out(c, 0, SECTION_MAX);
	uffd_move(scratch_at(c, 0), c->addr[0], WINDOW);
	all = scratch_holds(kernel.huge, SECTION_MAX, here);
	for (size_t k = 0; k < SECTION_MAX; k++)
		all &= here[k];
	if (all && c->unpinned) {
		find_held(c, SECTION_MAX, here);
		for (size_t k = 0; k < SECTION_MAX; k++)
			all &= here[k];
	}
	if (all && await_outsiders()) {
		for (size_t at = 0, end; at < SECTION_MAX && !thread_woke(); at = end) {
			end = section_end(c, at, SECTION_MAX);
			settle(c, at, end, at, here);
			wake(c, at, end);
		}
		clear_scratch(c, 0, SECTION_MAX);
		if (!all_done(c, 0, SECTION_MAX)) /* a part of it went home, so there are page tables now */
			huge_reset();
	} else {
		memset(c->status, BUSY, SECTION_MAX);
		bring_home(c, 0, kernel.huge, SECTION_MAX);
		huge_reset();
	}
	set_out(c, 0, 0);
	wake(c, 0, SECTION_MAX);
	return all;
}

/* Unregisters what move_and_map() registered. */
static void watch_no_more(const struct chunk *c, size_t i, size_t j)
{
	for (size_t end; i < j; i = end) {
		end = row_end(c, i, j);
		track_again(c->addr[i], c->addr[end - 1] + PAGE_SIZE, true);
	}
}

/*
 * Writes to pages without changing a byte. A page that a fork shared once does not become ours alone again
 * (PageAnonExclusive) until it is written, and does not move before that. Only pages are written that are ours alone by
 * pagemap bit 56; and only while nothing is registered for missing pages, since a page given up by MADV_FREE may be
 * gone, and we would wait for ourselves. A pinned page is exclusive already.
 */
static void unshare(const struct chunk *c, size_t i, size_t j)
{
	uint8_t kind[SECTION_MAX];

	if (page_kinds(c->addr[i], j - i, kind))
		return;
	for (size_t k = i, end; k < j; k = end) {
		for (end = k + 1; end < j && kind[end - i] == kind[k - i]; end++)
			;
		/* If something still holds a reference to them, the kernel copies them, which takes memory. */
		if (kind[k - i] == PAGE_OWN && room_to_merge((end - k) * PAGE_SIZE))
			real.madvise((void *)c->addr[k], (end - k) * PAGE_SIZE, MADV_POPULATE_WRITE);
	}
}

/* Swaps pages [i, j) of the chunk, by sections, or as the one huge page that they are. False: the huge page would not
 * move. */
static bool move_and_map(struct chunk *c, size_t i, size_t j, bool huge)
{
	bool moved = true;
	int err = 0;

	set_out(c, 0, 0);
	for (size_t at = i, end; at < j && !err; at = end) {
		end = row_end(c, at, j);
		err = uffd_register(kernel.move, c->addr[at], (end - at) * PAGE_SIZE, MODE_MISSING_WP);
	}
	if (err)
		memset(c->status + i, REFUSED, j - i);
	else if (huge)
		moved = swap_huge_page(c);
	else
		for (size_t at = i, end; at < j; at = end) {
			end = section_end(c, at, j);
			if (thread_woke())
				memset(c->status + at, BUSY, end - at);
			else
				section_by_move(c, at, end);
		}
	watch_no_more(c, i, j);
	set_out(NULL, 0, 0);
	return moved;
}

/* The same without parts of huge pages that cannot be split. */
static void move_parts(struct chunk *c, size_t i, size_t j)
{
	for (size_t at = i, end; at < j; at = end) {
		bool go = splits(c, at, row_end(c, at, j));

		for (end = row_end(c, at, j); end < j && splits(c, end, row_end(c, end, j)) == go;)
			end = row_end(c, end, j);
		if (go)
			move_and_map(c, at, end, false);
		else
			memset(c->status + at, BUSY, end - at);
	}
}

void swap_by_move(struct chunk *c, size_t i, size_t j)
{
	c->stale = c->unshared = false;
	if (is_huge_page(c, i, j)) {
		if (move_and_map(c, i, j, true) || kernel.move < 0)
			return;
		unshare(c, i, j);
		if (is_huge_page(c, i, j) && move_and_map(c, i, j, true))
			return;
	}
	move_parts(c, i, j);
	if (!c->stale || kernel.move < 0)
		return;
	c->unshared = true;
	for (size_t at = i, end; at < j; at = end) {
		for (end = at + 1; end < j && same_row(c, end) && c->status[end] == c->status[at]; end++)
			;
		if (c->status[at] != BUSY)
			continue;
		unshare(c, at, end);
		move_parts(c, at, end);
	}
}

void move_recover(void)
{
	struct chunk *c = now.chunk;

	if (!c)
		return;
	if (now.i < now.j)
		bring_home(c, now.i, c->scratch, now.j - now.i);
	for (size_t i = now.i, end; i < now.j; i = end) { /* bring_home() may not have come to that */
		end = row_end(c, i, now.j);
		advise_home(c->addr[i], c->addr[end - 1] + PAGE_SIZE);
	}
	watch_no_more(c, 0, c->n);
	now.chunk = NULL;
	spent = SECTION_MAX;
}
