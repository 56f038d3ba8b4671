/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The verbs: look, prove, donate, merge, break, restore, rejoin. All are for the agent thread, take the mmap_lock
 * themselves, step by step, and remember privately what they need from step to step. Exceptions: break_ksm() and
 * zero_segments().
 */
#ifndef SAMEPAGE_PAGES_PAGES_H
#define SAMEPAGE_PAGES_PAGES_H

#include "base/page.h"
#include "base/wire.h"

enum page_status { DONE, DIFFERENT, BUSY, GONE, NOMEM, NOMAP, REFUSED }; /* PageStatus in samepage/memory */

/* Looks at pages from req->vpn on. Fills `runs` and `sums`, which both have room for as much as a packet can carry. */
void scan_step(const struct sp_scan *req, struct sp_scanned *head, struct sp_run *runs, uint32_t max_runs,
	       uint64_t *sums, uint32_t max_sums);
/* From now on, looks leave out pages that are shared with a parent or a child. */
void scan_forked(void);
uint64_t page_checksum(const void *page); /* hash.c */

/* Copies pages to a new sealed memfd. Returns its descriptor; -1: no page could be copied. Sets one PageStatus a
 * page. */
int donate(const struct sp_area *runs, size_t n, uint8_t *status);

/* Hashes each of n pages under a key, as a proof that they are here. `proof` has SP_PROOF_SIZE bytes a page. */
void prove(const struct sp_prove *req, const uint64_t *vpns, size_t n, uint8_t *status, uint8_t *proof);
/* fd: a segment, or -1 if all extents are SP_ZERO_PAGE. Between two slices, which are short then, it calls `pause`
 * without the lock, unless that is NULL; calls of the application's may be taken there. Returns 0, or -errno if fd is
 * not a segment. */
int merge(int fd, const struct sp_extent *extents, size_t n, uint8_t *status, void (*pause)(void));
extern unsigned long views_given; /* how many mappings merge() has made */

/* Breaks merged pages of [start, end), at most max_pages. out->error is 0: none is left in the range; EAGAIN: max_pages
 * were broken. For any thread; but others than the agent's have no descriptors to restore pages with. */
void break_ksm(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out);

/* Makes islands of [start, end) anonymous memory again, if nobody holds them (for DMA, say): max_pages of them, or a
 * few more. Adds to `out`. Returns where it stopped. */
uintptr_t restore_islands(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_restored *out);

/* If the process has nearly as many mappings as it may have, joins some that merging cut. *joined: whether it joined
 * any. Called by agent_call(). */
void rejoin(void *joined);

/* Makes merged pages of the range zeros: by discard_segments(), or if no mapping can be had, by writing. For any
 * thread, with the lock. Returns 0 or -EAGAIN. */
int zero_segments(uintptr_t start, uintptr_t end);

#endif
