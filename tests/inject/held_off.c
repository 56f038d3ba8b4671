/* SPDX-License-Identifier: Apache-2.0 */
/* A process in whose name no call may be made, for the reason that its argument names. Says "ready", and waits. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif

/* Waits by the 32-bit way to call the kernel, again and again: pause(2). */
static void wait_in_32_bits(void)
{
	for (;;)
		__asm__ volatile("int $0x80" : : "a"(29) : "r8", "r9", "r10", "r11", "memory");
}

int main(int argc, char **argv)
{
	const char *why = argv[argc - 1];
	char byte;

	if (!strcmp(why, "dispatched") && prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 1UL << 62, 0))
		perror("PR_SET_SYSCALL_USER_DISPATCH");
	write(1, "ready\n", 6);
	if (!strcmp(why, "strict"))
		prctl(PR_SET_SECCOMP, 1);
	if (!strcmp(why, "call of 32 bits"))
		wait_in_32_bits();
	/* Not read() of libc's, which may do more. */
	while (syscall(SYS_read, 0, &byte, 1) > 0)
		;
	syscall(SYS_exit, 0);
	return 0;
}
