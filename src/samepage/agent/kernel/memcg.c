/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the limits of this process are: its memory cgroup, from /proc/self/cgroup, and the directory that shows it,
 * from /proc/self/mountinfo. Everything is read anew at each call, at about 2 us a file. No descriptor is kept, since a
 * forked child or a new agent thread could take it for its own. Only the directory is remembered.
 */
#include "kernel/memcg.h"

#include <stdlib.h>
#include <string.h>

struct memcg memcg;
bool blind;

static char text[16384]; /* the file last read */

/* ---- reading files --------------------------------------------------------------------------------- */

/* Whether the file does not exist. ENODEV is from a cgroup that is being removed, so no process can be below it. */
static bool is_absent(int err)
{
	return err == ENOENT || err == ENODEV;
}

int open_at(int dir, const char *name, int flags)
{
	int fd = openat(dir, name, flags | O_RDONLY | O_CLOEXEC);

	if (fd < 0 && !is_absent(errno))
		blind = true;
	return fd;
}

/* Reads it into `text`. One read is enough: seq_file shows a single record in one piece. */
bool read_at(int dir, const char *name)
{
	int fd = open_at(dir, name, 0);
	ssize_t n;

	if (fd < 0)
		return false;
	n = read(fd, text, sizeof(text) - 1);
	if (n < 0 ? !is_absent(errno) : n == sizeof(text) - 1) /* the rest of the file is unknown */
		blind = true;
	close(fd);
	text[n > 0 ? n : 0] = '\0';
	return n > 0;
}

uint64_t number_at(int dir, const char *name, uint64_t otherwise)
{
	uint64_t value;

	if (!read_at(dir, name))
		return otherwise;
	if (!strncmp(text, "max", 3))
		return NO_LIMIT;
	value = strtoull(text, NULL, 10);
	return value < 1ULL << 60 ? value : NO_LIMIT; /* v1 writes "none" as all the pages a long can count */
}

uint64_t field(const char *key, uint64_t otherwise)
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

/* Finds the memory cgroup in a file like /proc/self/cgroup. NULL: there is none, since no hierarchy was ever mounted,
 * so there are no cgroups but roots. The memory controller is in only one hierarchy: if v1 has it, v2's tree says
 * nothing about memory. */
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

/* mountinfo escapes space, tab, newline and backslash in octal. */
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

/* How many "/.." a path begins with. Both files give paths relative to the reader's cgroup namespace. */
static size_t ups(const char *path)
{
	size_t n = 0;

	while (!strncmp(path, "/..", 3) && (path[3] == '/' || !path[3])) {
		path += 3;
		n++;
	}
	return n;
}

/* The way down from the cgroup `root` to the cgroup `path`: "" or "/a/b". NULL if root is not above path. A root above
 * the namespace's root is above us, but nothing says by which way. */
static const char *way_down(const char *root, const char *path)
{
	size_t len = strlen(root);

	if (ups(root) > ups(path))
		return NULL;
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

/* Looks at one line of mountinfo. Takes the mount if it shows more of our ancestors than the best so far. */
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

/* Reads mountinfo, which may be of any length, line by line. */
static void find_mount(const struct roots *r)
{
	size_t best = 0, held = 0;
	int fd = open_at(AT_FDCWD, r->mountinfo, 0);
	ssize_t n;

	memcg.dir[0] = '\0';
	memcg.top = 0;
	if (fd < 0)
		return;
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
			held = 0; /* the line of a cgroup mount is never this long */
		memmove(text, line, held);
	}
	close(fd);
}

bool memcg_is_gone(const char *path)
{
	static const char mark[] = " (deleted)";
	size_t len = strlen(path), end = sizeof(mark) - 1;

	return len > end && !strcmp(path + len - end, mark);
}

/* The process's memory cgroup, or NULL. */
static const char *own_cgroup(const struct roots *r, bool *v2)
{
	const char *own = cgroup_path(r->cgroup, v2);

	/* If the leader of the thread group has exited, v1 shows the root, and v2 the cgroup in which the leader was.
	 * The memory is still charged where the other threads are, and this thread is one of them. */
	if (own && (memcg_is_gone(own) || (!*v2 && !strcmp(own, "/"))))
		own = cgroup_path(r->thread_cgroup, v2);
	return own;
}

/* Whether the process is in the root of the hierarchy, which has no limits, and not just in the root of a namespace. */
static bool in_root(const struct roots *r)
{
	static const char first[] = "cgroup:[4026531835]"; /* PROC_CGROUP_INIT_INO */
	char link[sizeof(first)] = "";

	return !strcmp(memcg.own, "/") && readlink(r->namespace, link, sizeof(link)) == sizeof(first) - 1 &&
	       !memcmp(link, first, sizeof(first) - 1);
}

bool memcg_locate(const struct roots *r)
{
	struct timespec now;
	bool v2;
	const char *own = own_cgroup(r, &v2);

	if (!own) {
		memcg = (struct memcg){0};
		return true;
	}
	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (memcg.v2 == v2 && !strcmp(memcg.own, own) && memcg.found == now.tv_sec)
		return false;
	memcg.v2 = v2;
	if (strlen(own) < sizeof(memcg.own))
		strcpy(memcg.own, own);
	else
		blind = true;
	find_mount(r);
	if (!memcg.dir[0] && !in_root(r))
		blind = true;
	memcg.found = now.tv_sec;
	return true;
}
