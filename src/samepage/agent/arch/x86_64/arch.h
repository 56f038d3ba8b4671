/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SAMEPAGE_ARCH_X86_64_ARCH_H
#define SAMEPAGE_ARCH_X86_64_ARCH_H

#define ARCH_PAGE_SHIFT 12 /* the processor has no other pages */
#define ARCH_PAGE_SHIFT_MIN ARCH_PAGE_SHIFT
#define ARCH_PAGE_SHIFT_MAX ARCH_PAGE_SHIFT
#define ARCH_TASK_SIZE ((1UL << 47) - 4096)
#define ARCH_ADDRESS_END (1UL << 48)
#define ARCH_LIBC "GLIBC_2.2.5"

static inline long raw_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long ret;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}

static inline void *arch_thread_pointer(void)
{
	void *tp;

	__asm__("mov %%fs:0, %0" : "=r"(tp)); /* its first word is its own address */
	return tp;
}

#endif
