/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SAMEPAGE_ARCH_AARCH64_ARCH_H
#define SAMEPAGE_ARCH_AARCH64_ARCH_H

/* 4, 16 or 64 KiB, as the kernel was built. */
extern unsigned arch_page_shift;
#define ARCH_PAGE_SHIFT arch_page_shift
#define ARCH_PAGE_SHIFT_MIN 12
#define ARCH_PAGE_SHIFT_MAX 16
#define ARCH_TASK_SIZE (1UL << 48) /* the most that kernels have, except 52 bits by hint */
#define ARCH_ADDRESS_END (1UL << 48)
#define ARCH_LIBC "GLIBC_2.17"

static inline long raw_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}

static inline void *arch_thread_pointer(void)
{
	void *tp;

	__asm__("mrs %0, tpidr_el0" : "=r"(tp));
	return tp;
}

#endif
