/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model --mode NAME --seed N --steps M [--record PREFIX | --compare PREFIX] [--lenient] [--naps] [--stealthy]
 *       [--only FILE] [--trace PAGE] [--seconds S]
 *
 * --record writes what each call returned to PREFIX.*, --compare wants the same. --lenient: mremap may return something
 * else. --naps: stands still now and then, so that there is something to merge. --stealthy: some calls by way of
 * syscall(2). --only: the steps whose numbers are in FILE, and no others. --trace: tells what becomes of one page.
 * --seconds: no more steps after so many. Exit status 0; 1 after the first finding.
 */
#include "model.h"

#include <dirent.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LOG_MAX (1UL << 20)
#define THREADS_MAX 4

const char *const op_names[NR_OPS] = {
	"fill",	 "poke", "verify", "probe",   "map",	  "unmap", "protect", "advise", "discard",     "lock",
	"remap", "fork", "nap",	   "process", "allocate", "free",  "resize",  "rewrite", "heap-advise", "trim",
};

#define PAGE_OPS                                                                                                       \
	[FILL] = 16, [POKE] = 8, [VERIFY] = 4, [PROBE] = 4, [MAP] = 12, [UNMAP] = 4, [PROTECT] = 6, [ADVISE] = 12,     \
	[DISCARD] = 7, [LOCK] = 2, [REMAP] = 12
#define HEAP_OPS [ALLOCATE] = 20, [FREE] = 12, [RESIZE] = 12, [REWRITE] = 8, [HEAP_ADVISE] = 8, [TRIM] = 1

static const struct mode modes[] = {
	{"pages", 4096, 256, 0, 0, 0, 1, 400, false, {PAGE_OPS, [FORK] = 1, [NAP] = 3, [PROCESS] = 1}},
	{"heap", 0, 1, 512, 4UL << 20, 96UL << 20, 1, 400, false, {HEAP_OPS, [FORK] = 1, [NAP] = 3, [PROCESS] = 1}},
	{"mixed", 2048, 128, 128, 2UL << 20, 48UL << 20, 1, 400, false, {PAGE_OPS, HEAP_OPS, [FORK] = 1, [NAP] = 4}},
	{"many", ARENA_PAGES, 24, 12000, 96UL << 10, 2048UL << 20, 1, 8000, true, {PAGE_OPS, HEAP_OPS, [NAP] = 1}},
	{"big", 16384, 8192, 8, 48UL << 20, 128UL << 20, 1, 100, false, {PAGE_OPS, HEAP_OPS, [FORK] = 1, [NAP] = 4}},
	{"threads", 1024, 64, 64, 1UL << 20, 16UL << 20, 4, 400, false, {PAGE_OPS, HEAP_OPS, [FORK] = 1, [NAP] = 4}},
	/* For whom the agent is to have time: see tests/fuzz/agent.py. */
	{"calm", 1024, 64, 64, 1UL << 20, 16UL << 20, 2, 400, false, {PAGE_OPS, HEAP_OPS, [FORK] = 1, [NAP] = 100}},
};

_Atomic unsigned long counts[NR_OPS], stricter, laxer;
bool naps;
struct page all_pages[ARENA_PAGES];
static struct block all_blocks[BLOCKS];
static uint32_t logs[THREADS_MAX][LOG_MAX];
static uint8_t *only; /* a bit a step, or NULL: all */
static uint64_t nsteps;
static time_t until; /* 0: for ever */
static size_t traced = SIZE_MAX; /* a page of the arena */

uint64_t draw(struct fuzz *f)
{
	uint64_t x = f->seed * 0x9e3779b97f4a7c15u + f->step * 0xd1b54a32d192ed03u + f->draws++ * 0x8cb92ba72f3d8dd7u;

	x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
	x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
	return (x ^ (x >> 32)) >> 1;
}

/* ---- findings ------------------------------------------------------------------------------------------- */

static void print_maps(uintptr_t at, size_t len)
{
	static char buf[8 << 20];
	uintptr_t start, end;
	ssize_t have = 0, got;
	int fd = open("/proc/self/maps", O_RDONLY);

	while (fd >= 0 && have < (ssize_t)sizeof(buf) - 1 && (got = read(fd, buf + have, sizeof(buf) - 1 - (size_t)have)) > 0)
		have += got;
	for (char *save, *line = strtok_r(buf, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
		if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start < at + len + 8 * PAGE && end + 8 * PAGE > at)
			fprintf(stderr, "model:   %s\n", line);
}

static void where(const struct fuzz *f)
{
	fprintf(stderr, "model: FINDING --mode %s --seed %lu, step %lu%s (%s), pid %d: ", f->mode->name, f->seed, f->step,
		f->child ? " of a child" : "", f->doing ? f->doing : op_names[f->op], getpid());
}

void finding(const struct fuzz *f, const void *at, const char *what, ...)
{
	va_list args;

	where(f);
	va_start(args, what);
	vfprintf(stderr, what, args);
	va_end(args);
	fprintf(stderr, " at %p\n", at);
	print_maps((uintptr_t)at, at == page_at(f, f->picked.first) ? (f->picked.end - f->picked.first) * PAGE : 0);
	_exit(1);
}

static _Thread_local struct fuzz *running;
static _Thread_local sigjmp_buf after_fault;
static _Thread_local volatile bool probing;

static void on_fault(int sig, siginfo_t *info, void *context)
{
	(void)context;
	if (probing)
		siglongjmp(after_fault, 1);
	if (running)
		finding(running, info->si_addr, "signal %d code %d", sig, info->si_code);
	fprintf(stderr, "model: FINDING signal %d at %p\n", sig, info->si_addr);
	_exit(1);
}

bool can_access(void *at, bool write_it, bool by_kernel)
{
	static int pipe_end[2] = {-1, -1};
	volatile char *p = at;
	char byte = 0;

	if (by_kernel) {
		if (pipe_end[0] < 0 && pipe2(pipe_end, O_CLOEXEC))
			_exit(2);
		if (write_it) /* does not change it */
			return syscall(SYS_futex, (uintptr_t)at & ~3UL, 5 /* WAKE_OP */, 0, 0, (uintptr_t)at & ~3UL,
				       1 << 28 /* ADD 0 */) >= 0;
		if (write(pipe_end[1], at, 1) != 1)
			return false;
		return read(pipe_end[0], &byte, 1) == 1;
	}
	probing = true;
	if (sigsetjmp(after_fault, 1)) {
		probing = false;
		return false;
	}
	byte = *p;
	if (write_it)
		__atomic_fetch_or(p, 0, __ATOMIC_SEQ_CST);
	probing = false;
	return true;
}

/* ---- what calls returned -------------------------------------------------------------------------------- */

uint32_t expect(struct fuzz *f, uint32_t got, bool lenient)
{
	uint32_t want = got;

	if (f->comparing && f->nlog < f->loglen)
		want = f->log[f->nlog];
	else if (f->recording && f->nlog < LOG_MAX)
		f->log[f->nlog] = got;
	f->nlog++;
	if (want != got && !(lenient && f->lenient))
		finding(f, page_at(f, f->picked.first), "returned %#x, and without samepage %#x; for %zu pages", got, want,
			f->picked.end - f->picked.first);
	return want;
}

static void log_begin(struct fuzz *f)
{
	int fd = f->comparing ? open(f->log_path, O_RDONLY | O_CLOEXEC) : -1;
	ssize_t got = fd < 0 ? 0 : read(fd, f->log, LOG_MAX * sizeof(*f->log));

	f->nlog = 0;
	f->loglen = got > 0 ? (size_t)got / sizeof(*f->log) : 0;
	if (fd >= 0)
		close(fd);
}

static void log_end(const struct fuzz *f)
{
	size_t bytes = (f->nlog < LOG_MAX ? f->nlog : LOG_MAX) * sizeof(*f->log);
	int fd;

	if (!f->recording)
		return;
	fd = open(f->log_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, f->log, bytes) != (ssize_t)bytes)
		_exit(2);
	close(fd);
}

/* ---- forks ---------------------------------------------------------------------------------------------- */

static void run(struct fuzz *f, uint64_t first, uint64_t end);

static void verify_all(struct fuzz *f)
{
	verify(f, (struct range){0, f->npages});
	verify_heap(f);
}

/* What a child finds. */
static void become_child(struct fuzz *f)
{
	static char path[4096 + 64];

	f->child = true;
	f->lock_future = false;
	f->children = 0;
	for (size_t i = 0; i < f->npages; i++) {
		struct page *s = &f->page[i];

		if (s->flags & DONTFORK)
			*s = (struct page){0};
		s->flags &= ~LOCKED;
		if (s->flags & WIPE) {
			s->flags &= ~GUARD;
			discard_page(s);
		}
	}
	if (f->log_path) {
		snprintf(path, sizeof(path), "%s.%u", f->log_path, f->forks);
		f->log_path = path;
	}
	f->doing = "verify in a child";
	verify_all(f);
	f->doing = NULL;
}

static void reap(struct fuzz *f, int options)
{
	int status;
	pid_t pid;

	while (f->children && (pid = waitpid(f->shared ? 0 : -1, &status, options)) > 0) {
		f->children--;
		if (!WIFEXITED(status) || WEXITSTATUS(status)) {
			where(f);
			fprintf(stderr, "child %d ended with status %#x\n", pid, status);
			_exit(1);
		}
	}
}

static pid_t fork_somehow(struct fuzz *f)
{
	switch (f->stealthy ? draw(f) % 4 : 0) {
	case 1:
		return (pid_t)syscall(SYS_fork);
	case 2:
		return (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	case 3:
		return _Fork();
	default:
		return fork();
	}
}

static void op_fork(struct fuzz *f)
{
	bool goes_on = chance(f, 50) && !f->shared;
	uint64_t steps = 20 + draw(f) % 200;
	pid_t pid;

	f->forks++;
	if (f->child) /* no grandchildren: they would be without number */
		return;
	while (f->children >= 3)
		reap(f, 0);
	pid = fork_somehow(f);
	if (pid < 0)
		finding(f, NULL, "fork: errno %d", errno);
	if (pid) {
		f->children++;
		return;
	}
	become_child(f);
	if (!goes_on)
		_exit(0);
	log_begin(f);
	f->seed += f->forks * 1000003u;
	run(f, f->step + 1, f->step + 1 + steps);
	verify_all(f);
	log_end(f);
	_exit(0);
}

/* ---- steps ---------------------------------------------------------------------------------------------- */

static void nap(struct fuzz *f)
{
	const struct timespec ts = {.tv_nsec = 1000000L * (long)(1 + draw(f) % 8)};

	if (naps)
		nanosleep(&ts, NULL);
}

static void do_op(struct fuzz *f)
{
	switch (f->op) {
	case FILL: op_fill(f); break;
	case POKE: op_poke(f); break;
	case VERIFY: verify(f, pick(f)); break;
	case PROBE: op_probe(f); break;
	case MAP: op_map(f); break;
	case UNMAP: op_unmap(f); break;
	case PROTECT: op_protect(f); break;
	case ADVISE: op_advise(f, false); break;
	case DISCARD: op_advise(f, true); break;
	case LOCK: op_lock(f); break;
	case REMAP: op_remap(f); break;
	case FORK: op_fork(f); break;
	case NAP: nap(f); break;
	case PROCESS: op_process(f); break;
	case ALLOCATE: op_allocate(f); break;
	case FREE: op_free(f); break;
	case RESIZE: op_resize(f); break;
	case REWRITE: op_rewrite(f); break;
	case HEAP_ADVISE: op_heap_advise(f); break;
	case TRIM: op_trim(f); break;
	case NR_OPS: break;
	}
}

static enum op draw_op(struct fuzz *f)
{
	unsigned sum = 0, at;
	enum op op = 0;

	for (unsigned i = 0; i < NR_OPS; i++)
		sum += f->mode->weight[i];
	at = (unsigned)(draw(f) % sum);
	while (at >= f->mode->weight[op])
		at -= f->mode->weight[op++];
	return op;
}

/* After a step: what the shadow says of one page, if that changed, and the kernel. */
static void trace(const struct fuzz *f)
{
	static struct page was;

	if (f->page != all_pages || traced >= f->npages || !memcmp(&was, &f->page[traced], sizeof(was)))
		return;
	was = f->page[traced];
	fprintf(stderr, "model: step %lu (%s): page %zu: pattern %u, word %u, prot %d, flags %#x\n", f->step,
		op_names[f->op], traced, was.pattern, was.poke, was.prot, was.flags);
	print_maps((uintptr_t)page_at(f, traced), 0);
}

static void run(struct fuzz *f, uint64_t first, uint64_t end)
{
	for (f->step = first; f->step < end && (!until || time(NULL) < until); f->step++) {
		if (only && !(only[f->step / 8] >> f->step % 8 & 1))
			continue;
		f->draws = 0;
		f->op = draw_op(f);
		do_op(f);
		counts[f->op]++;
		trace(f);
		if (f->step % f->mode->verify_every == 0) {
			f->doing = "verify all";
			verify_all(f);
			f->doing = NULL;
			reap(f, WNOHANG);
		}
	}
}

/* A mapping of two pages in every three, and a block in every place there is. */
static void crowd(struct fuzz *f)
{
	f->doing = "crowd";
	for (size_t i = 0; i + 3 <= f->npages; i += 3) {
		struct range r = {i, i + 2};
		int prot = i % 2 ? PROT_READ | PROT_WRITE : PROT_READ | PROT_WRITE | PROT_EXEC;

		if (mmap(page_at(f, i), 2 * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
			finding(f, page_at(f, i), "mmap: errno %d", errno);
		fresh(f, r, prot, 0, 0);
		if (i % 4 == 0)
			fill(f, i, 1 + i % PATTERNS);
		if (i % 2 == 0)
			madvise(page_at(f, i), 2 * PAGE, MADV_MERGEABLE);
	}
	for (size_t i = 0; i < f->nblocks * 3 / 4; i++) {
		f->step = i;
		f->draws = 0;
		op_allocate(f);
	}
	verify_all(f);
	f->doing = NULL;
}

static void *thread_main(void *arg)
{
	struct fuzz *f = arg;

	running = f;
	log_begin(f);
	if (f->mode->crowded)
		crowd(f);
	run(f, 0, nsteps);
	f->doing = "verify at the end";
	verify_all(f);
	reap(f, 0);
	log_end(f);
	for (size_t i = 0; i < f->nblocks; i++)
		free(f->block[i].p);
	return NULL;
}

/* ---- the command line ----------------------------------------------------------------------------------- */

static void read_only_steps(const char *path)
{
	FILE *file = fopen(path, "re");
	unsigned long step;

	only = calloc(1, nsteps / 8 + 1024);
	while (file && only && fscanf(file, "%lu", &step) == 1)
		if (step < nsteps + 4096)
			only[step / 8] |= (uint8_t)(1 << step % 8);
	if (!file || !only)
		_exit(2);
	fclose(file);
}

static int open_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int n = 0;

	while (dir && readdir(dir))
		n++;
	if (dir)
		closedir(dir);
	return n;
}

static void setup(struct fuzz *f, unsigned t, const struct fuzz *base)
{
	const struct mode *m = base->mode;
	static char path[THREADS_MAX][4096];

	*f = *base;
	f->arena = (char *)ARENA + t * (m->npages + 16) * PAGE;
	f->npages = m->npages;
	f->page = all_pages + t * m->npages;
	f->block = all_blocks + t * m->nblocks;
	f->nblocks = m->nblocks;
	f->log = logs[t];
	f->shared = m->threads > 1;
	f->seed = base->seed + t * 7919;
	if (base->log_path) {
		snprintf(path[t], sizeof(path[t]), "%s.%u", base->log_path, t);
		f->log_path = path[t];
	}
}

static const struct mode *mode_named(const char *name)
{
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++)
		if (!strcmp(modes[i].name, name))
			return &modes[i];
	fprintf(stderr, "model: no mode %s\n", name);
	_exit(2);
}

static void parse(int argc, char **argv, struct fuzz *base, const char **only_path)
{
	for (int i = 1; i < argc; i++) {
		const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : "";

		if (!strcmp(a, "--lenient"))
			base->lenient = true;
		else if (!strcmp(a, "--stealthy"))
			base->stealthy = true;
		else if (!strcmp(a, "--naps"))
			naps = true;
		else if (!strcmp(a, "--mode") && ++i)
			base->mode = mode_named(v);
		else if (!strcmp(a, "--seed") && ++i)
			base->seed = strtoull(v, NULL, 0);
		else if (!strcmp(a, "--steps") && ++i)
			nsteps = strtoull(v, NULL, 0);
		else if (!strcmp(a, "--only") && ++i)
			*only_path = v;
		else if (!strcmp(a, "--seconds") && ++i)
			until = time(NULL) + strtol(v, NULL, 0);
		else if (!strcmp(a, "--trace") && ++i)
			traced = strtoull(v, NULL, 0);
		else if (!strcmp(a, "--record") && ++i)
			base->recording = (base->log_path = argv[i]);
		else if (!strcmp(a, "--compare") && ++i)
			base->comparing = (base->log_path = argv[i]);
		else
			_exit((fprintf(stderr, "model: what is %s?\n", a), 2));
	}
}

int main(int argc, char **argv)
{
	static struct fuzz fuzz[THREADS_MAX], base;
	const struct sigaction act = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
	const char *only_path = NULL;
	pthread_t thread[THREADS_MAX];
	int before;

	base.mode = &modes[0];
	nsteps = 10000;
	parse(argc, argv, &base, &only_path);
	if (only_path)
		read_only_steps(only_path);
	sigaction(SIGSEGV, &act, NULL);
	sigaction(SIGBUS, &act, NULL);
	mallopt(M_MMAP_THRESHOLD, 64 << 10);
	make_patterns();
	can_access(&base, false, true);
	before = open_descriptors();
	for (unsigned t = 0; t < base.mode->threads; t++)
		setup(&fuzz[t], t, &base);
	for (unsigned t = 1; t < base.mode->threads; t++)
		if (pthread_create(&thread[t], NULL, thread_main, &fuzz[t]))
			_exit(2);
	thread_main(&fuzz[0]);
	for (unsigned t = 1; t < base.mode->threads; t++)
		pthread_join(thread[t], NULL);
	if (open_descriptors() != before)
		finding(&fuzz[0], NULL, "%d descriptors are open, and %d at the start", open_descriptors(), before);
	for (int i = 0; i < NR_OPS; i++)
		if (counts[i])
			printf("%s %lu, ", op_names[i], counts[i]);
	printf("mremap stricter %lu, laxer %lu\n", stricter, laxer);
	return 0;
}
