/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Swapping pages for a segment's.
 *
 * The swap must be atomic for the application's other threads. By *move*: the range is registered for missing faults,
 * its pages are moved to the scratch range, where nobody else can reach them, compared there, and either the segment is
 * mapped over the hole or the pages go home. A thread that touches the hole sleeps in the kernel until it is woken. By
 * *write-protection*: the range is write-protected, compared where it is, and mapped over; a thread that writes sleeps.
 * A device that got a page before does not sleep, so pages that somebody holds have to be found (holders.c).
 *
 * The two ways are in move.c and protect.c; this file has what they share.
 */
#include "pages/swap.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/settings.h"
#include "kernel/headroom.h"
#include "kernel/holders.h"
#include "kernel/window.h"
#include "pages/unstopped.h"

#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/syscall.h>

bool page_equal(const struct chunk *c, size_t i, const void *page)
{
	return !memcmp(page, c->target[i], PAGE_SIZE);
}

/* Maps the segment's pages over pages [i, j) of the chunk, which form one piece. The caller has made sure that they are
 * equal. */
static int map_segment(const struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = c->addr[i], end = start + (j - i) * PAGE_SIZE;
	int err = view_give(c->segment, c->target[i], end - start, start);

	if (err) {
		/* Under write-protection these pages were nowhere else. */
		if (kernel.protects && !range_mapped(start, end - start))
			strand();
		return err;
	}
	area_readvise(area_next(start), start, end);
	page_set(PAGE_SEGMENT, start >> PAGE_SHIFT, end >> PAGE_SHIFT, true);
	page_set(PAGE_KNOWN, start >> PAGE_SHIFT, end >> PAGE_SHIFT, true);
	page_set(PAGE_ISLAND, start >> PAGE_SHIFT, end >> PAGE_SHIFT, false);
	return 0;
}

/* Makes pages [i, j) of the chunk, a row of zeros, read as the kernel's zero page. If they were moved, the hole that
 * they left does so already. */
static int drop_zeros(const struct chunk *c, size_t i, size_t j)
{
	size_t len = (j - i) * PAGE_SIZE;
	int err;

	if (!kernel.protects)
		return 0;
	err = discard_segments(c->addr[i], c->addr[i] + len);
	return err ? err : real.madvise((void *)c->addr[i], len, MADV_DONTNEED) ? -errno : 0;
}

void map_equal(const struct chunk *c, size_t i, size_t j, const bool *equal)
{
	for (size_t end; i < j; i = end) {
		int err;

		for (end = i + 1; end < j && equal[end] == equal[i] && same_piece(c, end); end++)
			;
		if (!equal[i])
			continue;
		err = c->segment ? map_segment(c, i, end) : drop_zeros(c, i, end);
		memset(c->status + i, !err ? DONE : err == -ENOMEM ? NOMAP : REFUSED, end - i);
	}
}

void track_again(uintptr_t start, uintptr_t end, bool watched)
{
	for (uint64_t vpn = start >> PAGE_SHIFT, last = end >> PAGE_SHIFT, stop; vpn < last; vpn = stop) {
		vpn = page_next(PAGE_SEGMENT, vpn, last, false);
		stop = page_next(PAGE_SEGMENT, vpn, last, true);
		if (vpn == stop)
			continue;
		if (watched) {
			page_disturb();
			uffd_release(&kernel.move, vpn << PAGE_SHIFT, (stop - vpn) << PAGE_SHIFT);
		}
		track(vpn << PAGE_SHIFT, stop << PAGE_SHIFT);
	}
}

static struct chunk *swapping;

/* We don't check the pages first: nearly all can be swapped, and a failed attempt says why. Under write-protection, a
 * page in a segment's mapping can be swapped, too, if it was written. */
void swap_chunk(struct chunk *c)
{
	bool go[SECTION_MAX];

	if (!kernel.protects && !scratch_ready(c->n)) {
		memset(c->status, REFUSED, c->n);
		return;
	}
	swapping = c;
	for (size_t k = 0; k < c->n; k++)
		go[k] = kernel.protects || !page_test(PAGE_SEGMENT, c->addr[k] >> PAGE_SHIFT);
	for (size_t i = 0, j; i < c->n; i = j) {
		for (j = i + 1; j < c->n && go[j] == go[i]; j++)
			;
		if (!go[i])
			memset(c->status + i, REFUSED, j - i);
		else if (!kernel.protects)
			swap_by_move(c, i, j);
		else
			for (size_t at = i, end; at < j; at = end) {
				end = row_end(c, at, j);
				swap_by_protect(c, at, end);
			}
	}
	swapping = NULL;
}

/* Notes the pages of the chunk that are mapped from a segment by now. map_segment() may not have come to that. */
static void note_mapped(struct chunk *c)
{
	struct vma vma;

	for (size_t i = 0, end; i < c->n; i = end) {
		uintptr_t start = c->addr[i];
		uint64_t vpn;

		vma_forget(); /* advice cuts mappings */
		if (!vma_find(kernel.maps, start, &vma) || vma.start > start)
			vma = (struct vma){.end = start + PAGE_SIZE};
		for (end = i + 1; end < c->n && same_row(c, end) && c->addr[end] < vma.end; end++)
			;
		if (!vma_is_segment(&vma))
			continue;
		memset(c->status + i, DONE, end - i);
		area_readvise(area_next(start), start, start + (end - i) * PAGE_SIZE);
		vpn = start >> PAGE_SHIFT;
		page_set(PAGE_SEGMENT, vpn, vpn + (end - i), true);
		page_set(PAGE_KNOWN, vpn, vpn + (end - i), false); /* nobody will be told of it now */
	}
}

void swap_recover(void)
{
	struct chunk *c = swapping;

	if (!c)
		return;
	swapping = NULL;
	if (c->segment)
		note_mapped(c);
	if (!kernel.protects) {
		move_recover();
		return;
	}
	for (size_t i = 0, end; i < c->n; i = end) {
		uintptr_t start = c->addr[i], stop;

		end = row_end(c, i, c->n);
		stop = c->addr[end - 1] + PAGE_SIZE;
		uffd_release(&kernel.wp, start, stop - start);
		track_again(start, stop, false);
	}
}
