/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The small blocks of glibc's malloc, for `--memory all`. malloc moves the break from within libc, past all wrappers, so the agent
 * must know which part of the heap malloc cannot give back. It gives back only what lies above its last block. So the agent
 * has blocks of its own there, its *pins*: what is below one stays mapped, whatever the program calls, and however it finds the
 * function. When nothing above the last pin is in use any more, and much below it is free, the agent unmerges what only that pin
 * keeps, and frees it; so malloc gives back nearly all that it would give back without pins.
 *
 * malloc_trim(3) discards pages inside free blocks, also below a pin. What becomes of these does not matter: malloc
 * takes no free block for zeros, but only what it just took above the last block.
 *
 * Other arenas than the main one are mappings of libc's, and are left alone.
 */
#include "base/planes.h"
#include "base/real.h"
#include "hooks/hooks.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define PIN_EVERY (256UL << 10) /* at most so much of the heap's end is not pinned */
#define STRAYS_MAX 64
#define PIN_SIZE 1040		      /* bytes: malloc keeps a free block of that size in no list of its own (tcache) */
#define UNPINNED_FROM (PIN_EVERY / 4) /* so much must be free below a pin, or it would come and go with each block */
#define PREV_INUSE 1

struct pin {
	struct pin *below; /* or NULL */
};

_Atomic uintptr_t heap_watched = HEAP_NEVER, heap_next_pin = HEAP_NEVER;
/* These need the lock. */
static uintptr_t heap_start, pinned; /* between them all of the heap is pinned */
static struct pin *_Atomic last;     /* or NULL; heap_unpin() reads it without */

static _Atomic bool unpinning; /* one thread at a time */
static struct {		       /* under `unpinning`: the pin that had to stay for lack of memory, or NULL */
	const struct pin *pin;
	size_t frees, next_try; /* since then; after how many it is worth another try */
} refused;

/* As libc has it. Whoever stands in front of that need not keep blocks where they are. */
bool is_libcs(void *function)
{
	int (*dladdr)(const void *, Dl_info *) = NULL;
	void *version = dlsym(RTLD_NEXT, "gnu_get_libc_version");
	Dl_info one, other;

	*(void **)&dladdr = dlsym(RTLD_NEXT, "dladdr"); /* in libc since 2.34 */
	return dladdr && version && function && dladdr(function, &one) && dladdr(version, &other) &&
	       one.dli_fbase == other.dli_fbase;
}

/* From here on the heap is an area, so that whatever the program has the kernel do to it is noted. Nothing of it is mergeable
 * before it is pinned. */
void heap_enable(void)
{
	uintptr_t start = PAGE_ALIGN_UP(real.syscall(SYS_brk, 0));
	sigset_t saved;

	if (!is_libcs((void *)next.malloc) || !is_libcs((void *)next.calloc) || !is_libcs((void *)next.realloc))
		return;
	mmap_lock(&saved);
	if (start + HEAP_MAX <= ADDRESS_END && !area_overlaps(start, start + HEAP_MAX) &&
	    !area_add(start, start + HEAP_MAX, AREA_MAPPED | AREA_UNPINNED, PROT_READ | PROT_WRITE)) {
		heap_start = pinned = start;
		heap_next_pin = start + PIN_EVERY;
	}
	mmap_unlock(&saved);
}

void heap_leave(void)
{
	heap_next_pin = heap_watched = HEAP_NEVER;
}

/* A block that is not above the heap, but somewhere else: where the heap lies close to other mappings, not one in 64. */
static void note_stray(void)
{
	static _Atomic unsigned strays;

	if (atomic_fetch_add(&strays, 1) == STRAYS_MAX)
		heap_next_pin = HEAP_NEVER;
}

/* `pin` is the last one from now on. Needs the lock. */
static void set_last(struct pin *pin)
{
	uintptr_t at = pin ? (uintptr_t)pin : heap_start, next_pin = heap_next_pin;

	last = pin;
	pinned = PAGE_ALIGN_DOWN(at);
	if (next_pin == HEAP_NEVER)
		return;
	heap_watched = !pin ? HEAP_NEVER : pin->below ? (uintptr_t)pin->below : heap_start;
	if (!atomic_compare_exchange_strong(&heap_next_pin, &next_pin, at + PIN_EVERY))
		heap_watched = HEAP_NEVER; /* another thread called heap_leave() */
}

static void make_mergeable(uintptr_t start, uintptr_t end)
{
	if (start < end && !page_reserve(start >> PAGE_SHIFT, end >> PAGE_SHIFT))
		area_change(start, end, 0, AREA_UNPINNED, -1);
}

/* Returns how much more of the heap is mergeable now. */
static size_t note_pin(struct pin *pin)
{
	uintptr_t end = PAGE_ALIGN_DOWN(pin), grown = 0;
	sigset_t saved;

	mmap_lock(&saved);
	if (heap_next_pin != HEAP_NEVER && end > pinned) {
		grown = end - pinned;
		make_mergeable(pinned, end);
		pin->below = last;
		set_last(pin);
	}
	mmap_unlock(&saved);
	return grown;
}

void *heap_pin(void *p, size_t size, bool zeroed)
{
	int saved = errno;
	void *other, *pin;
	size_t grown;

	if (p >= next.sbrk(0)) { /* no system call: malloc made none either, maybe, and a filter may forbid it */
		note_stray();
		return p;
	}
	other = zeroed ? next.calloc(1, size) : next.malloc(size);
	if (!other)
		return p;
	pin = next.realloc(p, PIN_SIZE); /* stays where it is, if there is room */
	grown = heap_grew(pin) && pin < next.sbrk(0) ? note_pin(pin) : 0;
	if (grown)
		agent_start_unnamed(grown);
	else
		next.free(pin ? pin : p);
	errno = saved;
	return other;
}

/* Of a block of malloc's. The size of a block, with 16 bytes of malloc's own, stands before it, in whose last three bits are
 * flags (malloc_chunk in malloc/malloc.c of glibc). */
static size_t chunk_size(uintptr_t block)
{
	return ((volatile const size_t *)block)[-1] & ~7UL;
}

/* How many bytes are free right below the pin, if malloc has them in one block. */
static size_t free_below(const struct pin *pin)
{
	volatile const size_t *at = (volatile const size_t *)pin;

	return at[-1] & PREV_INUSE ? 0 : at[-2];
}

/* Whether the pin alone keeps a part of the heap that malloc would give back: nothing is in use above it, nor right below.
 * What is free at the end of the heap is one block, up to the break. Another thread may use it in the next moment. */
static bool is_in_the_way(const struct pin *pin)
{
	const uintptr_t end = (uintptr_t)next.sbrk(0), behind = (uintptr_t)pin + chunk_size((uintptr_t)pin);

	return behind < end && behind + chunk_size(behind) == end + 2 * sizeof(size_t) &&
	       free_below(pin) >= UNPINNED_FROM;
}

static bool has_merged(uintptr_t start, uintptr_t end)
{
	sigset_t saved;
	bool has;

	mmap_lock(&saved);
	has = has_segments(start, end);
	mmap_unlock(&saved);
	return has;
}

/* Makes the last pin one that nothing depends on any more. False: it is to stay, since there is no memory to unmerge what it
 * keeps. Other threads may set pins meanwhile. */
static bool let_go(struct pin *pin)
{
	struct pin *below;
	uintptr_t start, end;
	sigset_t saved;

	mmap_lock(&saved);
	below = pin->below;
	if (pin != last || (below && ((uintptr_t)below < heap_start || below >= pin))) { /* the program overwrote it */
		mmap_unlock(&saved);
		return false;
	}
	end = pinned;
	set_last(below);
	start = pinned;
	area_change(start, end, AREA_UNPINNED, 0, -1);
	mmap_unlock(&saved);
	if (!unmerge_first(start, end) && !has_merged(start, end))
		return true;
	mmap_lock(&saved);
	if (last == below) {
		make_mergeable(start, end);
		set_last(pin);
		if (heap_next_pin != HEAP_NEVER)
			heap_watched = heap_start; /* whatever is freed may be the memory that is missing */
	}
	mmap_unlock(&saved);
	return false;
}

/* Whether enough was freed since the pin had to stay. */
static bool is_worth_a_try(const struct pin *pin)
{
	if (pin != refused.pin)
		return true;
	return ++refused.frees >= refused.next_try;
}

/* What is free below pins may be all the memory that there is for what they keep: malloc gives back the pages of free blocks
 * first, of which it needs none. */
static bool let_go_when_short(struct pin *pin)
{
	next.malloc_trim(0);
	if (let_go(pin))
		return true;
	if (pin != refused.pin)
		refused.frees = 0;
	refused.pin = pin;
	refused.next_try = refused.frees + refused.frees / 4 + 16;
	return false;
}

void heap_unpin(bool trimmed)
{
	int saved = errno;
	bool gone = true;

	while (gone && !atomic_exchange(&unpinning, true)) {
		struct pin *pin = last; /* nobody else frees it */

		if (trimmed)
			refused.pin = NULL;
		gone = pin && is_in_the_way(pin) && is_worth_a_try(pin) && (let_go(pin) || let_go_when_short(pin));
		if (gone) {
			refused.pin = NULL;
			next.free(pin);
		}
		atomic_store(&unpinning, false);
	}
	errno = saved;
}

void heap_forked(void)
{
	atomic_store(&unpinning, false);
}
