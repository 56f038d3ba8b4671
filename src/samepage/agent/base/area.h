/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Areas: whose memory the agent may touch. An area is a large allocation that alloc.c served, a range that the program
 * named with madvise(MADV_MERGEABLE) or samepage_register(), or, under `samepage run --memory`, memory that the program
 * mapped itself. Every libc call that changes an area passes through a wrapper (hooks/) and takes the mmap_lock, so no
 * area changes while the agent is in the middle of a step.
 *
 * Callers hold the mmap_lock unless a comment says otherwise.
 */
#ifndef SAMEPAGE_BASE_AREA_H
#define SAMEPAGE_BASE_AREA_H

#include "base/page.h"

#include <stdatomic.h>

enum area_flags {
	AREA_ALLOC = 1 << 0,	 /* served by alloc.c */
	AREA_ADVISED = 1 << 1,	 /* MADV_MERGEABLE, samepage_register, PR_SET_MEMORY_MERGE */
	AREA_LOCKED = 1 << 2,	 /* mlocked */
	AREA_EXCLUDED = 1 << 3,	 /* an application's userfaultfd, MADV_WIPEONFORK, mbind(2): left alone for good */
	AREA_UNMERGING = 1 << 4, /* an unmerge is walking it: do not merge meanwhile */
	AREA_QUIET = 1 << 5,	 /* its owner promises that nobody touches it (samepage_quiet) */
	AREA_DONTFORK = 1 << 6,	 /* advice that any new mapping in the area must be given too */
	AREA_DONTDUMP = 1 << 7,
	AREA_HUGEPAGE = 1 << 8,
	AREA_NOHUGEPAGE = 1 << 9,
	AREA_UNMERGED = 1 << 10, /* MADV_UNMERGEABLE on memory that alloc.c served: known, not mergeable */
	AREA_MAPPED = 1 << 11, /* private anonymous memory that the program mapped itself: merged if merges_mapped() */
	AREA_WIPE = 1 << 12,   /* MADV_WIPEONFORK: the agent wipes in a child what is mapped from segments here */
	AREA_SEQUENTIAL = 1 << 13,
	AREA_RANDOM = 1 << 14,
	AREA_AFRESH = 1 << 15,	 /* was not mergeable for a while, so the service has forgotten its pages */
	AREA_SEALED = 1 << 16,	 /* mseal(2): the wrappers refuse what the kernel would refuse */
	AREA_RESERVED = 1 << 17, /* mapped, not advised: reserved addresses, most of which are never used as memory */
	AREA_UNPINNED =
		1
		<< 18, /* mapped, not advised: libc's malloc may give it back, or has not taken it yet (hooks/heap.c) */
};

struct area {
	uintptr_t start, end;
	unsigned flags;
	int prot;
};

/* An ordered set of disjoint areas (area_set.c). All zeros is an empty set. A pointer to one of its areas is valid
 * until the set grows or is trimmed. */
struct area_set {
	struct area_node *node;
	uint32_t nr, capacity, fresh, unused, hint;
	size_t reserved; /* for VM_BUG_ON */
};
/* The first area that ends after `addr`, or NULL. Constant time if it is the area of the last call, or the one after
 * it. */
struct area *area_set_next(struct area_set *s, uintptr_t addr);
/* Reserves room for `more` areas. Returns 0, or -ENOMEM with nothing changed. Call it before area_set_insert(). */
int area_set_reserve(struct area_set *s, size_t more);
struct area *area_set_insert(struct area_set *s, struct area a);
void area_set_delete(struct area_set *s, struct area *a);
/* Gives memory back if there were once far more areas. */
void area_set_trim(struct area_set *s);

extern _Atomic unsigned long nr_areas; /* read without the lock: 0 means every wrapper passes straight through */
extern _Atomic bool blocks_changed;    /* something was done to memory of AREA_ALLOC that its next user would notice */
extern uint64_t areas_seq;	       /* changes whenever merge_any or the set of mergeable ranges does */
extern _Atomic bool merge_any;	       /* PR_SET_MEMORY_MERGE: all that the program maps is mergeable */
extern _Atomic bool merge_mapped;      /* the same, set by `samepage run --memory` in the constructor */
extern _Atomic bool small_allocs; /* --memory all, and not --min-alloc, has alloc.c serve allocations below 1 MiB */
bool merges_mapped(void);	  /* merge_any or merge_mapped */
/* The kernel's KSM serves the processes that have no agent (`run --engine auto`). It must not serve this one too, so
 * the kernel's own PR_SET_MEMORY_MERGE is switched off here. Set before anything is mapped. */
extern bool kernel_serves_others;

/* The first area that ends after `addr`, or NULL; valid until the set changes. */
struct area *area_next(uintptr_t addr);
bool area_overlaps(uintptr_t start, uintptr_t end);
unsigned long area_count(uintptr_t start, uintptr_t end); /* areas that overlap the range */
/* Reserves room for `more` areas. Returns 0 or -ENOMEM. As long as the lock is held afterwards, area_add() can fail
 * only if there is no room for the planes, and area_change() and area_remove() cannot fail: area_add() uses room for
 * one area, area_change() for two, area_remove() for one. */
int area_reserve(unsigned long more);
void area_trim(void);
/* Adds an area; none may overlap the range yet. Returns 0 or -errno. */
int area_add(uintptr_t start, uintptr_t end, unsigned flags, int prot);
/* If there is no room for the pieces, both mark whole areas AREA_EXCLUDED. */
void area_change(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot); /* prot -1: keep */
void area_remove(uintptr_t start, uintptr_t end);
/* Both make areas at `to` like those of the range; area_move() also takes along what is known of their pages and
 * removes the old ones. The caller has reserved room: one for each area for area_copy(), two for area_move(). */
void area_copy(uintptr_t start, uintptr_t end, uintptr_t to);
void area_move(uintptr_t old_start, uintptr_t old_end, uintptr_t new_start);
bool area_mergeable(const struct area *a);
/* Whether somebody asked for this memory to be merged, and not only for all that the program maps. A large allocation
 * counts as asked for; small ones do not, for programs make them all the time. */
bool area_named(const struct area *a);
bool any_mergeable(void);
/* Sets merge_any. Excludes memory whose planes there is no room for. */
void area_merge_any(bool on);
void area_merge_mapped(void); /* once, in the constructor */
/* Drops the areas of [start, end) that need not be remembered: not ours, not mergeable, nothing merged in them. */
void area_forget_plain(uintptr_t start, uintptr_t end);
/* Existing areas in the range get `set` and lose `clear`; the gaps between them become areas with `set`. All get
 * `prot`; where `prot` is 0, existing areas keep theirs. Returns 0 or -ENOMEM. */
int area_cover(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot);
/* Whether it is memory of alloc.c, and nothing was done to it that its next user would notice. */
bool is_plain_block(const struct area *a);
/* The flags of a new area: AREA_LOCKED under mlockall(MCL_FUTURE). */
unsigned area_new_flags(void);
void area_lock_future(bool on);
/* Call these after the range was unlocked, or all memory was: by munlockall() or in a forked child. */
void area_unlock(uintptr_t start, uintptr_t end);
void area_unlock_all(void);

/* ---- mappings inside areas (mappings.c) ---- */

/* Whether any part of the range is mapped from a segment. */
bool has_segments(uintptr_t start, uintptr_t end);
/* Maps fresh anonymous memory over every part of the range that is mapped from segments, so that a discard gives zeros
 * there. Returns 0, or -errno with nothing lost. */
int discard_segments(uintptr_t start, uintptr_t end);
/* Gives a new mapping inside `a` the advice that the rest of `a` has. */
void area_readvise(const struct area *a, uintptr_t start, uintptr_t end);
/* Finds memory in [start, end) that the books call merged but the kernel does not: somebody mapped something else there
 * by a system call that passed no wrapper. That memory is left alone for good. `maps` is an open maps file, or -1.
 * Returns whether there was any. */
bool area_disown(uintptr_t start, uintptr_t end, int maps);
/* Call after a call that failed, maybe half-way. Forgets areas of the range that are no longer mapped, and learns how
 * the rest is protected. Keeps errno. */
void area_reconcile(uintptr_t start, uintptr_t end);
/* Learns which mappings in the range are locked. Call it after a call that unlocked more than it was asked to, or that
 * failed, maybe half-way: mlock(2) and munlock(2) of several mappings may stop without a reason (Linux 6.18). Keeps
 * errno. */
void learn_locks(uintptr_t start, uintptr_t end);

#endif
