/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The large blocks that alloc.c gives out: mappings of our own, and what is kept of them when they are free.
 *
 * A program that makes temporaries in a loop would have its pages mapped, zeroed and unmapped each time round. So free
 * blocks are kept, joined with their free neighbours, and the shortest that is long enough is given out again. What is
 * kept, and for how long, is glibc's own rule (mallopt(3), M_MMAP_THRESHOLD), so that no program needs more memory here
 * than there:
 *
 * - A block larger than any that was freed before is mapped *alone*, and unmapped when it is free. That says there may be
 *   more of its size; from then on such blocks come from the *heap*, which grows upwards in a row.
 * - When what is free at the upper end of the heap reaches twice that size, it is unmapped. So is all that is free, at
 *   malloc_trim(3).
 *
 * Beyond that rule, what nobody needed for DECAY calls is unmapped, too.
 *
 * Blocks, free or not, are nodes of a treap in the order of their addresses, and the free ones of another in that of their
 * lengths.
 */
#include "wrappers.h"

#include <malloc.h>
#include <sys/mman.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000 /* 4.17 */
#endif
#define LARGEST (32UL << 20) /* glibc's DEFAULT_MMAP_THRESHOLD_MAX: what is larger is always alone */
#define GAP (1UL << 40)	     /* that the heap may grow before it meets what the kernel places */
#define DECAY 5000	     /* calls */
#define POOL (4 * PAGE_SIZE) /* nodes are mapped so many bytes at a time */

enum order { BY_ADDRESS, BY_LENGTH, NR_ORDERS }; /* of the same length, the one at the lower address first */

struct block {
	uintptr_t start, end;
	struct block *left[NR_ORDERS], *right[NR_ORDERS];
	struct block *older, *newer; /* the free ones */
	unsigned priority;
	unsigned since; /* it is free: a number of a call */
	bool free, alone;
};

static struct block *roots[NR_ORDERS];
static struct block *oldest, *newest; /* of the free ones, in the order in which decay() looks at them */
static struct block *pool;	      /* nodes of nothing, by `older` */
static size_t pooled;
static uintptr_t heap_end; /* 0: there is no heap yet */
static unsigned calls;	   /* allocations and frees */

static size_t mmap_threshold = 128UL << 10, trim_threshold = 128UL << 10; /* glibc's */
static bool fixed_thresholds;						  /* somebody set one */

/* ---- nodes ------------------------------------------------------------------------------------------- */

/* Makes sure that n nodes can be had. */
static bool reserve(size_t n)
{
	struct block *more;

	if (pooled >= n)
		return true;
	more = real.mmap(NULL, POOL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (more == MAP_FAILED)
		return false;
	for (size_t i = 0; i < POOL / sizeof(*more); i++, pooled++) {
		more[i].older = pool;
		pool = &more[i];
	}
	return true;
}

/* ---- the treap --------------------------------------------------------------------------------------- */

static size_t length(const struct block *b)
{
	return b->end - b->start;
}

/* Whether b comes before a block of that length at that address. */
static bool before(enum order by, const struct block *b, size_t len, uintptr_t start)
{
	if (by == BY_LENGTH && length(b) != len)
		return length(b) < len;
	return b->start < start;
}

/* All of `low` comes before all of `high`. */
static struct block *join(enum order by, struct block *low, struct block *high)
{
	if (!low || !high)
		return low ? low : high;
	if (low->priority > high->priority) {
		low->right[by] = join(by, low->right[by], high);
		return low;
	}
	high->left[by] = join(by, low, high->left[by]);
	return high;
}

/* *low gets what comes before a block of that length at that address. */
static void part(enum order by, struct block *b, size_t len, uintptr_t start, struct block **low, struct block **high)
{
	if (!b) {
		*low = *high = NULL;
	} else if (before(by, b, len, start)) {
		*low = b;
		part(by, b->right[by], len, start, &b->right[by], high);
	} else {
		*high = b;
		part(by, b->left[by], len, start, low, &b->left[by]);
	}
}

static void attach(enum order by, struct block *b)
{
	struct block *low, *high;

	b->left[by] = b->right[by] = NULL;
	part(by, roots[by], length(b), b->start, &low, &high);
	roots[by] = join(by, join(by, low, b), high);
}

static void detach(enum order by, struct block *b)
{
	struct block *low, *self, *high;

	part(by, roots[by], length(b), b->start, &low, &high);
	part(by, high, length(b), b->start + 1, &self, &high);
	roots[by] = join(by, low, high);
}

/* The first block that ends after `addr`. */
static struct block *first_behind(uintptr_t addr)
{
	struct block *found = NULL;

	for (struct block *b = roots[BY_ADDRESS]; b;) {
		if (b->end > addr) {
			found = b;
			b = b->left[BY_ADDRESS];
		} else {
			b = b->right[BY_ADDRESS];
		}
	}
	return found;
}

/* The shortest free block of that length at least. */
static struct block *best_free(size_t len)
{
	struct block *found = NULL;

	for (struct block *b = roots[BY_LENGTH]; b;) {
		if (length(b) >= len) {
			found = b;
			b = b->left[BY_LENGTH];
		} else {
			b = b->right[BY_LENGTH];
		}
	}
	return found;
}

/* Sets the bounds of a block that is not free. */
static void place(struct block *b, uintptr_t start, uintptr_t end)
{
	if (b->start != start) {
		detach(BY_ADDRESS, b);
		b->start = start;
		attach(BY_ADDRESS, b);
	}
	b->end = end;
	if (!b->alone && start <= heap_end && end > heap_end)
		heap_end = end;
}

/* Needs a node. */
static struct block *insert(uintptr_t start, uintptr_t end, bool alone)
{
	static unsigned random = 1;
	struct block *b = pool;

	VM_BUG_ON(!b); /* nobody reserved it */
	pool = b->older;
	pooled--;
	random = random * 1664525 + 1013904223;
	*b = (struct block){.start = start, .alone = alone, .priority = random >> 8};
	attach(BY_ADDRESS, b);
	place(b, start, end);
	return b;
}

/* ---- the free ones -------------------------------------------------------------------------------------- */

/* Last in the order in which they are looked at. */
static void enlist(struct block *b)
{
	b->older = newest;
	b->newer = NULL;
	*(newest ? &newest->newer : &oldest) = b;
	newest = b;
}

static void unlist(struct block *b)
{
	*(b->older ? &b->older->newer : &oldest) = b->newer;
	*(b->newer ? &b->newer->older : &newest) = b->older;
}

/* Takes a block out of the free ones. */
static void claim(struct block *b)
{
	detach(BY_LENGTH, b);
	unlist(b);
	b->free = false;
}

static void forget(struct block *b)
{
	if (b->free)
		claim(b);
	detach(BY_ADDRESS, b);
	b->older = pool;
	pool = b;
	pooled++;
}

/* Makes a block a free one, joined with its free neighbours. It is as old as the oldest of them: else what nobody needs would
 * stay for ever where a part of it is used. */
static void retire(struct block *b, unsigned age)
{
	struct block *low = first_behind(b->start - 1), *high = first_behind(b->end);
	uintptr_t start;

	if (low->free && low->end == b->start) {
		age = calls - low->since > age ? calls - low->since : age;
		start = low->start;
		forget(low);
		b->start = start; /* there is nothing in between: its place in the order is the same */
	}
	if (high && high->free && high->start == b->end) {
		age = calls - high->since > age ? calls - high->since : age;
		b->end = high->end;
		forget(high);
	}
	b->free = true;
	b->alone = false;
	b->since = calls - age;
	attach(BY_LENGTH, b);
	enlist(b);
}

/* ---- giving back ---------------------------------------------------------------------------------------- */

static void empty(uintptr_t start, uintptr_t end)
{
	if (!discard_segments(start, end))
		real.madvise((void *)start, end - start, MADV_DONTNEED);
}

/* False: the kernel keeps the mapping (vm.max_map_count), but it is empty. */
static bool unmap(uintptr_t start, uintptr_t end)
{
	if (real.munmap((void *)start, end - start)) {
		empty(start, end);
		return false;
	}
	area_remove(start, end);
	if (end == heap_end)
		heap_end = start;
	return true;
}

/* Nothing was done to the range that the next user of it would meet. */
static bool is_plain(uintptr_t start, uintptr_t end)
{
	const unsigned allowed = AREA_ALLOC | AREA_HUGEPAGE | AREA_NOHUGEPAGE | area_new_flags();

	while (start < end) {
		const struct area *a = area_next(start);

		if (!a || a->start > start || !(a->flags & AREA_ALLOC) || a->flags & ~allowed ||
		    a->prot != (PROT_READ | PROT_WRITE))
			return false;
		start = a->end;
	}
	return true;
}

/* Nothing is given out right behind it. */
static bool is_top(const struct block *b)
{
	const struct block *after = first_behind(b->end);

	return !after || after->start > b->end;
}

/* Gives the memory of a free block back, and at the end of the heap its addresses. */
static void drop(struct block *b)
{
	if (!is_top(b))
		empty(b->start, b->end);
	else if (unmap(b->start, b->end))
		forget(b);
}

/* Each call looks at one free block. */
static void decay(void)
{
	struct block *b = oldest;

	calls++;
	if (!b)
		return;
	unlist(b);
	enlist(b);
	if (calls - b->since <= DECAY)
		return;
	b->since = calls;
	drop(b);
}

void block_free(struct block *b)
{
	bool plain = is_plain(b->start, b->end) && !has_segments(b->start, b->end);
	size_t len = length(b);

	decay();
	if (b->alone && !fixed_thresholds && len > mmap_threshold && len <= LARGEST) {
		mmap_threshold = len;
		trim_threshold = 2 * len;
	}
	if ((b->alone || !plain) && unmap(b->start, b->end)) {
		forget(b);
	} else if (!plain) { /* nobody's any more */
		area_remove(b->start, b->end);
		forget(b);
	} else {
		retire(b, 0);
		if (length(b) >= trim_threshold && is_top(b))
			drop(b);
	}
}

bool blocks_trim(void)
{
	bool any = oldest;

	for (struct block *b = oldest, *newer; b; b = newer) {
		newer = b->newer;
		drop(b);
	}
	return any;
}

bool blocks_release(void)
{
	bool any = false;

	for (struct block *b = oldest, *newer; b; b = newer) {
		newer = b->newer;
		if (unmap(b->start, b->end)) {
			forget(b);
			any = true;
		}
	}
	return any;
}

void blocks_forget(uintptr_t start, uintptr_t end)
{
	for (struct block *b; (b = first_behind(start)) && b->start < end;)
		forget(b);
}

/* ---- giving out ------------------------------------------------------------------------------------------- */

/* What is the agent's work in the range is undone: nobody sees it who gets it next. False: it cannot be. */
static bool make_anonymous(uintptr_t start, uintptr_t end)
{
	return !has_segments(start, end) || !discard_segments(start, end);
}

/* Takes [start, start + len) out of a free block. Needs two nodes. */
static struct block *carve(struct block *b, uintptr_t start, size_t len)
{
	uintptr_t low = b->start, high = b->end;
	unsigned age = calls - b->since;

	if (!make_anonymous(start, start + len))
		return NULL;
	claim(b);
	place(b, start, start + len);
	if (low < start)
		retire(insert(low, start, false), age);
	if (start + len < high)
		retire(insert(start + len, high, false), age);
	return b;
}

/* New memory at `addr` exactly, or with 0 anywhere. */
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

/* The range is newly mapped. */
static void note(uintptr_t start, uintptr_t end)
{
	area_remove(start, end); /* of a mapping that went without our seeing it */
	/* Should it fail, the block is as good as any, and never merged. */
	area_add(start, end, AREA_ALLOC | area_new_flags(), PROT_READ | PROT_WRITE);
}

/* What is free at the very end of the heap, or NULL. */
static struct block *top(void)
{
	struct block *b = heap_end ? first_behind(heap_end - 1) : NULL;

	return b && b->free && b->end == heap_end ? b : NULL;
}

/* A block from the end of the heap, which grows for it. *dirty: so much of it is not fresh from the kernel. */
static struct block *grow(size_t len, size_t *dirty)
{
	struct block *last = top();
	uintptr_t start, at;

	if (!heap_end)
		heap_end = PAGE_ALIGN_DOWN(pool) - GAP;
	if (last && (length(last) >= len || !make_anonymous(last->start, last->end)))
		last = NULL;
	at = heap_end;
	start = last ? last->start : at;
	if (map(&at, start + len - at)) {
		*dirty = at - start;
		note(at, start + len);
		if (!last)
			return insert(start, start + len, false);
		claim(last);
		place(last, start, start + len);
		return last;
	}
	at = 0;
	if (!map(&at, len))
		return NULL;
	/* Something is in the way. The next will be tried far from it. */
	heap_end = at > 2 * GAP ? at - GAP : 0;
	*dirty = 0;
	note(at, at + len);
	return insert(at, at + len, false);
}

/* A mapping of its own, at a multiple of `align`, a power of two. */
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
	return insert(start, start + len, alone);
}

uintptr_t block_new(size_t len, size_t align, size_t *dirty)
{
	size_t spare = align > PAGE_SIZE ? align - PAGE_SIZE : 0;
	struct block *b;

	*dirty = 0;
	if (!reserve(3))
		return 0;
	decay();
	b = spare <= PTRDIFF_MAX - len ? best_free(len + spare) : NULL;
	if (b)
		b = carve(b, (b->start + spare) & ~(align - 1), len);
	if (b)
		*dirty = len;
	else if (spare || len > mmap_threshold)
		b = map_alone(len, align, len > mmap_threshold);
	else
		b = grow(len, dirty);
	return b ? b->start : 0;
}

struct block *block_at(const void *p)
{
	struct block *b = first_behind((uintptr_t)p);

	return b && b->start == (uintptr_t)p && !b->free ? b : NULL;
}

size_t block_length(const struct block *b)
{
	return length(b);
}

/* ---- changing ---------------------------------------------------------------------------------------------- */

/* Frees what is behind the first `len` bytes. False: it has to be unmapped. */
static bool shrink(struct block *b, size_t len)
{
	uintptr_t cut = b->start + len, end = b->end;

	if (b->alone || !reserve(1) || !is_plain(cut, end) || has_segments(cut, end))
		return false;
	place(b, b->start, cut);
	block_free(insert(cut, end, false));
	return true;
}

/* Takes what is free right behind the block, and at the end of the heap what the kernel has. False: there is too
 * little. */
static bool extend(struct block *b, size_t len)
{
	struct block *after = first_behind(b->end);
	uintptr_t start = b->start, end = b->end, want = start + len, have = end;

	if (b->alone || !is_plain(start, end) || !reserve(1))
		return false;
	if (after && after->free && after->start == end)
		have = after->end;
	else
		after = NULL;
	if (have < want && (have != heap_end || len > mmap_threshold))
		return false;
	if (after && !make_anonymous(after->start, min_addr(have, want)))
		return false;
	if (have < want) {
		if (!map(&have, want - have))
			return false;
		note(have, want);
	}
	if (after)
		forget(after);
	place(b, start, want);
	if (have > want)
		retire(insert(want, have, false), 0);
	return true;
}

uintptr_t block_resize(struct block *b, size_t len)
{
	uintptr_t start = b->start;
	size_t old = length(b);
	void *moved;

	if (len == old || (len < old ? shrink(b, len) : extend(b, len)))
		return start;
	moved = remap(start, old, len, MREMAP_MAYMOVE, 0);
	if (moved == MAP_FAILED)
		return 0;
	if (b->end == heap_end && !b->alone)
		heap_end = start;
	b->alone |= len > mmap_threshold; /* as if it were allocated now */
	place(b, (uintptr_t)moved, (uintptr_t)moved + len);
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
}
