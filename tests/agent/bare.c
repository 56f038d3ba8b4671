/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program with memory to merge that makes system calls by itself.
 *
 * bare unreadable   prints what calls say whose argument cannot be read, or only in part
 * bare confined     prints how children end that end by the bare system call where little else is allowed
 * bare exit         ends by it, with status 5
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define UFFD_MOVE_LEN 40
#define UFFD_MOVE_CODE _IOC(_IOC_READ | _IOC_WRITE, UFFDIO, 0x05, UFFD_MOVE_LEN)

static void say(const char *what, long ret)
{
	printf("%s: %s\n", what, ret < 0 ? strerror(errno) : ret ? "something" : "0");
}

/* Addresses of 64 bytes each: null, in no mapping, in one that cannot be read, and half in that. */
static void unreadable(void)
{
	char *map = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *const places[] = {NULL, (char *)PAGE, map + PAGE, map + PAGE - 24, map + PAGE - 16};
	int self = (int)syscall(SYS_pidfd_open, getpid(), 0), uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = {.api = UFFD_API};

	if (map == MAP_FAILED || mprotect(map + PAGE, PAGE, PROT_NONE))
		exit(1);
	if (ioctl(uffd, UFFDIO_API, &api))
		exit(1);
	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		char *p = places[i];

		printf("%zu\n", i);
		say("clone3", syscall(SYS_clone3, p, sizeof(struct clone_args)));
		say("process_madvise", syscall(SYS_process_madvise, self, p, 4, MADV_COLD, 0));
		say("process_madvise, many", syscall(SYS_process_madvise, self, p, 1024, MADV_COLD, 0));
		say("register", ioctl(uffd, UFFDIO_REGISTER, p));
		say("move", ioctl(uffd, UFFD_MOVE_CODE, p));
		say("setrlimit", syscall(SYS_setrlimit, RLIMIT_CORE, p));
		say("prlimit64", syscall(SYS_prlimit64, 0, RLIMIT_CORE, p, NULL));
	}
}

static const struct sock_filter filter[] = {
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 1, 0),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit, 0, 1),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
};

static void confined(void)
{
	const struct sock_fprog program = {sizeof(filter) / sizeof(filter[0]), (struct sock_filter *)filter};

	for (int way = 0; way < 3; way++) {
		int status;
		pid_t pid = fork();

		if (!pid) {
			prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
			if (way == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0))
				_exit(1);
			if (way == 1 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
				_exit(1);
			if (way == 2 && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
				_exit(1);
			if (write(STDERR_FILENO, "", 0))
				_exit(2);
			syscall(SYS_exit, 4);
		}
		waitpid(pid, &status, 0);
		printf("%d: %#x\n", way, status);
	}
}

int main(int argc, char **argv)
{
	size_t len = 24 << 20;
	char *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (argc < 2 || memory == MAP_FAILED)
		return 1;
	for (size_t i = 0; i < len; i += PAGE)
		memory[i] = 1;
	if (!strcmp(argv[1], "unreadable"))
		unreadable();
	else if (!strcmp(argv[1], "confined"))
		confined();
	else
		syscall(SYS_exit, 5);
	return 0;
}
