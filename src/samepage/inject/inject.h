/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Making a system call in the name of a running process.
 *
 * The kernel's KSM is switched on for memory by a call that only its owner can make (prctl, madvise). For a process
 * that runs already, a tracer has to make it, by ptrace(2). It stops the first thread, sets its registers to those of
 * the call and to a `syscall` instruction that is in the process already, lets it run that one instruction, and
 * restores its registers. It writes no code and sends no signal (PTRACE_SEIZE, PTRACE_INTERRUPT).
 *
 * The rules:
 *
 * - *A tracer that is killed changes nothing.* The kernel lets the process go on with the registers of that moment, so these
 *   must lead back by themselves. Below the thread's stack lies a signal frame with all that the thread had, and behind
 *   the `syscall` stands a `ret` to rt_sigreturn(2) (frame.c). So at each moment the process, left alone, makes the call,
 *   which does no harm, and goes on where it was. The tracer does not go that way: it restores the registers itself.
 * - *A system call that was interrupted goes on.* The kernel asks for that by -ERESTART... in the register of the result,
 *   and acts on it when the thread goes on from a stop in which it looks for signals. So the registers are restored in
 *   such a stop, by a second PTRACE_INTERRUPT, never in the stop at the end of a call. Some calls say EINTR whenever
 *   they are stopped (signal(7)): for these -ERESTARTNOHAND is put there, by which the kernel says EINTR when there is a
 *   signal to handle, and else makes the call again. Such a call with a time to wait would wait for all of it again:
 *   so the tracer waits, for a second at most, until it has just begun (settle.c).
 * - *What is not sure is refused*, before anything is changed: enum inject_error. What a process can change about itself
 *   is looked at while it is held: by then it may have executed another program, or put itself under a seccomp filter.
 *
 * Each operation runs on a thread of its own: when that thread ends, the kernel detaches what it traced. What depends
 * on the processor is in arch/: a table of its registers and instructions, what its kernel shows of a thread that was
 * stopped in a call, and the signal frame. No file elsewhere names a register.
 */
#ifndef SAMEPAGE_INJECT_H
#define SAMEPAGE_INJECT_H

#include <elf.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#define RESTART_NO_HANDLER 514 /* ERESTARTNOHAND of the kernel's include/linux/errno.h */
#define RESTART_SYSCALL 512    /* ERESTARTSYS */

/* Why nothing, or not everything, was done. Python has a sentence for each (inject/__init__.py). */
enum inject_error {
	INJECT_OK,
	INJECT_GONE,	    /* the process ended, or became another program */
	INJECT_DENIED,	    /* the kernel does not let us trace it */
	INJECT_STOPPED,	    /* it is stopped by a signal */
	INJECT_OTHER_BITS,  /* it is not a 64-bit program, or is inside a 32-bit call */
	INJECT_SILENT,	    /* it did not stop in time: it sleeps uninterruptibly in the kernel */
	INJECT_BUSY,	    /* each time it was at a place where it must not be held */
	INJECT_NO_WAY_BACK, /* no `syscall; ret` or no rt_sigreturn in its code, or a shadow stack */
	INJECT_NO_STACK,    /* no room below its stack */
	INJECT_DISPATCHED,  /* it handles its system calls itself: prctl(PR_SET_SYSCALL_USER_DISPATCH) */
	INJECT_FILTERED,    /* it is under seccomp, which could kill it for the call */
	INJECT_NO_MEMORY,   /* to hold it takes a page of its stack, and there is none to be had */
	INJECT_STUCK,	    /* the kernel waited too long for memory of it: somebody serves that, and does not answer */
	INJECT_FAILED,	    /* a ptrace call failed that never should */
};

/* A call to make, and its result: -errno for an error. */
struct inject_call {
	int64_t nr;
	uint64_t arg[6];
	int64_t ret;
};

/* The call that a thread waits in; nr is -1 if it is in none. */
struct waits {
	int64_t nr;
	uint64_t arg[6], sp, pc;
};

/* The state of a thread when it was stopped, and all that leads back to it. */
struct tracee {
	pid_t pid;
	int pidfd;
	uint64_t program;	      /* where its stack begins, which every exec chooses anew */
	struct user_regs_struct regs; /* to be restored */
	struct waits waits;	      /* before it was stopped */
	bool eintr;		      /* that call said EINTR, and is to be made again */
	uint64_t mask;		      /* blocked signals */
	unsigned char fp[16384];      /* arch_fp_regset */
	size_t fp_len;
	uint64_t syscall_ret, sigreturn; /* addresses of instructions */
	uint64_t frame;			 /* address of the frame in the process */
	unsigned char *image;		 /* the frame */
	unsigned char *before;		 /* what was there before */
	size_t frame_len;
	uint64_t low, low_end; /* the pages that the frame lies in, if not just below the stack pointer */
	bool entered;	       /* the registers are not the thread's own */
};

/* ---- arch/ ---- */

/* Where a processor has what a call needs: offsets in struct user_regs_struct. */
struct registers {
	size_t pc, sp;
	size_t nr, arg[6], result;
	size_t interrupted; /* the call that the kernel would make again, if the tracer sees that; else NOWHERE */
	size_t back;	    /* to where `ret` returns; NOWHERE: to what is on top of the stack */
};

#define NOWHERE SIZE_MAX

/* Instructions, as they stand in memory. */
struct code {
	unsigned char bytes[9];
	size_t len;
};

extern const struct registers arch_registers;
extern const struct code arch_syscall_ret, arch_sigreturn[2];
extern const size_t arch_alignment; /* of instructions */
/* The register set of ptrace(2) that has everything in a signal frame that struct user_regs_struct has not. */
int arch_fp_regset(void);

/* Whether the thread may be held where it was stopped. If it is in a call that returns EINTR for every stop, changes
 * t->regs so that the call goes on. */
enum inject_error arch_check(struct tracee *t);
/* Whether the registers will be those that continue the interrupted call only after one more stop. */
bool arch_stop_again(const struct tracee *t);
/* What is left to do before t->regs are restored. */
void arch_restore(struct tracee *t);
/* Builds the frame in t->image. It must lie below `top`. */
enum inject_error arch_frame(struct tracee *t, uint64_t top);
/* How many bytes arch_frame() needs below `top`. */
size_t arch_frame_size(const struct tracee *t);
/* How many bytes below the stack pointer belong to the thread. */
extern const size_t arch_red_zone;

/* ---- registers.c ---- */

uint64_t get_register(const struct user_regs_struct *regs, size_t which);
void set_register(struct user_regs_struct *regs, size_t which, uint64_t value);
/* The registers that make a call. */
struct user_regs_struct registers_for(const struct tracee *t, const struct inject_call *call);
/* Looks for the instructions in `text`, which lies at `at` in the process. Those already found are kept. */
void find_code(struct tracee *t, const unsigned char *text, size_t len, uint64_t at);
/* Whether the instructions still are where they were found. */
bool verify_code(const struct tracee *t);

/* ---- stopped.c ---- */

/* Whether it is in a restartable sequence. The kernel restarts the sequence of a thread that was stopped in it, going
 * by the registers, and so by those that we set. */
bool in_section(const struct tracee *t);
bool is_dispatched(const struct tracee *t);
/* Whether a call returns EINTR in a thread that was only stopped, although nothing was done yet. */
bool may_be_made_again(int64_t nr);
/* Which argument holds the timeout of such a call; -1: none. */
int timeout_of(int64_t nr, const uint64_t arg[6]);

/* ---- frame.c ---- */

/* Finds the instructions while the process runs. */
enum inject_error find_instructions(struct tracee *t);
/* Finds a place for the frame and puts it there. */
enum inject_error put_frame(struct tracee *t);
void remove_frame(struct tracee *t);
bool read_from(const struct tracee *t, uint64_t at, void *to, size_t len);

/* ---- settle.c ---- */

/* Waits, if necessary, for a moment at which a stop goes unnoticed. */
void settle(pid_t pid);

/* ---- program.c ---- */

/* Notes which program the process runs. */
void note_program(struct tracee *t);
/* Whether the process, which is held, still runs it, and may make calls. */
enum inject_error check_program(const struct tracee *t);
/* In which call a process waits. */
struct waits call_of(pid_t pid);
/* Whether a handler of the process runs as soon as it goes on. */
bool is_signalled(pid_t pid);
/* Reads a file of /proc/PID into `text`, which ends with a zero byte. */
bool read_proc(pid_t pid, const char *name, char *text, size_t size);

/* ---- trace.c ---- */

/* Stops the first thread. On INJECT_OK, end() must follow; on an error nothing was changed. */
enum inject_error begin(struct tracee *t);
/* Makes a call. After an error the process runs as if we were gone, and end() need not follow. */
enum inject_error make_call(struct tracee *t, struct inject_call *call);
enum inject_error end(struct tracee *t);
/* Frees what the others allocated; call it last. */
void forget(struct tracee *t);

/* ---- thread.c ---- */

/* Runs `work` on a thread that ends afterwards. INJECT_STUCK: it did not end in time, and still has `what`. */
enum inject_error on_own_thread(enum inject_error (*work)(void *), void *what);
/* Whether this thread was given up. */
bool given_up(void);
uint64_t now_ns(void);

/* ---- headroom.c ---- */

/* How many bytes the process could be given without anybody being killed for it; 0 with *unseen if that is not
 * known. */
uint64_t headroom_of(pid_t pid, bool *unseen);

#endif
