/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Is there memory? A break must know before it faults, because the fault itself ends in the OOM killer.
 *
 * The answer is the least of what is left at each place that can say no: MemAvailable for the machine, and
 * the process's memory cgroup with each of its ancestors, where "left" is
 *
 *	limit - usage + clean file cache [+ what can be swapped out, only when asked]
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
 * How exact. The usage counter errs on the safe side: each CPU may hold up to 64 pages that are charged
 * but not used yet (MEMCG_CHARGE_BATCH). memory.stat, and with it the clean cache, errs both ways, by up to
 * 64 pages times the number of CPUs: updates below that are not flushed for a reader. And others allocate
 * between our look and our fault. The caller's reserve has to cover the last two.
 *
 * Everything is read anew at each call, at about 2 us a file: no descriptor is kept that a forked child or
 * a new agent thread could mistake for its own. memory.stat is the dear one (it may flush every CPU's
 * counters), so it is read only where the limit could be the least. Only the directory is remembered.
 * Needs the mmap_lock: the buffers are static.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NO_LIMIT UINT64_MAX

/* Where the kernel's files are; tests have their own. `prefix` goes before every mount point. */
struct roots {
	const char *cgroup, *thread_cgroup, *mountinfo, *meminfo, *swappiness, *prefix;
};

/* The process's memory cgroup, as found. */
static struct {
	char own[PATH_MAX]; /* its path as /proc/self/cgroup has it: when that changes, all of this is old */
	char dir[PATH_MAX]; /* its directory; those of its ancestors are what it begins with, down to `top` bytes */
	size_t top;
	bool v2;
	time_t found;	   /* CLOCK_MONOTONIC, seconds */
	uint64_t shielded; /* bytes of the machine's clean cache that memory.min and memory.low keep */
} memcg;

static char text[16384]; /* the file last read */
static bool blind;	 /* a file that exists could not be read for want of descriptors or memory */

static uint64_t least_of(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t minus(uint64_t a, uint64_t b)
{
	return a > b ? a - b : 0;
}

/* ---- reading files --------------------------------------------------------------------------------- */

static int open_at(int dir, const char *name, int flags)
{
	int fd = openat(dir, name, flags | O_RDONLY | O_CLOEXEC);

	if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM))
		blind = true;
	return fd;
}

/* The whole file into `text`. One read is enough: seq_file shows a single record in one piece. */
static bool read_at(int dir, const char *name)
{
	int fd = open_at(dir, name, 0);
	ssize_t n;

	if (fd < 0)
		return false;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[n > 0 ? n : 0] = '\0';
	return n > 0;
}

/* A file that holds one number of bytes, or "max"; `otherwise` when it cannot be read. */
static uint64_t number_at(int dir, const char *name, uint64_t otherwise)
{
	uint64_t value;

	if (!read_at(dir, name))
		return otherwise;
	if (!strncmp(text, "max", 3))
		return NO_LIMIT;
	value = strtoull(text, NULL, 10);
	return value < 1ULL << 60 ? value : NO_LIMIT; /* v1 writes "none" as all the pages a long can count */
}

/* The number after `key` in `text`, or `otherwise`. */
static uint64_t field(const char *key, uint64_t otherwise)
{
	size_t len = strlen(key);

	for (const char *line = text; *line;) {
		const char *end = strchrnul(line, '\n');

		if (!strncmp(line, key, len) && (line[len] == ' ' || line[len] == '\t'))
			return strtoull(line + len, NULL, 10);
		line = *end ? end + 1 : end;
	}
	return otherwise;
}

/* ---- finding the cgroup ---------------------------------------------------------------------------- */

static bool has_token(const char *list, const char *token)
{
	size_t len = strlen(token);

	for (;; list++) {
		if (!strncmp(list, token, len) && (list[len] == ',' || !list[len]))
			return true;
		list = strchr(list, ',');
		if (!list)
			return false;
	}
}

/* The memory cgroup in a file like /proc/self/cgroup, NULL when it has none. The memory controller is in one
 * hierarchy only: where v1 has it, v2's tree says nothing of memory. */
static const char *cgroup_path(const char *file, bool *v2)
{
	char *rest = text, *path = NULL, *line;

	if (!read_at(AT_FDCWD, file))
		return NULL;
	while ((line = strsep(&rest, "\n"))) {
		const char *id = strsep(&line, ":"), *controllers = strsep(&line, ":");

		if (!line)
			continue;
		if (has_token(controllers, "memory")) {
			*v2 = false;
			return line;
		}
		if (!strcmp(id, "0"))
			path = line;
	}
	*v2 = true;
	return path;
}

/* mountinfo writes space, tab, newline and backslash in octal. */
static void unescape(char *s)
{
	char *out = s;

	while (*s) {
		if (s[0] == '\\' && s[1] && s[2] && s[3]) {
			*out++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
			s += 4;
		} else {
			*out++ = *s++;
		}
	}
	*out = '\0';
}

/* How many "/.." a path begins with: both files write paths relative to the reader's cgroup namespace. */
static size_t ups(const char *path)
{
	size_t n = 0;

	while (!strncmp(path, "/..", 3) && (path[3] == '/' || !path[3])) {
		path += 3;
		n++;
	}
	return n;
}

/* The way down from the cgroup `root` to the cgroup `path`: "" or "/a/b". NULL when root is not above path. A root
 * higher in the tree than the namespace's is above us, but nobody tells by which way: then "", root alone. */
static const char *way_down(const char *root, const char *path)
{
	size_t len = strlen(root), up = ups(root);

	if (up > ups(path))
		return len == 3 * up ? "" : NULL;
	if (!strcmp(root, "/"))
		len = 0;
	if (strncmp(root, path, len) || (path[len] && path[len] != '/') || ups(path + len))
		return NULL;
	return strcmp(path + len, "/") ? path + len : "";
}

static size_t depth(const char *way)
{
	size_t n = 1;

	for (; *way; way++)
		n += *way == '/';
	return n;
}

/* One line of mountinfo: take the mount if it shows more of our ancestors than the best so far. */
static void consider_mount(char *line, const char *prefix, size_t *best)
{
	char *super = strstr(line, " - "), *root, *point;
	const char *type, *way;

	if (!super)
		return;
	*super = '\0';
	super += 3;
	type = strsep(&super, " ");
	strsep(&super, " "); /* the source */
	if (memcg.v2 ? strcmp(type, "cgroup2") : strcmp(type, "cgroup") || !super || !has_token(super, "memory"))
		return;
	for (int i = 0; i < 3; i++) /* mount ID, parent ID, device */
		strsep(&line, " ");
	root = strsep(&line, " ");
	point = strsep(&line, " ");
	if (!root || !point)
		return;
	unescape(root);
	unescape(point);
	way = way_down(root, memcg.own);
	if (!way || depth(way) <= *best || strlen(prefix) + strlen(point) + strlen(way) >= sizeof(memcg.dir))
		return;
	*best = depth(way);
	memcg.top = (size_t)(stpcpy(stpcpy(memcg.dir, prefix), point) - memcg.dir);
	strcpy(memcg.dir + memcg.top, way);
}

/* Reads mountinfo, which has no bound, line by line. */
static void find_mount(const struct roots *r)
{
	size_t best = 0, held = 0;
	int fd = open_at(AT_FDCWD, r->mountinfo, 0);
	ssize_t n;

	if (fd < 0)
		return;
	memcg.dir[0] = '\0';
	memcg.top = 0;
	while ((n = read(fd, text + held, sizeof(text) - 1 - held)) > 0) {
		char *line = text, *end;

		text[held + (size_t)n] = '\0';
		while ((end = strchr(line, '\n'))) {
			*end = '\0';
			consider_mount(line, r->prefix, &best);
			line = end + 1;
		}
		held = strlen(line);
		if (held == sizeof(text) - 1)
			held = 0; /* no mount of a cgroup has a line as long as this */
		memmove(text, line, held);
	}
	close(fd);
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

/* Bytes that memory.min and memory.low keep from reclaim that starts above this cgroup. v2 only. */
static uint64_t protection(int dir)
{
	uint64_t min = number_at(dir, "memory.min", 0), low = number_at(dir, "memory.low", 0);

	return min > low ? min : low;
}

/* Clean cache of a child cgroup that its parent's reclaim must leave. */
static uint64_t shielded_in(int child)
{
	uint64_t keep = protection(child), cache, usage;

	if (!keep)
		return 0;
	cache = clean_cache(child);
	usage = number_at(child, "memory.current", 0);
	return minus(cache, minus(usage, keep));
}

/* The same, for all children of a cgroup. */
static uint64_t shielded_below(int dir)
{
	static char entries[8192] __attribute__((aligned(8)));
	uint64_t sum = 0;
	struct stat st;
	ssize_t n;
	int fd;

	if (!memcg.v2 || fstat(dir, &st) || st.st_nlink == 2) /* kernfs counts subdirectories: most have none */
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

/* What a counter leaves of its limit, once `extra` is reclaimed. */
static uint64_t left(uint64_t limit, uint64_t usage, uint64_t extra)
{
	return limit == NO_LIMIT ? NO_LIMIT : minus(limit + extra, usage);
}

/* The usage that goes with a limit: of no interest without one, and when unknown there is nothing left. */
static uint64_t usage_at(int dir, const char *name, uint64_t limit)
{
	return limit == NO_LIMIT ? 0 : number_at(dir, name, UINT64_MAX);
}

/* What one cgroup leaves, or `least` when that is less anyhow. */
static uint64_t room_in(int dir, uint64_t swap, uint64_t least)
{
	uint64_t limit, usage, memsw = NO_LIMIT, memsw_usage, cache;

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

/* The machine's own reclaim is one that starts at the root, and MemAvailable does not know what it must leave. */
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

/* Finds the cgroup's directory, anew when the process has moved and once a second besides: mounts come and go. */
static void locate(const struct roots *r)
{
	struct timespec now;
	bool v2;
	const char *own = cgroup_path(r->cgroup, &v2);

	/* v1 shows a thread group whose leader has exited in the root, though its memory is still charged where it
	 * was. This thread has not exited. */
	if (own && !v2 && !strcmp(own, "/"))
		own = cgroup_path(r->thread_cgroup, &v2);
	if (!own || strlen(own) >= sizeof(memcg.own))
		return;
	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (memcg.v2 == v2 && !strcmp(memcg.own, own) && memcg.found == now.tv_sec)
		return;
	memcg.v2 = v2;
	strcpy(memcg.own, own);
	memcg.found = now.tv_sec;
	find_mount(r);
	memcg.shielded = shielded_from_machine();
}

/* Bytes of the process's own memory that can go to swap. Others' could as well, but not by limits that we see. */
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
			/* At 0 a cgroup's reclaim swaps nothing at all. v2 knows only the machine's. */
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

static uint64_t headroom_under(const struct roots *r, bool with_swap)
{
	static char path[PATH_MAX];
	uint64_t least = NO_LIMIT, swap = 0;

	blind = false;
	locate(r);
	if (read_at(AT_FDCWD, r->meminfo)) {
		uint64_t available = field("MemAvailable:", NO_LIMIT);

		if (with_swap)
			swap = 1024 *
			       least_of(field("SwapFree:", 0), field("Active(anon):", 0) + field("Inactive(anon):", 0));
		if (available != NO_LIMIT)
			least = minus(1024 * available, memcg.shielded) + swap;
	}
	if (swap)
		swap = swappable(r, swap);
	strcpy(path, memcg.dir);
	do {
		int dir = open_at(AT_FDCWD, path, O_PATH | O_DIRECTORY);

		if (dir < 0)
			continue;
		least = least_of(least, room_in(dir, swap, least));
		if (swap && memcg.v2 && protection(dir))
			swap = 0; /* an ancestor's reclaim may have to leave this one alone */
		close(dir);
	} while (ascend(path));
	/* Knowing nothing is not the same as knowing of no limit: a break can be had later, a killed process not. */
	return blind || least == NO_LIMIT ? 0 : least;
}

#define LOOK_GOOD_US 20000ULL /* a look is never good for longer: the process may be moved to another cgroup */
#define TAKEN_PER_US (10ULL << 30 / 1000000) /* by each CPU at most: nobody clears pages faster */

unsigned long online_cpus(void)
{
	static unsigned long n;

	if (!n) /* reads a file */
		n = (unsigned long)sysconf(_SC_NPROCESSORS_ONLN);
	return n;
}

bool room_for(uint64_t bytes, uint64_t leave)
{
	static uint64_t found, looked, taken;
	struct timespec t;
	uint64_t now, gone;

	clock_gettime(CLOCK_MONOTONIC, &t);
	now = (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
	/* What may be gone since: all that we asked for, and what every CPU can have taken. Where twice that was there,
	 * and then what is asked for now, it still is. */
	gone = taken + (now - looked) * TAKEN_PER_US * online_cpus();
	if (now - looked < LOOK_GOOD_US && 2 * (gone + bytes + leave) <= found) {
		taken += bytes;
		return true;
	}
	found = headroom(settings.use_swap);
	looked = now;
	taken = bytes;
	return found >= bytes + leave;
}

uint64_t headroom(bool with_swap)
{
	/* mountinfo is relative to a thread's root, and ours stays when the application calls chroot(). */
	static const struct roots kernel_files = {
		.cgroup = "/proc/self/cgroup",
		.thread_cgroup = "/proc/thread-self/cgroup",
		.mountinfo = "/proc/thread-self/mountinfo",
		.meminfo = "/proc/meminfo",
		.swappiness = "/proc/sys/vm/swappiness",
		.prefix = "",
	};

	return headroom_under(&kernel_files, with_swap);
}
