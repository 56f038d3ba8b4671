/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A file system with one file, whose reads are slow and bypass the page cache: while a read is under way, the pages
 * that it reads into are pinned.
 *
 * slow_file MOUNTPOINT GO
 *
 * /slow holds what was written to it. A read says "reading" and ends when the file GO is there.
 */
#define FUSE_USE_VERSION 31
#include <fuse3/fuse.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char content[1 << 20];
static const char *go;

static int slow_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	(void)fi;
	memset(st, 0, sizeof(*st));
	st->st_mode = strcmp(path, "/slow") ? S_IFDIR | 0700 : S_IFREG | 0600;
	st->st_nlink = 1;
	st->st_size = sizeof(content);
	st->st_uid = getuid();
	return strcmp(path, "/slow") && strcmp(path, "/") ? -ENOENT : 0;
}

static int slow_open(const char *path, struct fuse_file_info *fi)
{
	(void)path;
	fi->direct_io = 1;
	return 0;
}

static int slow_read(const char *path, char *buf, size_t size, off_t offset, struct fuse_file_info *fi)
{
	(void)path;
	(void)fi;
	puts("reading");
	fflush(stdout);
	while (access(go, F_OK))
		usleep(1000);
	memcpy(buf, content + offset, size);
	return (int)size;
}

static int slow_write(const char *path, const char *buf, size_t size, off_t offset, struct fuse_file_info *fi)
{
	(void)path;
	(void)fi;
	memcpy(content + offset, buf, size);
	return (int)size;
}

int main(int argc, char **argv)
{
	static const struct fuse_operations operations = {
		.getattr = slow_getattr, .open = slow_open, .read = slow_read, .write = slow_write};
	char *args[] = {argv[0], argv[1], "-f", NULL};

	if (argc < 3)
		return 2;
	go = argv[2];
	return fuse_main(3, args, &operations, NULL);
}
