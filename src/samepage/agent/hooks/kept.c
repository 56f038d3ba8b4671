/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Blocks that a program frees and soon wants again. blocks.c needs the lock, with all signals blocked, which is four
 * system calls for a malloc and a free: half a microsecond. So a few blocks are kept here without it, as glibc keeps the
 * end of its heap: 128 KiB of blocks up to that length, and no more, unless the program set a threshold.
 *
 * Longer blocks are not kept for long: whoever takes the lock to allocate frees them first, so that they are joined and
 * carved as any other. For them it saves the lock of a free, and that of the next malloc if it is for the same length.
 * They are no more bytes than the longest block that the program freed, which glibc would keep, too (blocks.c). And
 * none is kept if anything was done to blocks that the next user would notice.
 *
 * For blocks.c a block that is kept is in use. So it stays an area, and may be merged meanwhile; who gets it writes to
 * it or does not, as with any block. Of blocks in use the table `known` says how long they are, for as many as it has
 * room: whoever frees a block that is not there takes the lock.
 *
 * Each word is changed by one atomic operation, and whoever took a block out of a word has it alone. So a signal
 * handler, or a fork, between any two of them can at worst lose a block, which then stays in use.
 */
#include "hooks/blocks.h"

#define SHORT (128UL << 10)
#define LONGEST (PAGE_SIZE - 1) /* pages: what has room in a word beside the start */
#define PLACES 4
#define KNOWN 256

enum length { BRIEF, LONG, NR_LENGTHS };

static _Atomic uintptr_t kept[NR_LENGTHS][PLACES]; /* start and pages of a block, in one word; or 0 */
static _Atomic size_t bytes[NR_LENGTHS];	   /* of those kept, or soon to be */
static _Atomic size_t most[NR_LENGTHS] = {SHORT, SHORT};
static _Atomic uintptr_t known[KNOWN]; /* as in `kept`, of blocks in use */

static enum length class_of(size_t len)
{
	return len > SHORT ? LONG : BRIEF;
}

static _Atomic uintptr_t *place_of(uintptr_t start)
{
	uintptr_t page = start >> PAGE_SHIFT;

	return &known[(page ^ page >> 8) % KNOWN];
}

static size_t length_of(uintptr_t word)
{
	return word % PAGE_SIZE << PAGE_SHIFT;
}

void kept_note(uintptr_t start, size_t len)
{
	if (len >> PAGE_SHIFT <= LONGEST && len <= atomic_load_explicit(&most[class_of(len)], memory_order_relaxed))
		atomic_store(place_of(start), start | len >> PAGE_SHIFT);
}

void kept_forget(uintptr_t start)
{
	uintptr_t word = atomic_load(place_of(start));

	if (PAGE_ALIGN_DOWN(word) == start)
		atomic_compare_exchange_strong(place_of(start), &word, 0);
}

/* Returns whether the block of that word was there; it is the caller's from now on. */
static bool take_out(_Atomic uintptr_t *place, uintptr_t word)
{
	if (!atomic_compare_exchange_strong(place, &word, 0))
		return false;
	atomic_fetch_sub(&bytes[class_of(length_of(word))], length_of(word));
	return true;
}

uintptr_t kept_take(size_t len)
{
	_Atomic uintptr_t *places = kept[class_of(len)];

	for (size_t i = 0; i < PLACES; i++) {
		uintptr_t word = atomic_load_explicit(&places[i], memory_order_relaxed);

		if (word && length_of(word) == len && take_out(&places[i], word)) {
			kept_note(PAGE_ALIGN_DOWN(word), len);
			return PAGE_ALIGN_DOWN(word);
		}
	}
	return 0;
}

/* Whether its next user would find it as a new one. One that lies in libc's heap without the agent may be merged, or what its last
 * user made it; SHORT is where libc maps blocks by themselves. */
static bool is_keepable(uintptr_t start, size_t len)
{
	return len < SHORT ||
	       (!atomic_load_explicit(&blocks_changed, memory_order_relaxed) && !has_segments(start, start + len));
}

static bool put_in(_Atomic uintptr_t *places, uintptr_t word)
{
	for (size_t i = 0; i < PLACES; i++) {
		uintptr_t none = 0;

		if (!atomic_load_explicit(&places[i], memory_order_relaxed) &&
		    atomic_compare_exchange_strong(&places[i], &none, word))
			return true;
	}
	return false;
}

bool kept_put(uintptr_t start)
{
	uintptr_t word = atomic_load(place_of(start));
	size_t len = length_of(word);
	enum length class = class_of(len);

	if (PAGE_ALIGN_DOWN(word) != start || !is_keepable(start, len) ||
	    !atomic_compare_exchange_strong(place_of(start), &word, 0))
		return false;
	if (atomic_fetch_add(&bytes[class], len) + len <= atomic_load(&most[class]) && put_in(kept[class], word))
		return true;
	atomic_fetch_sub(&bytes[class], len);
	return false;
}

bool is_kept(uintptr_t start)
{
	for (size_t i = 0; i < NR_LENGTHS * PLACES; i++)
		if (PAGE_ALIGN_DOWN(atomic_load_explicit(&kept[i / PLACES][i % PLACES], memory_order_relaxed)) == start)
			return true;
	return false;
}

static bool release(enum length class)
{
	bool any = false;

	for (size_t i = 0; i < PLACES; i++) {
		uintptr_t word = atomic_load_explicit(&kept[class][i], memory_order_relaxed);
		struct block *b =
			word && take_out(&kept[class][i], word) ? block_at((const void *)PAGE_ALIGN_DOWN(word)) : NULL;

		if (b) {
			block_free(b);
			any = true;
		}
	}
	return any;
}

bool kept_release(void)
{
	return release(BRIEF) | release(LONG);
}

void kept_release_long(void)
{
	release(LONG);
}

void kept_limit(size_t len)
{
	most[BRIEF] = len < SHORT ? len : SHORT;
	most[LONG] = len;
	if (!len)
		kept_release();
}
