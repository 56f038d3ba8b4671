/* SPDX-License-Identifier: Apache-2.0 */
/* The part of making a call in another's name that depends on x86-64 (inject.h). */
#define _GNU_SOURCE
#include "inject.h"

#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#define USER_CS 0x33	      /* the code segment of 64-bit code */
#define USER_END (1ULL << 56) /* with five levels of page tables; the vsyscall page lies above it */
#define SYSCALL_LEN 2
#define RESTART_NO_INTR 513
#define RESTART_BLOCK 516

#define AT(name) offsetof(struct user_regs_struct, name)

const struct registers arch_registers = {
	.pc = AT(rip),
	.sp = AT(rsp),
	.nr = AT(rax),
	.arg = {AT(rdi), AT(rsi), AT(rdx), AT(r10), AT(r8), AT(r9)},
	.result = AT(rax),
	.interrupted = AT(orig_rax),
	.back = NOWHERE,
};

const struct code arch_syscall_ret = {{0x0f, 0x05, 0xc3}, 3};
/* mov $15, %rax; syscall, as glibc and musl write it, and as Go does */
const struct code arch_sigreturn[] = {
	{{0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05}, 9},
	{{0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05}, 7},
};
const size_t arch_alignment = 1;
const size_t arch_red_zone = 128;

/* Whether the kernel saves vectors by XSAVE, and not by FXSAVE as it does on older processors, and with "noxsave". */
static bool has_xsave(void)
{
	unsigned int a, b, c, d;

	return __get_cpuid(1, &a, &b, &c, &d) && c & bit_OSXSAVE;
}

int arch_fp_regset(void)
{
	return has_xsave() ? NT_X86_XSTATE : NT_PRFPREG;
}

/* ---- where it was stopped --------------------------------------------------------------------------- */

static bool in_syscall(const struct user_regs_struct *regs)
{
	return (int64_t)regs->orig_rax >= 0;
}

/* Whether the kernel is going to make the call again when the thread goes on. */
static bool restarts(const struct user_regs_struct *regs)
{
	int64_t ret = -(int64_t)regs->rax;

	return in_syscall(regs) &&
	       (ret == RESTART_SYSCALL || ret == RESTART_NO_INTR || ret == RESTART_NO_HANDLER || ret == RESTART_BLOCK);
}

enum inject_error arch_check(struct tracee *t)
{
	struct user_regs_struct *regs = &t->regs;
	unsigned char insn[SYSCALL_LEN];

	if (regs->cs != USER_CS)
		return INJECT_OTHER_BITS;
	if (regs->rip >= USER_END || regs->rsp >= USER_END)
		return INJECT_BUSY; /* in a vsyscall, which the kernel carries out for it */
	if (is_dispatched(t))
		return INJECT_DISPATCHED;
	if (in_syscall(regs)) {
		/* If the call was made by `int $0x80`, the kernel has forgotten that by the time the thread goes on
		 * from our call. */
		if (!read_from(t, regs->rip - SYSCALL_LEN, insn, sizeof(insn)) || insn[0] != 0x0f || insn[1] != 0x05)
			return INJECT_BUSY;
		if ((int64_t)regs->rax == -EINTR && may_be_made_again((int64_t)regs->orig_rax))
			regs->rax = (uint64_t)-RESTART_NO_HANDLER;
	} else if (in_section(t)) {
		return INJECT_BUSY;
	}
	return INJECT_OK;
}

/* The kernel decides only when the thread goes on, by orig_rax and rax, what becomes of the call. */
bool arch_stop_again(const struct tracee *t)
{
	(void)t;
	return false;
}

void arch_restore(struct tracee *t)
{
	(void)t;
}

/* ---- the frame -------------------------------------------------------------------------------------- */

#define FXSAVE_SIZE 512
#define SW_RESERVED 464 /* in the FXSAVE area: struct _fpx_sw_bytes */
#define XSTATE_BV 512	/* the first word of the XSAVE header */
#define MAGIC1 0x46505853U
#define MAGIC2 0x46505845U
#define AMX (3ULL << 17)
#define UC_FP_XSTATE 1
#define UC_SIGCONTEXT_SS 2
#define UC_STRICT_RESTORE_SS 4
#define NO_SUCH_MODE 0x7fff /* for sigaltstack(2), which then changes nothing */

struct sw_bytes {
	uint32_t magic1, extended_size;
	uint64_t xfeatures;
	uint32_t xstate_size, padding[7];
};

/* What rt_sigreturn() reads: struct rt_sigframe of arch/x86 without the siginfo. */
struct frame {
	uint64_t pretcode;
	uint64_t flags, link;
	stack_t stack;
	struct sigcontext mc;
	uint64_t mask;
};

static uint64_t xfeatures(const struct tracee *t)
{
	uint64_t mask, used;

	memcpy(&mask, t->fp + SW_RESERVED, sizeof(mask)); /* the features that the kernel has switched on */
	memcpy(&used, t->fp + XSTATE_BV, sizeof(used));
	return used & AMX ? mask : mask & ~AMX; /* the kernel accepts no tiles of a process that has not asked for
						 * them */
}

/* Length of the image of these features: up to the end of the last one. */
static uint32_t xstate_size(const struct tracee *t)
{
	uint64_t mask = xfeatures(t);
	uint32_t end = XSTATE_BV + 64, size, offset, c, d;

	if (!has_xsave())
		return FXSAVE_SIZE;
	for (unsigned int i = 2; i < 63; i++)
		if (mask >> i & 1 && __get_cpuid_count(0xd, i, &size, &offset, &c, &d) && offset + size > end)
			end = offset + size;
	return end;
}

size_t arch_frame_size(const struct tracee *t)
{
	return sizeof(struct frame) + xstate_size(t) + sizeof(uint32_t) + 64 + 16;
}

/* The number of the call to make again. A call that was interrupted twice has become restart_syscall(2), which only the
 * kernel can make again, and a return by a signal frame ends it with EINTR. The original number is in the code before
 * the call, where a compiler puts it: mov $nr, %eax. Its time to wait then begins anew. */
static uint64_t first_number(const struct tracee *t)
{
	unsigned char code[5];
	uint32_t nr;

	if (t->regs.orig_rax != SYS_restart_syscall)
		return t->regs.orig_rax;
	if (!read_from(t, t->regs.rip - SYSCALL_LEN - sizeof(code), code, sizeof(code)) || code[0] != 0xb8)
		return t->regs.orig_rax;
	memcpy(&nr, code + 1, sizeof(nr));
	if (nr == SYS_nanosleep || nr == SYS_clock_nanosleep || nr == SYS_poll || nr == SYS_futex)
		return nr;
	return t->regs.orig_rax;
}

/* The registers with which the thread would have gone on. If the kernel would have made a call again, the thread
 * does. */
static struct sigcontext context(const struct tracee *t, uint64_t fp)
{
	const struct user_regs_struct *r = &t->regs;
	bool again = restarts(r);

	return (struct sigcontext){
		.r8 = r->r8,
		.r9 = r->r9,
		.r10 = r->r10,
		.r11 = r->r11,
		.r12 = r->r12,
		.r13 = r->r13,
		.r14 = r->r14,
		.r15 = r->r15,
		.rdi = r->rdi,
		.rsi = r->rsi,
		.rbp = r->rbp,
		.rbx = r->rbx,
		.rdx = r->rdx,
		.rax = again ? first_number(t) : r->rax,
		.rcx = r->rcx,
		.rsp = r->rsp,
		.rip = again ? r->rip - SYSCALL_LEN : r->rip,
		.eflags = r->eflags,
		.cs = (unsigned short)r->cs,
		.__pad0 = (unsigned short)r->ss,
		.fpstate = (struct _fpstate *)fp,
	};
}

/* What says that an image at `fp` is one of XSAVE's. */
static void mark_xstate(const struct tracee *t, unsigned char *fp, uint32_t size)
{
	uint32_t magic2 = MAGIC2;
	struct sw_bytes sw = {MAGIC1, size + (uint32_t)sizeof(magic2), xfeatures(t), size, {0}};

	memcpy(fp + SW_RESERVED, &sw, sizeof(sw));
	memcpy(fp + size, &magic2, sizeof(magic2));
}

enum inject_error arch_frame(struct tracee *t, uint64_t top)
{
	uint32_t size = xstate_size(t), past = size + (uint32_t)sizeof(uint32_t);
	uint64_t fp = (top - past) & ~63ULL;
	struct frame f = {
		.pretcode = t->sigreturn,
		.flags = (has_xsave() ? UC_FP_XSTATE : 0) | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
		.stack = {.ss_flags = NO_SUCH_MODE},
		.mc = context(t, fp),
		.mask = t->mask,
	};

	if (t->fp_len < size)
		return INJECT_FAILED;
	t->frame = (fp - sizeof(f)) & ~15ULL;
	t->frame_len = (size_t)(fp - t->frame) + past;
	t->image = calloc(1, t->frame_len);
	t->before = malloc(t->frame_len);
	if (!t->image || !t->before)
		return INJECT_FAILED;
	memcpy(t->image, &f, sizeof(f));
	memcpy(t->image + (fp - t->frame), t->fp, size);
	if (has_xsave())
		mark_xstate(t, t->image + (fp - t->frame), size);
	return INJECT_OK;
}
