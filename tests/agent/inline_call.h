/* SPDX-License-Identifier: Apache-2.0 */
/* For programs that pass the agent's wrappers by. */
#ifndef TESTS_AGENT_INLINE_CALL_H
#define TESTS_AGENT_INLINE_CALL_H

/* A system call that nobody can stand in front of. */
static long inline_call(long number, long a, long b, long c, long d, long e, long f)
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

#endif
