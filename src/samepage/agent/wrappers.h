/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What stands between the application and libc. Every call that the agent has to see is answered by an sp_
 * function below; the exported wrapper of libc's name and syscall(2) both lead there. Return values and errno
 * are those of the call answered. A file a concern: alloc.c and blocks.c, mmap.c, mremap.c, madvise.c, fork.c, and
 * wrappers.c for the rest.
 */
#ifndef SAMEPAGE_WRAPPERS_H
#define SAMEPAGE_WRAPPERS_H

#include "agent.h"

#include <pthread.h>

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

extern _Atomic bool real_ready;

/* For calls of the application's that are only looked at: whoever else stands in front of libc sees them, too. The agent's
 * own go to the kernel by `real`. */
extern struct next {
	int (*prctl)(int, ...);
	int (*ioctl)(int, unsigned long, ...);
	long (*syscall)(long, ...);
	int (*chroot)(const char *);
	int (*setuid)(uid_t);
	int (*seteuid)(uid_t);
	int (*setreuid)(uid_t, uid_t);
	int (*setresuid)(uid_t, uid_t, uid_t);
	int (*setgid)(gid_t);
	int (*setegid)(gid_t);
	int (*setregid)(gid_t, gid_t);
	int (*setresgid)(gid_t, gid_t, gid_t);
	int (*setgroups)(size_t, const gid_t *);
	int (*initgroups)(const char *, gid_t);
	int (*setfsuid)(uid_t);
	int (*setfsgid)(gid_t);
	int (*capset)(void *, void *);
	int (*pthread_mutex_init)(pthread_mutex_t *, const pthread_mutexattr_t *);
	int (*pthread_mutexattr_getrobust)(const pthread_mutexattr_t *, int *);
	int (*pthread_attr_setstack)(pthread_attr_t *, void *, size_t);
} next;

static inline void need_real(void)
{
	if (__builtin_expect(!atomic_load_explicit(&real_ready, memory_order_acquire), 0))
		real_init();
}

/* Nothing is an area: no call can concern the agent. */
static inline bool no_areas(void)
{
	need_real();
	return !atomic_load_explicit(&nr_areas, memory_order_relaxed);
}

/* ---- alloc.c ---- */

/* From now on malloc serves `bytes` and more from mappings of its own. */
void alloc_enable(size_t bytes);
/* The range was given to madvise(MADV_MERGEABLE) and may hold blocks of the real allocator's. */
void alloc_note_advised(uintptr_t start, uintptr_t end);

/* ---- blocks.c: large blocks, free or given out; all need the lock ---- */

struct block;

/* The address of a new block of whole pages at a multiple of `align`, a power of two; 0 leaves it to the real allocator.
 * *dirty: so many bytes from its start may not be zero. */
uintptr_t block_new(size_t len, size_t align, size_t *dirty);
/* The block given out that starts at `p`, or NULL. Valid until the next call here. */
struct block *block_at(const void *p);
size_t block_length(const struct block *b);
void block_free(struct block *b);
/* Where it is now; 0 when it could not be resized, and is as it was. */
uintptr_t block_resize(struct block *b, size_t len);
/* The application unmapped or moved the range itself: blocks that overlap it are no longer ours. */
void blocks_forget(uintptr_t start, uintptr_t end);
/* Gives the memory of all that is free back. Whether there was any. */
bool blocks_trim(void);
/* Its addresses, too, which count against limits. */
bool blocks_release(void);
/* The application is about to be refused so many bytes, or a mapping: gives back what the agent keeps for itself and that may help
 * (relief.c). Whether it is worth another try; errno stays. Not under the lock. */
bool relieve(size_t bytes);
/* The same for a call that takes no memory, but may have to cut a mapping. */
bool relieve_mappings(void);
/* mallopt(3) */
void blocks_set(int param, size_t value);

/* ---- mmap.c ---- */

void *sp_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset);
int sp_munmap(void *addr, size_t len);
int sp_mprotect(void *addr, size_t len, int prot, int pkey);		 /* pkey -1: mprotect */
int sp_mlock(const void *addr, size_t len, unsigned flags, bool second); /* second: mlock2 */
int sp_munlock(const void *addr, size_t len);
int sp_mlockall(int flags);
int sp_munlockall(void);
long sp_set_policy(long number, const long *arg); /* mbind, set_mempolicy_home_node */
int sp_prlimit(pid_t pid, int resource, const void *to, void *old);

/* The rest need the lock. What is an area in the range gets `set` and loses `clear`; what is none becomes one with `set`. All get `prot`,
 * unless it is 0 and they have one. */
int area_cover(uintptr_t start, uintptr_t end, unsigned set, unsigned clear, int prot);
/* After a call that failed, maybe half-way: forgets areas of the range that are not mapped any more, and learns how
 * the rest is protected. Keeps errno. */
void area_reconcile(uintptr_t start, uintptr_t end);
void all_unlocked(void); /* by munlockall(), or in a forked child */

/* ---- maps.c ---- */

/* After a call that failed, maybe half-way (of several mappings, mlock(2) and munlock(2) may stop without a reason, Linux
 * 6.18), or that unlocked more than it was asked to: learns which of the mappings in the range are locked. Keeps errno. */
void learn_locks(uintptr_t start, uintptr_t end);
int maps_open(void); /* /proc/self/maps, or -1; no cancellation point, unlike open(2). Needs the lock. */
void maps_close(int file);
int vma_prot(const struct vma *v);

/* ---- attach.c ---- */

long sp_process_madvise(int fd, const void *vec, size_t n, int advice, unsigned flags);
int sp_mseal(void *addr, size_t len, unsigned long flags);
void *sp_shmat(int id, const void *addr, int flags);
/* The kernel's brk(2), which answers where the break is; and libc's functions. */
uintptr_t sp_brk(uintptr_t addr);
extern int (*real_brk)(void *);
extern void *(*real_sbrk)(intptr_t);

/* ---- mremap.c ---- */

void *sp_mremap(void *addr, size_t old_len, size_t new_len, int flags, void *new_addr);
/* The same under the lock and without a thought for alloc.c's blocks. */
void *remap(uintptr_t start, size_t old_len, size_t new_len, int flags, uintptr_t target);

/* ---- madvise.c ---- */

int sp_madvise(void *addr, size_t len, int advice);
int sp_set_memory_merge(bool on); /* 0, or -errno */
/* Breaks all merged pages of the range; takes the lock itself. 0, or -errno and the rest stays merged. */
int unmerge(uintptr_t start, uintptr_t end);
/* Needs the lock. Merged pages of the range become zeros: by discard_segments(), or where no mapping can be
 * had, by writing. 0 or -EAGAIN. */
int zero_segments(uintptr_t start, uintptr_t end);
/* Needs the lock. A merged page is in the range. */
bool has_segments(uintptr_t start, uintptr_t end);

/* ---- fork.c ---- */

/* What pthread_atfork() calls. The application's calls pass through us, so that ours is the first. */
extern int (*real_register_atfork)(void (*)(void), void (*)(void), void (*)(void), void *);

void fork_init(void);
/* In a child of a fork that passed no wrapper, as soon as it wants the lock. */
void forked_unseen(void);
/* A system call by which the process forks and the child goes on where its parent is. */
bool is_plain_fork(long number, const long *arg);
long plain_fork(long number, const long *arg); /* number -1: _Fork() */
int64_t now_ms(void);			       /* of CLOCK_MONOTONIC */
uint32_t ms_since_fork(void);		       /* UINT32_MAX: there was none, or long ago */
int sp_unshare(int flags);
int sp_setns(int fd, int type);
void leader_exits(void); /* if the calling thread is the one that leads: by the bare system call */

/* ---- exits.c ---- */

/* The kernel writes there when a thread ends: it is left where it is. */
void left_in_place(const void *p, size_t len);

/* ---- identity.c ---- */

bool changes_identity(long number, const long *arg); /* the system call would change who the process is */
long syscall_away(long number, const long *arg);     /* makes it, with the agent away meanwhile */

/* ---- sanitizer.c ---- */

const char *sanitizer(void); /* that the program was built with, or NULL */
void say_left_alone(const char *why, const char *whose);

/* Whether the filters that the process was started under are as many as were `tried` (seccomp.c); if not, it says so. Or, where the
 * program itself asks for an agent: whether none of the agent's calls is fatal. */
bool seccomp_allows(const char *tried);
bool seccomp_allows_asked(void);

#endif
