/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel's calls, one function each, with what each kernel version can do: kernel.c (what there is), pagemap.c,
 * uffd.c, nodes.c, populate.c.
 *
 * All are for the agent thread, which alone has the descriptors; populate_write() is for any thread. `struct kernel`
 * needs no lock: only the agent thread writes it, and others read only what does no harm (samepage_mode()).
 */
#ifndef SAMEPAGE_KERNEL_KERNEL_H
#define SAMEPAGE_KERNEL_KERNEL_H

#include "base/page.h"
#include "base/wire.h"

#include <sys/mman.h>

struct kernel {
	int move;	 /* userfaultfd with MOVE, and with WP_ASYNC if `tracking`; -1: none */
	int wp;		 /* userfaultfd with synchronous write-protection; -1: none */
	int pagemap;	 /* /proc/self/pagemap */
	int mem;	 /* /proc/self/mem */
	int maps;	 /* /proc/self/maps */
	int overcommit;	 /* /proc/sys/vm/overcommit_memory */
	int schedstat;	 /* /proc/self/task/TID/schedstat of the agent thread */
	bool scan;	 /* PAGEMAP_SCAN works */
	bool numa;	 /* there is more than one node */
	bool views_stay; /* mremap can move a private mapping of a file and leave an empty one behind (5.13) */
	bool wp_files;	 /* `wp` takes private mappings of segments (5.19) */
	bool tracking;
	enum sp_swap swap;
	bool protects; /* pages are swapped by write-protection */
	/* Four windows, the only places where the agent thread maps anything. Their size is WINDOW bytes, except for
	 * VIEW_WINDOW and COPY_WINDOW. */
	uintptr_t scratch; /* registered with `move`, always empty between requests */
	uintptr_t huge;	   /* another scratch, which holds nothing but one whole huge page; 0: none */
	uintptr_t view;	   /* shows a segment, to compare with */
	uintptr_t copy;	   /* where a break prepares private copies */
};
extern struct kernel kernel;
/* How often at most to repeat a call that the kernel could not do just now. */
#define KERNEL_TRIES 64
#define KERNEL_CLOSED                                                                                                  \
	((struct kernel){.move = -1, .wp = -1, .pagemap = -1, .mem = -1, .maps = -1, .overcommit = -1, .schedstat = -1})

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* 6.1 */
#endif

/* include/uapi/linux/fs.h, Linux 6.7 */
enum {
	PAGE_IS_WPALLOWED = 1 << 0, /* writes are followed here, by us or by the application */
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

/* A walk that asks for PAGE_IS_WRITTEN and nothing else is quick, some 2 ns a page instead of 40, for the kernel need
 * not look at any page. It counts absent pages as written, and reports no other categories. */
struct pm_walk {
	uint64_t must, must_not; /* categories that a page must have, and must not have */
	uint64_t any;		 /* a page must have one of these, unless 0 */
	uint64_t max_pages;	 /* stop after that many; 0: no limit */
	bool protect;		 /* write-protect the pages found, so that the next walk finds those written since */
};

int kernel_open(int dev_userfaultfd); /* dev_userfaultfd: a descriptor of /dev/userfaultfd from the service, or -1 */
void kernel_close(void);
/* Finds the regions of [start, end) that match, at most n. *walked: how far it came. Returns the number of regions or
 * -errno. */
int pagemap_walk(uintptr_t start, uintptr_t end, const struct pm_walk *w, struct page_region *v, int n,
		 uintptr_t *walked);
/* What is at each of n <= SECTION_MAX pages, by /proc/self/pagemap. PAGE_FORKED: anonymous, but other processes map it
 * too (bit 56 is clear). */
enum page_kind { PAGE_ABSENT, PAGE_FILE, PAGE_OWN, PAGE_FORKED };
int page_kinds(uintptr_t start, size_t n, uint8_t *kind);
/* Whether there is a page at each of n <= SECTION_MAX places, present or swapped out. */
int page_holds(uintptr_t start, size_t n, bool *holds);
/* The NUMA node of each of n <= SECTION_MAX pages that are present. Returns 0, or -errno if the kernel does not
 * tell. */
int page_nodes(uintptr_t start, size_t n, int *node);
bool several_nodes(void);
void prefer_node(int node); /* where this thread's new pages go; -1: back to the policy before the first call */
int uffd_register(int uffd, uintptr_t start, uintptr_t len, uint64_t mode);
int uffd_unregister(int uffd, uintptr_t start, uintptr_t len);
/* Unregisters a range that was registered to keep threads away. This must not fail: if it would, it closes the whole
 * userfaultfd, for good. */
void uffd_release(int *uffd, uintptr_t start, uintptr_t len);
/* Counts the threads that sleep at pages before `end` as held up since `since`; they are about to be woken. The kernel
 * reports each thread once, so those that sleep at later pages are remembered until their turn comes. Needs the
 * lock. */
void uffd_count_sleepers(int uffd, uintptr_t end, uint64_t since);
/* Whether all of the range still is registered with `move`. The answer can be wrong if another userfaultfd follows
 * writes there. */
bool uffd_holds(uintptr_t start, uintptr_t len);
int uffd_protect(uintptr_t start, uintptr_t len, bool on);
void uffd_wake(int uffd, uintptr_t start, uintptr_t len);
int uffd_move(uintptr_t dst, uintptr_t src, uintptr_t len); /* 0 or -errno: believe neither, read the pagemap */
int uffd_copy(uintptr_t dst, uintptr_t src, uintptr_t len);
/* Makes a memfd, as vm.memfd_noexec=2 requires it. Returns it or -errno. */
int new_memfd(void);
/* Faults in private copies of a writable range without changing a byte. It tries again only while the kernel backs out
 * of the fault. For any thread (populate.c). Returns 0, -ENOMEM or -EFAULT. */
int populate_write(uintptr_t start, uintptr_t len);
void track(uintptr_t start, uintptr_t end); /* from now on, follow writes to anonymous memory here */
void untrack(uintptr_t start, uintptr_t end);

#endif
