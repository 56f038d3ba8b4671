/* SPDX-License-Identifier: Apache-2.0 */
#include "base/real.h"
#include "base/system.h"

#include <stdarg.h>

/*
 * What changes mappings goes to the kernel, whoever else stands in front of libc. tcmalloc has an mmap() that is made
 * of syscall(), which is ours and would call it again; and while pages are out of their place the agent must not
 * meet foreign code. So does what the agent's thread calls, which may call nothing of others at all (thread.c).
 */
static void *kernel_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	return (void *)kernel_syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
}

static int kernel_munmap(void *addr, size_t len)
{
	return (int)kernel_syscall(SYS_munmap, addr, len);
}

static void *kernel_mremap(void *addr, size_t old_len, size_t new_len, int flags, ...)
{
	va_list args;
	void *target;

	va_start(args, flags);
	target = va_arg(args, void *);
	va_end(args);
	return (void *)kernel_syscall(SYS_mremap, addr, old_len, new_len, flags, target);
}

static int kernel_mprotect(void *addr, size_t len, int prot)
{
	return (int)kernel_syscall(SYS_mprotect, addr, len, prot);
}

static int kernel_madvise(void *addr, size_t len, int advice)
{
	return (int)kernel_syscall(SYS_madvise, addr, len, advice);
}

static int kernel_munlock(const void *addr, size_t len)
{
	return (int)kernel_syscall(SYS_munlock, addr, len);
}

static int kernel_prctl(int option, ...)
{
	unsigned long a, b, c, d;
	va_list args;

	va_start(args, option);
	a = va_arg(args, unsigned long);
	b = va_arg(args, unsigned long);
	c = va_arg(args, unsigned long);
	d = va_arg(args, unsigned long);
	va_end(args);
	return (int)kernel_syscall(SYS_prctl, option, a, b, c, d);
}

static int kernel_ioctl(int fd, unsigned long request, ...)
{
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	return (int)kernel_syscall(SYS_ioctl, fd, request, arg);
}

struct real real = {
	.mmap = kernel_mmap,
	.munmap = kernel_munmap,
	.mremap = kernel_mremap,
	.mprotect = kernel_mprotect,
	.madvise = kernel_madvise,
	.munlock = kernel_munlock,
	.prctl = kernel_prctl,
	.ioctl = kernel_ioctl,
	.syscall = kernel_syscall,
};
