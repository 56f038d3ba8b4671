/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What depends on the processor. Each processor has a folder, named as the kernel names it (uname -m), with inline code
 * in arch.h, and with hash.c, memory.c and task.c. No file elsewhere asks which processor it is.
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
 *	raw_syscall()	      makes a system call by its instruction; -errno for an error
 *	arch_thread_pointer() the thread pointer, which points at this thread's local storage
 *	ARCH_PAGE_SHIFT	      of the page size; need not be constant, but _MIN and _MAX are
 *	ARCH_TASK_SIZE	      where user addresses end, unless a program asks for higher ones by hint
 *	ARCH_ADDRESS_END      at or above that; the agent knows no address from here on
 *	ARCH_LIBC	      the version of symbols that glibc has had there from the start */
#if defined(__x86_64__)
#include "arch/x86_64/arch.h"
#elif defined(__aarch64__)
#include "arch/aarch64/arch.h"
#else
#error "samepage knows x86-64 and aarch64"
#endif

/* ---- hash.c ---- */

/* The fastest 64-bit XXH3 on this CPU. All variants give the same result. */
uint64_t (*arch_hash(void))(const void *data, size_t len);

/* ---- memory.c: memcpy, memmove, memset and memcmp, by libc's names (system.c) ---- */

/* ---- task.c ---- */

/* Called by the first thread that enters the library, before anything is mapped or becomes an area. */
void arch_init(void);

/*
 * clone(2). The new task calls run(arg) and ends. It runs on `stack`; if that is NULL, on this thread's stack, below
 * what is in use, while this thread sleeps (CLONE_VFORK). `tid` and `tls` are for the flags that want them. Returns the
 * task's number, or -errno.
 */
long arch_clone(unsigned long flags, void *stack, _Atomic uint32_t *tid, void *tls, void (*run)(void *), void *arg);

/* How many bytes at the thread pointer compiled code and libc may read. */
extern const size_t arch_tcb_size;
/* Fills those bytes at `tp` as they are for the calling thread. */
void arch_tcb_init(void *tp);

#endif
