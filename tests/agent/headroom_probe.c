/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Does what it reads on stdin, one command a line, and answers each with one number. With a directory as its argument,
 * headroom() reads the files in it instead of the kernel's.
 *
 *	look, swap          headroom(false), headroom(true)
 *	fill BATCH RESERVE  memory taken in batches for as long as headroom() leaves RESERVE after one
 *	room BATCH RESERVE  the same as long as room_for() says so
 *	taken US            what others are taken to have taken in so many microseconds
 *	late MS BYTES LEAVE room_for() asked after so long a pause
 *	unknown             headroom_unknown() after a look
 *	take BYTES          memory taken without asking
 *	read PATH           clean file cache; bytes read
 *	write PATH BYTES    dirty file cache; bytes written
 *	descriptors N       no descriptor from N on can be opened any more
 *	retire              the thread group's leader exits; another thread reads on
 */
#include "kernel/headroom.c"
#include "kernel/memcg.c"

#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>

static struct roots files;
static bool given;
struct sp_welcome settings;

static uint64_t look(bool with_swap)
{
	return given ? headroom_under(&files, with_swap) : headroom(with_swap);
}

static bool room(uint64_t bytes, uint64_t leave)
{
	return given ? room_under(&files, bytes, leave) : room_for(bytes, leave);
}

static void take(uint64_t bytes)
{
	char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		abort();
	memset(p, 1, bytes);
}

static uint64_t fill(uint64_t batch, uint64_t reserve)
{
	uint64_t taken = 0;

	for (; look(false) >= batch + reserve; taken += batch)
		take(batch);
	return taken;
}

static uint64_t fill_by_room(uint64_t batch, uint64_t reserve)
{
	uint64_t taken = 0;

	for (; room(batch, reserve); taken += batch)
		take(batch);
	return taken;
}

static uint64_t read_all(const char *path)
{
	static char block[1 << 16];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	uint64_t sum = 0;
	ssize_t n;

	while ((n = read(fd, block, sizeof(block))) > 0)
		sum += (uint64_t)n;
	close(fd);
	return sum;
}

static uint64_t write_all(const char *path, uint64_t bytes)
{
	static const char block[1 << 16] = {1};
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	uint64_t sum = 0;
	ssize_t n;

	while (sum < bytes && (n = write(fd, block, sizeof(block))) > 0)
		sum += (uint64_t)n;
	close(fd);
	return sum;
}

static void *serve(void *unused)
{
	char line[PATH_MAX + 64], verb[16], path[PATH_MAX];
	uint64_t a, b, c, answer;

	while (fgets(line, sizeof(line), stdin)) {
		sscanf(line, "%15s", verb);
		if (!strcmp(verb, "look")) {
			answer = look(false);
		} else if (!strcmp(verb, "swap")) {
			answer = look(true);
		} else if (sscanf(line, "fill %lu %lu", &a, &b) == 2) {
			answer = fill(a, b);
		} else if (sscanf(line, "room %lu %lu", &a, &b) == 2) {
			answer = fill_by_room(a, b);
		} else if (sscanf(line, "taken %lu", &a) == 1) {
			answer = taken_in(a) / online_cpus();
		} else if (sscanf(line, "late %lu %lu %lu", &a, &b, &c) == 3) {
			usleep((useconds_t)(a * 1000));
			answer = room(b, c);
		} else if (!strcmp(verb, "unknown")) {
			look(false);
			answer = headroom_unknown();
		} else if (sscanf(line, "take %lu", &answer) == 1) {
			take(answer);
		} else if (sscanf(line, "read %4095s", path) == 1) {
			answer = read_all(path);
		} else if (sscanf(line, "write %4095s %lu", path, &a) == 2) {
			answer = write_all(path, a);
		} else if (sscanf(line, "descriptors %lu", &a) == 1) {
			answer = (uint64_t)setrlimit(RLIMIT_NOFILE, &(struct rlimit){a, a});
		} else if (!strcmp(verb, "retire")) {
			pthread_t thread;

			answer = (uint64_t)pthread_create(&thread, NULL, serve, NULL);
			printf("%lu\n", answer);
			fflush(stdout);
			pthread_exit(unused);
		} else {
			abort();
		}
		printf("%lu\n", answer);
		fflush(stdout);
	}
	exit(0);
}

static const char *under(const char *dir, const char *path)
{
	char *name;

	if (asprintf(&name, "%s%s", dir, path) < 0)
		abort();
	return name;
}

int main(int argc, char **argv)
{
	given = argc > 1;
	if (given)
		files = (struct roots){
			.cgroup = under(argv[1], "/proc/self/cgroup"),
			.thread_cgroup = under(argv[1], "/proc/thread-self/cgroup"),
			.namespace = under(argv[1], "/proc/self/ns/cgroup"),
			.mountinfo = under(argv[1], "/proc/thread-self/mountinfo"),
			.meminfo = under(argv[1], "/proc/meminfo"),
			.swappiness = under(argv[1], "/proc/sys/vm/swappiness"),
			.prefix = argv[1],
		};
	return serve(NULL) != NULL;
}
