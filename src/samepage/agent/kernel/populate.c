/* SPDX-License-Identifier: Apache-2.0 */
/* Faulting in private copies, without changing a byte. */
#include "base/real.h"
#include "base/settings.h"
#include "kernel/kernel.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define BACK_OUTS 1024 /* how often the kernel may back out of a fault before we give up */

#define OR_NOTHING FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, 0x7ff)

/*
 * Replaces MADV_POPULATE_WRITE on kernels before 5.14. futex(2) can do an atomic operation on a word of each page.
 * Setting no bit changes nothing, even while other threads write there; but it is a write, so the kernel faults the
 * page in. Unlike a write instruction it fails with an errno if it cannot. It wakes threads that wait for the word to
 * become 0x7ff, which must expect spurious wakes anyway.
 */
static int write_nothing(uintptr_t start, uintptr_t len)
{
	static uint32_t nobody; /* waits on this word */

	for (uintptr_t at = start; at < start + len; at += PAGE_SIZE)
		if (real.syscall(SYS_futex, &nobody, FUTEX_WAKE_OP_PRIVATE, 0UL, 0UL, at, OR_NOTHING) < 0)
			return -errno;
	return 0;
}

/* Whether the kernel knows MADV_POPULATE_WRITE. If it does, the call with length 0 succeeds and does nothing. */
static bool populates(void)
{
	return !(settings.flags & SP_WELCOME_LIKE_5_10) && !real.madvise((void *)zero_page, 0, MADV_POPULATE_WRITE);
}

static int populate(uintptr_t start, uintptr_t len)
{
	if (!(settings.flags & SP_WELCOME_LIKE_5_10)) {
		int err = real.madvise((void *)start, len, MADV_POPULATE_WRITE) ? -errno : 0;

		if (err != -EINVAL)
			return err;
	}
	return populates() ? -EFAULT : write_nothing(start, len);
}

int populate_write(uintptr_t start, uintptr_t len)
{
	for (int tries = 0;; tries++) {
		int err = populate(start, len);

		if (!err || err == -ENOMEM)
			return err;
		if ((err != -EINTR && err != -EAGAIN) ||
		    tries == BACK_OUTS) /* EHWPOISON: the kernel's VM_FAULT_SIGBUS */
			return -EFAULT;
		real.syscall(SYS_sched_yield);
	}
}
