/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process in whose name no call may be made, for the reason that its argument names. Says "ready", and waits. With a
 * second argument, "later", its first thread waits in a call that it is not stopped in (settle.c), and another one changes it.
 */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
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

/* All threads are killed for prctl(2) from then on. */
static void filter(void)
{
	struct sock_filter insns[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_prctl, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = {sizeof(insns) / sizeof(*insns), insns};

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &prog))
		perror("seccomp");
}

/* What another thread does while the first one waits. */
static void *change(void *what)
{
	usleep(200000);
	if (!strcmp(what, "filtered"))
		filter();
	else
		execl("/proc/self/exe", "again", NULL);
	return NULL;
}

static void wait_for_a_time(void)
{
	struct epoll_event event;

	epoll_wait(epoll_create1(0), &event, 1, 700);
}

int main(int argc, char **argv)
{
	const char *why = argc > 1 ? argv[1] : "";
	pthread_t thread;
	char byte;

	if (!strcmp(why, "dispatched") && prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 1UL << 62, 0))
		perror("PR_SET_SYSCALL_USER_DISPATCH");
	write(1, "ready\n", 6);
	if (argc > 2 && pthread_create(&thread, NULL, change, argv[1]))
		perror("pthread_create");
	if (argc > 2)
		wait_for_a_time();
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
