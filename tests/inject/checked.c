/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program that checks itself: its first thread does one kind of thing over and over, or all in turn, and ends the process
 * as soon as one did not come out as it does in a process that nobody holds. Other threads help, and compute. At a
 * byte on stdin it ends, and says how often it did what.
 *
 *	checked [-e] [KIND]
 *
 * -e: calls may end with EINTR that do so whenever they are stopped (signal(7)).
 */
#define _GNU_SOURCE
#include "../check.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* A call that may have ended early. */
#define MAY_BE_STOPPED(what) CHECK((what) || (eintr && errno == EINTR))

static bool eintr;
static pthread_t first;
static int pipes[2], sockets[2], epoll, sems, full;
static _Atomic uint32_t word;

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* ---- computing -------------------------------------------------------------------------------------- */

#ifdef __x86_64__

struct held {
	uint64_t in[12], out[12], intact, moved;
	uint8_t x[10][32] __attribute__((aligned(32))), y[10][32] __attribute__((aligned(32)));
};

/* Every register that may be used holds a number of its own for a while, and so do the bytes below the stack pointer. */
static void registers(void)
{
	struct held h = {0};

	for (size_t i = 0; i < 12; i++)
		h.in[i] = 0x0101010101010101ULL * (uint64_t)(i + 1) ^ now_us();
	for (size_t i = 0; i < sizeof(h.x); i++)
		h.x[i / 32][i % 32] = (uint8_t)(i * 7 + 1);
	__asm__ volatile(
		"mov %%rsp, %c[moved](%%rdi)\n\t"
		"vmovdqa %c[x]+0(%%rdi), %%ymm0\n\tvmovdqa %c[x]+32(%%rdi), %%ymm1\n\t"
		"vmovdqa %c[x]+64(%%rdi), %%ymm2\n\tvmovdqa %c[x]+96(%%rdi), %%ymm3\n\t"
		"vmovdqa %c[x]+128(%%rdi), %%ymm4\n\tvmovdqa %c[x]+160(%%rdi), %%ymm7\n\t"
		"vmovdqa %c[x]+192(%%rdi), %%ymm8\n\tvmovdqa %c[x]+224(%%rdi), %%ymm9\n\t"
		"vmovdqa %c[x]+256(%%rdi), %%ymm14\n\tvmovdqa %c[x]+288(%%rdi), %%ymm15\n\t"
		"mov 0(%%rdi), %%rax\n\tmov 8(%%rdi), %%rbx\n\tmov 16(%%rdi), %%rdx\n\tmov 24(%%rdi), %%rsi\n\t"
		"mov 32(%%rdi), %%r8\n\tmov 40(%%rdi), %%r9\n\tmov 48(%%rdi), %%r10\n\tmov 56(%%rdi), %%r11\n\t"
		"mov 64(%%rdi), %%r12\n\tmov 72(%%rdi), %%r13\n\tmov 80(%%rdi), %%r14\n\tmov 88(%%rdi), %%r15\n\t"
		"mov %%rax, -8(%%rsp)\n\tmov %%rbx, -64(%%rsp)\n\tmov %%rdx, -128(%%rsp)\n\t"
		"mov $200000, %%ecx\n"
		"1:\tdec %%ecx\n\tjnz 1b\n\t"
		"mov %%rax, %c[out]+0(%%rdi)\n\tmov %%rbx, %c[out]+8(%%rdi)\n\tmov %%rdx, %c[out]+16(%%rdi)\n\t"
		"mov %%rsi, %c[out]+24(%%rdi)\n\tmov %%r8, %c[out]+32(%%rdi)\n\tmov %%r9, %c[out]+40(%%rdi)\n\t"
		"mov %%r10, %c[out]+48(%%rdi)\n\tmov %%r11, %c[out]+56(%%rdi)\n\tmov %%r12, %c[out]+64(%%rdi)\n\t"
		"mov %%r13, %c[out]+72(%%rdi)\n\tmov %%r14, %c[out]+80(%%rdi)\n\tmov %%r15, %c[out]+88(%%rdi)\n\t"
		"cmp %%rax, -8(%%rsp)\n\tjne 2f\n\tcmp %%rbx, -64(%%rsp)\n\tjne 2f\n\tcmp %%rdx, -128(%%rsp)\n\tjne "
		"2f\n\t"
		"movq $1, %c[intact](%%rdi)\n"
		"2:\tvmovdqa %%ymm0, %c[y]+0(%%rdi)\n\tvmovdqa %%ymm1, %c[y]+32(%%rdi)\n\t"
		"vmovdqa %%ymm2, %c[y]+64(%%rdi)\n\tvmovdqa %%ymm3, %c[y]+96(%%rdi)\n\t"
		"vmovdqa %%ymm4, %c[y]+128(%%rdi)\n\tvmovdqa %%ymm7, %c[y]+160(%%rdi)\n\t"
		"vmovdqa %%ymm8, %c[y]+192(%%rdi)\n\tvmovdqa %%ymm9, %c[y]+224(%%rdi)\n\t"
		"vmovdqa %%ymm14, %c[y]+256(%%rdi)\n\tvmovdqa %%ymm15, %c[y]+288(%%rdi)\n\t"
		"sub %%rsp, %c[moved](%%rdi)\n\t"
		:
		: "D"(&h), [x] "i"(offsetof(struct held, x)), [y] "i"(offsetof(struct held, y)),
		  [out] "i"(offsetof(struct held, out)), [intact] "i"(offsetof(struct held, intact)),
		  [moved] "i"(offsetof(struct held, moved))
		: "memory", "cc", "rax", "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
		  "r15", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm7", "xmm8", "xmm9", "xmm14", "xmm15");
	CHECK(h.intact && !h.moved);
	CHECK(!memcmp(h.in, h.out, sizeof(h.in)));
	CHECK(!memcmp(h.x, h.y, sizeof(h.x)));
}

#else /* aarch64 */

struct held {
	uint64_t in[12], out[12];
	uint8_t x[6][16] __attribute__((aligned(16))), y[6][16] __attribute__((aligned(16)));
};

/* Every kind of register holds numbers of its own for a while. */
static void registers(void)
{
	struct held h = {0};
	register struct held *p __asm__("x20") = &h;

	for (size_t i = 0; i < 12; i++)
		h.in[i] = 0x0101010101010101ULL * (uint64_t)(i + 1) ^ now_us();
	for (size_t i = 0; i < sizeof(h.x); i++)
		h.x[i / 16][i % 16] = (uint8_t)(i * 7 + 1);
	__asm__ volatile("ldp x0, x1, [x20, #0]\n\tldp x3, x4, [x20, #16]\n\tldp x7, x8, [x20, #32]\n\t"
			 "ldp x9, x15, [x20, #48]\n\tldp x16, x19, [x20, #64]\n\tldp x28, x30, [x20, #80]\n\t"
			 "ldp q0, q1, [x20, #192]\n\tldp q7, q8, [x20, #224]\n\tldp q16, q31, [x20, #256]\n\t"
			 "movz x10, #0x4240\n\tmovk x10, #0xf, lsl #16\n"
			 "1:\tsubs x10, x10, #1\n\tb.ne 1b\n\t"
			 "stp x0, x1, [x20, #96]\n\tstp x3, x4, [x20, #112]\n\tstp x7, x8, [x20, #128]\n\t"
			 "stp x9, x15, [x20, #144]\n\tstp x16, x19, [x20, #160]\n\tstp x28, x30, [x20, #176]\n\t"
			 "stp q0, q1, [x20, #288]\n\tstp q7, q8, [x20, #320]\n\tstp q16, q31, [x20, #352]\n\t"
			 :
			 : "r"(p)
			 : "memory", "cc", "x0", "x1", "x3", "x4", "x7", "x8", "x9", "x10", "x15", "x16", "x19", "x28",
			   "x30", "v0", "v1", "v7", "v8", "v16", "v31");
	CHECK(!memcmp(h.in, h.out, sizeof(h.in)));
	CHECK(!memcmp(h.x, h.y, sizeof(h.x)));
}

#endif

/* ---- waiting ---------------------------------------------------------------------------------------- */

static void sleeping(void)
{
	uint64_t began = now_us();

	CHECK(!nanosleep(&(struct timespec){0, 3000000}, NULL));
	CHECK(now_us() - began >= 3000);
	CHECK(!clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){0, 1000000}, NULL));
}

static void reading(void)
{
	char byte;

	CHECK(read(pipes[0], &byte, 1) == 1 && byte == 'x');
}

static void receiving(void)
{
	char byte;

	errno = 0;
	MAY_BE_STOPPED(recv(sockets[0], &byte, 1, 0) == -1 && errno == EAGAIN); /* after its SO_RCVTIMEO */
}

/* The same, for calls of several messages, and for one that waits until somebody accepts. */
static void receiving_several(void)
{
	struct mmsghdr messages[2] = {0};
	char byte;
	struct iovec iov = {&byte, 1};

	messages[0].msg_hdr = messages[1].msg_hdr = (struct msghdr){.msg_iov = &iov, .msg_iovlen = 1};
	errno = 0;
	MAY_BE_STOPPED(recvmmsg(sockets[0], messages, 2, 0, NULL) == -1 && errno == EAGAIN);
}

static void connecting(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	socklen_t len = sizeof(name);
	int s = socket(AF_UNIX, SOCK_STREAM, 0);

	CHECK(!getsockname(full, (struct sockaddr *)&name, &len));
	CHECK(!setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){0, 2000}, sizeof(struct timeval)));
	errno = 0;
	MAY_BE_STOPPED(connect(s, (struct sockaddr *)&name, len) == -1 && errno == EAGAIN);
	close(s);
}

static void futexes(void)
{
	uint32_t seen = atomic_load(&word);
	struct timespec t = {0, 2000000};

	if (syscall(SYS_futex, &word, FUTEX_WAIT, seen, NULL, NULL, 0))
		CHECK(errno == EAGAIN);
	seen = 0;
	MAY_BE_STOPPED(syscall(SYS_futex, &seen, FUTEX_WAIT, 0, &t, NULL, 0) == -1 && errno == ETIMEDOUT);
}

static void polling(void)
{
	struct pollfd p = {sockets[0], POLLIN, 0};
	struct timespec t = {0, 2000000};
	struct timeval tv = {0, 2000};
	uint64_t began = now_us();

	CHECK(poll(&p, 1, 3) == 0);
	CHECK(ppoll(&p, 1, &t, NULL) == 0);
	CHECK(select(0, NULL, NULL, NULL, &tv) == 0);
	CHECK(now_us() - began >= 6900);
	p.fd = pipes[0];
	CHECK(poll(&p, 1, -1) == 1);
}

static void epolling(void)
{
	struct epoll_event event;

	MAY_BE_STOPPED(epoll_wait(epoll, &event, 1, -1) == 1);
	reading();
}

static void epolling_for_a_time(void)
{
	struct epoll_event event;
	uint64_t began = now_us();
	int none = epoll_create1(0);

	MAY_BE_STOPPED(epoll_wait(none, &event, 1, 3) == 0);
	CHECK(eintr || now_us() - began >= 2900);
	close(none);
}

static void semaphores(void)
{
	struct sembuf down = {0, -1, 0};

	MAY_BE_STOPPED(!semop(sems, &down, 1));
}

/* ---- signals ---------------------------------------------------------------------------------------- */

static _Atomic int sent, handled;

static void handle(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	CHECK(info->si_code == SI_QUEUE && info->si_value.sival_int == handled);
	handled++;
}

/* A helper sends signals; each is handled once, and ends whatever waits with EINTR. */
static void signals(void)
{
	struct epoll_event event;
	int before = handled, none = epoll_create1(0);
	sigset_t empty;
	stack_t stack;

	sigemptyset(&empty);
	CHECK(epoll_pwait(none, &event, 1, -1, &empty) == -1 && errno == EINTR && (eintr || handled > before));
	before = handled;
	CHECK(sigsuspend(&empty) == -1 && errno == EINTR && handled > before);
	CHECK(!sigaltstack(NULL, &stack) && stack.ss_size == 65536 && !stack.ss_flags);
	close(none);
}

/* The same, waited for. */
static void waiting_for_signals(void)
{
	struct timespec t = {0, 2000000};
	sigset_t usr1;

	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	MAY_BE_STOPPED(sigtimedwait(&usr1, NULL, &t) == -1 && errno == EAGAIN);
}

/* ---- the helpers ------------------------------------------------------------------------------------ */

static void *help(void *unused)
{
	struct sembuf up = {0, 1, 0};

	for (;;) {
		usleep(700);
		CHECK(write(pipes[1], "x", 1) == 1);
		atomic_fetch_add(&word, 1);
		syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0);
		semop(sems, &up, 1);
		if (sent - handled < 100) {
			CHECK(!pthread_sigqueue(first, SIGRTMIN, (union sigval){.sival_int = sent}));
			sent++;
		}
	}
	return unused;
}

static void *compute(void *unused)
{
	for (;;) {
		registers();
		usleep(1000);
	}
	return unused;
}

static const struct {
	const char *name;
	void (*run)(void);
} kinds[] = {
	{"registers", registers},
	{"sleeping", sleeping},
	{"reading", reading},
	{"receiving", receiving},
	{"receiving_several", receiving_several},
	{"connecting", connecting},
	{"futexes", futexes},
	{"polling", polling},
	{"epolling", epolling},
	{"epolling_for_a_time", epolling_for_a_time},
	{"semaphores", semaphores},
	{"signals", signals},
	{"waiting_for_signals", waiting_for_signals},
};

#define KINDS (sizeof(kinds) / sizeof(*kinds))

/* A socket to which nobody more can connect: one waits to be accepted, and `full` has room for no other. */
static void fill(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	socklen_t len = sizeof(name);

	full = socket(AF_UNIX, SOCK_STREAM, 0);
	CHECK(!bind(full, (struct sockaddr *)&name, sizeof(sa_family_t)) && !listen(full, 0)); /* the kernel names it */
	CHECK(!getsockname(full, (struct sockaddr *)&name, &len));
	CHECK(!connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&name, len));
}

static void set_up(void)
{
	static char altstack[65536];
	struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK};
	struct timeval t = {0, 2000};
	sigset_t blocked;
	pthread_t thread;

	first = pthread_self();
	CHECK(!sigaltstack(&(stack_t){.ss_sp = altstack, .ss_size = sizeof(altstack)}, NULL));
	sigaction(SIGRTMIN, &action, NULL);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGRTMIN);
	sigaddset(&blocked, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	CHECK(!pipe(pipes) && !socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
	CHECK(!setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof(t)));
	fill();
	epoll = epoll_create1(0);
	CHECK(!epoll_ctl(epoll, EPOLL_CTL_ADD, pipes[0], &(struct epoll_event){.events = EPOLLIN}));
	sems = semget(IPC_PRIVATE, 1, 0600);
	CHECK(sems >= 0 && !pthread_create(&thread, NULL, help, NULL) && !pthread_create(&thread, NULL, compute, NULL));
}

/* Nothing is left of whoever held it: the mask of blocked signals is what it was. */
static void check_mask(void)
{
	sigset_t mask;

	pthread_sigmask(SIG_BLOCK, NULL, &mask);
	for (int n = 1; n < 32; n++)
		CHECK(sigismember(&mask, n) == (n == SIGUSR1));
}

int main(int argc, char **argv)
{
	const char *kind = NULL;
	struct pollfd end = {0, POLLIN, 0};
	unsigned long counts[KINDS] = {0};

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "-e"))
			eintr = true;
		else
			kind = argv[i];
	}
	set_up();
	puts("ready");
	fflush(stdout);
	/* Who does all in turn does everything once, also if that takes longer than it was to. */
	for (size_t i = 0; !(end.revents & POLLIN) || (!kind && !counts[KINDS - 1]); i = (i + 1) % KINDS) {
		if (kind && strcmp(kind, kinds[i].name))
			continue;
		kinds[i].run();
		check_mask();
		counts[i]++;
		CHECK(poll(&end, 1, 0) >= 0);
	}
	semctl(sems, 0, IPC_RMID);
	for (size_t i = 0; i < KINDS; i++)
		printf("%s %lu\n", kinds[i].name, counts[i]);
	return 0;
}
