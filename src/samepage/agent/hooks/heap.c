/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The small blocks of glibc's malloc, for `--memory all`. malloc moves the break from within libc, past all wrappers, so the agent
 * must know which part of the heap malloc cannot give back. It gives back only what lies above its last block. So the agent
 * has blocks of its own there, its *pins*, which it never frees: what is below one stays mapped as long as the process lives, whatever
 * the program calls, and however it finds the function.
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

_Atomic uintptr_t heap_next_pin = HEAP_NEVER;
static uintptr_t pinned; /* needs the lock: below that all of the heap is */

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
		pinned = start;
		heap_next_pin = start + PIN_EVERY;
	}
	mmap_unlock(&saved);
}

void heap_leave(void)
{
	heap_next_pin = HEAP_NEVER;
}

/* A block that is not above the heap, but somewhere else: where the heap lies close to other mappings, not one in 64. */
static void note_stray(void)
{
	static _Atomic unsigned strays;

	if (atomic_fetch_add(&strays, 1) == STRAYS_MAX)
		heap_next_pin = HEAP_NEVER;
}

/* Returns how much more of the heap is mergeable now. */
static size_t note_pin(uintptr_t pin)
{
	uintptr_t end = PAGE_ALIGN_DOWN(pin), grown = 0;
	sigset_t saved;

	mmap_lock(&saved);
	if (heap_next_pin != HEAP_NEVER && end > pinned) {
		grown = end - pinned;
		if (!page_reserve(pinned >> PAGE_SHIFT, end >> PAGE_SHIFT))
			area_change(pinned, end, 0, AREA_UNPINNED, -1);
		pinned = end;
		heap_next_pin = pin + PIN_EVERY;
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
	pin = next.realloc(p, 1); /* stays where it is, and gives the rest back */
	grown = pin == p ? note_pin((uintptr_t)pin) : 0;
	if (grown)
		agent_start_unnamed(grown);
	errno = saved;
	return other;
}
