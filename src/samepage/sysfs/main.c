/* SPDX-License-Identifier: Apache-2.0 */
/* The process: mounts, and unmounts when it is told to or the service is gone. */
#include "sysfs.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct file files[FILES_MAX];
unsigned nfiles;
struct timespec started;

static struct {
	struct fuse_session *session;
	const char *directory;
	bool private; /* the directory was made for the mount, and is removed with it */
	int service, signals;
} here;

/* Unmounts, and exits. */
static _Noreturn void leave(int status)
{
	static atomic_flag leaving = ATOMIC_FLAG_INIT;

	while (atomic_flag_test_and_set(&leaving)) /* unmounting ends the loop, which comes here, too */
		pause();
	fuse_session_unmount(here.session);
	if (here.private)
		rmdir(here.directory);
	/* When the helper of auto_unmount sees its socket close, it looks a last time whether something is mounted
	 * here. It must not find what somebody mounts next; so nobody may see us exit before the helper has ended. */
	close_range(3, ~0U, 0);
	while (wait(NULL) > 0)
		;
	_exit(status);
}

static void *watch(void *unused)
{
	struct pollfd fds[] = {{.fd = here.service, .events = POLLIN}, {.fd = here.signals, .events = POLLIN}};

	(void)unused;
	while (poll(fds, 2, -1) <= 0)
		;
	leave(0);
}

/* The names and modes of the files are lines of standard input: `run 644`. */
static bool read_files(void)
{
	struct file file = {.uid = getuid(), .gid = getgid()};
	int n = 0;

	while (nfiles < FILES_MAX && (n = scanf("%63s %o", file.name, &file.mode)) == 2)
		files[nfiles++] = file;
	return n == EOF && nfiles;
}

int main(int argc, char **argv)
{
	struct fuse_args args = FUSE_ARGS_INIT(0, NULL);
	pthread_t watcher;
	sigset_t signals;

	if (argc < 5 || argc > 6 || !read_files()) {
		fprintf(stderr, "samepage starts this: SOCKET PIDFD DIRECTORY OPTIONS [private]\n");
		return 2;
	}
	if (service_at(argv[1])) {
		fprintf(stderr, "%s: %s\n", argv[1], strerror(ENAMETOOLONG));
		return 1;
	}
	here.service = atoi(argv[2]);
	here.directory = argv[3];
	here.private = argc == 6;
	clock_gettime(CLOCK_REALTIME, &started);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGHUP);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	here.signals = signalfd(-1, &signals, SFD_CLOEXEC);

	if (fuse_opt_add_arg(&args, argv[0]) || fuse_opt_add_arg(&args, "-o") || fuse_opt_add_arg(&args, argv[4]))
		return 1;
	here.session = fuse_session_new(&args, &operations, sizeof(operations), NULL);
	if (!here.session || fuse_session_mount(here.session, here.directory))
		return 1; /* libfuse has said why */
	if (pthread_create(&watcher, NULL, watch, NULL))
		leave(1);
	puts("mounted");
	fflush(stdout);
	if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr))
		leave(1);
	fuse_session_loop(here.session); /* until somebody unmounts it */
	leave(0);
}
