/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The samepage agent: what has to live inside a process so that its pages can be merged.
 *
 * It decides nothing. The service (Python, at the far end of a socket) asks; the agent's one thread
 * hashes pages, copies them into sealed segments, swaps equal pages for a segment's, and breaks that
 * again. It is loaded by LD_PRELOAD or by `import samepage`.
 *
 * Whose memory. Only *areas* are ever touched (area.c): large allocations that alloc.c served itself,
 * and ranges the program named with madvise(MADV_MERGEABLE) or samepage_register(). Every libc call that
 * changes an area passes through a wrapper (wrappers.h) and takes the mmap_lock below, so that an area
 * never changes under a step of the agent's.
 *
 * Page planes. For every page of an area the agent knows three bits (planes.c):
 *
 *   PAGE_SEGMENT  the mapping here is a private mapping of a segment, not anonymous memory. Discarding
 *                 it must give zeros, so whoever discards maps anonymous memory over it first.
 *   PAGE_ISLAND   inside such a mapping, this page has a private copy: its copy-on-write was broken.
 *                 UFFDIO_MOVE does not take it from there; restore.c makes it anonymous memory again.
 *   PAGE_KNOWN    the service was told that this page is merged. Of an island: is to be told that it is not.
 *
 * Threads and descriptors. The agent thread is made by clone(2) and unknown to libc (thread.c), of which the agent uses
 * nothing that the application may replace, hold a lock of, or be inside of (system.h). The thread has a file table and
 * fs_struct of its own (CLOSE_RANGE_UNSHARE): its socket and userfaultfds cannot be closed, inherited or seen by the
 * application, and the application's are not kept open by it. Application threads never use them; what
 * needs one is handed over with agent_call().
 *
 * Memory. Nothing comes from the application's heap. All state is static or mmapped by the agent.
 *
 * Files, in the order of the story: lock.c, area.c, area_set.c, planes.c, maps.c (whose memory, and what is known of it);
 * in front of libc (wrappers.h): alloc.c (the malloc family), blocks.c and block_set.c (its large blocks), mmap.c, mremap.c, madvise.c,
 * relief.c and rejoin.c (what goes when the application is refused memory, or mappings), attach.c, fork.c (processes and threads), exits.c (what the kernel writes when one ends), identity.c (users), sanitizer.c and seccomp.c (who is left alone) and wrappers.c (the rest); check.c (a build that checks
 * all that); uffd.c, populate.c and holders.c (the kernel's calls, one function each), window.c (where the agent maps), scan.c and hash.c (look and
 * hash), donate.c, merge.c, swap.c, protect.c and home.c (donate and merge), unstopped.c (without being stopped), break.c (unmerge), restore.c (islands become memory like any
 * other), headroom.c and memcg.c (is there memory?); thread.c, call.c, descriptors.c, peer.c, wire.c, serve.c and
 * api.c (peer.h: the thread, and who speaks to it), and system.c under all.
 */
#ifndef SAMEPAGE_AGENT_H
#define SAMEPAGE_AGENT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

#define SP_EXPORT __attribute__((visibility("default")))
#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PAGE_ALIGN_DOWN(x) ((uintptr_t)(x) & ~(PAGE_SIZE - 1))
#define PAGE_ALIGN_UP(x) PAGE_ALIGN_DOWN((uintptr_t)(x) + PAGE_SIZE - 1)
#define SECTION_MAX 512UL /* pages that are swapped under one hold of the lock: one PMD */
#define WINDOW (SECTION_MAX * PAGE_SIZE)
/* Beyond every address of which the planes know: user addresses are below it, unless a program asks for others by hint. */
#define ADDRESS_END (1UL << 48)
#define VIEW_WINDOW (4 * WINDOW)
#define VIEW_SPACE (VIEW_WINDOW + WINDOW) /* and a page behind it that no segment has */
#define COPY_WINDOW (8 * WINDOW)

static inline uintptr_t min_addr(uintptr_t a, uintptr_t b)
{
	return a < b ? a : b;
}

/* ---- a build that checks itself (check.c) ------------------------------------------------------- */

#ifdef SAMEPAGE_CHECK
_Noreturn void check_failed(const char *line);
#define VM_BUG_LINE_(file, line, what) "samepage: " file ":" #line ": " what "\n"
#define VM_BUG_LINE(file, line, what) VM_BUG_LINE_(file, line, what)
#define VM_BUG_ON(wrong)                                                                                               \
	do {                                                                                                           \
		if (wrong)                                                                                             \
			check_failed(VM_BUG_LINE(__FILE__, __LINE__, #wrong));                                         \
	} while (0)
/* Before the lock is let go: areas and planes are as they must be, and as the kernel has it. */
void check_books(void);
/* The agent thread, between two requests: no page of the application's is in a window. */
void check_windows(void);
#else
#define VM_BUG_ON(wrong) ((void)sizeof(!(wrong)))
static inline void check_books(void)
{
}
static inline void check_windows(void)
{
}
#endif

/* ---- the real libc (wrappers.c) ---------------------------------------------------------------- */

/* The functions we stand in front of, as the next object in the search order has them; mmap to madvise, prctl, ioctl and
 * syscall: the kernel's, by the instruction. */
struct real {
	void *(*malloc)(size_t);
	void (*free)(void *);
	void *(*calloc)(size_t, size_t);
	void *(*realloc)(void *, size_t);
	int (*posix_memalign)(void **, size_t, size_t);
	void *(*aligned_alloc)(size_t, size_t);
	void *(*memalign)(size_t, size_t);
	size_t (*malloc_usable_size)(void *);
	int (*malloc_trim)(size_t);
	int (*mallopt)(int, int);
	void *(*mmap)(void *, size_t, int, int, int, off_t);
	int (*munmap)(void *, size_t);
	void *(*mremap)(void *, size_t, size_t, int, ...);
	int (*mprotect)(void *, size_t, int);
	int (*madvise)(void *, size_t, int);
	int (*mlock)(const void *, size_t);
	int (*munlock)(const void *, size_t);
	int (*mlockall)(int);
	int (*munlockall)(void);
	int (*prctl)(int, ...);
	int (*ioctl)(int, unsigned long, ...);
	long (*syscall)(long, ...);
	pid_t (*_Fork)(void);
	int (*clone)(int (*)(void *), void *, int, void *, ...);
	int (*unshare)(int);
	int (*setns)(int, int);
};
extern struct real real;

/* Fills `real`. Safe to call from anywhere, also from inside malloc while dlsym runs. */
void real_init(void);

/* ---- areas and their lock (area.c, lock.c) --------------------------------------------------------- */

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

/* The address-space lock. An application thread takes it with all signals blocked, since a handler may
 * call mprotect() too. The agent thread yields it between steps while anybody waits. */
void mmap_lock(sigset_t *saved);
void mmap_unlock(const sigset_t *saved);
void agent_mmap_lock(void);
void agent_mmap_unlock(void);
bool mmap_lock_contended(void);
void mmap_lock_reinit(void);	/* in a forked child */
void mmap_lock_watch(void);	/* from now on forks that pass no wrapper are noticed: there is an agent thread */
extern uint64_t mmap_lock_held; /* how often it was taken */

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

/* All need the lock. area_next: the first area that ends after `addr`, or NULL; valid until the set changes. */
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

/* ---- what is known of pages (planes.c) -------------------------------------------------------------- */

enum page_plane { PAGE_SEGMENT, PAGE_ISLAND, PAGE_KNOWN, NR_PLANES };

/* Page numbers, half-open ranges. page_reserve makes sure that later sets cannot fail. page_next finds the
 * first page in [vpn, end) whose bit equals `value`, or end. */
int page_reserve(uint64_t vpn, uint64_t end);
bool page_test(enum page_plane plane, uint64_t vpn);
void page_set(enum page_plane plane, uint64_t vpn, uint64_t end, bool value);
uint64_t page_next(enum page_plane plane, uint64_t vpn, uint64_t end, bool value);
void page_forget_known(void);				 /* nothing is known to the service any more */
void page_tell_islands(uint64_t vpn, uint64_t end);	 /* it is to be told of islands here that it may not know of */
void page_move(uint64_t vpn, uint64_t end, uint64_t to); /* mremap: bits travel, KNOWN does not */

/* ---- mappings inside areas (area.c) ----------------------------------------------------------------- */

/* Maps fresh anonymous memory over whatever part of the range is mapped from segments, so that a discard
 * gives zeros there. Needs the lock. 0, or -errno with nothing lost. */
int discard_segments(uintptr_t start, uintptr_t end);
/* Notes how much memory the machine has: what is larger is no memory that the program will use. (mmap.c) */
void mmap_note_memory(void);
/* What a new area starts with: AREA_LOCKED under mlockall(MCL_FUTURE). (mmap.c) */
unsigned area_new_flags(void);
/* Gives a new mapping inside `a` the advice that its neighbours have. */
void area_readvise(const struct area *a, uintptr_t start, uintptr_t end);

/* ---- the kernel's calls (uffd.c); the agent thread only ------------------------------------------ */

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
#define KERNEL_CLOSED                                                                                                  \
	((struct kernel){.move = -1, .wp = -1, .pagemap = -1, .mem = -1, .maps = -1, .overcommit = -1, .schedstat = -1})

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
void prefer_node(int node); /* for what this thread allocates; -1: as before the first such call */
int uffd_register(int uffd, uintptr_t start, uintptr_t len, uint64_t mode);
int uffd_unregister(int uffd, uintptr_t start, uintptr_t len);
/* The same for what was registered to keep threads away, where it may not fail: rather is all of it closed, for good. */
void uffd_release(int *uffd, uintptr_t start, uintptr_t len);
/* Whether all of the range still is registered with `move`, which can be wrong if another userfaultfd follows writes there. */
bool uffd_holds(uintptr_t start, uintptr_t len);
int uffd_protect(uintptr_t start, uintptr_t len, bool on);
void uffd_wake(int uffd, uintptr_t start, uintptr_t len);
int uffd_move(uintptr_t dst, uintptr_t src, uintptr_t len); /* 0, or -errno: believe neither, read the pagemap */
int uffd_copy(uintptr_t dst, uintptr_t src, uintptr_t len);
/* Faults in private copies of a range that may be written, changing no byte; tries again while the kernel backs out, and only
 * then. Any thread (populate.c). 0 or an errno: ENOMEM or EFAULT. */
int populate_write(uintptr_t start, uintptr_t len);
/* Page migration, which tells whether somebody holds a page (holders.c). Leaves a memory policy behind, for unmigrated() to
 * take back. 0: nobody else holds a page of the range; EIO: somebody does; or another errno. */
int migrate(uintptr_t start, uintptr_t len);
void unmigrated(uintptr_t start, uintptr_t len);
/* Whether it really tells: of a private page of a file, and of anonymous memory. Asked once. */
bool migration_tells(void);
/* Of a part of a huge page it does not. Whether this process never had any; where the program begins, and later. */
void note_page_size(void);
bool only_small_pages(void);
void note_huge_pages(void);		    /* there can be some from now on */
void track(uintptr_t start, uintptr_t end); /* follow writes to anonymous memory here from now on */
void untrack(uintptr_t start, uintptr_t end);

/* ---- the windows (window.c); the agent thread only ------------------------------------------------ */

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

/* ---- mappings --------------------------------------------------------------------------------------- */

/* What /proc/self/maps says of one mapping. */
struct vma {
	uintptr_t start, end;
	uint64_t offset, ino; /* offset in bytes */
	uint64_t dev;	      /* as /proc/self/maps has it: of 32 bits each */
	bool read, write, exec, shared;
};
/* The device of segments, as soon as one was merged with. */
extern uint64_t segment_dev;
static inline bool vma_is_segment(const struct vma *v)
{
	return v->ino && v->dev == segment_dev && !v->shared;
}
/* Leaves alone for good what the books have for merged in [start, end), but the kernel has not: somebody mapped something else
 * there by a system call that passed no wrapper. Needs the lock. Whether there was any. */
bool area_disown(uintptr_t start, uintptr_t end);
/* The first mapping that ends after `addr`; false when there is none. `file` is an open /proc/self/maps. Needs the lock. */
bool vma_find(int file, uintptr_t addr, struct vma *out);
void vma_forget(void); /* an open file is another from now on */
/* Under the lock. If nobody held it since it was last held here, no mapping changed that vma_find() is asked for. */
void vma_resume(void);
/* How many mappings the process has; *segments: of them of segments. */
unsigned long vma_count(unsigned long *segments);

/* The process is, or was, a virtual machine's (KVM): whatever becomes of its mappings its guest has to be told. */
extern _Atomic bool has_guest;

/* ---- the verbs ------------------------------------------------------------------------------------ */

extern struct sp_welcome settings;
extern const uint8_t zero_page[PAGE_SIZE];

/* Looks from req->vpn on; fills `runs` and `sums`, both with room for the most a packet can carry. */
void scan_step(const struct sp_scan *req, struct sp_scanned *head, struct sp_run *runs, uint32_t max_runs,
	       uint64_t *sums, uint32_t max_sums);
/* The next look is to be at everything, for something became of pages that no fault of the application's tells of. */
void scan_disturb(void);
uint64_t page_checksum(const void *page); /* hash.c */

/* A memfd, as vm.memfd_noexec=2 wants it; or -1. */
int new_memfd(void);
/* Copies pages to a new sealed memfd: the descriptor, -1 when no page could be had. One PageStatus a page. */
int donate(const struct sp_area *runs, size_t n, uint8_t *status);

enum page_status { DONE, DIFFERENT, BUSY, GONE, NOMEM, NOMAP, REFUSED }; /* PageStatus in samepage/memory */
/* Hashes each of n pages under a key, as a proof that they are here (prove.c). `proof` has SP_PROOF_SIZE bytes a page. */
void prove(const struct sp_prove *req, const uint64_t *vpns, size_t n, uint8_t *status, uint8_t *proof);
/* fd: a segment, or -1 when all extents are SP_ZERO_PAGE. 0, or the errno for a segment that is none. */
int merge(int fd, const struct sp_extent *extents, size_t n, uint8_t *status);

/* Breaks merged pages of [start, end), at most max_pages. out->error 0: none is left in the range;
 * EAGAIN: max_pages were done. */
void break_ksm(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out);
/* The same for any thread: on the agent thread, or where there is none, here and now. */
void unmerge_range(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out);

/* Makes islands of [start, end) anonymous memory again, where nobody holds them (for DMA, say): max_pages of them, or some more.
 * Adds to `out`. Where it stopped. The agent thread only. */
uintptr_t restore_islands(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_restored *out);

/* If the process has nearly as many mappings as it may, joins some again that merging cut (rejoin.c). *joined: some were. The
 * agent thread only, by agent_call(). */
void rejoin(void *joined);

/* Bytes this process could still be given before anybody would have to be killed: the least over its
 * memory cgroup, every ancestor, and MemAvailable. Needs the lock, for its buffers' sake. */
uint64_t headroom(bool with_swap);
/* Whether the last look found 0 because something that may hold a limit could not be read. Needs the lock. */
bool headroom_unknown(void);
/* Whether `bytes` can be taken and `leave` bytes are left then. Where there is plenty it does not look every time.
 * Needs the lock. */
bool room_for(uint64_t bytes, uint64_t leave);
/* The same for what merging takes before it gives more back, and looking, which is for nothing else: half of the reserve is
 * left, so that memory that an unmerge left scarce can be merged again. */
bool room_to_merge(uint64_t bytes);
unsigned long online_cpus(void);

/* ---- the thread (peer.h) --------------------------------------------------------------------------- */

/* Runs fn(arg) on the agent thread and waits. 0, or -ENOTCONN when there is no agent thread. */
int agent_call(void (*fn)(void *arg), void *arg);
/* There is something to merge: start the agent thread if there is a service to join and none yet. */
void agent_start(void);
/* The same for memory of a process that was told to merge all of it by whoever started it, and names none: so many bytes were
 * mapped or made writable. Small processes are not worth a thread, and some look whether they have only one: Chromium's
 * zygote, which maps 5 MiB. */
void agent_start_unnamed(size_t bytes);
void agent_stop(void);	 /* ends the thread; merged memory stays merged */
void agent_retire(void); /* the same, for good */
/* Around a call that the thread must not be there for, or would be left behind by: what agent_leave says agent_return is
 * told. */
bool agent_leave(void);
void agent_return(bool left);
void agent_fork_child(bool may_start_thread);
bool on_agent_thread(void);
uint64_t thread_cpu_ns(void);
void agent_configure(const char *path); /* the service to join (SAMEPAGE_SOCKET), from the constructor */
bool agent_configured(void);		/* there is a service to join, or one was attached */

/* The C API (api.c). samepage_unmerge: at most max_pages; -EAGAIN: that many are done, call again, or call
 * with max_pages 0 to leave it at that; 0: nothing in the range is merged or mergeable any more; else -errno
 * and the range stays registered. It serves MADV_UNMERGEABLE too. */
int samepage_register(void *addr, size_t len);
int samepage_unmerge(void *addr, size_t len, size_t max_pages, struct sp_broken *out);

#endif
