/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Is there memory? A break must know before it faults, because the fault itself ends in the OOM killer.
 *
 * The answer is the least of what is left at each place that can say no: MemAvailable for the machine, and
 * the process's memory cgroup with each of its ancestors, where "left" is
 *
 * 	limit - usage + clean file cache [+ what can be swapped out, only when asked]
 *
 * What counts, and what does not:
 *
 * - The limit is the lower of memory.max and memory.high (v2). Nobody is killed for being above `high`, but
 *   the kernel puts the thread that went there to sleep, with our mmap_lock held and the application behind
 *   it, and swaps to get back under it; and systemd-oomd kills for the pressure that this makes. On v1 it
 *   is memory.limit_in_bytes, and memory.memsw.limit_in_bytes as a second limit that swap cannot relieve.
 *   memory.kmem.* is ignored: deprecated since Linux 4.20 and not what page faults are charged to.
 * - Clean file cache is the file LRUs less dirty pages and pages under writeback. Shared memory, and so
 *   every segment, is on the anon LRUs and is not in it. Neither is reclaimable slab.
 * - memory.min and memory.low of v2 keep the cache of a cgroup from reclaim that starts above it. Reclaim
 *   that starts at a limit honours its direct children's values in full (mem_cgroup_calculate_protection),
 *   so what they shield is taken off. `low` gives way before a kill does; it is respected nonetheless.
 * - Ancestors above the root of a cgroup namespace, or of a bind-mounted subtree, cannot be seen; nor does
 *   MemAvailable know of cpusets and mempolicies. A limit that hides there is not honoured.
 *
 * A file that cannot be read permits nothing. A file that is not there may mean that there is no limit: v2 has none in
 * the root, and none where the controller is not enabled. Every other failure (no mount that shows the process's own
 * cgroup, another file system over it, no permission, no descriptor left, a file longer than our buffer) leaves a limit
 * unknown, and then headroom is 0: a refused unmerge can be repeated later, a killed process cannot. headroom_unknown()
 * then returns true.
 *
 * How exact is it? The usage counter errs on the safe side: each CPU may hold up to 64 pages that are charged but not
 * used yet (MEMCG_CHARGE_BATCH). memory.stat, and with it the clean cache, errs both ways, by up to 64 pages times the
 * number of CPUs: updates below that are not flushed for a reader. And others allocate between our look and our fault.
 * The caller's reserve has to cover the last two.
 *
 * Everything is read anew at each call (memcg.c). memory.stat is the expensive file (reading it may flush every CPU's
 * counters), so it is read only where the limit could be the least. Callers hold the mmap_lock, since the buffers are
 * static.
 */
#include "kernel/headroom.h"
#include "base/settings.h"
#include "kernel/memcg.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static uint64_t shielded; /* bytes of the machine's clean cache that memory.min and memory.low protect */

static uint64_t least_of(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t minus(uint64_t a, uint64_t b)
{
	return a > b ? a - b : 0;
}

/* ---- one cgroup ------------------------------------------------------------------------------------- */

static uint64_t clean_cache(int dir)
{
	if (!read_at(dir, "memory.stat"))
		return 0;
	if (memcg.v2)
		return minus(field("inactive_file", 0) + field("active_file", 0),
			     field("file_dirty", 0) + field("file_writeback", 0));
	return minus(field("total_inactive_file", 0) + field("total_active_file", 0),
		     field("total_dirty", 0) + field("total_writeback", 0));
}

/* How many bytes memory.min and memory.low protect from reclaim that starts above this cgroup. v2 only. */
static uint64_t protection(int dir)
{
	uint64_t min = number_at(dir, "memory.min", 0), low = number_at(dir, "memory.low", 0);

	return min > low ? min : low;
}

/* How much clean cache of a child cgroup its parent's reclaim must leave. */
static uint64_t shielded_in(int child)
{
	uint64_t keep = protection(child), cache, usage;

	if (!keep)
		return 0;
	cache = clean_cache(child);
	usage = number_at(child, "memory.current", 0);
	return minus(cache, minus(usage, keep));
}

/* The same, summed over all children of a cgroup. */
static uint64_t shielded_below(int dir)
{
	static char entries[8192] __attribute__((aligned(8)));
	uint64_t sum = 0;
	struct stat st;
	ssize_t n;
	int fd;

	if (!memcg.v2 || fstat(dir, &st) || st.st_nlink == 2) /* kernfs counts subdirectories in st_nlink; most cgroups
							       * have none */
		return 0;
	fd = open_at(dir, ".", O_DIRECTORY);
	if (fd < 0)
		return 0;
	while ((n = getdents64(fd, entries, sizeof(entries))) > 0) {
		for (ssize_t at = 0; at < n;) {
			const struct dirent64 *e = (const void *)(entries + at);

			at += e->d_reclen;
			if (e->d_type == DT_DIR && strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) {
				int child = open_at(fd, e->d_name, O_PATH | O_DIRECTORY);

				if (child >= 0) {
					sum += shielded_in(child);
					close(child);
				}
			}
		}
	}
	close(fd);
	return sum;
}

/* How much a counter leaves of its limit once `extra` is reclaimed. */
static uint64_t left(uint64_t limit, uint64_t usage, uint64_t extra)
{
	return limit == NO_LIMIT ? NO_LIMIT : minus(limit + extra, usage);
}

/* The usage that belongs to a limit. Without a limit it does not matter; if it is unknown, nothing is left. */
static uint64_t usage_at(int dir, const char *name, uint64_t limit)
{
	return limit == NO_LIMIT ? 0 : number_at(dir, name, UINT64_MAX);
}

/* How much one cgroup leaves, or `least` if that is less anyway. */
static uint64_t room_in(int dir, uint64_t swap, uint64_t least)
{
	uint64_t limit, usage, memsw = NO_LIMIT, memsw_usage, cache;

	if (faccessat(dir, "cgroup.procs", F_OK, 0)) /* every cgroup has this file: something else is mounted here */
		blind = true;
	if (memcg.v2) {
		limit = least_of(number_at(dir, "memory.max", NO_LIMIT), number_at(dir, "memory.high", NO_LIMIT));
		usage = usage_at(dir, "memory.current", limit);
	} else {
		limit = number_at(dir, "memory.limit_in_bytes", NO_LIMIT);
		usage = usage_at(dir, "memory.usage_in_bytes", limit);
		memsw = number_at(dir, "memory.memsw.limit_in_bytes", NO_LIMIT);
	}
	memsw_usage = usage_at(dir, "memory.memsw.usage_in_bytes", memsw);
	if (left(limit, usage, 0) >= least && left(memsw, memsw_usage, 0) >= least)
		return least;
	cache = clean_cache(dir);
	if (cache)
		cache = minus(cache, shielded_below(dir));
	return least_of(left(limit, usage, cache + swap), left(memsw, memsw_usage, cache));
}

/* ---- the process's cgroup and all above it ---------------------------------------------------------- */

/* Steps from a copy of memcg.dir to its parent; false above the top. */
static bool ascend(char *dir)
{
	char *slash = strrchr(dir + memcg.top, '/');

	if (slash)
		*slash = '\0';
	return slash;
}

/* The machine's own reclaim starts at the root, and MemAvailable does not take off what that must leave. */
static uint64_t shielded_from_machine(void)
{
	uint64_t bytes = 0;
	char end = memcg.dir[memcg.top];
	int dir;

	memcg.dir[memcg.top] = '\0';
	dir = open_at(AT_FDCWD, memcg.dir, O_PATH | O_DIRECTORY);
	memcg.dir[memcg.top] = end;
	if (dir < 0)
		return 0;
	if (!read_at(dir, "memory.max")) /* only the root has none */
		bytes = shielded_below(dir);
	close(dir);
	return bytes;
}

/* How many bytes of the process's own memory can be swapped out. Others' memory could be as well, but within limits
 * that we do not see. */
static uint64_t swappable(const struct roots *r, uint64_t swap_free)
{
	static char path[PATH_MAX];
	uint64_t anon = 0, swappiness = 0;

	strcpy(path, memcg.dir);
	do {
		int dir = open_at(AT_FDCWD, path, O_PATH | O_DIRECTORY);

		if (dir < 0)
			continue;
		if (strlen(path) == strlen(memcg.dir)) {
			/* At 0, a cgroup's reclaim swaps nothing at all. v2 has only the machine's swappiness. */
			swappiness = memcg.v2 ? number_at(AT_FDCWD, r->swappiness, 0)
					      : number_at(dir, "memory.swappiness", 0);
			if (read_at(dir, "memory.stat"))
				anon = field("inactive_anon", 0) + field("active_anon", 0);
		}
		if (memcg.v2) {
			uint64_t limit = least_of(number_at(dir, "memory.swap.max", NO_LIMIT),
						  number_at(dir, "memory.swap.high", NO_LIMIT));

			swap_free = least_of(swap_free, left(limit, usage_at(dir, "memory.swap.current", limit), 0));
		}
		close(dir);
	} while (ascend(path));
	return swappiness ? least_of(anon, swap_free) : 0;
}

/* How much the machine leaves. *swap: how much of that has to be swapped out first; 0 unless `with_swap`. */
static uint64_t room_in_machine(const struct roots *r, bool with_swap, uint64_t *swap)
{
	uint64_t available = NO_LIMIT;

	*swap = 0;
	if (read_at(AT_FDCWD, r->meminfo)) {
		available = field("MemAvailable:", NO_LIMIT);
		if (with_swap)
			*swap = 1024 * least_of(field("SwapFree:", 0),
						field("Active(anon):", 0) + field("Inactive(anon):", 0));
	}
	if (available == NO_LIMIT) {
		blind = true;
		return 0;
	}
	return minus(1024 * available, shielded) + *swap;
}

static uint64_t headroom_under(const struct roots *r, bool with_swap)
{
	static char path[PATH_MAX];
	uint64_t least, swap;

	blind = false;
	if (memcg_locate(r)) {
		shielded = memcg.dir[0] ? shielded_from_machine() : 0;
		if (blind)
			memcg.found = -1; /* look again at the next call for what was not seen */
	}
	least = room_in_machine(r, with_swap, &swap);
	if (swap)
		swap = swappable(r, swap);
	strcpy(path, memcg.dir);
	do {
		int dir = open_at(AT_FDCWD, path, O_PATH | O_DIRECTORY);

		if (dir < 0) {
			/* Something else is mounted over it; unless there is no cgroup at all, or this one is gone and
			 * only its ancestors count. */
			if (*path && !memcg_is_gone(path))
				blind = true;
			continue;
		}
		least = least_of(least, room_in(dir, swap, least));
		if (swap && memcg.v2 && protection(dir))
			swap = 0; /* an ancestor's reclaim may have to leave this cgroup alone */
		close(dir);
	} while (ascend(path));
	return blind ? 0 : least;
}

bool headroom_unknown(void)
{
	return blind;
}

#define LOOK_GOOD_US 20000ULL /* a result is good for no longer: the process may be moved to another cgroup */
#define TAKEN_PER_US ((10ULL << 30) / 1000000) /* by each CPU at most: none clears pages faster */

/* How many numbers a list like "0-3,8-11" has. */
static unsigned long count_listed(const char *list)
{
	unsigned long n = 0;

	while (*list >= '0' && *list <= '9') {
		char *end;
		unsigned long first = strtoul(list, &end, 10), last = *end == '-' ? strtoul(end + 1, &end, 10) : first;

		n += last - first + 1;
		list = *end ? end + 1 : end;
	}
	return n ? n : 1;
}

unsigned long online_cpus(void)
{
	static unsigned long n;
	char list[1024] = "";
	int fd;

	if (n)
		return n;
	fd = open("/sys/devices/system/cpu/online", O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (read(fd, list, sizeof(list) - 1) < 0)
			list[0] = '\0';
		close(fd);
	}
	return n = count_listed(list);
}

/* How much all CPUs together can take in `us` microseconds. */
static uint64_t taken_in(uint64_t us)
{
	return us * TAKEN_PER_US * online_cpus();
}

static bool room_under(const struct roots *r, uint64_t bytes, uint64_t leave)
{
	static uint64_t found, looked, taken;
	struct timespec t;
	uint64_t now;

	clock_gettime(CLOCK_MONOTONIC, &t);
	now = (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
	/* Since the last look, we took all that we asked for, and each CPU can have taken TAKEN_PER_US. If there was
	 * twice that, and the bytes asked for now, they are still there. */
	if (now - looked < LOOK_GOOD_US && 2 * (taken + taken_in(now - looked) + bytes + leave) <= found) {
		taken += bytes;
		return true;
	}
	found = headroom_under(r, settings.use_swap);
	looked = now;
	taken = bytes;
	return found >= bytes + leave;
}

/* mountinfo is relative to a thread's root, and this thread's need not be the main thread's. */
static const struct roots kernel_files = {
	.cgroup = "/proc/self/cgroup",
	.thread_cgroup = "/proc/thread-self/cgroup",
	.namespace = "/proc/thread-self/ns/cgroup",
	.mountinfo = "/proc/thread-self/mountinfo",
	.meminfo = "/proc/meminfo",
	.swappiness = "/proc/sys/vm/swappiness",
	.prefix = "",
};

bool room_for(uint64_t bytes, uint64_t leave)
{
	return room_under(&kernel_files, bytes, leave);
}

bool room_to_merge(uint64_t bytes)
{
	return room_for(bytes, settings.reserve / 2);
}

uint64_t headroom(bool with_swap)
{
	return headroom_under(&kernel_files, with_swap);
}
