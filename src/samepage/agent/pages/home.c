/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How pages come home from the scratch.
 *
 * The mapping that they came from is still there, with a hole in it. So the kernel only has to move them back, which
 * takes no mapping and no memory and meets no limit. It may refuse for these reasons, some of which the application can
 * bring about meanwhile (by system calls that pass no wrapper, or from another process):
 *
 *   EAGAIN, EBUSY   a migration, a pin or a lock of the page, for a moment; a page in the swap cache; ksmd has it
 *   EINVAL          the home or the scratch is locked in memory and the other is not, or the home was protected or cut
 *   EEXIST          something stands at home
 *   ENOENT          the mapping at home is gone, or the page is not in the scratch any more
 *   ENOMEM          no page table is to be had
 *   EFAULT          the page is damaged (hwpoison)
 *   EINTR           the process is being killed
 *
 * Hence a ladder. Each step is tried a few times, from the second step on page by page: move the page; move it after
 * undoing whatever of ours can stop it; copy it, which works despite locks and protection, and which nobody can tell
 * from a move, since all others wait; map the page at home with a mapping of its own. If all that fails FINAL_TRIES
 * times, the process is ended, since it would otherwise read zeros where its data was.
 */
#include "base/real.h"
#include "kernel/window.h"
#include "pages/swap.h"
#include "pages/unstopped.h"

#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>

enum { MOVE_TRIES = 4, UNDO_TRIES = 8, COPY_TRIES = 16, GIVE_AWAY_TRIES = 32, FINAL_TRIES = 256 };

bool scratch_holds(uintptr_t scratch, size_t n, bool *here)
{
	const struct pm_walk w = {.any = PAGE_IS_PRESENT | PAGE_IS_SWAPPED};
	uintptr_t at = scratch, end = at + n * PAGE_SIZE;
	struct page_region v[16];

	memset(here, 0, n);
	while (at < end) {
		uintptr_t from = at;
		int regions = pagemap_walk(at, end, &w, v, 16, &at);

		if (regions < 0 || (!regions && at == from))
			break;
		for (int r = 0; r < regions; r++)
			memset(here + ((v[r].start - scratch) >> PAGE_SHIFT), 1, (v[r].end - v[r].start) >> PAGE_SHIFT);
	}
	if (at >= end || !page_holds(scratch, n, here))
		return true;
	memset(here, 1, n);
	return false;
}

static bool holds(uintptr_t page)
{
	bool here = true;

	return page_holds(page, 1, &here) || here;
}

/* Something is at home already. The range is registered for missing pages, so only we can have put it there: the page
 * itself or its copy. Or mlockall(2) filled the scratch with zeros. In both cases the page in the scratch is of no
 * use. */
static bool came_home(uintptr_t home, uintptr_t page)
{
	bool there;

	if (page_holds(home, 1, &there) || !there)
		return false;
	window_drop(page, PAGE_SIZE);
	return true;
}

/* Undoes whatever of ours can keep a page from moving. */
static void undo(uintptr_t page)
{
	windows_unlock();
	if (holds(page)) /* brings it back from the swap, and away from ksmd */
		real.madvise((void *)page, PAGE_SIZE, MADV_POPULATE_WRITE);
}

static bool copy_home(uintptr_t home, uintptr_t page)
{
	int err;

	if (!holds(page))
		return true;
	err = uffd_copy(home, page, PAGE_SIZE);
	if (!err)
		window_drop(page, PAGE_SIZE);
	return !err || (err == -EEXIST && came_home(home, page));
}

void advise_home(uintptr_t start, uintptr_t end)
{
	real.madvise((void *)start, end - start, MADV_DOFORK);
	real.madvise((void *)start, end - start, MADV_DODUMP);
	area_readvise(area_next(start), start, end);
}

/* Gives the page a mapping at home. If there is a mapping that is not ours any more, the application made it after it
 * unmapped the page's old place. */
static bool map_home(uintptr_t home, uintptr_t page)
{
	bool there = true;

	if (!holds(page) || came_home(home, page))
		return true;
	if (range_mapped(home, PAGE_SIZE) && !uffd_holds(home, PAGE_SIZE)) {
		window_drop(page, PAGE_SIZE);
		return true;
	}
	if (page_holds(home, 1, &there) || there || window_give(page, PAGE_SIZE, home))
		return false;
	advise_home(home, home + PAGE_SIZE);
	if (!window_fill(page, PAGE_SIZE, PROT_READ | PROT_WRITE, -1, 0) ||
	    uffd_register(kernel.move, page, PAGE_SIZE, UFFDIO_REGISTER_MODE_WP))
		window_lost();
	return true;
}

/* Tries once more to bring the page home. False: it is not known to be there. */
static bool page_home(uintptr_t home, uintptr_t page, int tries)
{
	int err;

	if (tries == UNDO_TRIES)
		undo(page);
	err = uffd_move(home, page, PAGE_SIZE);
	if (!err)
		return true;
	if (err == -ENOENT && !holds(page))
		return true;
	if (err == -EEXIST && came_home(home, page))
		return true;
	if (tries >= COPY_TRIES && copy_home(home, page))
		return true;
	return tries >= GIVE_AWAY_TRIES && map_home(home, page);
}

bool bring_home(struct chunk *c, size_t i, uintptr_t scratch, size_t n)
{
	const struct timespec nap = {.tv_nsec = 1000000};
	bool here[SECTION_MAX], empty;

	for (int tries = 0; tries < FINAL_TRIES; tries++) {
		bool known = scratch_holds(scratch, n, here), left = false;

		empty = known && !memchr(here, true, n);
		for (size_t k = 0; k < n; k++)
			here[k] &= c->status[i + k] != DONE;
		for (size_t k = 0, end; k < n; k = end) {
			uintptr_t home = c->addr[i + k];

			for (end = k + 1; end < n && here[end] == here[k] && same_row(c, i + end); end++)
				;
			if (!here[k])
				continue;
			if (tries < MOVE_TRIES && known) {
				uffd_move(home, scratch + k * PAGE_SIZE, (end - k) * PAGE_SIZE);
				left = true;
				continue;
			}
			for (; k < end; k++, home += PAGE_SIZE)
				left |= !page_home(home, scratch + k * PAGE_SIZE, tries) || known;
		}
		if (!left)
			return empty;
		if (tries >= GIVE_AWAY_TRIES)
			real.syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &nap, NULL);
		else if (tries)
			real.syscall(SYS_sched_yield);
	}
	strand();
}
