/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Areas: whose memory the agent may touch. Large allocations that alloc.c served itself, ranges that the program named with
 * madvise(MADV_MERGEABLE) or samepage_register(), and what it maps itself if it is run so. Every libc call that changes an
 * area passes through a wrapper (hooks/) and takes the mmap_lock, so that an area never changes under a step of the agent's.
 *
 * All need the mmap_lock, but where it says otherwise.
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
	AREA_UNMERGING = 1 << 4, /* an unmerge walks it: do not merge meanwhile */
	AREA_QUIET = 1 << 5,	 /* its owner vows that nobody touches it (samepage_quiet) */
	AREA_DONTFORK = 1 << 6,	 /* advice that a new mapping in the area must be given too */
	AREA_DONTDUMP = 1 << 7,
	AREA_HUGEPAGE = 1 << 8,
	AREA_NOHUGEPAGE = 1 << 9,
	AREA_UNMERGED = 1 << 10, /* MADV_UNMERGEABLE on memory of ours: known, not mergeable */
	AREA_MAPPED = 1 << 11, /* private anonymous memory that the program mapped itself: merged if merges_mapped() */
	AREA_WIPE = 1 << 12,   /* MADV_WIPEONFORK: what is a segment's here, the agent wipes in a child */
	AREA_SEQUENTIAL = 1 << 13,
	AREA_RANDOM = 1 << 14,
	AREA_AFRESH = 1 << 15,	 /* was not mergeable for a while: the service has forgotten what it was told of it */
	AREA_SEALED = 1 << 16,	 /* mseal(2): what the kernel would refuse there is refused */
	AREA_RESERVED = 1 << 17, /* mapped, not advised: addresses, of which most are not to be used as memory */
};

struct area {
	uintptr_t start, end;
	unsigned flags;
	int prot;
};

/* An ordered set of disjoint areas (area_set.c); all zeros is an empty one. A pointer to an area of it is valid until the
 * set grows or is trimmed. */
struct area_set {
	struct area_node *node;
	uint32_t nr, capacity, fresh, unused, hint;
	size_t reserved; /* for VM_BUG_ON */
};
/* The first area that ends after `addr`, or NULL. Takes no time where it was asked for last, or the one before. */
struct area *area_set_next(struct area_set *s, uintptr_t addr);
/* Room for so many more, or -ENOMEM and nothing changed. Insert needs room. */
int area_set_reserve(struct area_set *s, size_t more);
struct area *area_set_insert(struct area_set *s, struct area a);
void area_set_delete(struct area_set *s, struct area *a);
/* Gives memory back when there were far more areas once. */
void area_set_trim(struct area_set *s);

extern _Atomic unsigned long nr_areas; /* read without the lock: 0 means every wrapper passes straight through */
extern uint64_t areas_seq;	       /* changes whenever the set of mergeable ranges does, or merge_any */
extern _Atomic bool merge_any;	       /* PR_SET_MEMORY_MERGE: what the program mapped or will map is mergeable */
extern _Atomic bool merge_mapped;      /* the same, by `samepage run --memory`; set before anything is mapped */
bool merges_mapped(void);	       /* one of the two */
/* Where the kernel's KSM serves the processes that have no agent (`run --engine auto`), it is not to serve this one, too: the
 * kernel's own PR_SET_MEMORY_MERGE is off here. Set before anything is mapped. */
extern bool kernel_serves_others;

/* The first area that ends after `addr`, or NULL; valid until the set changes. */
struct area *area_next(uintptr_t addr);
bool area_overlaps(uintptr_t start, uintptr_t end);
unsigned long area_count(uintptr_t start, uintptr_t end); /* that overlap the range */
/* Room for `more` areas than there are, or -ENOMEM. Then area_add fails only for want of room for planes, and the others not
 * at all, as long as the lock is held: area_add takes room for one, area_change for two, area_remove for one. */
int area_reserve(unsigned long more);
void area_trim(void);
/* Where there is no area yet. 0 or -errno. */
int area_add(uintptr_t start, uintptr_t end, unsigned flags, int prot);
/* Without room for the pieces these two leave whole areas, excluded. */
void area_change(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot); /* prot -1: keep */
void area_remove(uintptr_t start, uintptr_t end);
/* Areas of a range where none is become areas at `to` as well; or they move there with what is known of their pages.
 * The caller reserved: for each area one, and two. */
void area_copy(uintptr_t start, uintptr_t end, uintptr_t to);
void area_move(uintptr_t old_start, uintptr_t old_end, uintptr_t new_start);
bool area_mergeable(const struct area *a);
bool any_mergeable(void);
/* Sets merge_any. Memory for which there is no room to keep books is left alone. */
void area_merge_any(bool on);
/* Drops areas of [start, end) that nothing has to be remembered of: not ours, not mergeable, nothing merged. */
void area_forget_plain(uintptr_t start, uintptr_t end);
/* What is an area in the range gets `set` and loses `clear`; what is none becomes one with `set`. All get `prot`, unless it
 * is 0 and they have one. 0 or -ENOMEM. */
int area_cover(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot);
/* What a new area starts with: AREA_LOCKED under mlockall(MCL_FUTURE). */
unsigned area_new_flags(void);
void area_lock_future(bool on);
/* The range was unlocked; or all memory, by munlockall() or in a forked child. */
void area_unlock(uintptr_t start, uintptr_t end);
void area_unlock_all(void);

/* ---- mappings inside areas (mappings.c) ---- */

/* A merged page is in the range. */
bool has_segments(uintptr_t start, uintptr_t end);
/* Maps fresh anonymous memory over whatever part of the range is mapped from segments, so that a discard
 * gives zeros there. 0, or -errno with nothing lost. */
int discard_segments(uintptr_t start, uintptr_t end);
/* Gives a new mapping inside `a` the advice that its neighbours have. */
void area_readvise(const struct area *a, uintptr_t start, uintptr_t end);
/* Leaves alone for good what the books have for merged in [start, end), but the kernel has not: somebody mapped something else
 * there by a system call that passed no wrapper. `maps` is an open maps file, or -1. Whether there was any. */
bool area_disown(uintptr_t start, uintptr_t end, int maps);
/* After a call that failed, maybe half-way: forgets areas of the range that are not mapped any more, and learns how
 * the rest is protected. Keeps errno. */
void area_reconcile(uintptr_t start, uintptr_t end);
/* After a call that failed, maybe half-way (of several mappings, mlock(2) and munlock(2) may stop without a reason, Linux
 * 6.18), or that unlocked more than it was asked to: learns which of the mappings in the range are locked. Keeps errno. */
void learn_locks(uintptr_t start, uintptr_t end);

#endif
