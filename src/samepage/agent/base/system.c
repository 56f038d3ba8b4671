/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The functions that the agent uses of libc, made of system calls and plain loops. They have libc's names and are
 * hidden, so that every such call in this library ends here (system.h). None is a cancellation point.
 */
#include "base/system.h"
#include "base/descriptors.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* For loops in functions that the compiler knows: without it the compiler may recognise the loop as memcpy or strlen
 * and call that, which is the very function that the loop is in. */
#define AS_WRITTEN __asm__ volatile("")

/* ---- system calls ------------------------------------------------------------------------------------ */

static long result(long ret)
{
	if ((unsigned long)ret < -4095UL)
		return ret;
	errno = (int)-ret;
	return -1;
}

#define CALL(number, a, b, c, d, e, f)                                                                                 \
	result(raw_syscall(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f)))

long kernel_syscall(long number, ...)
{
	long a[6];

	ARGUMENTS(a, number);
	return CALL(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int open(const char *path, int flags, ...)
{
	return (int)CALL(SYS_openat, AT_FDCWD, path, flags, 0, 0, 0); /* no mode: the agent creates no files */
}

int openat(int dir, const char *path, int flags, ...)
{
	return (int)CALL(SYS_openat, dir, path, flags, 0, 0, 0);
}

/* close(), read() and write() check that the descriptor still is the agent's: a process may be restored from a
 * checkpoint at any moment (descriptors.c). */
int close(int fd)
{
	return descriptors_are_ours() ? (int)CALL(SYS_close, fd, 0, 0, 0, 0, 0) : 0;
}

ssize_t read(int fd, void *buf, size_t n)
{
	if (!descriptors_are_ours()) {
		errno = EBADF;
		return -1;
	}
	return CALL(SYS_read, fd, buf, n, 0, 0, 0);
}

ssize_t write(int fd, const void *buf, size_t n)
{
	if (!descriptors_are_ours()) {
		errno = EBADF;
		return -1;
	}
	return CALL(SYS_write, fd, buf, n, 0, 0, 0);
}

ssize_t pread(int fd, void *buf, size_t n, off_t offset)
{
	return CALL(SYS_pread64, fd, buf, n, offset, 0, 0);
}

off_t lseek(int fd, off_t offset, int whence)
{
	return CALL(SYS_lseek, fd, offset, whence, 0, 0, 0);
}

int ftruncate(int fd, off_t length)
{
	return (int)CALL(SYS_ftruncate, fd, length, 0, 0, 0, 0);
}

int fstat(int fd, struct stat *st)
{
	return (int)CALL(SYS_fstat, fd, st, 0, 0, 0, 0);
}

int fcntl(int fd, int command, ...)
{
	long a[1];

	ARGUMENTS(a, command);
	return (int)CALL(SYS_fcntl, fd, command, a[0], 0, 0, 0);
}

int faccessat(int dir, const char *path, int mode, int flags)
{
	return (int)CALL(SYS_faccessat, dir, path, mode, flags, 0,
			 0); /* the system call has no flags, so `flags` is always 0 */
}

ssize_t readlink(const char *path, char *buf, size_t n)
{
	return CALL(SYS_readlinkat, AT_FDCWD, path, buf, n, 0, 0);
}

ssize_t getdents64(int fd, void *buf, size_t n)
{
	return CALL(SYS_getdents64, fd, buf, n, 0, 0, 0);
}

int chdir(const char *path)
{
	return (int)CALL(SYS_chdir, path, 0, 0, 0, 0, 0);
}

int socket(int domain, int type, int protocol)
{
	return (int)CALL(SYS_socket, domain, type, protocol, 0, 0, 0);
}

int connect(int fd, const struct sockaddr *to, socklen_t len)
{
	return (int)CALL(SYS_connect, fd, to, len, 0, 0, 0);
}

int getsockopt(int fd, int level, int name, void *value, socklen_t *len)
{
	return (int)CALL(SYS_getsockopt, fd, level, name, value, len, 0);
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t len)
{
	return (int)CALL(SYS_setsockopt, fd, level, name, value, len, 0);
}

ssize_t sendmsg(int fd, const struct msghdr *m, int flags)
{
	return CALL(SYS_sendmsg, fd, m, flags, 0, 0, 0);
}

ssize_t recvmsg(int fd, struct msghdr *m, int flags)
{
	return CALL(SYS_recvmsg, fd, m, flags, 0, 0, 0);
}

int poll(struct pollfd *p, nfds_t n, int timeout_ms)
{
	struct timespec left = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};

	return (int)CALL(SYS_ppoll, p, n, timeout_ms < 0 ? NULL : &left, NULL, 0, 0);
}

pid_t getpid(void)
{
	return (pid_t)CALL(SYS_getpid, 0, 0, 0, 0, 0, 0);
}

uid_t geteuid(void)
{
	return (uid_t)CALL(SYS_geteuid, 0, 0, 0, 0, 0, 0);
}

int sched_yield(void)
{
	return (int)CALL(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
}

int clock_gettime(clockid_t clock, struct timespec *t)
{
	return (int)CALL(SYS_clock_gettime, clock, t, 0, 0, 0, 0);
}

int getrusage(__rusage_who_t who, struct rusage *usage)
{
	return (int)CALL(SYS_getrusage, who, usage, 0, 0, 0, 0);
}

/* All signals, also the two of libc's own: a thread that is cancelled while it holds a lock would keep it. */
int sigfillset(sigset_t *set)
{
	memset(set, 0xff, sizeof(*set));
	return 0;
}

int pthread_sigmask(int how, const sigset_t *set, sigset_t *saved)
{
	return (int)-raw_syscall(SYS_rt_sigprocmask, how, (long)set, (long)saved, _NSIG / 8, 0, 0);
}

/* ---- helpers made of these ---------------------------------------------------------------------------- */

bool is_readable(const void *p, size_t len)
{
	uintptr_t at = (uintptr_t)p, last = at + len - sizeof(uint64_t);

	/* The kernel reads the set before it looks at what to do with it, which is nothing. */
	while (raw_syscall(SYS_rt_sigprocmask, -1, (long)at, 0, sizeof(uint64_t), 0, 0) != -EFAULT) {
		if (at >= last)
			return true;
		at = PAGE_ALIGN_DOWN(at) + PAGE_SIZE;
		if (at > last)
			at = last;
	}
	return false;
}

ssize_t read_file(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got;

	if (fd < 0)
		return -errno;
	got = read(fd, buf, size);
	if (got < 0)
		got = -errno;
	close(fd);
	return got;
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int64_t now_ms(void)
{
	return (int64_t)(now_ns() / 1000000);
}

uint64_t thread_cpu_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- memory, except what arch/ has --------------------------------------------------------------------- */

void *memchr(const void *p, int c, size_t n)
{
	for (const unsigned char *s = p; n--; s++)
		if (*s == (unsigned char)c)
			return (void *)s;
	return NULL;
}

/* ---- text -------------------------------------------------------------------------------------------- */

size_t strlen(const char *s)
{
	size_t n = 0;

	for (; s[n]; n++)
		AS_WRITTEN;
	return n;
}

/* stpcpy() and strcpy(), and strcmp() and strncmp(), share a function under another name: the compiler knows both names
 * and may turn either into a call of the other. */
static char *copy_text(char *to, const char *from)
{
	for (; (*to = *from); to++, from++)
		AS_WRITTEN;
	return to;
}

char *stpcpy(char *restrict to, const char *restrict from)
{
	return copy_text(to, from);
}

char *strcpy(char *restrict to, const char *restrict from)
{
	copy_text(to, from);
	return to;
}

static int compare_text(const char *a, const char *b, size_t n)
{
	for (; n && *a && *a == *b; n--)
		a++, b++;
	return n ? (unsigned char)*a - (unsigned char)*b : 0;
}

int strncmp(const char *a, const char *b, size_t n)
{
	return compare_text(a, b, n);
}

int strcmp(const char *a, const char *b)
{
	return compare_text(a, b, SIZE_MAX);
}

char *strchrnul(const char *s, int c)
{
	for (; *s && *s != (char)c; s++)
		AS_WRITTEN;
	return (char *)s;
}

char *strchr(const char *s, int c)
{
	s = strchrnul(s, c);
	return *s == (char)c ? (char *)s : NULL;
}

char *strrchr(const char *s, int c)
{
	const char *last = NULL;

	for (;; s++) {
		if (*s == (char)c)
			last = s;
		if (!*s)
			return (char *)last;
	}
}

char *strstr(const char *s, const char *what)
{
	size_t n = strlen(what);

	for (;; s++) {
		if (!compare_text(s, what, n))
			return (char *)s;
		if (!*s)
			return NULL;
	}
}

char *strsep(char **rest, const char *stops)
{
	char *start = *rest, *end = start;

	if (!start)
		return NULL;
	while (*end && !strchr(stops, *end))
		end++;
	*rest = *end ? end + 1 : NULL;
	*end = '\0';
	return start;
}

/* Reads decimal digits after blanks; the agent needs no more. */
unsigned long strtoul(const char *restrict s, char **restrict end, int base)
{
	unsigned long n = 0;

	(void)base;
	while (*s == ' ' || *s == '\t')
		s++;
	for (; *s >= '0' && *s <= '9'; s++)
		if (__builtin_mul_overflow(n, 10, &n) || __builtin_add_overflow(n, (unsigned)(*s - '0'), &n))
			n = ~0UL;
	if (end)
		*end = (char *)s;
	return n;
}

unsigned long long strtoull(const char *restrict s, char **restrict end, int base)
{
	return strtoul(s, end, base);
}
