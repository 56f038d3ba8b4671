/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The constructor, which sets up the agent, and the calls that are not about memory or processes alone: prctl, ioctl,
 * and syscall(2), through which any other call may come.
 */
#include "base/real.h"
#include "base/system.h"
#include "hooks/hooks.h"
#include "kernel/holders.h"
#include "kernel/kernel.h"

#include <linux/futex.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#ifndef FUTEX_LOCK_PI2
#define FUTEX_LOCK_PI2 13 /* 5.14 */
#endif
#define MIN_ALLOC_LEAST (64UL << 10)

/* ---- prctl and ioctl ----------------------------------------------------------------------------------- */

static void filter_comes(void)
{
	heap_leave();
	agent_retire();
}

static int sp_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
{
	int err;

	need_next();
	switch (option) {
	case PR_SET_MEMORY_MERGE:
	case PR_GET_MEMORY_MERGE:
		if (!agent_configured())
			break;
		err = b || c || d || (a && option == PR_GET_MEMORY_MERGE) ? -EINVAL : 0;
		if (!err && option == PR_GET_MEMORY_MERGE)
			return merge_any;
		if (!err)
			err = sp_set_memory_merge(a);
		if (!err)
			return 0;
		errno = -err;
		return -1;
	case PR_SET_VMA:
		/* Only anonymous memory can have a name. */
		if (a == PR_SET_VMA_ANON_NAME && !no_areas() &&
		    unmerge(PAGE_ALIGN_DOWN(b), PAGE_ALIGN_UP(b + c)) == -ENOMEM) {
			errno = ENOMEM;
			return -1;
		}
		break;
	case PR_SET_THP_DISABLE:
		if (a != 1 || b)
			note_huge_pages();
		break;
	case PR_SET_SECCOMP:
		/* A filter may kill for calls that the agent needs. With NULL, the program only asks what the kernel
		 * can do. */
		if (a == SECCOMP_MODE_STRICT || b)
			filter_comes();
		break;
	}
	if (changes_identity(SYS_prctl, (long[]){option})) {
		bool left = agent_leave();
		int ret = next.prctl(option, a, b, c, d);

		agent_return(left);
		return ret;
	}
	return next.prctl(option, a, b, c, d);
}

SP_EXPORT int prctl(int option, ...)
{
	long a[4];

	ARGUMENTS(a, option);
	return sp_prctl(option, (unsigned long)a[0], (unsigned long)a[1], (unsigned long)a[2], (unsigned long)a[3]);
}

static void untrack_range(void *arg)
{
	const struct uffdio_range *range = arg;

	untrack(range->start, range->start + range->len);
}

/* The application registers the range with a userfaultfd of its own, so the agent leaves it alone from now on. Returns
 * 0; or -ENOMEM if pages there have to stay merged because there is no memory. */
static int leave_to_userfaultfd(struct uffdio_range *range)
{
	uintptr_t start = range->start, end = range->start + range->len;
	bool ours;
	sigset_t saved;

	if (no_areas() || start >= end)
		return 0;
	mmap_lock(&saved);
	ours = area_overlaps(start, end);
	area_change(start, end, AREA_EXCLUDED, 0, -1);
	mmap_unlock(&saved);
	if (!ours)
		return 0;
	if (unmerge(start, end) == -ENOMEM)
		return -ENOMEM;
	agent_call(untrack_range, range);
	return 0;
}

/* struct uffdio_move (Linux 6.8). */
struct uffd_move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define UFFD_MOVE _IOWR(UFFDIO, 0x05, struct uffd_move)

/* The application moves pages itself, which the kernel does from anonymous mappings alone, and from where the pages are in
 * their place. */
static int leave_to_move(const struct uffd_move *move)
{
	struct uffdio_range src = {move->src, move->len};

	return leave_to_userfaultfd(&src);
}

static int sp_ioctl(int fd, unsigned long request, void *arg)
{
	int ret;

	need_next();
	if (request == UFFD_MOVE && is_readable(arg, offsetof(struct uffd_move, move)) && leave_to_move(arg)) {
		errno = ENOMEM;
		return -1;
	}
	if (request == UFFDIO_REGISTER && is_readable(arg, offsetof(struct uffdio_register, ioctls)) &&
	    leave_to_userfaultfd(&((struct uffdio_register *)arg)->range)) {
		errno = ENOMEM;
		return -1;
	}
	ret = next.ioctl(fd, request, arg);
	if (request == KVM_CREATE_VM && ret >= 0)
		atomic_store(&has_guest, true);
	return ret;
}

SP_EXPORT int ioctl(int fd, unsigned long request, ...)
{
	long a[1];

	ARGUMENTS(a, request);
	return sp_ioctl(fd, request, (void *)a[0]);
}

/* ---- futex ---- */

/* Operations by which the kernel itself writes the word. It does not wait for a page there (fixup_user_fault() without
 * FAULT_FLAG_ALLOW_RETRY), but says EFAULT, when nothing is done yet. */
static bool writes_futex(int op)
{
	switch (op & FUTEX_CMD_MASK) {
	case FUTEX_WAKE_OP:
	case FUTEX_LOCK_PI:
	case FUTEX_LOCK_PI2:
	case FUTEX_UNLOCK_PI:
	case FUTEX_TRYLOCK_PI:
	case FUTEX_CMP_REQUEUE_PI:
		return true;
	default:
		return false;
	}
}

static long sp_futex(const long *a)
{
	int op = (int)a[1];
	long ret = next.syscall(SYS_futex, a[0], a[1], a[2], a[3], a[4], a[5]);

	if (ret >= 0 || errno != EFAULT || !writes_futex(op) || no_areas())
		return ret;
	left_in_place((void *)a[0], sizeof(uint32_t));
	if ((op & FUTEX_CMD_MASK) == FUTEX_WAKE_OP || (op & FUTEX_CMD_MASK) == FUTEX_CMP_REQUEUE_PI)
		left_in_place((void *)a[4], sizeof(uint32_t));
	return next.syscall(SYS_futex, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ---- syscall(2) ------------------------------------------------------------------------------------------ */

SP_EXPORT long syscall(long number, ...)
{
	long a[6];

	ARGUMENTS(a, number);
	heed_watchers();
	if (watched) /* the watchers themselves call this */
		return next.syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	switch (number) {
	case SYS_mmap:
		return (long)sp_mmap((void *)a[0], (size_t)a[1], (int)a[2], (int)a[3], (int)a[4], a[5]);
	case SYS_munmap:
		return sp_munmap((void *)a[0], (size_t)a[1]);
	case SYS_mremap:
		return (long)sp_mremap((void *)a[0], (size_t)a[1], (size_t)a[2], (int)a[3], (void *)a[4]);
	case SYS_mprotect:
		return sp_mprotect((void *)a[0], (size_t)a[1], (int)a[2], -1);
	case SYS_pkey_mprotect:
		return sp_mprotect((void *)a[0], (size_t)a[1], (int)a[2], (int)a[3]);
	case SYS_madvise:
		return sp_madvise((void *)a[0], (size_t)a[1], (int)a[2]);
	case SYS_process_madvise:
		return sp_process_madvise((int)a[0], (const void *)a[1], (size_t)a[2], (int)a[3], (unsigned)a[4]);
	case SYS_mseal:
		return sp_mseal((void *)a[0], (size_t)a[1], (unsigned long)a[2]);
	case SYS_shmat:
		return (long)sp_shmat((int)a[0], (const void *)a[1], (int)a[2]);
	case SYS_brk:
		return (long)sp_brk((uintptr_t)a[0]);
	case SYS_mlock:
		return sp_mlock((void *)a[0], (size_t)a[1], 0, false);
	case SYS_mlock2:
		return sp_mlock((void *)a[0], (size_t)a[1], (unsigned)a[2], true);
	case SYS_munlock:
		return sp_munlock((void *)a[0], (size_t)a[1]);
	case SYS_mlockall:
		return sp_mlockall((int)a[0]);
	case SYS_munlockall:
		return sp_munlockall();
	case SYS_mbind:
	case SYS_set_mempolicy_home_node:
		return sp_set_policy(number, a);
	case SYS_setrlimit:
		if (!a[1]) /* EFAULT, while prlimit64() would do nothing */
			break;
		return sp_prlimit(0, (int)a[0], (void *)a[1], NULL);
	case SYS_prlimit64:
		return sp_prlimit((pid_t)a[0], (int)a[1], (void *)a[2], (void *)a[3]);
	case SYS_prctl:
		return sp_prctl((int)a[0], (unsigned long)a[1], (unsigned long)a[2], (unsigned long)a[3],
				(unsigned long)a[4]);
	case SYS_ioctl:
		return sp_ioctl((int)a[0], (unsigned long)a[1], (void *)a[2]);
	case SYS_unshare:
		return sp_unshare((int)a[0]);
	case SYS_setns:
		return sp_setns((int)a[0], (int)a[1]);
	case SYS_futex:
		return sp_futex(a);
	case SYS_set_tid_address:
		left_in_place((void *)a[0], sizeof(pid_t));
		break;
	case SYS_exit:
		leader_exits();
		break;
	case SYS_seccomp:
		if (a[0] == SECCOMP_SET_MODE_STRICT || (a[0] == SECCOMP_SET_MODE_FILTER && a[2]))
			filter_comes();
		break;
	default:
		if (changes_identity(number, a))
			return syscall_away(number, a);
		if (is_plain_fork(number, a))
			return plain_fork(number, a);
	}
	return next.syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ---- the constructor --------------------------------------------------------------------------------------- */

_Atomic bool begun;

/* Runs in every process of a tree, also in those that live for a millisecond: it starts no thread and opens no file or
 * socket. Returns whether the process has an agent, as far as is known. */
static bool set_up(void)
{
	const char *service = secure_getenv("SAMEPAGE_SOCKET"), *least = secure_getenv("SAMEPAGE_MIN_ALLOC");
	const char *memory = secure_getenv("SAMEPAGE_MEMORY"), *engine = secure_getenv("SAMEPAGE_ENGINE");
	bool all = memory && !strcmp(memory, "all"), mapped = memory && !strcmp(memory, "mapped");
	unsigned long bytes = all ? MIN_ALLOC_LEAST : MIN_ALLOC_DEFAULT;

	need_next();
	fork_look_up();
	if (!service || !*service)
		return false;
	if (sanitizer()) {
		say_left_alone(" was built with ", sanitizer());
		return false;
	}
	if (!seccomp_allows(secure_getenv("SAMEPAGE_SECCOMP")))
		return false;
	if (all || mapped)
		area_merge_mapped();
	agent_configure(service, secure_getenv("SAMEPAGE_DOMAIN"));
	mmap_note_memory();
	kernel_serves_others = engine && !strcmp(engine, "auto");
	/* Set before an exec, or by whoever started us (systemd's MemoryKSM=). */
	if (real.prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) == 1) {
		area_merge_any(true);
		if (kernel_serves_others) /* do this at once: right after an exec nothing is merged yet that the kernel
					   * would have to copy */
			real.prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0);
	}
	if (least && *least)
		bytes = strtoul(least, NULL, 10);
	else
		small_allocs = all;
	alloc_enable(bytes < MIN_ALLOC_LEAST ? MIN_ALLOC_LEAST : bytes);
	if (all)
		heap_enable();
	return true;
}

/* Allocators may have taken memory in constructors that ran before, and the wrappers noted it. */
__attribute__((constructor)) static void initialise(void)
{
	bool serves = set_up();
	sigset_t saved;

	begun = true;
	if (serves || no_areas())
		return;
	mmap_lock(&saved);
	area_remove(0, ADDRESS_END);
	mmap_unlock(&saved);
}
