/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What depends on the processor. A folder for each, of the name that the kernel gives it (uname -m), with arch.h for what is
 * inline, and hash.c, memory.c and task.c. No file outside of these asks which one it is.
 */
#ifndef SAMEPAGE_ARCH_ARCH_H
#define SAMEPAGE_ARCH_ARCH_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>

/* Defines
 *
 *	raw_syscall()	      the kernel's instruction: what it answers, -errno for an error
 *	arch_thread_pointer() what points at the thread-local storage of this thread
 *	ARCH_PAGE_SHIFT	      of the size of a page, which need not be a constant; and _MIN and _MAX, which are
 *	ARCH_TASK_SIZE	      the end of the memory of a program that asks for no addresses beyond by hint
 *	ARCH_ADDRESS_END      beyond it and all that the agent knows of
 */
#if defined(__x86_64__)
#include "arch/x86_64/arch.h"
#elif defined(__aarch64__)
#include "arch/aarch64/arch.h"
#else
#error "samepage knows x86-64 and aarch64"
#endif

/* ---- hash.c ---- */

/* The fastest XXH3 (of 64 bits) that this CPU has. All give the same number. */
uint64_t (*arch_hash(void))(const void *data, size_t len);

/* ---- memory.c: memcpy, memmove, memset and memcmp, by libc's names (system.c) ---- */

/* ---- task.c ---- */

/* By the first thread that comes into the library, before anything is mapped or an area. */
void arch_init(void);

/*
 * clone(2). The new task calls run(arg) and ends: on `stack`, or, where that is NULL, on this thread's, below what is on it,
 * while this thread sleeps (CLONE_VFORK). `tid` and `tls` are for the flags that want them. Its number, or -errno.
 */
long arch_clone(unsigned long flags, void *stack, _Atomic uint32_t *tid, void *tls, void (*run)(void *), void *arg);

/* Bytes at the thread pointer that compiled code and libc may read. */
extern const size_t arch_tcb_size;
/* Fills them, at `tp`, as the calling thread has them. */
void arch_tcb_init(void *tp);

#endif
