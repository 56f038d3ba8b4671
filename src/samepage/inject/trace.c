/* SPDX-License-Identifier: Apache-2.0 */
/* Stopping a thread, having it make calls, and letting it go (inject.h). */
#define _GNU_SOURCE
#include "inject.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_NS 5000000000ULL /* how long to wait for a thread to come out of the kernel */
#define TRIES 200		  /* for a thread that is at a place where it must not be held */
#define LOOKS 20		  /* for a program's instructions */
#define STOPS 3			  /* in a row, where one does not say all */
#define SYSCALL_STOP (SIGTRAP | 0x80)
#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

static void nap(long ns)
{
	nanosleep(&(struct timespec){0, ns}, NULL);
}

/* ---- stops ------------------------------------------------------------------------------------------ */

/* Waits for the next stop of the thread. *status is waitpid()'s. */
static enum inject_error next_stop(const struct tracee *t, int *status)
{
	uint64_t until = now_ns() + PATIENCE_NS;

	for (int tries = 0;; tries++) {
		pid_t found = waitpid(t->pid, status, __WALL | __WNOTHREAD | WNOHANG);

		if (found == t->pid)
			return WIFSTOPPED(*status) ? INJECT_OK : INJECT_GONE;
		if (found < 0 && errno != EINTR)
			return INJECT_GONE;
		if (tries < 100)
			sched_yield();
		else if (now_ns() > until)
			return INJECT_SILENT;
		else
			nap(tries < 200 ? 50000 : 1000000);
	}
}

static bool is_event(int status)
{
	return status >> 16 == PTRACE_EVENT_STOP;
}

static bool is_syscall(int status)
{
	return !(status >> 16) && WSTOPSIG(status) == SYSCALL_STOP;
}

/* Why a ptrace call failed that fails only when the thread was killed, as by another thread that executes a program. */
static enum inject_error failed(void)
{
	return errno == ESRCH ? INJECT_GONE : INJECT_FAILED;
}

/* Lets the thread go on from the stop `status`, with the signal that it was stopped for. */
static enum inject_error resume(const struct tracee *t, int how, int status)
{
	bool signal = !(status >> 16) && WSTOPSIG(status) != SYSCALL_STOP;

	if (ptrace(how, t->pid, 0, signal ? WSTOPSIG(status) : 0))
		return failed();
	return INJECT_OK;
}

/* Lets the thread go on until it stops where it looks for signals: registers are restored only there. */
static enum inject_error until_event(const struct tracee *t, int how, int *status)
{
	enum inject_error err;

	for (;;) {
		err = next_stop(t, status);
		if (err || is_event(*status))
			return err;
		err = resume(t, how, *status);
		if (err)
			return err;
	}
}

/* Lets the thread go on from `*status` until the next stop at a system call. */
static enum inject_error until_syscall(const struct tracee *t, int *status)
{
	enum inject_error err;

	do {
		err = resume(t, PTRACE_SYSCALL, *status);
		if (!err)
			err = next_stop(t, status);
	} while (!err && !is_syscall(*status));
	return err;
}

/* ---- registers -------------------------------------------------------------------------------------- */

static enum inject_error get_regs(const struct tracee *t, struct user_regs_struct *regs)
{
	struct iovec iov = {regs, sizeof(*regs)};

	if (ptrace(PTRACE_GETREGSET, t->pid, NT_PRSTATUS, &iov))
		return failed();
	return iov.iov_len == sizeof(*regs) ? INJECT_OK : INJECT_OTHER_BITS; /* a 32-bit thread has fewer */
}

static enum inject_error set_regs(const struct tracee *t, const struct user_regs_struct *regs)
{
	struct iovec iov = {(void *)regs, sizeof(*regs)};

	return ptrace(PTRACE_SETREGSET, t->pid, NT_PRSTATUS, &iov) ? failed() : INJECT_OK;
}

static enum inject_error set_mask(const struct tracee *t, uint64_t mask)
{
	return ptrace(PTRACE_SETSIGMASK, t->pid, sizeof(mask), &mask) ? failed() : INJECT_OK;
}

static enum inject_error get_state(struct tracee *t)
{
	struct iovec fp = {t->fp, sizeof(t->fp)};
	enum inject_error err = get_regs(t, &t->regs);

	if (err)
		return err;
	if (ptrace(PTRACE_GETREGSET, t->pid, arch_fp_regset(), &fp) ||
	    ptrace(PTRACE_GETSIGMASK, t->pid, sizeof(t->mask), &t->mask))
		return failed();
	t->fp_len = fp.iov_len;
	return INJECT_OK;
}

/* ---- the operation ---------------------------------------------------------------------------------- */

/* Whether this is the process that was meant: its pid could be another's by now. */
static bool is_same(const struct tracee *t)
{
	return !syscall(SYS_pidfd_send_signal, t->pidfd, 0, NULL, 0);
}

static void let_go(const struct tracee *t)
{
	ptrace(PTRACE_DETACH, t->pid, 0, 0);
}

void forget(struct tracee *t)
{
	free(t->image);
	free(t->before);
	t->image = t->before = NULL;
}

/* Waits for the stop that was asked for, and reads what the thread is then. */
static enum inject_error stopped(struct tracee *t)
{
	int status;
	enum inject_error err = until_event(t, PTRACE_CONT, &status);

	if (!err && WSTOPSIG(status) != SIGTRAP)
		err = INJECT_STOPPED;
	if (!err && !is_same(t))
		err = INJECT_GONE;
	return err ? err : get_state(t);
}

static enum inject_error stop(struct tracee *t)
{
	return ptrace(PTRACE_INTERRUPT, t->pid, 0, 0) ? INJECT_GONE : stopped(t);
}

/* Lets it go on, for so long that it makes its call again, and stops it once more. */
static enum inject_error stop_again(struct tracee *t)
{
	if (ptrace(PTRACE_CONT, t->pid, 0, 0))
		return failed();
	nap(50000);
	return stop(t);
}

static enum inject_error seize(struct tracee *t)
{
	enum inject_error err;

	if (ptrace(PTRACE_SEIZE, t->pid, 0, PTRACE_O_TRACESYSGOOD))
		return errno == ESRCH ? INJECT_GONE : INJECT_DENIED;
	t->waits = call_of(t->pid);
	err = stop(t);
	for (int stops = 1; !err && stops < STOPS && arch_stop_again(t); stops++)
		err = stop_again(t);
	if (!err)
		err = check_program(t);
	if (!err)
		err = arch_check(t);
	/* Do this at once: if the tracer is killed before, an interrupted call returns EINTR. */
	if (!err)
		err = set_regs(t, &t->regs);
	if (err)
		let_go(t);
	return err;
}

/* From here on the thread, if it is let go, makes `call` and returns by the frame. */
static enum inject_error enter(struct tracee *t, const struct inject_call *call)
{
	struct user_regs_struct regs = registers_for(t, call);
	enum inject_error err = set_regs(t, &regs);

	if (!err && !t->entered)
		err = set_mask(t, ~0ULL);
	t->entered = t->entered || !err;
	return err;
}

static enum inject_error hold(struct tracee *t)
{
	enum inject_error err = seize(t);

	if (err)
		return err;
	err = put_frame(t);
	if (err) {
		forget(t);
		let_go(t);
	}
	return err;
}

/* A program that was just executed has its libraries only in a moment. */
static enum inject_error look(struct tracee *t)
{
	enum inject_error err;

	for (int tries = 0;; tries++) {
		note_program(t);
		err = find_instructions(t);
		if (err != INJECT_NO_WAY_BACK || tries == LOOKS)
			return err;
		nap(5000000);
	}
}

/* Whether the next try may have more luck. The kernel also denies it to trace a thread that is just ending, as the
 * first one does when another executes a program. */
static bool may_pass(enum inject_error err)
{
	return err == INJECT_BUSY || err == INJECT_NO_STACK || err == INJECT_DENIED;
}

enum inject_error begin(struct tracee *t)
{
	enum inject_error err;

	t->entered = false;
	err = look(t);
	if (err)
		return err;
	settle(t->pid);
	for (int tries = 0; tries < TRIES; tries++) {
		err = hold(t);
		if (!may_pass(err))
			break;
		nap(tries < 100 ? 100000 : 1000000);
	}
	return err;
}

enum inject_error make_call(struct tracee *t, struct inject_call *call)
{
	struct user_regs_struct regs;
	enum inject_error err;
	int status = PTRACE_EVENT_STOP << 16 | SIGTRAP << 8 | 0x7f; /* a stop that brings no signal */

	if (given_up())
		return INJECT_STUCK;
	err = enter(t, call);
	if (!err)
		err = until_syscall(t, &status);
	if (!err)
		err = until_syscall(t, &status);
	if (!err)
		err = get_regs(t, &regs);
	call->ret = err ? 0 : (int64_t)get_register(&regs, arch_registers.result);
	return err;
}

enum inject_error end(struct tracee *t)
{
	enum inject_error err = INJECT_OK;
	int status = SYSCALL_STOP << 8 | 0x7f;

	if (t->entered) {
		if (ptrace(PTRACE_INTERRUPT, t->pid, 0, 0))
			return INJECT_GONE;
		err = resume(t, PTRACE_CONT, status);
		if (!err)
			err = until_event(t, PTRACE_CONT, &status);
		/* In this order: if the thread is let go in between, it has its mask and returns by the frame. */
		if (!err)
			err = set_mask(t, t->mask);
		if (!err)
			arch_restore(t);
		if (!err)
			err = set_regs(t, &t->regs);
		t->entered = false;
	}
	if (!err)
		remove_frame(t);
	if (!err)
		let_go(t);
	return err;
}
