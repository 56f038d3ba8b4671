/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mremap(2) of areas. The application sees an area as one anonymous mapping. Once pages in it were merged it is many
 * mappings, and the kernel resizes only one at a time. So a range with merged pages is resized in place by mapping or
 * unmapping its tail, and moved piece by piece.
 */
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"
#include "hooks/hooks.h"
#include "kernel/headroom.h"
#include "pages/pages.h"

#include <string.h>
#include <sys/mman.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4 /* 5.7 */
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000 /* 4.17 */
#endif
#define READ_WRITE (PROT_READ | PROT_WRITE)

/* [start, end) becomes [to, to_end). */
struct resize {
	uintptr_t start, end, to, to_end;
	bool leave; /* MREMAP_DONTUNMAP: the old range stays, empty */
	bool known; /* the old range ended in an area, which is `last` */
	struct area last;
};

static struct area *area_of(uintptr_t addr)
{
	struct area *a = area_next(addr);

	return a && a->start <= addr ? a : NULL;
}

/* Updates the books after the kernel's part is done. New memory belongs to the area that grew into it. */
static void settle(const struct resize *r)
{
	uintptr_t keep = min_addr(r->end - r->start, r->to_end - r->to);

	if (r->to == r->start) {
		area_remove(r->start + keep, r->end);
	} else if (r->leave) {
		area_remove(r->to, r->to_end);
		area_copy(r->start, r->end, r->to);
	} else {
		area_remove(r->start + keep, r->end);
		area_move(r->start, r->start + keep, r->to);
	}
	if (r->to_end - r->to > keep) {
		area_remove(r->to + keep, r->to_end);
		if (r->known)
			area_add(r->to + keep, r->to_end, r->last.flags, r->last.prot);
	}
}

static void *fail(int error)
{
	errno = error;
	return MAP_FAILED;
}

/* ---- without merged pages: the kernel does it ---------------------------------------------------------- */

static void *remap_whole(struct resize *r, size_t old_len, size_t new_len, int flags, uintptr_t target)
{
	void *p = real.mremap((void *)r->start, old_len, new_len, flags, (void *)target);

	if (p == MAP_FAILED) {
		/* The tail may be gone, and so may what was at the target. */
		area_reconcile(PAGE_ALIGN_DOWN(r->start), r->end);
		if (flags & MREMAP_FIXED)
			area_reconcile(PAGE_ALIGN_DOWN(target), PAGE_ALIGN_UP(target + new_len));
		return p;
	}
	r->to = (uintptr_t)p;
	r->to_end = PAGE_ALIGN_UP(r->to + new_len);
	settle(r);
	return p;
}

/* Makes [start, end), a new mapping of anonymous memory, like the rest of an area: with its protection, advice and
 * lock. */
static void adopt(const struct area *a, uintptr_t start, uintptr_t end)
{
	if (a->prot != READ_WRITE)
		real.mprotect((void *)start, end - start, a->prot);
	area_readvise(a, start, end);
	if (a->flags & AREA_LOCKED)
		next.mlock((void *)start, end - start);
}

/* ---- with merged pages ----------------------------------------------------------------------------------- */

/* Moves [from, to), one mapping or a part of one, onto anonymous memory at `dst`. If the kernel refuses because there
 * are too many mappings, the bytes are copied, and are no longer merged. */
static void move_piece(const struct vma *v, uintptr_t from, uintptr_t to, uintptr_t dst, bool leave)
{
	bool segment = page_test(PAGE_SEGMENT, from >> PAGE_SHIFT);
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (leave ? MREMAP_DONTUNMAP : 0);
	const struct area *a = area_of(from);
	int prot = a ? a->prot : vma_prot(v);
	size_t len = to - from;

	/* The kernel would leave a mapping of a segment behind that still shows the segment, but the old range has to
	 * be empty. */
	if (!(leave && segment) && real.mremap((void *)from, len, len, flags, (void *)dst) != MAP_FAILED)
		return;
	if (!v->read)
		real.mprotect((void *)from, len, PROT_READ);
	memcpy((void *)dst, (const void *)from, len);
	if (a)
		adopt(a, dst, dst + len);
	else if (prot != READ_WRITE)
		real.mprotect((void *)dst, len, prot);
	if (!leave) {
		page_set(PAGE_SEGMENT, from >> PAGE_SHIFT, to >> PAGE_SHIFT, false);
		page_set(PAGE_ISLAND, from >> PAGE_SHIFT, to >> PAGE_SHIFT, false);
		real.munmap((void *)from, len);
	} else if (!segment) {
		if (!v->read)
			real.mprotect((void *)from, len, prot);
		real.madvise((void *)from, len, MADV_DONTNEED);
	}
}

/* Merged pages are copied (move_piece()), since the range that stays behind must not show the segment. Returns whether
 * there is memory for that. */
static bool can_leave(const struct resize *r)
{
	uint64_t last = r->end >> PAGE_SHIFT, pages = 0, stop;

	for (uint64_t vpn = r->start >> PAGE_SHIFT; (vpn = page_next(PAGE_SEGMENT, vpn, last, true)) < last;
	     vpn = stop) {
		stop = page_next(PAGE_SEGMENT, vpn, last, false);
		pages += stop - vpn;
	}
	return !pages || headroom(settings.use_swap) >= pages * PAGE_SIZE + settings.reserve;
}

static void *move_pieces(struct resize *r, size_t new_len, uintptr_t target, bool fixed)
{
	uintptr_t keep = min_addr(r->end - r->start, new_len), at = r->start;
	int maps = maps_open();
	struct vma v;
	void *p;

	if (maps < 0)
		return fail(ENOMEM);
	if (r->leave && !can_leave(r)) {
		maps_close(maps);
		return fail(ENOMEM);
	}
	p = real.mmap((void *)(fixed ? target : 0), new_len, READ_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | (fixed ? MAP_FIXED : 0), -1, 0);
	if (p == MAP_FAILED) {
		maps_close(maps);
		return fail(ENOMEM);
	}
	r->to = (uintptr_t)p;
	r->to_end = r->to + new_len;
	area_remove(r->to, r->to_end);
	if (page_reserve(r->to >> PAGE_SHIFT, r->to_end >> PAGE_SHIFT)) {
		real.munmap(p, new_len);
		maps_close(maps);
		return fail(ENOMEM);
	}
	while (at < r->start + keep && vma_find(maps, at, &v) && v.start < r->start + keep) {
		uintptr_t from = v.start > at ? v.start : at;

		at = min_addr(v.end, r->start + keep);
		move_piece(&v, from, at, r->to + (from - r->start), r->leave);
	}
	maps_close(maps);
	if (new_len > keep)
		adopt(&r->last, r->to + keep, r->to_end);
	if (r->leave)
		zero_segments(r->start, r->end);
	settle(r);
	return p;
}

/* Maps the new memory right behind the range, if that place is free. */
static bool grow_in_place(struct resize *r, size_t new_len)
{
	size_t more = new_len - (r->end - r->start);
	void *p = real.mmap((void *)r->end, more, READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (p == MAP_FAILED)
		return false;
	if (p != (void *)r->end) { /* a kernel before 4.17 takes the address for a hint */
		real.munmap(p, more);
		return false;
	}
	adopt(&r->last, r->end, r->end + more);
	r->to = r->start;
	r->to_end = r->start + new_len;
	settle(r);
	return true;
}

/* Whether the kernel, like the application, sees the range as one mapping. Breaking merged pages leaves several
 * mappings too; and a move of several may stop half-way without saying how far it came (6.17 and later). */
static bool is_one_mapping(uintptr_t start, uintptr_t end)
{
	int maps = maps_open();
	struct vma v;
	bool one;

	if (maps < 0)
		return true;
	one = vma_find(maps, start, &v) && v.start <= start && v.end >= end;
	maps_close(maps);
	return one;
}

/* Whether there is no hole in the range. */
static bool is_mapped(uintptr_t start, uintptr_t end)
{
	int maps = maps_open();
	struct vma v;

	while (start < end && maps >= 0 && vma_find(maps, start, &v) && v.start <= start)
		start = v.end;
	if (maps >= 0)
		maps_close(maps);
	return start >= end;
}

static bool is_covered(uintptr_t start, uintptr_t end)
{
	while (start < end) {
		const struct area *a = area_of(start);

		if (!a)
			return false;
		start = a->end;
	}
	return true;
}

static void *remap_pieces(struct resize *r, size_t new_len, int flags, uintptr_t target)
{
	bool fixed = flags & MREMAP_FIXED;
	bool grows = new_len > r->end - r->start, moves = fixed || r->leave || grows;

	/* If only a part is an area, the application sees several mappings too: those may move, but not grow. If the
	 * range only shrinks, the kernel checks only that something is mapped at its start. */
	if (!is_mapped(r->start, moves ? r->end : r->start + PAGE_SIZE) || (grows && !is_covered(r->start, r->end)))
		return fail(EFAULT);
	if (new_len < r->end - r->start) {
		if (real.munmap((void *)(r->start + new_len), r->end - r->start - new_len))
			return MAP_FAILED;
		area_remove(r->start + new_len, r->end);
		r->end = r->start + new_len;
	}
	if (!fixed && !r->leave) {
		if (new_len == r->end - r->start || grow_in_place(r, new_len))
			return (void *)r->start;
		if (!(flags & MREMAP_MAYMOVE))
			return fail(ENOMEM);
	}
	return move_pieces(r, new_len, target, fixed);
}

/* Whether the kernel refuses the call outright (EINVAL), before it looks at any mapping. */
static bool is_refused(uintptr_t start, size_t old_len, size_t new_len, int flags, uintptr_t target)
{
	if (flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP) || start % PAGE_SIZE || !new_len)
		return true;
	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) && !(flags & MREMAP_MAYMOVE))
		return true;
	if (flags & MREMAP_DONTUNMAP && PAGE_ALIGN_UP(old_len) != PAGE_ALIGN_UP(new_len))
		return true;
	if (!(flags & MREMAP_FIXED))
		return false;
	return target % PAGE_SIZE || (target < start + old_len && start < target + new_len);
}

static bool is_sealed(uintptr_t start, uintptr_t end)
{
	const struct area *a;

	while (start < end && (a = area_next(start)) && a->start < end) {
		if (a->flags & AREA_SEALED)
			return true;
		start = a->end;
	}
	return false;
}

void *remap(uintptr_t start, size_t old_len, size_t new_len, int flags, uintptr_t target)
{
	struct resize r = {.start = start, .end = PAGE_ALIGN_UP(start + old_len), .leave = flags & MREMAP_DONTUNMAP};
	const struct area *last;

	/* Room for settle(): to move all areas, and to cut those at the target and behind it. */
	if (area_reserve(area_count(r.start, r.end) + 4))
		return fail(ENOMEM);
	area_disown(r.start, r.end, -1);
	last = r.end > start ? area_of(r.end - 1) : NULL;
	if (last) {
		r.known = true;
		r.last = *last;
	}
	if (!is_refused(start, old_len, new_len, flags, target) &&
	    (is_sealed(r.start, r.end) || (flags & MREMAP_FIXED && is_sealed(target, PAGE_ALIGN_UP(target + new_len)))))
		return fail(EPERM);
	/* A single mapping may be of a segment: the kernel would grow it beyond the end of the file, where access gives
	 * SIGBUS. */
	if (is_refused(start, old_len, new_len, flags, target) || !area_overlaps(r.start, r.end) ||
	    (!has_segments(r.start, r.end) && is_one_mapping(r.start, r.end)))
		return remap_whole(&r, old_len, new_len, flags, target);
	return remap_pieces(&r, PAGE_ALIGN_UP(new_len), flags, target);
}

static void *remap_locked(void *addr, size_t old_len, size_t new_len, int flags, void *new_addr)
{
	uintptr_t start = (uintptr_t)addr, to;
	sigset_t saved;
	void *p;

	mmap_lock(&saved);
	p = remap(start, old_len, new_len, flags, (uintptr_t)new_addr);
	if (p != MAP_FAILED) {
		to = (uintptr_t)p;
		if (flags & MREMAP_DONTUNMAP) /* if a part of a mapping is moved, this unlocks all of the mapping
					       * (6.18) */
			learn_locks(start, PAGE_ALIGN_UP(start + old_len));
		blocks_forget(start, PAGE_ALIGN_UP(start + old_len));
		blocks_forget(to, PAGE_ALIGN_UP(to + new_len));
	}
	mmap_unlock(&saved);
	return p;
}

void *sp_mremap(void *addr, size_t old_len, size_t new_len, int flags, void *new_addr)
{
	void *p;

	heed_watchers();
	if (no_areas())
		return real.mremap(addr, old_len, new_len, flags, new_addr);
	p = remap_locked(addr, old_len, new_len, flags, new_addr);
	/* Don't repeat a call that shrinks: it may have shrunk before the rest failed. */
	if (p == MAP_FAILED && errno == ENOMEM && flags & MREMAP_MAYMOVE &&
	    (new_len > old_len ? relieve(new_len - old_len) : new_len == old_len && relieve_mappings()))
		p = remap_locked(addr, old_len, new_len, flags, new_addr);
	return p;
}

SP_EXPORT void *mremap(void *addr, size_t old_len, size_t new_len, int flags, ...)
{
	long a[1];

	ARGUMENTS(a, flags);
	return sp_mremap(addr, old_len, new_len, flags, (void *)a[0]);
}
