/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Blocks of 64 to 128 KiB that a program frees and soon wants again (`--memory all`). blocks.c needs the lock, with all
 * signals blocked, which is four system calls for a malloc and a free: half a microsecond. So a few blocks are kept
 * here without it, as glibc keeps the end of its heap, and no more: 128 KiB, unless the program set a threshold.
 *
 * For blocks.c a block that is kept is in use. So it stays an area, and may be merged meanwhile; who gets it writes to
 * it or does not, as with any block. Of blocks in use the table `known` says how long they are, for as many as it has
 * room: whoever frees a block that is not there takes the lock.
 *
 * Each word is changed by one atomic operation, and whoever took a block out of a word has it alone. So a signal
 * handler, or a fork, between any two of them can at worst lose a block, which then stays in use.
 */
#include "hooks/blocks.h"

#define MOST (128UL << 10)
#define LONGEST 32 /* pages */
#define KNOWN 64

static _Atomic uintptr_t kept[LONGEST + 1]; /* by pages: the start of a block, or 0 */
static _Atomic uintptr_t known[KNOWN];	    /* start and pages, in one word; or 0 */
static _Atomic size_t bytes;		    /* of those kept, or soon to be */
static _Atomic bool off;

static _Atomic uintptr_t *place_of(uintptr_t start)
{
	uintptr_t page = start >> PAGE_SHIFT;

	return &known[(page ^ page >> 6) % KNOWN];
}

void kept_note(uintptr_t start, size_t len)
{
	if (len >> PAGE_SHIFT <= LONGEST && len <= MOST)
		atomic_store(place_of(start), start | len >> PAGE_SHIFT);
}

void kept_forget(uintptr_t start)
{
	uintptr_t word = atomic_load(place_of(start));

	if (PAGE_ALIGN_DOWN(word) == start)
		atomic_compare_exchange_strong(place_of(start), &word, 0);
}

static uintptr_t take_out(size_t npages)
{
	uintptr_t start = 0;

	if (atomic_load_explicit(&kept[npages], memory_order_relaxed))
		start = atomic_exchange(&kept[npages], 0);
	if (start)
		atomic_fetch_sub(&bytes, npages << PAGE_SHIFT);
	return start;
}

uintptr_t kept_take(size_t len)
{
	uintptr_t start = len >> PAGE_SHIFT <= LONGEST ? take_out(len >> PAGE_SHIFT) : 0;

	if (start)
		kept_note(start, len);
	return start;
}

bool kept_put(uintptr_t start)
{
	uintptr_t word = atomic_load(place_of(start)), none = 0;
	size_t npages = word - start, len = npages << PAGE_SHIFT;

	if (PAGE_ALIGN_DOWN(word) != start || off || !atomic_compare_exchange_strong(place_of(start), &word, 0))
		return false;
	if (atomic_fetch_add(&bytes, len) + len <= MOST && atomic_compare_exchange_strong(&kept[npages], &none, start))
		return true;
	atomic_fetch_sub(&bytes, len);
	return false;
}

bool is_kept(uintptr_t start)
{
	for (size_t i = 0; i <= LONGEST; i++)
		if (atomic_load_explicit(&kept[i], memory_order_relaxed) == start)
			return true;
	return false;
}

bool kept_release(bool for_good)
{
	bool any = false;

	off |= for_good;
	for (size_t i = 0; i <= LONGEST; i++) {
		uintptr_t start = take_out(i);
		struct block *b = start ? block_at((const void *)start) : NULL;

		if (b) {
			block_free(b);
			any = true;
		}
	}
	return any;
}
