/* SPDX-License-Identifier: Apache-2.0 */
/* The agent in a forked child: it has no thread yet, and none of the parent's descriptors. */
#include "base/area.h"
#include "base/lock.h"
#include "base/planes.h"
#include "kernel/kernel.h"
#include "kernel/window.h"
#include "pages/pages.h"
#include "thread/peer.h"

static _Atomic int64_t fork_ms; /* when the last fork was; 0: never */

void note_fork(void)
{
	atomic_store(&fork_ms, now_ms());
	scan_forked();
}

uint32_t ms_since_fork(void)
{
	int64_t then = atomic_load(&fork_ms), ms = then ? now_ms() - then : UINT32_MAX;

	return ms < UINT32_MAX ? (uint32_t)ms : UINT32_MAX;
}

/* Memory locks are not inherited. What the program kept from its children (MADV_DONTFORK) is not mapped here, and libc
 * may map something else there. What it wants wiped in children (MADV_WIPEONFORK), the kernel wiped, except for what is
 * mapped from segments. */
static void inherit_areas(void)
{
	uintptr_t end;

	area_unlock_all();
	for (const struct area *a = area_next(0); a; a = area_next(end)) {
		end = a->end;
		if (a->flags & AREA_DONTFORK)
			area_remove(a->start, end);
		else if (a->flags & AREA_WIPE)
			zero_segments(a->start, end);
	}
}

/* The thread, its descriptors and all that depended on them stayed in the parent. */
static void begin_anew(bool may_start_thread)
{
	life = (struct mutex){0};
	calls_forget();
	atomic_store(&thread.tid, 0);
	atomic_store(&thread.away, 0);
	thread.owner = getpid();
	atomic_store(&peer.joined, false);
	if (atomic_load(&thread.state) == RUNNING)
		atomic_store(&thread.state, IDLE);
	peer.sock = peer.attached = -1;
	windows_forked();
	kernel = KERNEL_CLOSED;
	page_forget_known();
	thread.delay = true;
	if (may_start_thread && thread.wanted && any_mergeable())
		agent_start();
}

void forked(bool plain)
{
	mmap_lock_reinit();
	atomic_store(&fork_ms, 0);
	area_change(0, ADDRESS_END, 0, AREA_UNMERGING, -1); /* the thread that was unmerging stayed in the parent */
	inherit_areas();
	begin_anew(!plain);
}

void forked_unseen(void)
{
	scan_forked(); /* note_fork() did not */
	forked(true);
}
