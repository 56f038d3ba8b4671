/*
 * Stops another process again and again, and looks at its memory meanwhile: ./stopper PID ADDRESS PAGES ROUNDS HOW
 * [DIRECTORY]
 *
 * HOW: signal (SIGSTOP), trace (ptrace(2) of every thread, as debuggers do) or freeze (by the freezer at DIRECTORY, of
 * version 1 or 2 of cgroups). Nobody else may write to the pages. Prints how many pages it read, how many it could not
 * read, how many differed from what they were before the first stop, and in how many rounds that was so.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define THREADS_MAX 64

static pid_t pid;
static pid_t thread[THREADS_MAX];
static int threads;
static const char *freezer;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void list_threads(void)
{
	char path[64];
	struct dirent *e;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		die(path);
	threads = 0;
	while ((e = readdir(dir)))
		if (e->d_name[0] != '.' && threads < THREADS_MAX)
			thread[threads++] = atoi(e->d_name);
	closedir(dir);
}

static char state_of(pid_t tid)
{
	char path[64], text[512] = "";
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", tid);
	fd = open(path, O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof(text) - 1) <= 0)
		die(path);
	close(fd);
	return strrchr(text, ')')[2];
}

static void write_freezer(const char *name, const char *text)
{
	char path[512];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", freezer, name);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die(path);
	close(fd);
}

static bool is_frozen(bool v2)
{
	char path[512], text[512] = "";
	int fd;

	snprintf(path, sizeof(path), "%s/%s", freezer, v2 ? "cgroup.events" : "freezer.state");
	fd = open(path, O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof(text) - 1) <= 0)
		die(path);
	close(fd);
	return strstr(text, v2 ? "frozen 1" : "FROZEN");
}

static void freeze(bool on)
{
	char path[512];
	bool v2;

	snprintf(path, sizeof(path), "%s/cgroup.freeze", freezer);
	v2 = !access(path, F_OK);
	write_freezer(v2 ? "cgroup.freeze" : "freezer.state", v2 ? on ? "1" : "0" : on ? "FROZEN" : "THAWED");
	while (on && !is_frozen(v2)) /* version 1 has to be told again, if a thread was not at a place where it freezes */
		if (!v2)
			write_freezer("freezer.state", "FROZEN");
}

static void stop(const char *how)
{
	list_threads();
	if (!strcmp(how, "signal")) {
		kill(pid, SIGSTOP);
		for (int i = 0; i < threads; i++)
			while (state_of(thread[i]) != 'T')
				;
	} else if (!strcmp(how, "trace")) {
		for (int i = 0; i < threads; i++)
			if (ptrace(PTRACE_ATTACH, thread[i], NULL, NULL) || waitpid(thread[i], NULL, __WALL) != thread[i])
				die("attach");
	} else {
		freeze(true);
	}
}

static void go_on(const char *how)
{
	if (!strcmp(how, "signal"))
		kill(pid, SIGCONT);
	else if (!strcmp(how, "trace"))
		for (int i = 0; i < threads; i++)
			ptrace(PTRACE_DETACH, thread[i], NULL, NULL);
	else
		freeze(false);
}

int main(int argc, char **argv)
{
	size_t pages, bytes;
	unsigned long looked = 0, unread = 0, wrong = 0, bad_rounds = 0;
	char *before, page[PAGE], path[64];
	uintptr_t address;
	struct timespec nap = {0};
	int mem, rounds;

	if (argc < 6)
		return 2;
	pid = atoi(argv[1]);
	address = strtoul(argv[2], NULL, 0);
	pages = strtoul(argv[3], NULL, 0);
	rounds = atoi(argv[4]);
	freezer = argv[6];
	bytes = pages * PAGE;
	before = malloc(bytes);
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	mem = open(path, O_RDONLY);
	if (mem < 0 || pread(mem, before, bytes, (off_t)address) != (ssize_t)bytes)
		die(path);
	puts("ready");
	fflush(stdout);
	for (int round = 0; round < rounds; round++) {
		unsigned long were = unread + wrong;

		nap.tv_nsec = 1000000 + rand() % 3000000;
		nanosleep(&nap, NULL);
		stop(argv[5]);
		for (size_t i = 0; i < pages; i++) {
			if (pread(mem, page, PAGE, (off_t)(address + i * PAGE)) != (ssize_t)PAGE)
				unread++;
			else if (memcmp(page, before + i * PAGE, PAGE))
				wrong++;
		}
		go_on(argv[5]);
		looked += pages;
		bad_rounds += unread + wrong > were;
	}
	printf("%lu %lu %lu %lu\n", looked, unread, wrong, bad_rounds);
	return 0;
}
