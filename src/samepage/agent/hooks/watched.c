/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Programs that watch their own memory. MPI libraries (Open MPI, UCX) remember which memory a network card has pinned, and must hear when
 * it is unmapped or discarded. To hear it from libc's malloc, too, they write a jump over the first bytes of libc's munmap(2) and its
 * kin. What the agent asks the kernel passes that by, and the card would go on with pages that the program does not have any more.
 *
 * So a process in which libc's code has changed is left alone, and all of its calls go through that code from then on.
 */
#include "base/real.h"
#include "hooks/blocks.h"
#include "hooks/hooks.h"
#include "thread/peer.h"

#include <string.h>

#define BREAKPOINT 0xCC /* on x86-64 */

_Atomic bool watched;
uint64_t libc_code[LIBC_CODE_WORDS];

void watched_init(void)
{
	if (next.munmap)
		memcpy(libc_code, (void *)next.munmap, sizeof(libc_code));
}

/* Breakpoints and uprobes change code, too, by one byte. */
static bool has_changed(void)
{
	unsigned char before[sizeof(libc_code)];
	const unsigned char *now = (const unsigned char *)(void *)next.munmap;

	memcpy(before, libc_code, sizeof(before));
	for (size_t i = 0; i < sizeof(before); i++)
		if (now[i] != before[i] && now[i] != BREAKPOINT)
			return true;
	return false;
}

/* Merged pages become the program's own again, and the agent forgets all memory but which blocks are in use. */
static bool let_go(void)
{
	sigset_t saved;

	heap_leave();
	alloc_disable();
	agent_retire();
	agent_unconfigure();
	if (atomic_load(&thread.tid) || unmerge(0, ADDRESS_END))
		return false;
	mmap_lock(&saved);
	blocks_release();
	area_remove(0, ADDRESS_END);
	mmap_unlock(&saved);
	return true;
}

/* All of these are libc's own, or none: tcmalloc's call syscall(), which is ours. */
static void pass_calls_on(void)
{
	if (!is_libcs((void *)next.munmap) || !is_libcs((void *)next.mmap) || !is_libcs((void *)next.mremap) ||
	    !is_libcs((void *)next.madvise))
		return;
	real.mmap = next.mmap;
	real.munmap = next.munmap;
	real.mremap = next.mremap;
	real.madvise = next.madvise;
}

void leave_to_watchers(void)
{
	static _Atomic bool begun;
	bool served = agent_configured();

	if (!has_changed() || atomic_exchange(&begun, true))
		return;
	if (!let_go()) {
		say_left_alone(" watches its memory (MPI), keeps merged pages for lack of memory", "");
		return;
	}
	pass_calls_on();
	atomic_store(&watched, true);
	if (served)
		say_left_alone(" watches its memory (MPI)", "");
}
