/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program whose first thread waits in one call, of the kind that its argument names, until a byte comes on stdin. Then
 * another thread does what the call waits for, and the call must say so: not EINTR.
 */
#define _GNU_SOURCE
#include "../check.h"

#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>

#define PIPE 65536 /* bytes that fit into one */

static int ends[2], other[2], made;
static _Atomic uint32_t word;
static pid_t child;
static pthread_t first;
static char byte = 'x', path[32];

static void write_to_pipe(void)
{
	CHECK(write(ends[1], &byte, 1) == 1);
}

/* ---- reading and writing ---------------------------------------------------------------------------- */

static void read_pipe(void)
{
	CHECK(read(ends[0], &byte, 1) == 1);
}

static void write_full(void)
{
	static char much[PIPE];

	CHECK(write(ends[1], much, sizeof(much)) == sizeof(much)); /* it is full */
	CHECK(write(ends[1], &byte, 1) == 1);
}

static void drain(void)
{
	static char much[PIPE];

	CHECK(read(ends[0], much, sizeof(much)) > 0);
}

static void splice_pipe(void)
{
	CHECK(splice(ends[0], NULL, other[1], NULL, 1, 0) == 1);
}

static void tee_pipe(void)
{
	CHECK(tee(ends[0], other[1], 1, 0) == 1);
}

static void read_eventfd(void)
{
	uint64_t n;

	made = eventfd(0, 0);
	CHECK(read(made, &n, sizeof(n)) == sizeof(n));
}

static void count(void)
{
	CHECK(!eventfd_write(made, 1));
}

static void read_timerfd(void)
{
	struct itimerspec in = {.it_value = {3, 0}};
	uint64_t n;

	made = timerfd_create(CLOCK_MONOTONIC, 0);
	CHECK(!timerfd_settime(made, 0, &in, NULL) && read(made, &n, sizeof(n)) == sizeof(n));
}

static void nothing(void)
{
}

static void read_inotify(void)
{
	char event[4096];
	int watching = inotify_init1(0);

	snprintf(path, sizeof(path), "/proc/self/fd/%d", memfd_create("file", 0));
	CHECK(inotify_add_watch(watching, path, IN_OPEN) >= 0 && read(watching, event, sizeof(event)) > 0);
}

static void open_something(void)
{
	CHECK(open(path, O_RDONLY) >= 0);
}

static void read_signalfd(void)
{
	struct signalfd_siginfo info;
	sigset_t usr1;

	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	CHECK(read(signalfd(-1, &usr1, 0), &info, sizeof(info)) == sizeof(info));
}

static void raise_usr1(void)
{
	CHECK(!pthread_kill(first, SIGUSR1));
}

static void wait_for_a_signal(void)
{
	sigset_t usr1;
	int got;

	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	CHECK(!sigwait(&usr1, &got) && got == SIGUSR1);
}

/* ---- sockets, locks, messages, children ------------------------------------------------------------- */

static void receive(void)
{
	CHECK(recv(ends[0], &byte, 1, MSG_WAITALL) == 1);
}

static void lock_file(void)
{
	int mine = memfd_create("lock", 0);

	snprintf(path, sizeof(path), "/proc/self/fd/%d", mine);
	made = open(path, O_RDWR);
	CHECK(made >= 0 && !flock(made, LOCK_EX) && !flock(mine, LOCK_EX));
}

static void unlock_file(void)
{
	CHECK(!flock(made, LOCK_UN));
}

static void lock_range(void)
{
	struct flock whole = {.l_type = F_WRLCK};
	int mine = memfd_create("lock", 0);

	snprintf(path, sizeof(path), "/proc/self/fd/%d", mine);
	made = open(path, O_RDWR);
	CHECK(made >= 0 && !fcntl(made, F_OFD_SETLK, &whole) && !fcntl(mine, F_OFD_SETLKW, &whole));
}

static void unlock_range(void)
{
	struct flock whole = {.l_type = F_UNLCK};

	CHECK(!fcntl(made, F_OFD_SETLK, &whole));
}

static void receive_message(void)
{
	struct {
		long type;
		char text[8];
	} message;

	made = msgget(IPC_PRIVATE, 0600);
	CHECK(msgrcv(made, &message, sizeof(message.text), 0, 0) == 1);
	msgctl(made, IPC_RMID, NULL);
}

static void send_message(void)
{
	struct {
		long type;
		char text[8];
	} message = {1, "x"};

	CHECK(!msgsnd(made, &message, 1, 0));
}

static void wait_for_a_child(void)
{
	int status;

	child = fork();
	if (!child)
		for (;;)
			pause();
	CHECK(wait4(child, &status, 0, NULL) == child && WIFSIGNALED(status));
}

static void wait_for_an_id(void)
{
	siginfo_t info;

	child = fork();
	if (!child)
		for (;;)
			pause();
	CHECK(!waitid(P_PID, (id_t)child, &info, WEXITED));
}

static void kill_child(void)
{
	CHECK(!kill(child, SIGKILL));
}

static void wait_for_vfork(void)
{
	volatile pid_t forked = vfork();

	if (!forked) {
		char end;

		/* As the child of a vfork does: it uses the memory of its parent, which the kernel holds. */
		syscall(SYS_read, ends[0], &end, 1);
		_exit(0);
	}
	CHECK(forked > 0);
}

/* ---- futexes, rings ---------------------------------------------------------------------------------- */

static void wait_on_a_word(void)
{
	while (!atomic_load(&word))
		CHECK(!syscall(SYS_futex, &word, FUTEX_WAIT, 0, NULL, NULL, 0) || errno == EAGAIN);
}

static void wait_until_a_time(void)
{
	struct timespec far;

	clock_gettime(CLOCK_MONOTONIC, &far);
	far.tv_sec += 100;
	while (!atomic_load(&word))
		CHECK(!syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 0, &far, NULL, ~0U) || errno == EAGAIN);
}

static void lock_pi(void)
{
	CHECK(!syscall(SYS_futex, &word, FUTEX_LOCK_PI, 0, NULL, NULL, 0));
}

static void wake(void)
{
	atomic_store(&word, 1);
	CHECK(syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0) >= 0);
}

static void unlock_pi(void)
{
	CHECK(!syscall(SYS_futex, &word, FUTEX_UNLOCK_PI, 0, NULL, NULL, 0));
}

static void sleep_until(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	t.tv_sec += 3;
	CHECK(!clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL));
}

static void enter_a_ring(void)
{
	struct io_uring_params p = {0};
	struct io_uring_sqe *sqes;
	char *ring;
	int fd = (int)syscall(SYS_io_uring_setup, 4, &p);

	if (fd < 0)
		_exit(77);
	ring = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	sqes = mmap(NULL, p.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0x10000000);
	CHECK(ring != MAP_FAILED && sqes != MAP_FAILED);
	sqes[0] = (struct io_uring_sqe){.opcode = IORING_OP_READ, .fd = ends[0], .addr = (uintptr_t)&byte, .len = 1};
	*(uint32_t *)(void *)(ring + p.sq_off.array) = 0;
	atomic_store((_Atomic uint32_t *)(void *)(ring + p.sq_off.tail), 1);
	CHECK(syscall(SYS_io_uring_enter, fd, 1, 0, 0, NULL, 0) == 1);
	CHECK(syscall(SYS_io_uring_enter, fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 0);
}

static void get_events(void)
{
	struct iocb cb = {.aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = (uint32_t)ends[0], .aio_buf = POLLIN};
	struct iocb *list[] = {&cb};
	struct io_event event;
	aio_context_t context = 0;

	CHECK(!syscall(SYS_io_setup, 4, &context) && syscall(SYS_io_submit, context, 1, list) == 1);
	CHECK(syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1);
}

/* ---- */

static const struct {
	const char *name;
	void (*wait)(void), (*end)(void);
} kinds[] = {
	{"read", read_pipe, write_to_pipe},
	{"write", write_full, drain},
	{"splice", splice_pipe, write_to_pipe},
	{"tee", tee_pipe, write_to_pipe},
	{"eventfd", read_eventfd, count},
	{"timerfd", read_timerfd, nothing},
	{"inotify", read_inotify, open_something},
	{"signalfd", read_signalfd, raise_usr1},
	{"sigwait", wait_for_a_signal, raise_usr1},
	{"recv", receive, write_to_pipe},
	{"flock", lock_file, unlock_file},
	{"range lock", lock_range, unlock_range},
	{"msgrcv", receive_message, send_message},
	{"wait4", wait_for_a_child, kill_child},
	{"waitid", wait_for_an_id, kill_child},
	{"vfork", wait_for_vfork, write_to_pipe},
	{"futex", wait_on_a_word, wake},
	{"futex until", wait_until_a_time, wake},
	{"futex pi", lock_pi, unlock_pi},
	{"sleep until", sleep_until, nothing},
	{"io_uring", enter_a_ring, write_to_pipe},
	{"io_getevents", get_events, write_to_pipe},
};

static size_t kind;

static void *help(void *unused)
{
	char end;

	if (!strcmp(kinds[kind].name, "futex pi"))
		CHECK(!syscall(SYS_futex, &word, FUTEX_LOCK_PI, 0, NULL, NULL, 0));
	CHECK(write(1, "ready\n", 6) == 6 && read(0, &end, 1) == 1);
	kinds[kind].end();
	if (!strcmp(kinds[kind].name, "futex pi"))
		pause(); /* who has a lock must live */
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	sigset_t usr1;

	while (kind < sizeof(kinds) / sizeof(*kinds) && strcmp(argv[argc - 1], kinds[kind].name))
		kind++;
	CHECK(kind < sizeof(kinds) / sizeof(*kinds));
	first = pthread_self();
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	if (!strcmp(kinds[kind].name, "recv"))
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	else
		CHECK(!pipe(ends));
	CHECK(!pipe(other) && !pthread_create(&thread, NULL, help, NULL));
	usleep(20000); /* it has the lock by now */
	kinds[kind].wait();
	return 0;
}
