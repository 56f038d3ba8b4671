/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The verbs: look, prove, donate, merge, break, restore, rejoin. All are the agent thread's, take the mmap_lock themselves, step
 * by step, and keep what they remember from step to step for themselves; but break_ksm() and zero_segments().
 */
#ifndef SAMEPAGE_PAGES_PAGES_H
#define SAMEPAGE_PAGES_PAGES_H

#include "base/page.h"
#include "base/wire.h"

enum page_status { DONE, DIFFERENT, BUSY, GONE, NOMEM, NOMAP, REFUSED }; /* PageStatus in samepage/memory */

/* Looks from req->vpn on; fills `runs` and `sums`, both with room for the most a packet can carry. */
void scan_step(const struct sp_scan *req, struct sp_scanned *head, struct sp_run *runs, uint32_t max_runs,
	       uint64_t *sums, uint32_t max_sums);
uint64_t page_checksum(const void *page); /* hash.c */

/* Copies pages to a new sealed memfd: the descriptor, -1 when no page could be had. One PageStatus a page. */
int donate(const struct sp_area *runs, size_t n, uint8_t *status);

/* Hashes each of n pages under a key, as a proof that they are here. `proof` has SP_PROOF_SIZE bytes a page. */
void prove(const struct sp_prove *req, const uint64_t *vpns, size_t n, uint8_t *status, uint8_t *proof);
/* fd: a segment, or -1 when all extents are SP_ZERO_PAGE. Between two slices, without the lock, it calls `pause`, which says
 * whether it took calls of the application's. 0, or -errno for a segment that is none. */
int merge(int fd, const struct sp_extent *extents, size_t n, uint8_t *status, bool (*pause)(void));

/* Breaks merged pages of [start, end), at most max_pages. out->error 0: none is left in the range;
 * EAGAIN: max_pages were done. Any thread, but others than the agent's have no descriptors for it. */
void break_ksm(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out);

/* Makes islands of [start, end) anonymous memory again, where nobody holds them (for DMA, say): max_pages of them, or some more.
 * Adds to `out`. Where it stopped. */
uintptr_t restore_islands(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_restored *out);

/* If the process has nearly as many mappings as it may, joins some again that merging cut. *joined: some were. By
 * agent_call(). */
void rejoin(void *joined);

/* Any thread, with the lock. Merged pages of the range become zeros: by discard_segments(), or where no mapping can be
 * had, by writing. 0 or -EAGAIN. */
int zero_segments(uintptr_t start, uintptr_t end);

#endif
