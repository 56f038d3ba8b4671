/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tree, as the kernel asks for it.
 *
 * Inode numbers say what they are, so nothing is remembered of them. files[i] has FIRST_FILE + i. For a process, pid <<
 * 8 is its directory in .proc; with 1 or 2 in the low bits, a file in that. `.proc` is in no listing (as .zfs is not):
 * a program that reads every file of /sys/kernel/mm/ksm should find the kernel's files only.
 *
 * Files are opened with direct_io, so the kernel caches nothing of them. Each open file keeps the text that was last
 * shown through it (struct shown), so that a program that reads it in parts gets parts of one text, as from a sysfs
 * file.
 */
#include "sysfs.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FIRST_FILE 2
#define PROC 0xff
#define PAGE_BYTES 4096 /* no more of a write is used; also the size that every file has */
#define FOREVER 86400.0 /* seconds that the kernel may cache what never changes */

static const char *const process_files[] = {"ksm_merging_pages", "ksm_stat"};

struct shown {
	size_t size;
	off_t pos; /* where the last read ended */
	char text[TEXT_SIZE];
};

static pthread_mutex_t shown_lock = PTHREAD_MUTEX_INITIALIZER;

static pid_t pid_of(fuse_ino_t ino)
{
	return (pid_t)(ino >> 8);
}

static bool is_file(fuse_ino_t ino)
{
	return ino >= FIRST_FILE && ino < FIRST_FILE + nfiles;
}

static bool is_process_file(fuse_ino_t ino)
{
	return pid_of(ino) && (ino & 0xff);
}

/* Returns 0 or an errno. */
static int attributes(fuse_ino_t ino, struct stat *st)
{
	*st = (struct stat){
		.st_ino = ino,
		.st_nlink = 1,
		.st_blksize = PAGE_BYTES,
		.st_uid = getuid(),
		.st_gid = getgid(),
		.st_atim = started,
		.st_mtim = started,
		.st_ctim = started,
	};
	if (is_file(ino)) {
		const struct file *file = &files[ino - FIRST_FILE];

		st->st_mode = S_IFREG | file->mode;
		st->st_uid = file->uid;
		st->st_gid = file->gid;
		st->st_size = PAGE_BYTES;
	} else if (ino == FUSE_ROOT_ID || ino == PROC) {
		st->st_mode = S_IFDIR | (ino == PROC ? 0555 : 0755);
		st->st_nlink = 2;
	} else if (pid_of(ino)) {
		struct stat process;
		char path[32];

		snprintf(path, sizeof(path), "/proc/%d", pid_of(ino));
		if (stat(path, &process))
			return ENOENT;
		st->st_uid = process.st_uid;
		st->st_gid = process.st_gid;
		st->st_mode = is_process_file(ino) ? S_IFREG | 0400 : S_IFDIR | 0555;
		st->st_nlink = is_process_file(ino) ? 1 : 2;
	} else {
		return ENOENT;
	}
	return 0;
}

static double lifetime(fuse_ino_t ino)
{
	return pid_of(ino) ? 0 : FOREVER;
}

static fuse_ino_t find(fuse_ino_t parent, const char *name)
{
	if (parent == FUSE_ROOT_ID) {
		for (unsigned i = 0; i < nfiles; i++)
			if (!strcmp(files[i].name, name))
				return FIRST_FILE + i;
		return strcmp(name, ".proc") ? 0 : PROC;
	}
	if (parent == PROC) {
		char *end;
		unsigned long pid = strtoul(name, &end, 10);

		return *name < '1' || *name > '9' || *end || pid > 1 << 22 ? 0 : pid << 8;
	}
	for (unsigned i = 0; i < 2; i++)
		if (!strcmp(process_files[i], name))
			return parent + 1 + i;
	return 0;
}

/* ---- looking around ------------------------------------------------------------------------------- */

static void tree_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = {.ino = find(parent, name)};

	entry.attr_timeout = entry.entry_timeout = lifetime(entry.ino);
	if (!entry.ino || attributes(entry.ino, &entry.attr))
		fuse_reply_err(req, ENOENT);
	else
		fuse_reply_entry(req, &entry);
}

static void tree_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct stat st;
	int error = attributes(ino, &st);

	(void)fi;
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_attr(req, &st, lifetime(ino));
}

/* As in sysfs, a file may be given to somebody else, truncating it does nothing, and its times are not remembered. */
static void tree_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int which, struct fuse_file_info *fi)
{
	if (is_file(ino)) {
		struct file *file = &files[ino - FIRST_FILE];

		if (which & FUSE_SET_ATTR_MODE)
			file->mode = attr->st_mode & 07777;
		if (which & FUSE_SET_ATTR_UID)
			file->uid = attr->st_uid;
		if (which & FUSE_SET_ATTR_GID)
			file->gid = attr->st_gid;
	} else if (which & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)) {
		fuse_reply_err(req, EPERM);
		return;
	}
	tree_getattr(req, ino, fi);
}

struct listing {
	size_t size, space;
	char *entries;
};

static bool add(fuse_req_t req, struct listing *list, const char *name, fuse_ino_t ino)
{
	size_t need = fuse_add_direntry(req, NULL, 0, name, NULL, 0);
	struct stat st;

	if (attributes(ino, &st)) /* the process has gone */
		return true;
	if (list->size + need > list->space) {
		size_t space = 2 * list->space + 4096;
		char *entries = realloc(list->entries, space);

		if (!entries)
			return false;
		list->entries = entries;
		list->space = space;
	}
	fuse_add_direntry(req, list->entries + list->size, need, name, &st, (off_t)(list->size + need));
	list->size += need;
	return true;
}

static bool list_processes(fuse_req_t req, struct listing *list, const pid_t *pids, int n)
{
	char name[16];

	for (int i = 0; i < n; i++) {
		snprintf(name, sizeof(name), "%d", pids[i]);
		if (!add(req, list, name, (fuse_ino_t)pids[i] << 8))
			return false;
	}
	return true;
}

static void forget_listing(struct listing *list)
{
	if (list)
		free(list->entries);
	free(list);
}

static void open_directory(struct job *job)
{
	struct listing *list = calloc(1, sizeof(*list));
	bool whole = list && add(job->req, list, ".", job->ino) && add(job->req, list, "..", FUSE_ROOT_ID);
	int n = 0;

	if (job->ino == FUSE_ROOT_ID) {
		for (unsigned i = 0; i < nfiles; i++)
			whole = whole && add(job->req, list, files[i].name, FIRST_FILE + i);
	} else if (job->ino == PROC) {
		pid_t *pids = malloc(PIDS_MAX * sizeof(*pids));

		n = pids ? service_processes(job->req, pids) : -ENOMEM;
		whole = whole && list_processes(job->req, list, pids, n);
		free(pids);
	} else {
		for (unsigned i = 0; i < 2; i++)
			whole = whole && add(job->req, list, process_files[i], job->ino + 1 + i);
	}
	if (n >= 0 && whole) {
		job->fi.fh = (uintptr_t)list;
		if (!fuse_reply_open(job->req, &job->fi))
			return;
	} else {
		fuse_reply_err(job->req, n < 0 ? -n : ENOMEM);
	}
	forget_listing(list);
}

static void tree_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	detach(open_directory, req, ino, 0, 0, fi, NULL);
}

static void tree_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct listing *list = (struct listing *)(uintptr_t)fi->fh;
	size_t from = (size_t)off < list->size ? (size_t)off : list->size;

	(void)ino;
	fuse_reply_buf(req, list->entries + from, list->size - from < size ? list->size - from : size);
}

static void tree_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	forget_listing((struct listing *)(uintptr_t)fi->fh);
	fuse_reply_err(req, 0);
}

/* ---- files ---------------------------------------------------------------------------------------- */

/* As in sysfs, even root can open a file only in ways that its mode allows somebody. */
static void tree_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	mode_t mode = is_file(ino) ? files[ino - FIRST_FILE].mode : 0400;
	struct shown *shown = NULL;
	int error = 0;

	if ((fi->flags & O_ACCMODE) != O_RDONLY && !(mode & 0222))
		error = EACCES;
	else if (fi->flags & O_DIRECT)
		error = EINVAL;
	else if (!(shown = calloc(1, sizeof(*shown))))
		error = ENOMEM;
	if (error) {
		fuse_reply_err(req, error);
		return;
	}
	fi->fh = (uintptr_t)shown;
	fi->direct_io = 1;
	fi->noflush = 1; /* closing never fails, even when the tree is gone */
	if (fuse_reply_open(req, fi))
		free(shown);
}

static void tree_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	free((struct shown *)(uintptr_t)fi->fh);
	fuse_reply_err(req, 0);
}

/* Replies with the part of the text that was asked for. */
static void reply(fuse_req_t req, struct shown *shown, size_t size, off_t off)
{
	char part[TEXT_SIZE];

	pthread_mutex_lock(&shown_lock);
	size_t from = (size_t)off < shown->size ? (size_t)off : shown->size;
	size_t n = shown->size - from < size ? shown->size - from : size;

	memcpy(part, shown->text + from, n);
	shown->pos = off + (off_t)n;
	pthread_mutex_unlock(&shown_lock);
	fuse_reply_buf(req, part, n);
}

static void show(fuse_req_t req, struct shown *shown, const char *text, size_t size, off_t off)
{
	pthread_mutex_lock(&shown_lock);
	strcpy(shown->text, text);
	shown->size = strlen(text);
	pthread_mutex_unlock(&shown_lock);
	reply(req, shown, size, off);
}

static void read_later(struct job *job)
{
	struct shown *shown = (struct shown *)(uintptr_t)job->fi.fh;
	char text[TEXT_SIZE];
	int error;

	if (is_file(job->ino))
		error = service_show((unsigned)(job->ino - FIRST_FILE), job->reader, job->req, text);
	else
		error = service_show_process(pid_of(job->ino), process_files[(job->ino & 0xff) - 1], job->req, text);
	if (error)
		fuse_reply_err(job->req, -error);
	else
		show(job->req, shown, text, job->size, job->off);
}

static void tree_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct shown *shown = (struct shown *)(uintptr_t)fi->fh;
	char text[TEXT_SIZE];
	int error = -EAGAIN;
	bool goes_on;

	pthread_mutex_lock(&shown_lock);
	goes_on = off && off == shown->pos;
	pthread_mutex_unlock(&shown_lock);
	if (goes_on) {
		reply(req, shown, size, off);
		return;
	}
	if (is_file(ino))
		error = service_show((unsigned)(ino - FIRST_FILE), fuse_req_ctx(req)->pid, NULL, text);
	if (error == -EAGAIN)
		detach(read_later, req, ino, size, off, fi, NULL);
	else if (error)
		fuse_reply_err(req, -error);
	else
		show(req, shown, text, size, off);
}

static void write_later(struct job *job)
{
	int error = service_store((unsigned)(job->ino - FIRST_FILE), job->data, job->size, job->req);

	if (error)
		fuse_reply_err(job->req, -error);
	else
		fuse_reply_write(job->req, job->size);
}

/* The text written is the new value, whatever the offset. */
static void tree_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t off,
		       struct fuse_file_info *fi)
{
	(void)off;
	detach(write_later, req, ino, size < PAGE_BYTES ? size : PAGE_BYTES, 0, fi, data);
}

/* ---- what cannot be done here, with sysfs's errors ------------------------------------------------ */

static void no_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
	(void)parent, (void)name, (void)rdev;
	fuse_reply_err(req, S_ISREG(mode) ? EACCES : EPERM);
}

static void no_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	(void)parent, (void)name, (void)mode;
	fuse_reply_err(req, EPERM);
}

static void no_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	(void)parent, (void)name;
	fuse_reply_err(req, EPERM);
}

static void no_symlink(fuse_req_t req, const char *link, fuse_ino_t parent, const char *name)
{
	(void)link, (void)parent, (void)name;
	fuse_reply_err(req, EPERM);
}

static void no_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent, const char *newname,
		      unsigned flags)
{
	(void)parent, (void)name, (void)newparent, (void)newname, (void)flags;
	fuse_reply_err(req, EPERM);
}

static void no_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t newparent, const char *newname)
{
	(void)ino, (void)newparent, (void)newname;
	fuse_reply_err(req, EPERM);
}

const struct fuse_lowlevel_ops operations = {
	.lookup = tree_lookup,
	.getattr = tree_getattr,
	.setattr = tree_setattr,
	.opendir = tree_opendir,
	.readdir = tree_readdir,
	.releasedir = tree_releasedir,
	.open = tree_open,
	.read = tree_read,
	.write = tree_write,
	.release = tree_release,
	.mknod = no_mknod,
	.mkdir = no_mkdir,
	.unlink = no_unlink,
	.rmdir = no_unlink,
	.symlink = no_symlink,
	.rename = no_rename,
	.link = no_link,
};
