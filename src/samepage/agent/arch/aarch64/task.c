/* SPDX-License-Identifier: Apache-2.0 */
#include "arch/arch.h"

#include <sys/auxv.h>

unsigned arch_page_shift = ARCH_PAGE_SHIFT_MIN;

void arch_init(void)
{
	arch_page_shift = (unsigned)__builtin_ctzl(getauxval(AT_PAGESZ));
}

long arch_clone(unsigned long flags, void *stack, _Atomic uint32_t *tid, void *tls, void (*run)(void *), void *arg)
{
	register long x8 __asm__("x8") = SYS_clone;
	register unsigned long x0 __asm__("x0") = flags;
	register void *x1 __asm__("x1") = stack;
	register void *x2 __asm__("x2") = tid;
	register void *x3 __asm__("x3") = tls;
	register void *x4 __asm__("x4") = tid;
	register void (*x9)(void *) __asm__("x9") = run;
	register void *x10 __asm__("x10") = arg;

	__asm__ volatile("svc #0\n\t"
			 "cbnz x0, 1f\n\t"
			 "mov x29, xzr\n\t"
			 "mov x30, xzr\n\t"
			 "mov x0, x10\n\t"
			 "blr x9\n\t"
			 "mov x0, xzr\n\t"
			 "mov x8, %[exit]\n\t"
			 "svc #0\n\t"
			 "brk #1\n"
			 "1:"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x9), "r"(x10), [exit] "i"(SYS_exit)
			 : "memory");
	return (long)x0;
}

/* The thread pointer points at two words of libc's. The guards that compiled code reads are ordinary variables. */
const size_t arch_tcb_size = 2 * sizeof(void *);

void arch_tcb_init(void *tp)
{
	((void **)tp)[0] = ((void **)tp)[1] = NULL;
}
