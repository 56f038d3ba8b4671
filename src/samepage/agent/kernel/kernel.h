/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel's calls, one function each, with what each kernel version can do: kernel.c (what there is), pagemap.c, uffd.c,
 * nodes.c, populate.c.
 *
 * All are the agent thread's, which alone has the descriptors, but populate_write(). It needs no lock for `struct kernel`: only
 * the thread writes it, and others read of it what cannot hurt (samepage_mode()).
 */
#ifndef SAMEPAGE_KERNEL_KERNEL_H
#define SAMEPAGE_KERNEL_KERNEL_H

#include "base/page.h"
#include "base/wire.h"

#include <sys/mman.h>

struct kernel {
	int move;	 /* userfaultfd with MOVE, and WP_ASYNC where tracking; -1 */
	int wp;		 /* userfaultfd with synchronous write-protection; -1 */
	int pagemap;	 /* /proc/self/pagemap */
	int mem;	 /* /proc/self/mem */
	int maps;	 /* /proc/self/maps */
	int overcommit;	 /* /proc/sys/vm/overcommit_memory */
	int schedstat;	 /* /proc/self/task/TID/schedstat of the agent thread */
	bool scan;	 /* PAGEMAP_SCAN works */
	bool numa;	 /* there is more than one node */
	bool views_stay; /* a private mapping of a file can be moved and stay behind empty (mremap, 5.13) */
	bool wp_files;	 /* `wp` takes private mappings of segments (5.19) */
	bool tracking;
	enum sp_swap swap;
	bool protects; /* it is done by write-protection */
	/* Four windows, the only places where the agent thread maps anything: of WINDOW bytes, but VIEW_WINDOW and
	 * COPY_WINDOW. */
	uintptr_t scratch; /* registered with `move`, always empty between requests */
	uintptr_t huge;	   /* another one, which only ever holds a whole huge page; 0: none */
	uintptr_t view;	   /* of a segment, to compare with */
	uintptr_t copy;	   /* where a break prepares private copies */
};
extern struct kernel kernel;
/* How often the kernel is asked again at most, where it says that it could not just now. */
#define KERNEL_TRIES 64
#define KERNEL_CLOSED                                                                                                  \
	((struct kernel){.move = -1, .wp = -1, .pagemap = -1, .mem = -1, .maps = -1, .overcommit = -1, .schedstat = -1})

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* 6.1 */
#endif

/* include/uapi/linux/fs.h, Linux 6.7 */
enum {
	PAGE_IS_WRITTEN = 1 << 1,
	PAGE_IS_FILE = 1 << 2,
	PAGE_IS_PRESENT = 1 << 3,
	PAGE_IS_SWAPPED = 1 << 4,
	PAGE_IS_PFNZERO = 1 << 5,
	PAGE_IS_HUGE = 1 << 6,
};

struct page_region {
	uint64_t start, end, categories;
};

/* PAGE_IS_WRITTEN and nothing else is a quick look, some 2 ns a page instead of 40, for the kernel need not look at any
 * page; it takes absent pages for written, and says of no region what else it is. */
struct pm_walk {
	uint64_t must, must_not; /* categories a page needs, and may not have */
	uint64_t any;		 /* it needs one of these, unless 0 */
	uint64_t max_pages;	 /* stop after that many; 0: no limit */
	bool protect;		 /* write-protect what is found: the next walk finds what was written since */
};

int kernel_open(int dev_userfaultfd); /* dev: a descriptor of /dev/userfaultfd from the service, or -1 */
void kernel_close(void);
/* Regions of [start, end) that match, at most n; *walked says how far it came. Number of regions or -errno. */
int pagemap_walk(uintptr_t start, uintptr_t end, const struct pm_walk *w, struct page_region *v, int n,
		 uintptr_t *walked);
/* What stands at each of n <= SECTION_MAX pages, from /proc/self/pagemap. FORKED: anonymous, but other
 * processes map it too (bit 56 is clear). */
enum page_kind { PAGE_ABSENT, PAGE_FILE, PAGE_OWN, PAGE_FORKED };
int page_kinds(uintptr_t start, size_t n, uint8_t *kind);
/* Whether something stands at each of n <= SECTION_MAX pages, swapped out ones too. */
int page_holds(uintptr_t start, size_t n, bool *holds);
/* The NUMA node of each of n <= SECTION_MAX pages that are present. 0 or -errno: the kernel does not tell. */
int page_nodes(uintptr_t start, size_t n, int *node);
bool several_nodes(void);
void prefer_node(int node); /* for what this thread allocates; -1: as before the first such call */
int uffd_register(int uffd, uintptr_t start, uintptr_t len, uint64_t mode);
int uffd_unregister(int uffd, uintptr_t start, uintptr_t len);
/* The same for what was registered to keep threads away, where it may not fail: rather is all of it closed, for good. */
void uffd_release(int *uffd, uintptr_t start, uintptr_t len);
/* Notes the threads that sleep at pages before `end`, and are about to be woken, as held up since then. The kernel tells of each
 * once, so those that sleep behind it are kept in mind until their turn comes. Needs the lock. */
void uffd_count_sleepers(int uffd, uintptr_t end, uint64_t since);
/* Whether all of the range still is registered with `move`, which can be wrong if another userfaultfd follows writes there. */
bool uffd_holds(uintptr_t start, uintptr_t len);
int uffd_protect(uintptr_t start, uintptr_t len, bool on);
void uffd_wake(int uffd, uintptr_t start, uintptr_t len);
int uffd_move(uintptr_t dst, uintptr_t src, uintptr_t len); /* 0, or -errno: believe neither, read the pagemap */
int uffd_copy(uintptr_t dst, uintptr_t src, uintptr_t len);
/* A memfd, as vm.memfd_noexec=2 wants it; or -errno. */
int new_memfd(void);
/* Faults in private copies of a range that may be written, changing no byte; tries again while the kernel backs out, and only
 * then. Any thread (populate.c). 0, -ENOMEM or -EFAULT. */
int populate_write(uintptr_t start, uintptr_t len);
void track(uintptr_t start, uintptr_t end); /* follow writes to anonymous memory here from now on */
void untrack(uintptr_t start, uintptr_t end);

#endif
