/* SPDX-License-Identifier: Apache-2.0 */
/* Who holds a page; the agent thread only, but note_page_size() and note_huge_pages(). */
#ifndef SAMEPAGE_KERNEL_HOLDERS_H
#define SAMEPAGE_KERNEL_HOLDERS_H

#include "base/page.h"

/* Page migration, which tells whether somebody holds a page. Leaves a memory policy behind, for unmigrated() to
 * take back. 0: nobody else holds a page of the range; -EIO: somebody does; or another -errno. */
int migrate(uintptr_t start, uintptr_t len);
void unmigrated(uintptr_t start, uintptr_t len);
/* Whether it really tells: of a private page of a file, and of anonymous memory. Asked once. */
bool migration_tells(void);
/* Whether there may be a file system that reads into pages without pinning them, so that no move notices it. */
bool reads_unpinned(void);
/* Of a part of a huge page it does not. Whether this process never had any; where the program begins, and later. */
void note_page_size(void);
bool only_small_pages(void);
void note_huge_pages(void); /* there can be some from now on */

#endif
