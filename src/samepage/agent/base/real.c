/* SPDX-License-Identifier: Apache-2.0 */
#include "base/real.h"
#include "base/system.h"

/*
 * Calls that change mappings go straight to the kernel, whoever has replaced libc's functions. tcmalloc's mmap() calls
 * syscall(), which is our wrapper and would call it again; and while pages are out of their place, the agent must not
 * run foreign code. All calls of the agent's thread go straight to the kernel, too: it may call nobody else's functions
 * at all (thread.c).
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
	long a[1];

	ARGUMENTS(a, flags);
	return (void *)kernel_syscall(SYS_mremap, addr, old_len, new_len, flags, a[0]);
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
	long a[4];

	ARGUMENTS(a, option);
	return (int)kernel_syscall(SYS_prctl, option, a[0], a[1], a[2], a[3]);
}

static int kernel_ioctl(int fd, unsigned long request, ...)
{
	long a[1];

	ARGUMENTS(a, request);
	return (int)kernel_syscall(SYS_ioctl, fd, request, a[0]);
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
