/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The way back for a thread whose tracer was killed (inject.h): where its instructions are, and where its frame lies.
 *
 * The frame has to lie where nobody keeps anything. While the first thread is held, nobody uses the memory below its
 * stack pointer, if that is in the kernel's mapping for the stack: no program hands out parts of that. If the stack
 * pointer is elsewhere (on a goroutine's stack, a coroutine's, or a signal handler's), anything may lie below it. Then
 * the frame goes to pages at the low end of the stack mapping that were never touched, because the stack has not
 * reached them yet. Afterwards these are filled with MARK, by which they are recognised the next time.
 */
#define _GNU_SOURCE
#include "inject.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define TEXT_MAX (256UL << 20) /* how many bytes of code to search */
#define CHUNK (256UL << 10)
#define TOUCHED (3ULL << 62) /* bits of a pagemap entry: present or swapped */
#define BLOCK 4096	     /* how much is filled with marks at a time: a page, or a part of one */
#define MARK "samepage: unused"
#define MARK_LEN (sizeof(MARK) - 1)

struct map {
	uint64_t start, end;
	char perms[8];
	char name[256];
};

/* Bytes, up to a page that cannot be read; or -1 and errno. */
static ssize_t read_some(const struct tracee *t, uint64_t at, void *to, size_t len)
{
	struct iovec local = {to, len}, remote = {(void *)at, len};

	return process_vm_readv(t->pid, &local, 1, &remote, 1, 0);
}

bool read_from(const struct tracee *t, uint64_t at, void *to, size_t len)
{
	return read_some(t, at, to, len) == (ssize_t)len;
}

static bool write_to(const struct tracee *t, uint64_t at, void *from, size_t len)
{
	struct iovec local = {from, len}, remote = {(void *)at, len};

	return process_vm_writev(t->pid, &local, 1, &remote, 1, 0) == (ssize_t)len;
}

static FILE *open_maps(pid_t pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	return fopen(path, "re");
}

static bool next_map(FILE *maps, struct map *m)
{
	char line[512];

	m->name[0] = '\0';
	if (!fgets(line, sizeof(line), maps))
		return false;
	if (sscanf(line, "%lx-%lx %7s %*s %*s %*s %255[^\n]", &m->start, &m->end, m->perms, m->name) < 3)
		return false;
	if (!strchr(line, '\n')) /* the rest of a long name */
		while (fgets(line, sizeof(line), maps) && !strchr(line, '\n'))
			;
	return true;
}

/* ---- the instructions ------------------------------------------------------------------------------- */

/* Code that stays where it is as long as the process runs: a file's, or the kernel's. */
static bool is_code(const struct map *m)
{
	return m->perms[0] == 'r' && m->perms[2] == 'x' && (m->name[0] == '/' || !strcmp(m->name, "[vdso]"));
}

/* 0, or why the last part could not be read. */
static int search(struct tracee *t, const struct map *m, unsigned char *buffer)
{
	ssize_t got = 0;

	for (uint64_t at = m->start; at < m->end && !(t->syscall_ret && t->sigreturn);
	     at += CHUNK - sizeof(struct code)) {
		got = read_some(t, at, buffer, m->end - at < CHUNK ? m->end - at : CHUNK);
		if (got > 0)
			find_code(t, buffer, (size_t)got, at);
	}
	return got < 0 ? errno : 0;
}

/* Where there is code, in the order of the addresses; the caller frees it. -1: there is no memory for that. */
static ssize_t code_of(FILE *maps, struct map **code)
{
	size_t n = 0, room = 0;
	struct map m, *more;

	*code = NULL;
	while (next_map(maps, &m)) {
		if (!is_code(&m))
			continue;
		if (n == room) {
			room = room ? 2 * room : 32;
			more = realloc(*code, room * sizeof(m));
			if (!more)
				return -1;
			*code = more;
		}
		(*code)[n++] = m;
	}
	return (ssize_t)n;
}

/* Looks from the highest address down: libc, which has both, lies above most of what a program loads after it. */
static enum inject_error search_all(struct tracee *t, const struct map *code, size_t n)
{
	unsigned char *buffer = malloc(CHUNK);
	uint64_t searched = 0;
	int err = 0;

	t->syscall_ret = t->sigreturn = 0;
	if (!buffer)
		return INJECT_FAILED;
	while (n && searched < TEXT_MAX && !(t->syscall_ret && t->sigreturn)) {
		const struct map *m = &code[--n];

		err = search(t, m, buffer);
		searched += m->end - m->start;
	}
	free(buffer);
	if (t->syscall_ret && t->sigreturn)
		return INJECT_OK;
	if (!searched || err == ESRCH) /* the file of a process that has ended is empty */
		return INJECT_GONE;
	return err == EPERM ? INJECT_DENIED : INJECT_NO_WAY_BACK;
}

enum inject_error find_instructions(struct tracee *t)
{
	FILE *maps = open_maps(t->pid);
	enum inject_error error;
	struct map *code;
	ssize_t n;

	if (!maps)
		return errno == ENOENT || errno == ESRCH ? INJECT_GONE : INJECT_DENIED;
	n = code_of(maps, &code);
	fclose(maps);
	error = n < 0 ? INJECT_FAILED : search_all(t, code, (size_t)n);
	free(code);
	return error;
}

/* ---- the frame -------------------------------------------------------------------------------------- */

static bool find_stack(const struct tracee *t, struct map *m)
{
	FILE *maps = open_maps(t->pid);
	bool found = false;

	while (maps && !found && next_map(maps, m))
		found = !strcmp(m->name, "[stack]");
	if (maps)
		fclose(maps);
	return found;
}

static uint64_t page_size(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Whether a page was never touched. */
static bool is_untouched(const struct tracee *t, uint64_t at)
{
	uint64_t entry = TOUCHED;
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", t->pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (pread(fd, &entry, sizeof(entry), (off_t)(at / page_size() * sizeof(entry))) != sizeof(entry))
		entry = TOUCHED;
	if (fd >= 0)
		close(fd);
	return !(entry & TOUCHED);
}

static void fill_with_marks(unsigned char *block)
{
	for (size_t at = 0; at < BLOCK; at += MARK_LEN)
		memcpy(block + at, MARK, MARK_LEN);
}

/* Whether a block is as an earlier frame left it: full of marks. */
static bool is_marked(const struct tracee *t, uint64_t at)
{
	unsigned char block[BLOCK], marks[BLOCK];

	fill_with_marks(marks);
	return read_from(t, at, block, sizeof(block)) && !memcmp(block, marks, sizeof(block));
}

static enum inject_error place(struct tracee *t, uint64_t *top)
{
	uint64_t sp = get_register(&t->regs, arch_registers.sp);
	uint64_t need = arch_frame_size(t), page = page_size();
	struct map m;

	if (!find_stack(t, &m) || m.perms[1] != 'w')
		return INJECT_NO_STACK;
	*top = sp - arch_red_zone;
	t->low = 0;
	if (sp > m.start && sp <= m.end)
		return *top > m.start && *top - m.start >= need ? INJECT_OK : INJECT_NO_STACK;
	*top = m.start + (need + page - 1) / page * page;
	if (*top >= m.end)
		return INJECT_NO_STACK;
	for (uint64_t at = m.start; at < *top; at += BLOCK)
		if (!is_untouched(t, at) && !is_marked(t, at))
			return INJECT_NO_STACK;
	t->low = m.start;
	t->low_end = *top;
	return INJECT_OK;
}

enum inject_error put_frame(struct tracee *t)
{
	uint64_t top;
	enum inject_error err = verify_code(t) ? place(t, &top) : INJECT_BUSY;

	if (!err)
		err = arch_frame(t, top);
	if (!err &&
	    (!read_from(t, t->frame, t->before, t->frame_len) || !write_to(t, t->frame, t->image, t->frame_len)))
		err = INJECT_NO_STACK;
	return err;
}

void remove_frame(struct tracee *t)
{
	unsigned char marks[BLOCK];

	if (!t->low) {
		if (t->before)
			write_to(t, t->frame, t->before, t->frame_len);
		return;
	}
	fill_with_marks(marks);
	for (uint64_t at = t->low; at < t->low_end; at += BLOCK)
		write_to(t, at, marks, sizeof(marks));
}
