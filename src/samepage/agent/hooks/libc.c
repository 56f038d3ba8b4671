/* SPDX-License-Identifier: Apache-2.0 */
#include "hooks/libc.h"
#include "base/real.h"
#include "base/system.h"
#include "hooks/hooks.h"

#include <sched.h>

_Atomic bool next_ready;
struct next next;

static const struct {
	void *slot;
	const char *name;
} symbols[] = {
	/* First, since dlsym() may call calloc and malloc. Each must be in every libc: dlsym() allocates what dlerror() is
	 * to say, and an allocator that is about to begin (jemalloc) does not bear that. */
	{&next.calloc, "calloc"},
	{&next.malloc, "malloc"},
	{&next.free, "free"},
	{&next.realloc, "realloc"},
	{&next.posix_memalign, "posix_memalign"},
	{&next.aligned_alloc, "aligned_alloc"},
	{&next.memalign, "memalign"},
	{&next.malloc_usable_size, "malloc_usable_size"},
	{&next.malloc_trim, "malloc_trim"},
	{&next.mallopt, "mallopt"},
	{&next.mmap, "mmap"},
	{&next.munmap, "munmap"},
	{&next.mremap, "mremap"},
	{&next.madvise, "madvise"},
	{&next.mlock, "mlock"},
	{&next.munlock, "munlock"},
	{&next.mlockall, "mlockall"},
	{&next.munlockall, "munlockall"},
	{&next.prctl, "prctl"},
	{&next.ioctl, "ioctl"},
	{&next.clone, "clone"},
	{&next.unshare, "unshare"},
	{&next.setns, "setns"},
	{&next.register_atfork, "__register_atfork"},
	{&next.shmat, "shmat"},
	{&next.brk, "brk"},
	{&next.sbrk, "sbrk"},
	{&next.syscall, "syscall"},
	{&next.chroot, "chroot"},
	{&next.setuid, "setuid"},
	{&next.seteuid, "seteuid"},
	{&next.setreuid, "setreuid"},
	{&next.setresuid, "setresuid"},
	{&next.setgid, "setgid"},
	{&next.setegid, "setegid"},
	{&next.setregid, "setregid"},
	{&next.setresgid, "setresgid"},
	{&next.setgroups, "setgroups"},
	{&next.initgroups, "initgroups"},
	{&next.setfsuid, "setfsuid"},
	{&next.setfsgid, "setfsgid"},
	{&next.capset, "capset"},
	{&next.pthread_mutex_init, "pthread_mutex_init"},
	{&next.pthread_mutexattr_getrobust, "pthread_mutexattr_getrobust"},
	{&next.pthread_mutexattr_getprotocol, "pthread_mutexattr_getprotocol"},
	{&next.pthread_attr_setstack, "pthread_attr_setstack"},
	{&next.pthread_attr_setstackaddr, "pthread_attr_setstackaddr"},
};

static void look_up(void)
{
	for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++)
		*(void **)symbols[i].slot = dlsym(RTLD_NEXT, symbols[i].name);
}

void next_init(void)
{
	static _Atomic uintptr_t owner;
	uintptr_t nobody = 0, self = (uintptr_t)arch_thread_pointer();

	if (next_ready)
		return;
	if (!atomic_compare_exchange_strong(&owner, &nobody, self)) {
		/* Inside this thread's own dlsym(), go on with what is there; another thread waits. */
		while (!next_ready && owner != self)
			sched_yield();
		return;
	}
	arch_init();
	look_up();
	watched_init();
	atomic_store_explicit(&next_ready, true, memory_order_release);
	fork_init();
}
