/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is between the application and libc. An sp_ function below answers each call that the agent has to see; both the
 * exported wrapper of libc's name and syscall(2) lead to it. Return values and errno are those of the call answered.
 * There is a file for each concern: alloc.c and blocks.c, mmap.c, mremap.c, madvise.c, fork.c and so on; wrappers.c has
 * the rest.
 */
#ifndef SAMEPAGE_HOOKS_HOOKS_H
#define SAMEPAGE_HOOKS_HOOKS_H

#include "base/area.h"
#include "base/lock.h"
#include "hooks/libc.h"
#include "thread/thread.h"

#define SP_EXPORT __attribute__((visibility("default")))

/* Newer than the headers of Debian 12 (6.1), or absent from old ones. */
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* 5.18 */
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102 /* 6.13 */
#endif
#ifndef SYS_mseal
#define SYS_mseal 462 /* 6.10 */
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41 /* 5.17 */
#define PR_SET_VMA_ANON_NAME 0
#endif
#ifndef SYS_set_mempolicy_home_node
#define SYS_set_mempolicy_home_node 450 /* 5.17 */
#endif

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67 /* 6.4 */
#define PR_GET_MEMORY_MERGE 68
#endif

/* There is no area, so no call can concern the agent. */
static inline bool no_areas(void)
{
	need_next();
	return !atomic_load_explicit(&nr_areas, memory_order_relaxed);
}

extern _Atomic bool begun; /* the constructor has run */

/* What the program does to its memory may concern the agent now or, before the constructor, later. */
static inline bool agent_may_come(void)
{
	return agent_configured() || !atomic_load_explicit(&begun, memory_order_relaxed);
}

/* ---- watched.c ---- */

#define LIBC_CODE_WORDS 2

extern _Atomic bool watched;		    /* the program hears of its unmaps by libc's code: the agent is gone */
extern uint64_t libc_code[LIBC_CODE_WORDS]; /* how munmap() began when the agent was loaded */
void watched_init(void);
void leave_to_watchers(void);

/* Call it first, without the lock, in whatever changes mappings. */
static inline void heed_watchers(void)
{
	const uint64_t *now;

	need_next();
	now = (const uint64_t *)(void *)next.munmap;
	if (__builtin_expect(now && (now[0] != libc_code[0] || now[1] != libc_code[1]), 0) &&
	    !atomic_load_explicit(&watched, memory_order_relaxed))
		leave_to_watchers();
}

/* ---- alloc.c ---- */

#define MIN_ALLOC_DEFAULT (1UL << 20)

/* From now on malloc serves blocks of `bytes` and more from mappings of its own. */
void alloc_enable(size_t bytes);
bool alloc_enabled(void);
void alloc_disable(void);
/* A block of ours, also in a process whose malloc is not ours. NULL: leave it to the real allocator. */
void *large_alloc(size_t size, bool zeroed);
size_t large_length(const void *p); /* 0: the block is not ours */
/* Returns the block's new address; NULL: it is as it was. */
void *large_resize(void *p, size_t size);
bool large_free(void *p); /* false: the block is not ours */
/* Notes that the range was given to madvise(MADV_MERGEABLE), so it may hold blocks of the real allocator. */
void alloc_note_advised(uintptr_t start, uintptr_t end);

/* ---- blocks.c: large blocks, free or given out; all need the lock ---- */

struct block;

/* Allocates a block of whole pages at a multiple of `align`, a power of two. Returns its address; 0: leave it to the
 * real allocator. *dirty: that many bytes from its start may not be zero. */
uintptr_t block_new(size_t len, size_t align, size_t *dirty);
/* The block in use that starts at `p`, or NULL. Valid until the next call here. */
struct block *block_at(const void *p);
size_t block_length(const struct block *b);
void block_free(struct block *b);
/* Returns the block's new address; 0: it could not be resized, and is as it was. */
uintptr_t block_resize(struct block *b, size_t len);
/* Call this when the application itself unmapped or moved the range: blocks that overlap it are no longer ours. */
void blocks_forget(uintptr_t start, uintptr_t end);
/* Gives back the memory of all free blocks. Returns whether there were any. */
bool blocks_trim(void);
/* The same, and their addresses, too, which count against limits. */
bool blocks_release(void);
/* Call this when the application is about to be refused `bytes`, or a mapping. Gives back what the agent keeps for
 * itself, if that may help (relief.c). Returns whether another try is worth it; errno stays. Not under the lock. */
bool relieve(size_t bytes);
/* The same, for a call that takes no memory but may have to cut a mapping. */
bool relieve_mappings(void);
/* mallopt(3) */
void blocks_set(int param, size_t value);

/* ---- heap.c: glibc's heap ---- */

#define HEAP_MAX (64UL << 30)
#define HEAP_NEVER (UINTPTR_MAX / 2 + 1)

/* Before anything is allocated, if it can be. */
void heap_enable(void);
/* Before a seccomp filter is installed, which may allow malloc no system call any more. */
void heap_leave(void);
bool is_libcs(void *function);
extern _Atomic uintptr_t heap_next_pin; /* or HEAP_NEVER */
extern _Atomic uintptr_t heap_watched;	/* the last pin but one, or the heap's start; or HEAP_NEVER: there is no pin */

/* The heap grew far enough beyond what is known to stay: `p`, of `size` bytes, which libc's malloc or calloc just returned, becomes a
 * pin. Returns the block that the program gets in its place. */
void *heap_pin(void *p, size_t size, bool zeroed);
static inline bool heap_grew(const void *p)
{
	return (uintptr_t)p - atomic_load_explicit(&heap_next_pin, memory_order_relaxed) < HEAP_MAX;
}

/* A block of the heap's end was freed, or all free memory was given back (`trimmed`): frees the pins that nothing needs any more. */
void heap_unpin(bool trimmed);
void heap_forked(void); /* in the child */
static inline bool at_heap_end(const void *p)
{
	return (uintptr_t)p - atomic_load_explicit(&heap_watched, memory_order_relaxed) < HEAP_MAX;
}

/* ---- mmap.c ---- */

void *sp_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset);
int sp_munmap(void *addr, size_t len);
int sp_mprotect(void *addr, size_t len, int prot, int pkey); /* pkey -1: mprotect */
long sp_set_policy(long number, const long *arg);	     /* mbind, set_mempolicy_home_node */
/* Notes once how much memory the machine has. Mappings larger than that are reservations, not memory. */
void mmap_note_memory(void);
/* Some calls need private copies of all pages. For merged pages that takes memory; this breaks them first, after
 * looking whether the memory is there. Returns 0, or -1 with errno ENOMEM. */
int unmerge_first(uintptr_t start, uintptr_t end);

/* ---- mlock.c ---- */

int sp_mlock(const void *addr, size_t len, unsigned flags, bool second); /* second: mlock2 */
int sp_munlock(const void *addr, size_t len);
int sp_mlockall(int flags);
int sp_munlockall(void);
int sp_prlimit(pid_t pid, int resource, const void *to, void *old);

/* ---- attach.c ---- */

long sp_process_madvise(int fd, const void *vec, size_t n, int advice, unsigned flags);
int sp_mseal(void *addr, size_t len, unsigned long flags);
void *sp_shmat(int id, const void *addr, int flags);
/* The kernel's brk(2), which returns the new break. */
uintptr_t sp_brk(uintptr_t addr);

/* ---- mremap.c ---- */

void *sp_mremap(void *addr, size_t old_len, size_t new_len, int flags, void *new_addr);
/* The same with the lock held, and without regard for alloc.c's blocks. */
void *remap(uintptr_t start, size_t old_len, size_t new_len, int flags, uintptr_t target);

/* ---- madvise.c ---- */

int sp_madvise(void *addr, size_t len, int advice);
int sp_set_memory_merge(bool on); /* 0, or -errno */
/* Breaks all merged pages of the range; takes the lock itself. Returns 0, or -errno with the rest still merged. */
int unmerge(uintptr_t start, uintptr_t end);

/* ---- fork.c ---- */

void fork_init(void);
void fork_look_up(void);
/* Whether the system call forks, with the child going on where its parent is. */
bool is_plain_fork(long number, const long *arg);
long plain_fork(long number, const long *arg); /* number -1: _Fork() */
int sp_unshare(int flags);
int sp_setns(int fd, int type);
void leader_exits(void); /* the calling thread ends by the bare system call; it may be the main thread */

/* ---- exits.c ---- */

/* Says that the kernel writes to this memory when a thread ends, so it must never be moved. */
void left_in_place(const void *p, size_t len);

/* ---- identity.c ---- */

bool changes_identity(long number, const long *arg); /* whether the system call would change who the process is */
long syscall_away(long number, const long *arg);     /* makes the call while the agent is away */

/* ---- api.c: for the program itself, bound by samepage/agent/__init__.py ---- */

int samepage_register(void *addr, size_t len);
/* Unmerges at most max_pages, and serves MADV_UNMERGEABLE too. Returns -EAGAIN: that many are done; call again, or with
 * max_pages 0 to leave it at that. 0: nothing in the range is merged or mergeable any more. Else -errno, and the range
 * stays registered. */
int samepage_unmerge(void *addr, size_t len, size_t max_pages, struct sp_broken *out);

/* ---- sanitizer.c ---- */

const char *sanitizer(void); /* the one that the program was built with, or NULL */
void say_left_alone(const char *why, const char *whose);

/* seccomp_allows(): whether the process is under exactly as many filters as were `tried` (seccomp.c); if not, it says
 * so on stderr. seccomp_allows_asked(), for a program that asks for an agent itself: whether none of the agent's calls
 * is fatal. */
bool seccomp_allows(const char *tried);
bool seccomp_allows_asked(void);

#endif
