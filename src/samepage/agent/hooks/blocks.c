/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The large blocks that alloc.c gives out: mappings of our own, and the free ones among them that are kept.
 *
 * A program that makes temporaries in a loop would have its pages mapped, zeroed and unmapped each time round. So free
 * blocks are kept and joined with their free neighbours; an allocation gets the shortest that is long enough. glibc's
 * own rule (mallopt(3), M_MMAP_THRESHOLD) decides what is kept and for how long, so that no program needs more memory
 * here than there:
 *
 * - A block larger than any that was freed before is mapped *alone*, and unmapped when it is freed. Its size then
 *   shows that more of that size may follow: from then on such blocks come from the *heap*, which grows upwards.
 * - When the free memory at the upper end of the heap reaches twice that size, it is unmapped. malloc_trim(3) unmaps
 *   all that is free.
 *
 * Beyond that rule, memory that nobody needed for DECAY calls is given back, too.
 */
#include "hooks/blocks.h"
#include "base/real.h"

#include <malloc.h>
#include <sys/mman.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000 /* 4.17 */
#endif
#define LARGEST (32UL << 20) /* glibc's DEFAULT_MMAP_THRESHOLD_MAX: larger blocks are always alone */
#define GAP (1UL << 40)	     /* how far the heap may grow before it meets mappings that the kernel placed */
#define DECAY 5000	     /* calls */

static size_t mmap_threshold = 128UL << 10, trim_threshold = 128UL << 10; /* glibc's */
static bool fixed_thresholds;						  /* the program set one of them */

/* ---- giving back ---------------------------------------------------------------------------------------- */

static void empty(uintptr_t start, uintptr_t end)
{
	if (!discard_segments(start, end))
		real.madvise((void *)start, end - start, MADV_DONTNEED);
}

/* False: the kernel cannot unmap the range (vm.max_map_count); it is emptied instead. */
static bool unmap(uintptr_t start, uintptr_t end)
{
	if (real.munmap((void *)start, end - start)) {
		empty(start, end);
		return false;
	}
	area_remove(start, end);
	if (end == blocks.heap_end)
		blocks.heap_end = start;
	return true;
}

/* Whether nothing was done to the range that its next user would notice. */
static bool is_plain(uintptr_t start, uintptr_t end)
{
	while (start < end) {
		const struct area *a = area_next(start);

		if (!a || a->start > start || !is_plain_block(a))
			return false;
		start = a->end;
	}
	return true;
}

/* Whether no block lies right behind it. */
static bool is_top(const struct block *b)
{
	const struct block *after = block_behind(b->end);

	return !after || after->start > b->end;
}

/* Gives back the memory of a free block, and at the end of the heap its addresses. */
static void drop(struct block *b)
{
	if (!is_top(b))
		empty(b->start, b->end);
	else if (unmap(b->start, b->end))
		block_remove(b);
}

/* Each call looks at one free block. */
static void decay(void)
{
	struct block *b = blocks.oldest;

	blocks.calls++;
	if (!b)
		return;
	block_later(b);
	if (blocks.calls - b->since <= DECAY)
		return;
	b->since = blocks.calls;
	drop(b);
}

void block_free(struct block *b)
{
	bool plain = is_plain(b->start, b->end) && !has_segments(b->start, b->end);
	size_t len = block_length(b);

	decay();
	if (b->alone && !fixed_thresholds && len > mmap_threshold && len <= LARGEST) {
		mmap_threshold = len;
		trim_threshold = 2 * len;
		kept_limit(len);
	}
	if ((b->alone || !plain) && unmap(b->start, b->end)) {
		block_remove(b);
	} else if (!plain) { /* forget it: it is empty, but still mapped */
		area_remove(b->start, b->end);
		block_remove(b);
	} else {
		block_retire(b, 0);
		if (block_length(b) >= trim_threshold && is_top(b))
			drop(b);
	}
}

bool blocks_trim(void)
{
	bool any = kept_release() | !!blocks.oldest;

	for (struct block *b = blocks.oldest, *newer; b; b = newer) {
		newer = b->newer;
		drop(b);
	}
	return any;
}

bool blocks_release(void)
{
	bool any = kept_release();

	for (struct block *b = blocks.oldest, *newer; b; b = newer) {
		newer = b->newer;
		if (unmap(b->start, b->end)) {
			block_remove(b);
			any = true;
		}
	}
	return any;
}

void blocks_forget(uintptr_t start, uintptr_t end)
{
	for (struct block *b; (b = block_behind(start)) && b->start < end;) {
		kept_forget(b->start);
		block_remove(b);
	}
}

/* ---- giving out ------------------------------------------------------------------------------------------- */

/* Undoes the agent's work in the range, so that its next user sees nothing of it. False: that failed. */
static bool make_anonymous(uintptr_t start, uintptr_t end)
{
	return !has_segments(start, end) || !discard_segments(start, end);
}

/* Takes [start, start + len) out of a free block. Needs two nodes. */
static struct block *carve(struct block *b, uintptr_t start, size_t len)
{
	uintptr_t low = b->start, high = b->end;
	unsigned age = blocks.calls - b->since;

	if (!make_anonymous(start, start + len))
		return NULL;
	block_claim(b);
	block_place(b, start, start + len);
	if (low < start)
		block_retire(block_insert(low, start, false), age);
	if (start + len < high)
		block_retire(block_insert(start + len, high, false), age);
	return b;
}

/* Maps new memory at *addr, or anywhere if that is 0. */
static bool map(uintptr_t *addr, size_t len)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (*addr ? MAP_FIXED_NOREPLACE : 0);
	void *p = real.mmap((void *)*addr, len, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (p == MAP_FAILED)
		return false;
	if (*addr && p != (void *)*addr) { /* a kernel before 4.17 takes the address for a hint */
		real.munmap(p, len);
		return false;
	}
	*addr = (uintptr_t)p;
	return true;
}

/* Notes a newly mapped range. */
static void note(uintptr_t start, uintptr_t end)
{
	area_remove(start, end); /* of an old mapping, whose end we did not see */
	/* If this fails, the block is as good as any, but never merged. */
	area_add(start, end, AREA_ALLOC | area_new_flags(), PROT_READ | PROT_WRITE);
}

/* The free block at the very end of the heap, or NULL. */
static struct block *top(void)
{
	struct block *b = blocks.heap_end ? block_behind(blocks.heap_end - 1) : NULL;

	return b && b->free && b->end == blocks.heap_end ? b : NULL;
}

/* Makes a block at the end of the heap, which grows for it. *dirty: how many bytes of it are not fresh from the
 * kernel. */
static struct block *grow(size_t len, size_t *dirty)
{
	struct block *last = top();
	uintptr_t start, at;

	if (!blocks.heap_end)
		blocks.heap_end = PAGE_ALIGN_DOWN(blocks.pool) - GAP;
	if (last && (block_length(last) >= len || !make_anonymous(last->start, last->end)))
		last = NULL;
	at = blocks.heap_end;
	start = last ? last->start : at;
	if (map(&at, start + len - at)) {
		*dirty = at - start;
		note(at, start + len);
		if (!last)
			return block_insert(start, start + len, false);
		block_claim(last);
		block_place(last, start, start + len);
		return last;
	}
	at = 0;
	if (!map(&at, len))
		return NULL;
	/* Something is in the way. Let the heap go on far from it. */
	blocks.heap_end = at > 2 * GAP ? at - GAP : 0;
	*dirty = 0;
	note(at, at + len);
	return block_insert(at, at + len, false);
}

/* Maps a block at a multiple of `align`, a power of two. */
static struct block *map_alone(size_t len, size_t align, bool alone)
{
	size_t spare = align > PAGE_SIZE ? align - PAGE_SIZE : 0;
	uintptr_t p = 0, start;

	if (spare > PTRDIFF_MAX - len || !map(&p, len + spare))
		return NULL;
	start = spare ? (p + align - 1) & ~(align - 1) : p;
	if (start > p)
		real.munmap((void *)p, start - p);
	if (p + spare > start)
		real.munmap((void *)(start + len), p + spare - start);
	note(start, start + len);
	return block_insert(start, start + len, alone);
}

uintptr_t block_new(size_t len, size_t align, size_t *dirty)
{
	size_t spare = align > PAGE_SIZE ? align - PAGE_SIZE : 0;
	struct block *b;

	*dirty = 0;
	if (!blocks_reserve(3))
		return 0;
	kept_release_long();
	decay();
	b = spare <= PTRDIFF_MAX - len ? block_fitting(len + spare) : NULL;
	if (b)
		b = carve(b, (b->start + spare) & ~(align - 1), len);
	if (b)
		*dirty = len;
	else if (spare || len > mmap_threshold)
		b = map_alone(len, align, len > mmap_threshold);
	else
		b = grow(len, dirty);
	if (b && !b->alone)
		kept_note(b->start, len);
	return b ? b->start : 0;
}

struct block *block_at(const void *p)
{
	struct block *b = block_behind((uintptr_t)p);

	return b && b->start == (uintptr_t)p && !b->free ? b : NULL;
}

/* ---- changing ---------------------------------------------------------------------------------------------- */

/* Frees all but the first `len` bytes. False: they have to be unmapped. */
static bool shrink(struct block *b, size_t len)
{
	uintptr_t cut = b->start + len, end = b->end;

	if (b->alone || !blocks_reserve(1) || !is_plain(cut, end) || has_segments(cut, end))
		return false;
	block_place(b, b->start, cut);
	block_free(block_insert(cut, end, false));
	return true;
}

/* Extends a block into the free block right behind it, and at the end of the heap with new memory. False: there is too
 * little. */
static bool extend(struct block *b, size_t len)
{
	struct block *after = block_behind(b->end);
	uintptr_t start = b->start, end = b->end, want = start + len, have = end;

	if (b->alone || !is_plain(start, end) || !blocks_reserve(1))
		return false;
	if (after && after->free && after->start == end)
		have = after->end;
	else
		after = NULL;
	if (have < want && (have != blocks.heap_end || len > mmap_threshold))
		return false;
	if (after && !make_anonymous(after->start, min_addr(have, want)))
		return false;
	if (have < want) {
		if (!map(&have, want - have))
			return false;
		note(have, want);
	}
	if (after)
		block_remove(after);
	block_place(b, start, want);
	if (have > want)
		block_retire(block_insert(want, have, false), 0);
	return true;
}

uintptr_t block_resize(struct block *b, size_t len)
{
	uintptr_t start = b->start;
	size_t old = block_length(b);
	void *moved;

	if (len == old || (len < old ? shrink(b, len) : extend(b, len)))
		return start;
	moved = remap(start, old, len, MREMAP_MAYMOVE, 0);
	if (moved == MAP_FAILED)
		return 0;
	if (b->end == blocks.heap_end && !b->alone)
		blocks.heap_end = start;
	b->alone |= len > mmap_threshold; /* as if it had been allocated now */
	block_place(b, (uintptr_t)moved, (uintptr_t)moved + len);
	return (uintptr_t)moved;
}

/* ---- glibc's thresholds -------------------------------------------------------------------------------------- */

void blocks_set(int param, size_t value)
{
	if (param == M_MMAP_THRESHOLD && value > LARGEST)
		return;
	if (param == M_MMAP_THRESHOLD)
		mmap_threshold = value;
	else if (param == M_MMAP_MAX && !value) /* no block may be alone */
		mmap_threshold = SIZE_MAX;
	else if (param == M_TRIM_THRESHOLD)
		trim_threshold = value;
	else if (param != M_TOP_PAD && param != M_MMAP_MAX)
		return;
	fixed_thresholds = true;
	kept_limit(0);
}
