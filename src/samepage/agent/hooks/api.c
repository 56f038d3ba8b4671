/* SPDX-License-Identifier: Apache-2.0 */
/* For the program itself: the C API that samepage/agent/__init__.py binds. */
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "hooks/hooks.h"
#include "kernel/kernel.h"
#include "thread/peer.h"

#include <string.h>
#include <unistd.h>

static void take_life(sigset_t *saved)
{
	next_init();
	thread_note_defaults();
	mmap_note_memory();
	block_signals(saved);
	mutex_lock(&life);
}

static void leave_life(const sigset_t *saved)
{
	mutex_unlock(&life);
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

SP_EXPORT int samepage_join(const char *path)
{
	sigset_t saved;
	int err;

	if (strlen(path) >= sizeof(peer.path))
		return -ENAMETOOLONG;
	next_init();
	if (!agent_configured() && !seccomp_allows_asked())
		return -EPERM;
	take_life(&saved);
	if (atomic_load(&thread.state) == RUNNING && strcmp(path, peer.path)) {
		err = -EBUSY;
	} else {
		strcpy(peer.path, path);
		err = thread_start();
	}
	leave_life(&saved);
	return err;
}

SP_EXPORT int samepage_attach(int fd)
{
	sigset_t saved;
	int err = -EBUSY;

	next_init();
	if (!agent_configured() && !seccomp_allows_asked())
		return -EPERM;
	take_life(&saved);
	if (atomic_load(&thread.state) == IDLE) {
		peer.attached = fd;
		err = thread_start();
		/* Until the thread has a file table of its own, it needs this descriptor in ours. */
		while (!err && !calls_taken() && atomic_load(&thread.tid))
			real.syscall(SYS_sched_yield);
		if (!err && !calls_taken()) {
			atomic_store(&thread.state, IDLE);
			err = -ENOSYS; /* close_range(2) with CLOSE_RANGE_UNSHARE: Linux 5.9 */
		}
		if (err)
			peer.attached = -1;
		else
			close(fd);
	}
	leave_life(&saved);
	return err;
}

/* Returns 0 if [start, end) is private anonymous memory that may be read and written; else -errno. */
static int check_mergeable(uintptr_t start, uintptr_t end)
{
	int maps = maps_open(), err = maps < 0 ? maps : 0;
	struct vma v;

	while (!err && start < end) {
		if (!vma_find(maps, start, &v) || v.start > start)
			err = -ENOMEM;
		else if (v.shared || (v.ino && !page_test(PAGE_SEGMENT, start >> PAGE_SHIFT)))
			err = -EINVAL;
		else if (!v.read || !v.write)
			err = -EACCES;
		start = v.end;
	}
	if (maps >= 0)
		maps_close(maps);
	return err;
}

SP_EXPORT int samepage_register(void *addr, size_t len)
{
	uintptr_t start = (uintptr_t)addr, end = start + len;
	sigset_t saved;
	int err;

	if (!len || (start | len) & (PAGE_SIZE - 1))
		return -EINVAL;
	if (watched)
		return -EPERM;
	mmap_lock(&saved);
	err = check_mergeable(start, end);
	if (!err)
		err = area_cover(start, end, AREA_ADVISED, AREA_UNMERGED, PROT_READ | PROT_WRITE);
	mmap_unlock(&saved);
	if (!err)
		agent_start();
	return err;
}

SP_EXPORT int samepage_unmerge(void *addr, size_t len, size_t max_pages, struct sp_broken *out)
{
	uintptr_t start = PAGE_ALIGN_DOWN(addr), end = PAGE_ALIGN_UP((uintptr_t)addr + len);
	sigset_t saved;

	memset(out, 0, sizeof(*out));
	mmap_lock(&saved);
	area_change(start, end, max_pages ? AREA_UNMERGING : 0, AREA_UNMERGING, -1);
	mmap_unlock(&saved);
	if (!max_pages)
		return 0;
	unmerge_range(start, end, max_pages, out);
	if (out->error == EAGAIN)
		return -EAGAIN;
	mmap_lock(&saved);
	if (out->error) {
		area_change(start, end, 0, AREA_UNMERGING, -1);
	} else {
		area_change(start, end, AREA_UNMERGED, AREA_UNMERGING | AREA_ADVISED, -1);
		area_forget_plain(start, end);
	}
	mmap_unlock(&saved);
	return -out->error;
}

SP_EXPORT void samepage_quiet(void *addr, size_t len, int on)
{
	sigset_t saved;

	mmap_lock(&saved);
	area_change((uintptr_t)addr, (uintptr_t)addr + len, on ? AREA_QUIET : 0, AREA_QUIET, -1);
	mmap_unlock(&saved);
}

SP_EXPORT int samepage_mode(void)
{
	return atomic_load(&peer.joined) ? (int)kernel.swap : -ENOTCONN;
}

SP_EXPORT const char *samepage_strmode(int mode)
{
	static const char *const names[] = {"none", "move", "write-protect", "quiet areas only",
					    "quiet areas only, by write-protection"};

	return mode >= 0 && mode < 5 ? names[mode] : "not joined";
}
