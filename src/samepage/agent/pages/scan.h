/* SPDX-License-Identifier: Apache-2.0 */
/* What a look is made of: scan.c goes through the areas, look.c looks at a part of one. All of it needs the lock. */
#ifndef SAMEPAGE_PAGES_SCAN_H
#define SAMEPAGE_PAGES_SCAN_H

#include "base/area.h"
#include "base/wire.h"

#define STEP_PAGES 512UL /* hashed under one hold of the lock, or up to twice as many: 2 MiB, some 200 us */
#define NR_REGIONS 64
#define SMALL_PAGES 16UL /* areas of so many pages are walked together: for them a system call is dear */

/* The answer, as far as it is made. */
struct out {
	struct sp_run *runs;
	uint64_t *sums;
	uint32_t nruns, max_runs, nsums, max_sums;
	uint32_t flags;	 /* enum sp_scan_flags */
	bool small;	 /* the last step was at a few pages */
	uintptr_t dense; /* where the last step ended, if all its pages were hashed; else 0 */
};

static inline bool full(const struct out *o)
{
	return o->nruns == o->max_runs || o->nsums == o->max_sums;
}

/* Look at pages [vpn, end) of an area, which are anonymous memory, or all mapped from segments. Return how far they came. */
uint64_t look_at_anonymous(struct out *o, const struct area *a, uint64_t vpn, uint64_t end);
uint64_t look_at_segment(struct out *o, const struct area *a, uint64_t vpn, uint64_t end);

#endif
