/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernel has mapped. Since Linux 6.11 one can ask for the mapping at an address. On older kernels
 * /proc/self/maps has to be read from its start. A caller that asks for one mapping after another must not read
 * everything before it each time; so reading goes on where it stopped, as long as nobody else held the lock and the
 * next address is not below the last.
 */
#include "base/maps.h"
#include "base/lock.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

uint64_t segment_dev;

/* Not /proc/self: that is the main thread, which may have ended and then shows no mappings. */
int maps_open(void)
{
	int file;

	vma_forget();
	file = (int)real.syscall(SYS_openat, AT_FDCWD, "/proc/thread-self/maps", O_RDONLY | O_CLOEXEC);
	return file < 0 ? -errno : file;
}

void maps_close(int file)
{
	real.syscall(SYS_close, file);
}

int vma_prot(const struct vma *v)
{
	return (v->read ? PROT_READ : 0) | (v->write ? PROT_WRITE : 0) | (v->exec ? PROT_EXEC : 0);
}

#define MAX_MAP_COUNT 65530UL /* the kernel's default */

/* ---- lines -------------------------------------------------------------------------------------------- */

static bool hex(const char **p, const char *end, uint64_t *out)
{
	const char *s = *p;

	for (*out = 0; s < end; s++) {
		int c = *s, d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;

		if (d < 0)
			break;
		*out = *out << 4 | (uint64_t)d;
	}
	*p = s;
	return s < end;
}

/* "start-end perms offset maj:min inode ..." */
static bool parse_vma(const char *s, const char *end, struct vma *v)
{
	uint64_t a, b, major, minor;

	if (!hex(&s, end, &a) || *s++ != '-' || !hex(&s, end, &b) || end - s < 6)
		return false;
	v->start = a;
	v->end = b;
	v->read = s[1] == 'r';
	v->write = s[2] == 'w';
	v->exec = s[3] == 'x';
	v->shared = s[4] == 's';
	s += 6;
	if (!hex(&s, end, &v->offset) || !hex((s++, &s), end, &major) || !hex((s++, &s), end, &minor))
		return false;
	v->dev = major << 32 | minor;
	for (s++, v->ino = 0; s < end && *s >= '0' && *s <= '9'; s++)
		v->ino = v->ino * 10 + (uint64_t)(*s - '0');
	return true;
}

/* Where reading stopped. Protected by the lock. */
static struct {
	bool valid;
	int file;
	uint64_t held;	 /* the hold of the lock that this belongs to (mmap_lock_held) */
	uintptr_t from;	 /* the mappings read before the last end here or below */
	struct vma last; /* the last line that was read; none if its end is 0 */
	size_t at, have;
	char buf[8192]; /* longer than any line: a path has at most PATH_MAX bytes */
} reader;

void vma_forget(void)
{
	reader.valid = false;
}

void vma_resume(void)
{
	if (reader.held == mmap_lock_held - 1)
		reader.held = mmap_lock_held;
}

static bool rewind_reader(int file)
{
	reader.file = file;
	reader.held = mmap_lock_held;
	reader.last = (struct vma){0};
	reader.at = reader.have = 0;
	return reader.valid = lseek(file, 0, SEEK_SET) == 0;
}

/* Keeps what was not parsed yet and reads more after it. False at the end of the file. */
static bool fill_reader(void)
{
	long got;

	reader.have -= reader.at;
	memmove(reader.buf, reader.buf + reader.at, reader.have);
	reader.at = 0;
	/* Not read(2), which is a cancellation point: application threads come here with the lock held. */
	got = real.syscall(SYS_read, reader.file, reader.buf + reader.have, sizeof(reader.buf) - reader.have);
	if (got <= 0)
		return reader.valid = false;
	reader.have += (size_t)got;
	return true;
}

/* Parses the next line into reader.last. False if there is none. */
static bool next_line(void)
{
	const char *line, *nl;

	do {
		line = reader.buf + reader.at;
		nl = memchr(line, '\n', reader.have - reader.at);
		if (!nl && !fill_reader())
			return false;
	} while (!nl);
	reader.at += (size_t)(nl + 1 - line);
	if (!parse_vma(line, nl, &reader.last))
		reader.last.end = 0;
	return true;
}

static bool read_on(int file, uintptr_t addr, struct vma *out)
{
	bool goes_on = reader.valid && reader.file == file && reader.held == mmap_lock_held && addr >= reader.from;

	if (!goes_on && !rewind_reader(file))
		return false;
	reader.from = addr;
	while (reader.last.end <= addr)
		if (!next_line())
			return false;
	*out = reader.last;
	return true;
}

/* ---- one mapping ----------------------------------------------------------------------------------------- */

struct procmap_query { /* include/uapi/linux/fs.h, Linux 6.11 */
	uint64_t size, flags, addr, start, end, vma_flags, page_size, offset, inode;
	uint32_t dev_major, dev_minor, name_size, build_id_size;
	uint64_t name, build_id;
};
#define PROCMAP_REQUEST _IOWR('f', 17, struct procmap_query)
#define PROCMAP_COVERING_OR_NEXT 0x10

static bool vma_query(int file, uintptr_t addr, struct vma *out, bool *known)
{
	struct procmap_query q = {.size = sizeof(q), .flags = PROCMAP_COVERING_OR_NEXT, .addr = addr};

	*known = false;
	if (settings.flags & SP_WELCOME_NO_MAP_QUERY)
		return false;
	if (real.ioctl(file, PROCMAP_REQUEST, &q)) {
		*known = errno == ENOENT; /* there is no mapping from here on */
		return false;
	}
	*out = (struct vma){.start = q.start,
			    .end = q.end,
			    .offset = q.offset,
			    .ino = q.inode,
			    .dev = (uint64_t)q.dev_major << 32 | q.dev_minor,
			    .read = q.vma_flags & 1,
			    .write = q.vma_flags & 2,
			    .exec = q.vma_flags & 4,
			    .shared = q.vma_flags & 8};
	return *known = true;
}

bool vma_find(int file, uintptr_t addr, struct vma *out)
{
	bool known;

	*out = (struct vma){0};
	if (vma_query(file, addr, out, &known) || known)
		return out->end > addr;
	return read_on(file, addr, out);
}

unsigned long vma_count(unsigned long *segments)
{
	int file = open("/proc/thread-self/maps", O_RDONLY | O_CLOEXEC);
	unsigned long lines = 0;
	size_t kept = 0;
	char buf[4096];
	ssize_t got;

	*segments = 0;
	while (file >= 0 && (got = read(file, buf + kept, sizeof(buf) - kept)) > 0) {
		char *line = buf, *end = buf + kept + got;

		for (char *p; (p = memchr(line, '\n', (size_t)(end - line))); line = p + 1) {
			lines++;
			*p = 0;
			*segments += strstr(line, "/memfd:samepage") != NULL;
		}
		kept = (size_t)(end - line);
		if (kept == sizeof(buf)) /* no mapping of ours has a path that long */
			kept = 0;
		memmove(buf, line, kept);
	}
	if (file >= 0)
		close(file);
	return lines;
}

unsigned long vma_limit(void)
{
	char buf[32] = "";

	if (read_file("/proc/sys/vm/max_map_count", buf, sizeof(buf) - 1) <= 0)
		return MAX_MAP_COUNT;
	return strtoul(buf, NULL, 10);
}
