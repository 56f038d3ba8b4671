/*
 * Linked into an agent for tests: makes calls of the agent's thread fail as a test says. The test shares `struct plan`
 * with the process through the file that SAMEPAGE_FAULTS names. -Wl,--wrap=pread brings pread(2) here.
 *
 * It can also kill the child that makes a step (unstopped.c), before or after any call that changes something.
 */
#include "base/descriptors.h"
#include "base/real.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOVE 0x05

/* KINDS in test_faults.py */
enum kind {
	K_MOVE,
	K_COPY,
	K_REGISTER,
	K_UNREGISTER,
	K_WAKE,
	K_PROTECT,
	K_SCAN,
	K_PREAD,
	K_MREMAP,
	K_MMAP,
	K_MPROTECT,
	K_DONTNEED,
	K_POPULATE,
	K_COLLAPSE,
	K_ADVICE,
	K_MUNLOCK,
	K_MSYNC,
	K_PRLIMIT,
	K_MBIND,
	NR_KINDS
};

/* What is done of a call that fails. GAP: what stood at a fixed target is unmapped. */
enum done { NOTHING, ALL, HALF, GAP };

struct rule {
	_Atomic uint32_t kind, first, count, error, done;
};

#define NR_RULES 3

struct plan {
	_Atomic uint32_t armed, failed;
	_Atomic uint32_t calls[NR_KINDS];
	struct rule rules[NR_RULES];
	_Atomic uint32_t moments; /* how often a child was about to change something, or just had */
	_Atomic uint32_t fatal;	  /* at which of these moments it is killed, counted from 1; 0: never */
};

#define LINGER_NS 3000000 /* before it dies, so that others meet what is half done */

static struct plan *plan;
static struct real kernel_calls;
static long owner; /* the process */

/* Before and after every call of the agent's that changes mappings, or what is in them. */
static void moment(void)
{
	const struct timespec linger = {.tv_nsec = LINGER_NS};
	long pid;

	if (!plan || !atomic_load(&plan->armed) || !on_agent_thread())
		return;
	pid = kernel_calls.syscall(SYS_getpid);
	if (pid == owner || atomic_fetch_add(&plan->moments, 1) + 1 != atomic_load(&plan->fatal))
		return;
	kernel_calls.syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &linger, NULL);
	kernel_calls.syscall(SYS_kill, pid, SIGKILL);
}

/* Makes a call that changes mappings, or what is in them; its value. */
#define BETWEEN_MOMENTS(call)                                                                                          \
	({                                                                                                             \
		__typeof__(call) ret_;                                                                                 \
		moment();                                                                                              \
		ret_ = (call);                                                                                         \
		moment();                                                                                              \
		ret_;                                                                                                  \
	})

/* The rule by which this call of a kind is to fail, or NULL. */
static const struct rule *fails(enum kind kind)
{
	uint32_t n;

	if (!plan || !on_agent_thread())
		return NULL;
	n = atomic_fetch_add(&plan->calls[kind], 1);
	for (struct rule *r = plan->rules; r < plan->rules + NR_RULES && atomic_load(&plan->armed); r++)
		if (r->kind == kind && n >= r->first && n - r->first < r->count) {
			atomic_fetch_add(&plan->failed, 1);
			return r;
		}
	return NULL;
}

static int fail(const struct rule *r)
{
	errno = (int)r->error;
	return -1;
}

static size_t half(size_t len)
{
	return len / 2 & ~(PAGE_SIZE - 1);
}

static int uffd_ioctl(int fd, unsigned long request, void *arg, enum kind kind)
{
	uint64_t *word = arg; /* start and length; of a move and a copy: target, source and length */
	size_t at = kind == K_MOVE || kind == K_COPY ? 2 : 1;
	uint64_t len = word[at];
	const struct rule *r = fails(kind);

	if (!r)
		return BETWEEN_MOMENTS(kernel_calls.ioctl(fd, request, arg));
	if (r->done == HALF)
		word[at] = half(len);
	if (r->done != NOTHING && word[at])
		kernel_calls.ioctl(fd, request, arg);
	word[at] = len;
	return fail(r);
}

static int scan_ioctl(int fd, unsigned long request, void *arg)
{
	uint64_t *word = arg; /* size, flags, start, end, walk_end: struct pm_scan_arg */
	uint64_t end = word[3];
	const struct rule *r = fails(K_SCAN);
	int got;

	if (!r)
		return kernel_calls.ioctl(fd, request, arg);
	if (r->done != HALF || half(end - word[2]) == 0)
		return fail(r);
	word[3] = word[2] + half(end - word[2]);
	got = kernel_calls.ioctl(fd, request, arg);
	word[3] = end;
	return got;
}

static int faulty_ioctl(int fd, unsigned long request, ...)
{
	static const struct {
		unsigned type, number;
		enum kind kind;
	} uffd[] = {
		{UFFDIO, MOVE, K_MOVE},
		{UFFDIO, _UFFDIO_COPY, K_COPY},
		{UFFDIO, _UFFDIO_REGISTER, K_REGISTER},
		{UFFDIO, _UFFDIO_UNREGISTER, K_UNREGISTER},
		{UFFDIO, _UFFDIO_WAKE, K_WAKE},
		{UFFDIO, _UFFDIO_WRITEPROTECT, K_PROTECT},
	};
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	for (size_t i = 0; i < sizeof(uffd) / sizeof(uffd[0]) && _IOC_SIZE(request); i++) /* not USERFAULTFD_IOC_NEW */
		if (_IOC_TYPE(request) == uffd[i].type && _IOC_NR(request) == uffd[i].number)
			return uffd_ioctl(fd, request, arg, uffd[i].kind);
	if (_IOC_TYPE(request) == 'f' && _IOC_NR(request) == 16)
		return scan_ioctl(fd, request, arg);
	return kernel_calls.ioctl(fd, request, arg);
}

static void *faulty_mremap(void *addr, size_t old_len, size_t new_len, int flags, ...)
{
	const struct rule *r;
	va_list args;
	void *target;

	va_start(args, flags);
	target = va_arg(args, void *);
	va_end(args);
	r = fails(K_MREMAP);
	if (!r)
		return BETWEEN_MOMENTS(kernel_calls.mremap(addr, old_len, new_len, flags, target));
	if (r->done == GAP && flags & MREMAP_FIXED)
		kernel_calls.munmap(target, new_len);
	fail(r);
	return MAP_FAILED;
}

static void *faulty_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	const struct rule *r = fails(K_MMAP);

	if (!r)
		return BETWEEN_MOMENTS(kernel_calls.mmap(addr, len, prot, flags, fd, offset));
	fail(r);
	return MAP_FAILED;
}

static int fatal_munmap(void *addr, size_t len)
{
	return BETWEEN_MOMENTS(kernel_calls.munmap(addr, len));
}

static int faulty_mprotect(void *addr, size_t len, int prot)
{
	const struct rule *r = fails(K_MPROTECT);

	return r ? fail(r) : kernel_calls.mprotect(addr, len, prot);
}

static int faulty_madvise(void *addr, size_t len, int advice)
{
	enum kind kind = advice == MADV_DONTNEED	 ? K_DONTNEED
			 : advice == MADV_POPULATE_WRITE ? K_POPULATE
			 : advice == 25			 ? K_COLLAPSE
							 : K_ADVICE;
	const struct rule *r = fails(kind);

	if (!r)
		return BETWEEN_MOMENTS(kernel_calls.madvise(addr, len, advice));
	if (r->done == HALF && half(len))
		kernel_calls.madvise(addr, half(len), advice);
	return fail(r);
}

static int faulty_munlock(const void *addr, size_t len)
{
	const struct rule *r = fails(K_MUNLOCK);

	return r ? fail(r) : kernel_calls.munlock(addr, len);
}

static long faulty_syscall(long number, ...)
{
	const struct rule *r = NULL;
	long a[6];
	va_list args;

	va_start(args, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(args, long);
	va_end(args);
	if (number == SYS_msync)
		r = fails(K_MSYNC);
	else if (number == SYS_prlimit64)
		r = fails(K_PRLIMIT);
	else if (number == SYS_mbind)
		r = fails(K_MBIND);
	if (r && number == SYS_mbind && r->done != NOTHING)
		kernel_calls.syscall(number, a[0], r->done == HALF ? (long)half((size_t)a[1]) : a[1], a[2], a[3], a[4], a[5]);
	return r ? fail(r) : kernel_calls.syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

ssize_t __real_pread(int fd, void *buf, size_t len, off_t offset);
ssize_t __wrap_pread(int fd, void *buf, size_t len, off_t offset);

ssize_t __wrap_pread(int fd, void *buf, size_t len, off_t offset)
{
	const struct rule *r = fails(K_PREAD);

	if (!r)
		return __real_pread(fd, buf, len, offset);
	return r->done == HALF ? __real_pread(fd, buf, len / 16 * 8, offset) : fail(r);
}

__attribute__((constructor)) static void interpose(void)
{
	const char *path = getenv("SAMEPAGE_FAULTS");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	void *p;

	if (fd < 0)
		return;
	p = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (p == MAP_FAILED)
		return;
	kernel_calls = real;
	real.ioctl = faulty_ioctl;
	real.mremap = faulty_mremap;
	real.mmap = faulty_mmap;
	real.munmap = fatal_munmap;
	real.mprotect = faulty_mprotect;
	real.madvise = faulty_madvise;
	real.munlock = faulty_munlock;
	real.syscall = faulty_syscall;
	owner = kernel_calls.syscall(SYS_getpid);
	plan = p;
}
