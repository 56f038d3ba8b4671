/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The malloc family. Large blocks are mappings of our own: they are page-aligned, so that equal arrays are equally
 * aligned in every process, and they are areas as long as they exist. All other blocks are the real allocator's, which
 * may be any (jemalloc, tcmalloc, ...).
 *
 * blocks.c decides where large blocks come from and what becomes of them when they are free. They start on a page
 * boundary, within bounds that only ever widen; so for nearly every small block free() costs two comparisons.
 */
#include "base/real.h"
#include "hooks/blocks.h"
#include "pages/pages.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct bounds {
	_Atomic uintptr_t low, high;
};

static struct bounds block_bounds = {.low = UINTPTR_MAX};
static struct bounds advised_bounds = {.low = UINTPTR_MAX};

static _Atomic size_t min_alloc = SIZE_MAX;

void alloc_disable(void)
{
	min_alloc = SIZE_MAX;
}

bool alloc_enabled(void)
{
	return atomic_load_explicit(&min_alloc, memory_order_relaxed) != SIZE_MAX;
}

void alloc_enable(size_t bytes)
{
	static const struct {
		const char *name;
		int param;
	} tuned[] = {
		/* mallopt(3) */
		{"MALLOC_MMAP_MAX_", M_MMAP_MAX},
		{"MALLOC_MMAP_THRESHOLD_", M_MMAP_THRESHOLD},
		{"MALLOC_TOP_PAD_", M_TOP_PAD},
		{"MALLOC_TRIM_THRESHOLD_", M_TRIM_THRESHOLD},
	};

	for (size_t i = 0; i < sizeof(tuned) / sizeof(tuned[0]); i++) {
		const char *value = secure_getenv(tuned[i].name);

		if (value && *value)
			blocks_set(tuned[i].param, strtoul(value, NULL, 0));
	}
	min_alloc = bytes;
}

/* A thread that holds a pointer into the bounds got it after they were widened, so relaxed loads see that. */
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

/* dlsym() may call malloc or calloc, and next_init() calls dlsym(). */
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
	size += !size; /* elsewhere 0 says that a pointer is not ours */
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

/* ---- blocks of ours ---- */

static inline bool maybe_ours(const void *p)
{
	return (uintptr_t)p % PAGE_SIZE == 0 && within(&block_bounds, p);
}

/* Large enough to be ours, but small enough that rounding it up cannot overflow. */
static inline bool is_large(size_t size)
{
	return size >= atomic_load_explicit(&min_alloc, memory_order_relaxed) && size <= PTRDIFF_MAX - PAGE_SIZE;
}

/* libc's malloc sets itself up in the program's first call, by system calls (getrandom, brk). Without us that call
 * might be for a large block. So we make a small one right after the first large one: much later, a seccomp filter may
 * forbid those system calls. */
static void set_up_real_malloc(void)
{
	static _Atomic bool done;

	if (!atomic_load_explicit(&done, memory_order_relaxed) && next.malloc && !atomic_exchange(&done, true))
		next.free(next.malloc(1));
}

/* Blocks below 1 MiB that nobody asked for are no more worth a thread than what the program maps itself. */
static void start_agent(size_t len)
{
	if (small_allocs && len < MIN_ALLOC_DEFAULT)
		agent_start_unnamed(len);
	else
		agent_start();
}

static void *allocate(size_t size, size_t align, bool zeroed)
{
	size_t len = PAGE_ALIGN_UP(size), dirty;
	uintptr_t start;
	sigset_t saved;
	int err;

	heed_watchers();
	if (!alloc_enabled())
		return NULL;
	if (align <= PAGE_SIZE && (start = kept_take(len)))
		return zeroed ? memset((void *)start, 0, len) : (void *)start;
	err = errno;
	mmap_lock(&saved);
	do
		start = block_new(len, align, &dirty);
	while (!start && blocks_release());
	if (start)
		widen(&block_bounds, start, start + len);
	mmap_unlock(&saved);
	errno = err; /* the kernel may have refused one place before it gave another */
	set_up_real_malloc();
	if (start && zeroed)
		memset((void *)start, 0, dirty);
	if (start && dirty < len)
		start_agent(len);
	return (void *)start;
}

void *large_alloc(size_t size, bool zeroed)
{
	return is_large(size) ? allocate(size, PAGE_SIZE, zeroed) : NULL;
}

size_t large_length(const void *p)
{
	const struct block *b;
	sigset_t saved;
	size_t len;

	if (!maybe_ours(p))
		return 0;
	mmap_lock(&saved);
	b = block_at(p);
	len = b ? block_length(b) : 0;
	mmap_unlock(&saved);
	return len;
}

bool large_free(void *p)
{
	struct block *b;
	sigset_t saved;
	size_t len = 0;

	if (!maybe_ours(p))
		return false;
	heed_watchers();
	if (alloc_enabled() && kept_put((uintptr_t)p))
		return true;
	mmap_lock(&saved);
	kept_forget((uintptr_t)p);
	b = is_kept((uintptr_t)p) ? NULL : block_at(p); /* freed twice: the real allocator says so */
	if (b && watched) {
		len = block_length(b);
		blocks_forget((uintptr_t)p, (uintptr_t)p + len);
	} else if (b) {
		block_free(b);
	}
	mmap_unlock(&saved);
	if (len)
		real.munmap(p, len); /* not under the lock: somebody listens, and may free memory himself */
	return b;
}

void *large_resize(void *p, size_t size)
{
	size_t len = PAGE_ALIGN_UP(size);
	uintptr_t start = 0;
	struct block *b;
	sigset_t saved;

	if (!is_large(size))
		return NULL;
	mmap_lock(&saved);
	kept_forget((uintptr_t)p);
	b = block_at(p);
	if (b)
		start = block_resize(b, len);
	if (start)
		widen(&block_bounds, start, start + len);
	mmap_unlock(&saved);
	if (start)
		start_agent(len);
	return (void *)start;
}

/*
 * The program may have given advice for memory of the real allocator. That ends before the allocator gets the memory
 * back, because what the allocator then does with it (munmap, MADV_DONTNEED that must give zeros) passes no wrapper of
 * ours. Pages that the block shares with its neighbours stay merged: they are in use.
 */
static void end_advice(void *p)
{
	uintptr_t start, end;
	sigset_t saved;

	if (!within(&advised_bounds, p))
		return;
	start = (uintptr_t)p;
	end = start + next.malloc_usable_size(p);
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

	need_next();
	if (is_large(size) && (p = allocate(size, PAGE_SIZE, false)))
		return p;
	if (!next.malloc)
		return early_alloc(size);
	p = next.malloc(size);
	if (heap_grew(p))
		return heap_pin(p, size, false);
	return p || !relieve(size) ? p : next.malloc(size);
}

SP_EXPORT void *calloc(size_t n, size_t size)
{
	size_t bytes;
	void *p;

	need_next();
	if (!__builtin_mul_overflow(n, size, &bytes) && is_large(bytes) && (p = allocate(bytes, PAGE_SIZE, true)))
		return p;
	if (!next.calloc)
		return early_alloc(bytes);
	p = next.calloc(n, size);
	if (heap_grew(p))
		return heap_pin(p, bytes, true);
	return p || !relieve(bytes) ? p : next.calloc(n, size);
}

static __attribute__((noinline)) void free_carefully(void *p)
{
	int saved = errno;

	if (!p || is_early(p))
		return;
	if (!large_free(p)) {
		end_advice(p);
		next.free(p);
	}
	if (at_heap_end(p))
		heap_unpin(false);
	errno = saved;
}

/* Programs free small blocks all the time, and each call on the way shows: so theirs is a jump. */
SP_EXPORT void free(void *p)
{
	need_next();
	if (!p || is_early(p) || maybe_ours(p) || within(&advised_bounds, p) || at_heap_end(p))
		free_carefully(p);
	else
		next.free(p);
}

SP_EXPORT void cfree(void *p) /* until glibc 2.26 */
{
	free(p);
}

/* Copies at most `old_size` bytes of `p` to a new block of `size`. Leaves `p` alone. */
static void *copy_to_new(const void *p, size_t old_size, size_t size)
{
	void *q = is_large(size) ? allocate(size, PAGE_SIZE, false) : NULL;

	if (!q)
		q = next.malloc(size);
	if (!q && relieve(size))
		q = next.malloc(size);
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
	need_next();
	old_size = is_early(p) ? early_size(p) : large_length(p);
	if (old_size) {
		if (!size) {
			free(p);
			return NULL;
		}
		if ((q = large_resize(p, size)))
			return q;
	} else {
		if (!size)
			end_advice(p);
		if (!size || !(is_large(size) || within(&advised_bounds, p))) {
			q = next.realloc(p, size);
			return q || !size || !relieve(size) ? q : next.realloc(p, size);
		}
		old_size = next.malloc_usable_size(p);
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
	int err;

	need_next();
	if (is_large(size) && power_of_two(align) && align % sizeof(void *) == 0 &&
	    (p = allocate(size, align, false))) {
		*out = p;
		return 0;
	}
	err = next.posix_memalign(out, align, size);
	return err != ENOMEM || !relieve(size) ? err : next.posix_memalign(out, align, size);
}

SP_EXPORT void *aligned_alloc(size_t align, size_t size)
{
	void *p;

	need_next();
	if (is_large(size) && power_of_two(align) && (p = allocate(size, align, false)))
		return p;
	p = next.aligned_alloc(align, size);
	return p || !relieve(size) ? p : next.aligned_alloc(align, size);
}

SP_EXPORT void *memalign(size_t align, size_t size)
{
	void *p;

	need_next();
	if (is_large(size) && power_of_two(align) && (p = allocate(size, align, false)))
		return p;
	p = next.memalign(align, size);
	return p || !relieve(size) ? p : next.memalign(align, size);
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
	need_next();
	len = is_early(p) ? early_size(p) : large_length(p);
	return len ? len : next.malloc_usable_size(p);
}

/* ---- what tunes it ---- */

SP_EXPORT int malloc_trim(size_t pad)
{
	sigset_t saved;
	bool any;

	need_next();
	mmap_lock(&saved);
	any = blocks_trim();
	mmap_unlock(&saved);
	any |= next.malloc_trim(pad) != 0;
	heap_unpin(true);
	return any;
}

SP_EXPORT int mallopt(int param, int value)
{
	sigset_t saved;

	need_next();
	mmap_lock(&saved);
	blocks_set(param, (size_t)value);
	mmap_unlock(&saved);
	return next.mallopt(param, value);
}
