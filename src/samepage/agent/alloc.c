/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The malloc family. Large blocks are mappings of our own: page-aligned, so that equal arrays are equally
 * aligned in every process, and areas from birth to death. Everything else is the real allocator's, which
 * may be any (jemalloc, tcmalloc, ...).
 *
 * A block is known by its entry in a sorted table outside of it. Blocks start on a page boundary, and within
 * bounds that only ever widen; so for nearly every small block free() costs two comparisons.
 */
#include "wrappers.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct block {
	uintptr_t start, end;
};

/* Under the mmap_lock. Mapped by us, grown by mremap. */
static struct block *blocks;
static size_t nr_blocks, capacity;

struct bounds {
	_Atomic uintptr_t low, high;
};

static struct bounds block_bounds = {.low = UINTPTR_MAX};
static struct bounds advised_bounds = {.low = UINTPTR_MAX};

static _Atomic size_t min_alloc = SIZE_MAX;

void alloc_enable(size_t bytes)
{
	min_alloc = bytes;
}

/* Whoever holds a pointer into the bounds got it after they were widened, so relaxed loads see them. */
static inline bool within(const struct bounds *b, const void *p)
{
	return (uintptr_t)p >= atomic_load_explicit(&b->low, memory_order_relaxed) &&
	       (uintptr_t)p < atomic_load_explicit(&b->high, memory_order_relaxed);
}

/* Needs the lock. */
static void widen(struct bounds *b, uintptr_t start, uintptr_t end)
{
	if (start < b->low)
		b->low = start;
	if (end > b->high)
		b->high = end;
}

void alloc_note_advised(uintptr_t start, uintptr_t end)
{
	widen(&advised_bounds, start, end);
}

/* ---- before there is a real malloc ---- */

/* dlsym() may call malloc or calloc, and real_init() calls dlsym(). */
static _Alignas(16) char early[8192];
static size_t early_used;

static bool is_early(const void *p)
{
	return (const char *)p >= early && (const char *)p < early + sizeof(early);
}

static void *early_alloc(size_t size)
{
	size_t need = 16 + (size | 15) + 1; /* a header with the size */
	char *p = early + early_used;

	if (size > sizeof(early) || need > sizeof(early) - early_used)
		return NULL;
	size += !size; /* 0 says elsewhere that a pointer is not ours */
	early_used += need;
	memcpy(p, &size, sizeof(size));
	return p + 16;
}

static size_t early_size(const void *p)
{
	size_t size;

	memcpy(&size, (const char *)p - 16, sizeof(size));
	return size;
}

/* ---- the table; all need the lock ---- */

/* Index of the first block that ends after `addr`. */
static size_t lower(uintptr_t addr)
{
	size_t lo = 0, hi = nr_blocks;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;

		if (blocks[mid].end > addr)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

static struct block *block_at(const void *p)
{
	size_t i = lower((uintptr_t)p);

	return i < nr_blocks && blocks[i].start == (uintptr_t)p ? &blocks[i] : NULL;
}

static bool make_room(void)
{
	size_t bytes = capacity * sizeof(*blocks), bigger = bytes ? bytes * 2 : PAGE_SIZE;
	void *p;

	if (nr_blocks < capacity)
		return true;
	p = blocks ? real.mremap(blocks, bytes, bigger, MREMAP_MAYMOVE)
		   : real.mmap(NULL, bigger, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return false;
	blocks = p;
	capacity = bigger / sizeof(*blocks);
	return true;
}

/* Needs room for it. */
static void insert(uintptr_t start, uintptr_t end)
{
	size_t i = lower(start);

	memmove(&blocks[i + 1], &blocks[i], (nr_blocks - i) * sizeof(*blocks));
	blocks[i] = (struct block){start, end};
	nr_blocks++;
	widen(&block_bounds, start, end);
}

static void delete(struct block *b)
{
	memmove(b, b + 1, (size_t)(blocks + nr_blocks - (b + 1)) * sizeof(*blocks));
	nr_blocks--;
}

/* ---- free blocks kept for the next; all need the lock ---- */

/*
 * A program that makes temporaries in a loop would have its pages mapped, zeroed and unmapped each time round. So
 * free blocks are kept, by glibc's own rule (mallopt(3), M_MMAP_THRESHOLD): the first free block of a size is
 * unmapped and says that there may be more; then twice as many bytes as the largest so far are kept at most.
 */
#define PARKED_MAX 16
#define PARKED_LARGEST (32UL << 20)

static struct block parked[PARKED_MAX]; /* the oldest first */
static size_t nr_parked, parked_bytes, parked_largest;

static void unpark(size_t i)
{
	parked_bytes -= parked[i].end - parked[i].start;
	memmove(&parked[i], &parked[i + 1], (nr_parked - i - 1) * sizeof(*parked));
	nr_parked--;
}

static void unmap(struct block b)
{
	area_remove(b.start, b.end);
	real.munmap((void *)b.start, b.end - b.start);
}

/* Nothing was done to it that the next user of the block would meet. */
static bool is_plain(struct block b)
{
	const struct area *a = area_next(b.start);

	return a && a->start <= b.start && b.end <= a->end && a->flags == AREA_ALLOC &&
	       a->prot == (PROT_READ | PROT_WRITE) && !has_segments(b.start, b.end);
}

/* The block is free. Keeps it, or unmaps it. */
static void park(struct block b)
{
	size_t len = b.end - b.start;

	if (len > parked_largest || !is_plain(b)) {
		if (len <= PARKED_LARGEST && len > parked_largest)
			parked_largest = len;
		unmap(b);
		return;
	}
	while (nr_parked == PARKED_MAX || (nr_parked && parked_bytes + len > 2 * parked_largest)) {
		struct block oldest = parked[0];

		unpark(0);
		unmap(oldest);
	}
	parked[nr_parked++] = b;
	parked_bytes += len;
}

/* A parked block of just this length, the last one first: its pages are the warmest. 0: there is none. */
static uintptr_t take_parked(size_t len, size_t align)
{
	for (size_t i = nr_parked; i-- > 0;) {
		struct block b = parked[i];

		if (b.end - b.start != len || b.start % align)
			continue;
		unpark(i);
		if (!has_segments(b.start, b.end))
			return b.start;
		unmap(b); /* merged meanwhile: it would have to be copied page by page as it is written */
	}
	return 0;
}

void alloc_forget(uintptr_t start, uintptr_t end)
{
	for (size_t i = lower(start); i < nr_blocks && blocks[i].start < end;)
		delete(&blocks[i]);
	for (size_t i = nr_parked; i-- > 0;)
		if (parked[i].start < end && start < parked[i].end)
			unpark(i);
}

/* ---- blocks of ours ---- */

static inline bool maybe_ours(const void *p)
{
	return (uintptr_t)p % PAGE_SIZE == 0 && within(&block_bounds, p);
}

/* Large enough to be ours, and not so large that rounding it up could overflow. */
static inline bool is_large(size_t size)
{
	return size >= atomic_load_explicit(&min_alloc, memory_order_relaxed) && size <= PTRDIFF_MAX - PAGE_SIZE;
}

/* Whole zeroed pages at a multiple of `align`, a power of two; NULL leaves it to the real allocator. */
static void *map_aligned(size_t len, size_t align)
{
	size_t spare = align > PAGE_SIZE ? align - PAGE_SIZE : 0;
	uintptr_t p, start;
	void *map;

	if (spare > PTRDIFF_MAX - len)
		return NULL;
	map = real.mmap(NULL, len + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map == MAP_FAILED)
		return NULL;
	p = (uintptr_t)map;
	start = spare ? (p + align - 1) & ~(align - 1) : p;
	if (start > p)
		real.munmap(map, start - p);
	if (p + spare > start)
		real.munmap((void *)(start + len), p + spare - start);
	return (void *)start;
}

static void *allocate(size_t size, size_t align, bool zeroed)
{
	size_t len = PAGE_ALIGN_UP(size);
	uintptr_t start;
	sigset_t saved;
	bool known;

	mmap_lock(&saved);
	known = make_room();
	start = known && !zeroed ? take_parked(len, align) : 0;
	if (start)
		insert(start, start + len);
	mmap_unlock(&saved);
	if (start || !known)
		return (void *)start;
	start = (uintptr_t)map_aligned(len, align);
	if (!start)
		return NULL;
	mmap_lock(&saved);
	known = make_room();
	if (known) {
		insert(start, start + len);
		area_remove(start, start + len); /* of a mapping that went without our seeing it */
		/* Should it fail, the block is as good as any, and never merged. */
		area_add(start, start + len, AREA_ALLOC | area_new_flags(), PROT_READ | PROT_WRITE);
	}
	mmap_unlock(&saved);
	if (!known) {
		real.munmap((void *)start, len);
		return NULL;
	}
	agent_start();
	return (void *)start;
}

/* Length of the block that starts at `p`; 0 when that is none of ours. */
static size_t length_of(const void *p)
{
	const struct block *b;
	sigset_t saved;
	size_t len;

	if (!maybe_ours(p))
		return 0;
	mmap_lock(&saved);
	b = block_at(p);
	len = b ? b->end - b->start : 0;
	mmap_unlock(&saved);
	return len;
}

static bool release(void *p)
{
	struct block *b, freed;
	sigset_t saved;

	if (!maybe_ours(p))
		return false;
	mmap_lock(&saved);
	b = block_at(p);
	if (b) {
		freed = *b;
		delete(b);
		park(freed);
	}
	mmap_unlock(&saved);
	return b;
}

static void *resize(void *p, size_t size)
{
	size_t len = PAGE_ALIGN_UP(size);
	struct block *b;
	sigset_t saved;
	void *moved;

	mmap_lock(&saved);
	b = block_at(p);
	moved = b ? remap(b->start, b->end - b->start, len, MREMAP_MAYMOVE, 0) : MAP_FAILED;
	if (moved != MAP_FAILED) {
		delete(b);
		insert((uintptr_t)moved, (uintptr_t)moved + len);
	}
	mmap_unlock(&saved);
	if (moved == MAP_FAILED)
		return NULL;
	agent_start();
	return moved;
}

/*
 * The program may have advised memory that the real allocator gave it. That ends before the allocator gets it
 * back, because what the allocator then does with it (munmap, MADV_DONTNEED that must give zeros) passes no
 * wrapper of ours. Pages that the block shares with its neighbours stay as they are: they are in use.
 */
static void end_advice(void *p)
{
	uintptr_t start, end;
	sigset_t saved;

	if (!within(&advised_bounds, p))
		return;
	start = (uintptr_t)p;
	end = start + real.malloc_usable_size(p);
	mmap_lock(&saved);
	if (area_overlaps(start, end)) {
		if (PAGE_ALIGN_UP(start) < PAGE_ALIGN_DOWN(end))
			zero_segments(PAGE_ALIGN_UP(start), PAGE_ALIGN_DOWN(end));
		area_remove(PAGE_ALIGN_DOWN(start), PAGE_ALIGN_UP(end));
	}
	mmap_unlock(&saved);
}

/* ---- the family ---- */

SP_EXPORT void *malloc(size_t size)
{
	void *p;

	need_real();
	if (is_large(size) && (p = allocate(size, PAGE_SIZE, false)))
		return p;
	return real.malloc ? real.malloc(size) : early_alloc(size);
}

SP_EXPORT void *calloc(size_t n, size_t size)
{
	size_t bytes;
	void *p;

	need_real();
	if (!__builtin_mul_overflow(n, size, &bytes) && is_large(bytes) && (p = allocate(bytes, PAGE_SIZE, true)))
		return p;
	return real.calloc ? real.calloc(n, size) : early_alloc(bytes);
}

SP_EXPORT void free(void *p)
{
	int saved = errno;

	if (!p || is_early(p))
		return;
	need_real();
	if (!release(p)) {
		end_advice(p);
		real.free(p);
	}
	errno = saved;
}

SP_EXPORT void cfree(void *p) /* until glibc 2.26 */
{
	free(p);
}

/* A new block of `size` with the first `old_size` bytes of `p` at most. Leaves `p` alone. */
static void *copy_to_new(const void *p, size_t old_size, size_t size)
{
	void *q = is_large(size) ? allocate(size, PAGE_SIZE, false) : NULL;

	if (!q)
		q = real.malloc(size);
	if (q)
		memcpy(q, p, old_size < size ? old_size : size);
	return q;
}

SP_EXPORT void *realloc(void *p, size_t size)
{
	size_t old_size;
	void *q;

	if (!p)
		return malloc(size);
	need_real();
	old_size = is_early(p) ? early_size(p) : length_of(p);
	if (old_size) {
		if (!size) {
			free(p);
			return NULL;
		}
		if (is_large(size) && (q = resize(p, size)))
			return q;
	} else {
		if (!size)
			end_advice(p);
		if (!size || !(is_large(size) || within(&advised_bounds, p)))
			return real.realloc(p, size);
		old_size = real.malloc_usable_size(p);
	}
	q = copy_to_new(p, old_size, size);
	if (q)
		free(p);
	return q;
}

SP_EXPORT void *reallocarray(void *p, size_t n, size_t size)
{
	size_t bytes;

	if (__builtin_mul_overflow(n, size, &bytes)) {
		errno = ENOMEM;
		return NULL;
	}
	return realloc(p, bytes);
}

static bool power_of_two(size_t n)
{
	return n && !(n & (n - 1));
}

SP_EXPORT int posix_memalign(void **out, size_t align, size_t size)
{
	void *p;

	need_real();
	if (is_large(size) && power_of_two(align) && align % sizeof(void *) == 0 &&
	    (p = allocate(size, align, false))) {
		*out = p;
		return 0;
	}
	return real.posix_memalign(out, align, size);
}

SP_EXPORT void *aligned_alloc(size_t align, size_t size)
{
	void *p;

	need_real();
	if (is_large(size) && power_of_two(align) && (p = allocate(size, align, false)))
		return p;
	return real.aligned_alloc(align, size);
}

SP_EXPORT void *memalign(size_t align, size_t size)
{
	void *p;

	need_real();
	if (is_large(size) && power_of_two(align) && (p = allocate(size, align, false)))
		return p;
	return real.memalign(align, size);
}

SP_EXPORT void *valloc(size_t size)
{
	return memalign(PAGE_SIZE, size);
}

SP_EXPORT void *pvalloc(size_t size)
{
	if (size > PTRDIFF_MAX - PAGE_SIZE) {
		errno = ENOMEM;
		return NULL;
	}
	return memalign(PAGE_SIZE, size ? PAGE_ALIGN_UP(size) : PAGE_SIZE);
}

SP_EXPORT size_t malloc_usable_size(void *p)
{
	size_t len;

	if (!p)
		return 0;
	need_real();
	len = is_early(p) ? early_size(p) : length_of(p);
	return len ? len : real.malloc_usable_size(p);
}
