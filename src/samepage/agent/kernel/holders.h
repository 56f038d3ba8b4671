/* SPDX-License-Identifier: Apache-2.0 */
/* Who holds a page. For the agent thread only; any thread may call note_page_size() and note_huge_pages(). */
#ifndef SAMEPAGE_KERNEL_HOLDERS_H
#define SAMEPAGE_KERNEL_HOLDERS_H

#include "base/page.h"

/* Migrates the pages of a range, which shows whether somebody holds one. Returns 0: nobody else holds a page; -EIO:
 * somebody does; or another -errno. Leaves a memory policy on the range, which unmigrated() takes off. */
int migrate(uintptr_t start, uintptr_t len);
void unmigrated(uintptr_t start, uintptr_t len);
/* Whether migration really shows that a page is held, both for a private page of a file and for anonymous memory. Tried
 * once. */
bool migration_tells(void);
/* Whether there may be a file system that reads into pages without pinning them, so that no move notices it. */
bool reads_unpinned(void);
/* Migration shows nothing about a part of a huge page. only_small_pages(): whether this process never had huge pages.
 * Call note_page_size() when the program begins. */
void note_page_size(void);
bool only_small_pages(void);
void note_huge_pages(void); /* there can be some from now on */

#endif
