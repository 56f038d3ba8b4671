/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The windows: the only places where the agent thread maps anything. They are that thread's, but windows_matter(), which
 * any may ask, and windows_forked().
 */
#ifndef SAMEPAGE_KERNEL_WINDOW_H
#define SAMEPAGE_KERNEL_WINDOW_H

#include "base/page.h"

#define WINDOW (SECTION_MAX * PAGE_SIZE)
#define VIEW_WINDOW (4 * WINDOW)
#define VIEW_SPACE (VIEW_WINDOW + WINDOW) /* and a page behind it that no segment has */
#define COPY_WINDOW (8 * WINDOW)

bool windows_open(void); /* maps them all. False: no memory */
void windows_close(void);
void windows_forked(void); /* in a forked child: they are the parent's */
/* Whether `move` really moves: one page of our own there and back. */
bool scratch_works(void);
/* Maps a window, or part of one, afresh: anonymous when fd is -1, else fd shared. NULL: no memory. */
void *window_reset(uintptr_t start, size_t len, int prot, int fd, off_t offset);
/* Makes the window `huge` anew, with no page table in it. */
void huge_reset(void);
/* Empties a part of the scratch. mlockall(2) locks and fills windows, too: it unlocks them where it finds that. False: what
 * was there still is. */
bool window_drop(uintptr_t start, size_t len);
/* Takes mappings that nobody needs, or gives them up, so that some are left for rejoin() when there is none. */
void window_ballast(bool on);
void windows_unlock(void);
/*
 * Puts [from, from + len) of a window, page tables and all, over whatever stands at `to`, and leaves a hole in the window: for
 * window_fill(), which takes the place again; window_lost() where it cannot, for somebody else's mapping may be there by
 * then. Since no mapping grows and nothing is charged for it, no limit can refuse this when the target is unmapped already,
 * as it can MREMAP_DONTUNMAP. 0; or -errno, with what stood at `to` still there, or (only when the kernel itself has no
 * memory left) not.
 */
int window_give(uintptr_t from, size_t len, uintptr_t to);
bool window_fill(uintptr_t start, size_t len, int prot, int fd, off_t offset);
void window_lost(void);
/* Whether RLIMIT_AS or RLIMIT_DATA may refuse a mapping, or vm.overcommit_memory=2 one that is charged for. */
bool mappings_limited(void);
bool mappings_charged(void);
/* Whether RLIMIT_AS and RLIMIT_DATA leave that much; the rest is the application's. */
bool limits_leave(uint64_t bytes);
/* Whether they would leave that much to the application if there were no windows. For any thread. */
bool windows_matter(uint64_t bytes);
bool range_mapped(uintptr_t start, size_t len); /* all of the range is mapped */

#ifdef SAMEPAGE_CHECK
/* Between two requests: no page of the application's is in a window. */
void check_windows(void);
#else
static inline void check_windows(void)
{
}
#endif

#endif
