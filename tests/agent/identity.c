/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes its identity in the way that the argument names, with memory to merge and an agent. Prints whether any of its
 * threads kept the old identity.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SIZE (4UL << 20)
#define NOBODY 65534

int capset(void *head, void *data);

static void nap(long ms)
{
	nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

/* Whatever a task's status says from "Uid:" to "Groups:", and of capabilities. */
static void identity(const char *task, char *out, size_t size)
{
	char path[300], line[512];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/task/%s/status", task);
	file = fopen(path, "r");
	for (*out = 0; file && fgets(line, sizeof(line), file);)
		if (!strncmp(line, "Uid:", 4) || !strncmp(line, "Gid:", 4) || !strncmp(line, "Groups:", 7) ||
		    !strncmp(line, "Cap", 3))
			strncat(out, line, size - strlen(out) - 1);
	if (file)
		fclose(file);
}

/* How many other threads there are, and how many of them are who this one is. */
static void others(int *all, int *same)
{
	char own[4096], other[4096], self[16];
	DIR *tasks = opendir("/proc/self/task");

	snprintf(self, sizeof(self), "%d", getpid());
	identity(self, own, sizeof(own));
	*all = *same = 0;
	for (struct dirent *e; (e = readdir(tasks));)
		if (e->d_name[0] != '.' && strcmp(e->d_name, self)) {
			identity(e->d_name, other, sizeof(other));
			++*all;
			*same += !strcmp(own, other);
		}
	closedir(tasks);
}

static int drop_all(int raw)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{0}};

	return raw ? (int)syscall(SYS_capset, &head, data) : capset(&head, data);
}

static long inline_setresuid(long user)
{
	register long third __asm__("rdx") = user;
	long ret;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(SYS_setresuid), "D"(user), "S"(user), "r"(third)
			 : "rcx", "r11", "memory");
	return ret;
}

static void *setfsuid_elsewhere(void *arg)
{
	setfsuid(NOBODY);
	syscall(SYS_setresuid, -1, NOBODY, -1);
	return arg;
}

static int in_a_thread(void)
{
	pthread_t thread;

	return pthread_create(&thread, NULL, setfsuid_elsewhere, NULL) || pthread_join(thread, NULL);
}

static const gid_t one_group[] = {NOBODY};

static long become(const char *how)
{
#define WAY(text, call)                                                                                                \
	if (!strcmp(how, text))                                                                                        \
		return call;
	WAY("setuid", setuid(NOBODY))
	WAY("seteuid", seteuid(NOBODY))
	WAY("setreuid", setreuid(NOBODY, NOBODY))
	WAY("setresuid", setresuid(NOBODY, NOBODY, NOBODY))
	WAY("setgid", setgid(NOBODY))
	WAY("setegid", setegid(NOBODY))
	WAY("setregid", setregid(NOBODY, NOBODY))
	WAY("setresgid", setresgid(NOBODY, NOBODY, NOBODY))
	WAY("setgroups", setgroups(1, one_group))
	WAY("initgroups", initgroups("nobody", NOBODY))
	WAY("setfsuid", setfsuid(NOBODY))
	WAY("setfsgid", setfsgid(NOBODY))
	WAY("capset", drop_all(0))
	WAY("SYS_capset", drop_all(1))
	WAY("SYS_setuid", syscall(SYS_setuid, NOBODY))
	WAY("SYS_setresuid", syscall(SYS_setresuid, NOBODY, NOBODY, NOBODY))
	WAY("SYS_setresgid", syscall(SYS_setresgid, NOBODY, NOBODY, NOBODY))
	WAY("SYS_setgroups", syscall(SYS_setgroups, 1, one_group))
	WAY("PR_CAPBSET_DROP", prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0))
	WAY("unshare", unshare(CLONE_NEWUSER))
	WAY("inline", inline_setresuid(NOBODY))
	WAY("thread", in_a_thread())
	return -2;
}

int main(int argc, char **argv)
{
	unsigned char *p = aligned_alloc(4096, SIZE);
	int all = 0, same = 0;

	(void)argc;
	memset(p, 1, SIZE);
	for (int i = 0; !all && i < 500; i++, nap(10))
		others(&all, &same);
	printf("agents %d, the same %d\n", all, same);
	nap(200);
	if (become(argv[1]) < 0)
		perror(argv[1]);
	puts("changed");
	fflush(stdout);
	memset(aligned_alloc(4096, 2 * SIZE), 2, 2 * SIZE);
	for (int i = 0; i < 80; i++, nap(10)) {
		others(&all, &same);
		if (all != same && strcmp(argv[1], "inline")) /* as it is at any time, and not only in the end */
			break;
	}
	printf("agents %d, the same %d\n", all, same);
	return 0;
}
