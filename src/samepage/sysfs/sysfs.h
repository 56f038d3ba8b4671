/* SPDX-License-Identifier: Apache-2.0 */
/*
 * samepage-sysfs: the files of /sys/kernel/mm/ksm for programs that know the kernel's KSM, in a mount of its own.
 *
 * It knows nothing of KSM. The names and modes of the files come from mount.py, which starts it. What is in the files
 * and what a write does, it asks the service (ksm_files.py) over the control socket. All that it decides itself is how
 * long anybody waits:
 *
 * - One thread answers the kernel, and never waits for the service. A request that has to is given to a thread
 *   of its own, so `echo 2 > run` may take minutes and can be interrupted, and everybody else is served meanwhile.
 * - A read waits TIMEOUT_MS for the service, and then fails with ETIMEDOUT; for a while after that, all do at once.
 * - When the service is gone the mount goes too: its pidfd tells.
 *
 * Why C: a scraper that reads 24 files ten times a second sends 1,200 requests a second. docs/ksm-interface.md says
 * what that costs with this program, and with libraries for Python.
 *
 * Files: main.c (mounts), tree.c (answers the kernel), jobs.c (what has to wait), service.c (asks the service, keeps
 * snapshots).
 */
#ifndef SAMEPAGE_SYSFS_H
#define SAMEPAGE_SYSFS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define FUSE_USE_VERSION 31
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>
#include <time.h>

#define FILES_MAX 64
#define NAME_SIZE 64
#define TEXT_SIZE 512 /* a file's content, and a NUL */
#define PIDS_MAX 16384
#define TIMEOUT_MS 2000	 /* a service that is silent for this long is stuck */
#define STARTUP_MS 30000 /* but until its first answer it may still be loading, on a busy machine */

struct file {
	char name[NAME_SIZE];
	mode_t mode;
	uid_t uid;
	gid_t gid;
};

/* Set before the tree is mounted. */
extern struct file files[FILES_MAX];
extern unsigned nfiles;
extern struct timespec started;

extern const struct fuse_lowlevel_ops operations;

/* A request that has to wait. */
struct job {
	struct job *next;
	void (*work)(struct job *job);
	fuse_req_t req;
	fuse_ino_t ino;
	pid_t reader;
	struct fuse_file_info fi;
	off_t off;
	size_t size;
	char data[];
};

/* Runs `work` in another thread, so that this one need not wait. */
void detach(void (*work)(struct job *), fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
	    const struct fuse_file_info *fi, const char *data);

/* All of these return 0 or a negative errno: what the service said; ETIMEDOUT if it says nothing; ENODEV if it is gone;
 * EIO if it talks nonsense; EINTR if the sender of `req` was interrupted. */

/* Reads files[index] for the thread `reader`. If `req` is NULL it does not wait, but returns -EAGAIN. */
int service_show(unsigned index, pid_t reader, fuse_req_t req, char text[TEXT_SIZE]);

/* Reads the file `name` of /proc/PID. */
int service_show_process(pid_t pid, const char *name, fuse_req_t req, char text[TEXT_SIZE]);

/* Fills `pids` with the processes that have joined, and returns how many they are. */
int service_processes(fuse_req_t req, pid_t pids[PIDS_MAX]);

/* Writes to files[index]. It may take long, but gives up on a service that is stuck. */
int service_store(unsigned index, const char *data, size_t size, fuse_req_t req);

/* Says where the service listens. Call it once, before all else. */
int service_at(const char *path);

#endif
