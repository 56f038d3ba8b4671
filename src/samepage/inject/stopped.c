/* SPDX-License-Identifier: Apache-2.0 */
/* Where a thread was stopped: in a sequence that must not be interrupted, or in a call that says EINTR for it. */
#define _GNU_SOURCE
#include "inject.h"

#include <sys/ptrace.h>
#include <sys/syscall.h>

#define SYS_EPOLL_PWAIT2 441
#define ENTER_EXT_ARG 8 /* IORING_ENTER_EXT_ARG: the fifth argument has a timeout */

/* include/uapi/linux/ptrace.h: Linux 5.13 and 6.4. */
#define GET_RSEQ 0x420f
#define GET_DISPATCH 0x4211

struct rseq_config {
	uint64_t pointer;
	uint32_t size, signature, flags, pad;
};

struct dispatch_config {
	uint64_t mode, selector, offset, len;
};

/* What a thread announces in struct rseq while it is in a section that must not be interrupted. */
struct section {
	uint32_t version, flags;
	uint64_t start, len, abort;
};

bool in_section(const struct tracee *t)
{
	struct rseq_config config = {0};
	struct section section;
	uint64_t at;

	if (ptrace(GET_RSEQ, t->pid, sizeof(config), &config) < 0 || !config.pointer)
		return false;
	if (!read_from(t, config.pointer + 8, &at, sizeof(at)) || !at)
		return false;
	return !read_from(t, at, &section, sizeof(section)) ||
	       get_register(&t->regs, arch_registers.pc) - section.start < section.len;
}

bool is_dispatched(const struct tracee *t)
{
	struct dispatch_config dispatch = {0};

	return !ptrace(GET_DISPATCH, t->pid, sizeof(dispatch), &dispatch) && dispatch.mode;
}

/* Calls that return EINTR in a thread that was only stopped (signal(7)), although nothing was done yet, so they may be
 * made again. `timeout` is the argument that holds the time to wait, if there is one. */
static const struct {
	int64_t nr;
	int timeout;
	bool pointer;
} interrupted[] = {
	{SYS_read, -1, false},		{SYS_readv, -1, false},	     {SYS_write, -1, false},
	{SYS_writev, -1, false},	{SYS_recvfrom, -1, false}, /* with SO_RCVTIMEO */
	{SYS_recvmsg, -1, false},	{SYS_sendto, -1, false},     {SYS_sendmsg, -1, false},
	{SYS_recvmmsg, -1, false},	{SYS_sendmmsg, -1, false},   {SYS_connect, -1, false},
	{SYS_accept, -1, false},	{SYS_accept4, -1, false},    {SYS_epoll_pwait, 3, false},
	{SYS_EPOLL_PWAIT2, 3, true},	{SYS_semop, -1, false},	     {SYS_semtimedop, 3, true},
	{SYS_rt_sigtimedwait, 2, true}, {SYS_io_getevents, 4, true}, {SYS_io_uring_enter, -1, false},
#ifdef SYS_epoll_wait /* newer processors have only epoll_pwait */
	{SYS_epoll_wait, 3, false},
#endif
};

#define INTERRUPTED (sizeof(interrupted) / sizeof(*interrupted))

int timeout_of(int64_t nr, const uint64_t arg[6])
{
	if (nr == SYS_io_uring_enter && arg[3] & ENTER_EXT_ARG)
		return 4;
	for (size_t i = 0; i < INTERRUPTED; i++) {
		int n = interrupted[i].timeout;

		if (interrupted[i].nr == nr && n >= 0)
			return (interrupted[i].pointer ? arg[n] != 0 : (int32_t)arg[n] > 0) ? n : -1;
	}
	return -1;
}

bool may_be_made_again(int64_t nr)
{
	for (size_t i = 0; i < INTERRUPTED; i++)
		if (interrupted[i].nr == nr)
			return true;
	return false;
}
