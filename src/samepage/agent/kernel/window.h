/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The windows: the only places where the agent thread maps anything. Only that thread uses them, but any thread may ask
 * windows_matter(), and a forked child calls windows_forked().
 */
#ifndef SAMEPAGE_KERNEL_WINDOW_H
#define SAMEPAGE_KERNEL_WINDOW_H

#include "base/page.h"

#define WINDOW (SECTION_MAX * PAGE_SIZE)
#define VIEW_WINDOW (4 * WINDOW)
#define VIEW_SPACE (VIEW_WINDOW + WINDOW) /* and after it a page that no segment has */
#define COPY_WINDOW (8 * WINDOW)

void windows_reserve(void); /* for a thread of the program's: reserves addresses for them, if they can be had */
bool windows_open(void);    /* maps them all. False: no addresses are reserved, or there is no memory */
void windows_close(void);   /* empties them; the addresses stay reserved */
void windows_give_up(void); /* gives the addresses back */
void windows_forked(void);  /* in a forked child: the windows are the parent's */
/* Whether `move` really works: moves one page of our own. */
bool scratch_works(void);
/* Maps a window, or part of one, afresh: anonymous when fd is -1, else fd shared. NULL: no memory. */
void *window_reset(uintptr_t start, size_t len, int prot, int fd, off_t offset);
/* Maps the window `huge` anew, with no page table in it. */
void huge_reset(void);
/* Empties a part of the scratch. mlockall(2) locks and fills windows, too; if it did, this unlocks them. False: the
 * contents are still there. */
bool window_drop(uintptr_t start, size_t len);
/* Makes mappings that nobody needs, or gives them up, so that rejoin() has some when the process has none left. */
void window_ballast(bool on);
void windows_unlock(void);
/*
 * Puts [from, from + len) of a window, page tables and all, over whatever is mapped at `to`. That leaves a hole in the
 * window. window_fill() fills it again; if it cannot, because somebody else's mapping may be there by then, call
 * window_lost(). No limit can refuse this if the target is already unmapped, as limits can refuse MREMAP_DONTUNMAP,
 * since no mapping grows and nothing is charged. Returns 0; or -errno, with what was at `to` still there or, only if
 * the kernel itself has no memory left, gone.
 */
int window_give(uintptr_t from, size_t len, uintptr_t to);
bool window_fill(uintptr_t start, size_t len, int prot, int fd, off_t offset);
void window_lost(void);
/* Whether RLIMIT_AS or RLIMIT_DATA may refuse a mapping; whether vm.overcommit_memory=2 may refuse one that is
 * charged. */
bool mappings_limited(void);
bool mappings_charged(void);
/* Whether RLIMIT_AS and RLIMIT_DATA leave that much more; the rest is for the application. */
bool limits_leave(uint64_t bytes);
/* Whether they would leave that much for the application if there were no windows. For any thread. */
bool windows_matter(uint64_t bytes);
bool range_mapped(uintptr_t start, size_t len); /* whether all of the range is mapped */

#ifdef SAMEPAGE_CHECK
/* Checks between two requests that no page of the application's is in a window. */
void check_windows(void);
#else
static inline void check_windows(void)
{
}
#endif

#endif
