/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of making a call in another's name that depends on aarch64 (inject.h).
 *
 * The tracer sees a call that was interrupted only after the kernel has decided: the thread stands before the `svc`
 * again, with the arguments that it had. So what the kernel would do on other processors, when it goes on, is done here:
 *
 * - A call that waits for a time becomes restart_syscall(2), which waits for the rest. The kernel writes that number
 *   when the thread goes on from its first stop, so there is a second one (arch_stop_again()).
 * - If a handler runs before the call is made again, some calls end with EINTR (arch_restore()). Those that do so only
 *   for a handler without SA_RESTART are made again.
 * - Nothing says whether a thread that has EINTR has it from a stop. It has if /proc said that it waited in that call
 *   just before. A call that began only after that look keeps its EINTR, as after SIGSTOP and SIGCONT.
 */
#define _GNU_SOURCE
#include "inject.h"

#include <asm/ptrace.h>
#include <asm/sigcontext.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#define SVC_LEN 4
#define BTYPE (3ULL << 10) /* PSTATE after an indirect jump: the next instruction must be one that may be jumped to */

#define AT(name) offsetof(struct user_regs_struct, name)
#define X(n) (AT(regs) + (n) * sizeof(uint64_t))

const struct registers arch_registers = {
	.pc = AT(pc),
	.sp = AT(sp),
	.nr = X(8),
	.arg = {X(0), X(1), X(2), X(3), X(4), X(5)},
	.result = X(0),
	.interrupted = NOWHERE,
	.back = X(30),
};

const struct code arch_syscall_ret = {{0x01, 0x00, 0x00, 0xd4, 0xc0, 0x03, 0x5f, 0xd6}, 8}; /* svc #0; ret */
/* mov x8, #139; svc #0, with all of x8 or with its lower half */
const struct code arch_sigreturn[] = {
	{{0x68, 0x11, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4}, 8},
	{{0x68, 0x11, 0x80, 0x52, 0x01, 0x00, 0x00, 0xd4}, 8},
};
const size_t arch_alignment = 4;
const size_t arch_red_zone = 0;

int arch_fp_regset(void)
{
	return NT_PRFPREG;
}

/* ---- what a frame cannot restore -------------------------------------------------------------------- */

/* include/uapi/linux/elf.h: scalable vectors, the same in streaming mode (Linux 5.19), their matrix, and the shadow
 * stack (6.13). */
#define SVE 0x405
#define STREAMING_SVE 0x40b
#define ZA 0x40c
#define GCS 0x410

struct vectors {
	uint32_t size, max_size;
	uint16_t vl, max_vl, flags, reserved;
};

#define IN_USE 1 /* SVE_PT_REGS_SVE: more than what struct user_fpsimd_state has */

/* The first bytes of a register set; zeros if there is no such set. */
static bool get_set(const struct tracee *t, int set, void *to, size_t len)
{
	struct iovec iov = {to, len};

	memset(to, 0, len);
	return !ptrace(PTRACE_GETREGSET, t->pid, set, &iov);
}

/* Whether the thread uses vectors that are wider than those of the frame. The kernel drops them at each system call. */
static bool has_vectors(const struct tracee *t)
{
	struct vectors sve, streaming, za;

	get_set(t, SVE, &sve, sizeof(sve));
	get_set(t, STREAMING_SVE, &streaming, sizeof(streaming));
	get_set(t, ZA, &za, sizeof(za));
	return sve.flags & IN_USE || streaming.flags & IN_USE || za.size > sizeof(za);
}

static bool has_shadow_stack(const struct tracee *t)
{
	uint64_t gcs[3];

	return get_set(t, GCS, gcs, sizeof(gcs)) && gcs[0] & 1;
}

/* ---- where it was stopped --------------------------------------------------------------------------- */

static bool is_svc(const struct tracee *t, uint64_t at)
{
	unsigned char insn[SVC_LEN];

	return read_from(t, at, insn, sizeof(insn)) && !memcmp(insn, arch_syscall_ret.bytes, sizeof(insn));
}

/* Whether the thread waited in a call, before it was stopped, that ends at `pc`. */
static bool waited(const struct tracee *t, uint64_t pc)
{
	return t->waits.nr >= 0 && t->waits.pc == pc && t->waits.sp == t->regs.sp;
}

/* The first argument of the call that has just returned. The kernel keeps it, and shows it of a thread that is in a
 * call, so it is told that the thread is. */
static bool first_argument(const struct tracee *t, uint64_t *arg)
{
	int nr = (int)t->waits.nr, none = -1;
	struct iovec in = {&nr, sizeof(nr)}, out = {&none, sizeof(none)};
	struct waits now;

	if (ptrace(PTRACE_SETREGSET, t->pid, NT_ARM_SYSTEM_CALL, &in))
		return false;
	now = call_of(t->pid);
	*arg = now.arg[0];
	return !ptrace(PTRACE_SETREGSET, t->pid, NT_ARM_SYSTEM_CALL, &out) && now.nr == t->waits.nr;
}

enum inject_error arch_check(struct tracee *t)
{
	struct user_regs_struct *regs = &t->regs;
	uint64_t first;

	if (has_shadow_stack(t))
		return INJECT_NO_WAY_BACK;
	if (is_dispatched(t))
		return INJECT_DISPATCHED;
	if (in_section(t) || has_vectors(t) || regs->pstate & BTYPE)
		return INJECT_BUSY;
	t->eintr = (int64_t)regs->regs[0] == -EINTR && waited(t, regs->pc) && may_be_made_again(t->waits.nr) &&
		   first_argument(t, &first);
	if (t->eintr) {
		regs->regs[0] = first;
		regs->pc -= SVC_LEN;
	}
	return INJECT_OK;
}

bool arch_stop_again(const struct tracee *t)
{
	uint64_t nr = t->regs.regs[8];

	return (nr == SYS_nanosleep || nr == SYS_clock_nanosleep || nr == SYS_futex) && is_svc(t, t->regs.pc);
}

void arch_restore(struct tracee *t)
{
	uint64_t nr = t->regs.regs[8];
	bool until = nr == SYS_clock_nanosleep && t->regs.regs[1] & TIMER_ABSTIME;
	bool ends = t->eintr || until || nr == SYS_restart_syscall || nr == SYS_ppoll || nr == SYS_pselect6 ||
		    nr == SYS_rt_sigsuspend;

	if (ends && is_svc(t, t->regs.pc) && is_signalled(t->pid)) {
		t->regs.regs[0] = (uint64_t)-EINTR;
		t->regs.pc += SVC_LEN;
	}
}

/* ---- the frame -------------------------------------------------------------------------------------- */

#define NO_SUCH_MODE 0x7fff /* for sigaltstack(2), which then changes nothing */

/* What rt_sigreturn() reads: struct rt_sigframe of arch/arm64. */
struct frame {
	unsigned char siginfo[128];
	uint64_t flags, link;
	stack_t stack;
	uint64_t mask[16];
	struct sigcontext mc;
};

size_t arch_frame_size(const struct tracee *t)
{
	(void)t;
	return sizeof(struct frame) + 16;
}

/* The number of the call to make again. restart_syscall(2) can be made only by the kernel: after a return by a signal
 * frame it says EINTR. */
static uint64_t first_number(const struct tracee *t)
{
	if (t->regs.regs[8] == SYS_restart_syscall && waited(t, t->regs.pc + SVC_LEN))
		return (uint64_t)t->waits.nr;
	return t->regs.regs[8];
}

enum inject_error arch_frame(struct tracee *t, uint64_t top)
{
	const struct user_regs_struct *r = &t->regs;
	struct fpsimd_context fp = {.head = {FPSIMD_MAGIC, sizeof(fp)}};
	const struct user_fpsimd_state *state = (const void *)t->fp;
	struct frame *f = calloc(1, sizeof(*f));

	t->frame = (top - sizeof(*f)) & ~15ULL;
	t->frame_len = sizeof(*f);
	t->image = (unsigned char *)f;
	t->before = malloc(sizeof(*f));
	if (!f || !t->before || t->fp_len < sizeof(*state))
		return INJECT_FAILED;
	f->stack.ss_flags = NO_SUCH_MODE;
	f->mask[0] = t->mask;
	memcpy(f->mc.regs, r->regs, sizeof(f->mc.regs));
	f->mc.regs[8] = first_number(t);
	f->mc.sp = r->sp;
	f->mc.pc = r->pc;
	f->mc.pstate = r->pstate;
	memcpy(fp.vregs, state->vregs, sizeof(fp.vregs));
	fp.fpsr = state->fpsr;
	fp.fpcr = state->fpcr;
	memcpy(f->mc.__reserved, &fp, sizeof(fp)); /* zeros follow, which end the records */
	return INJECT_OK;
}
