/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent thread: joins the service, answers its requests one at a time, and joins again when the service
 * went and came back. Its descriptors live in a file table of its own (see agent.h).
 */
#include "wrappers.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define STACK_SIZE (256UL << 10)
#define REJOIN_MS 200	 /* between two attempts to join */
#define FORK_DELAY_MS 50 /* most forked children exec at once, and are not worth a connection */
#define LEADER_CHECK_MS 1000
#define MAX_RUNS 1024U
#define MAX_SUMS                                                                                                       \
	((SP_MSG_MAX - sizeof(struct sp_hdr) - sizeof(struct sp_scanned) - MAX_RUNS * sizeof(struct sp_run)) / 8)

struct sp_welcome settings = {.section = 64, .reserve = 16 << 20};

enum { IDLE, RUNNING, RETIRED };

static struct {
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	int attached; /* a socket to serve instead, -1 */
	_Atomic int state;
	pthread_t thread;
	_Atomic pid_t tid; /* 0 until the thread takes calls */
	int wake[2];	   /* a pipe: wake[1] is opened by callers through /proc */
	int sock;
	_Atomic bool stop;
	bool delay;
	_Atomic bool joined;
} peer = {.attached = -1, .wake = {-1, -1}, .sock = -1};

/* Serialises what starts and stops the thread. */
static pthread_mutex_t life = PTHREAD_MUTEX_INITIALIZER;

/* ---- calls from application threads --------------------------------------------------------------- */

static pthread_mutex_t call_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	void (*fn)(void *arg);
	void *arg;
	_Atomic uint32_t done; /* futex */
} call;

bool on_agent_thread(void)
{
	return atomic_load(&peer.tid) == (pid_t)real.syscall(SYS_gettid);
}

static void futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout)
{
	real.syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

static char *put_number(char *p, unsigned long n)
{
	char digits[20];
	int k = 0;

	do {
		digits[k++] = (char)('0' + n % 10);
	} while (n /= 10);
	while (k)
		*p++ = digits[--k];
	return p;
}

/* Writes a byte into the agent thread's pipe. The pipe is in a file table that this thread does not share;
 * /proc opens it by name, and nothing stays open behind. */
static bool poke(pid_t tid)
{
	char path[64] = "/proc/self/task/", *p = path + strlen(path);
	bool ok;
	int fd;

	p = put_number(p, (unsigned long)tid);
	memcpy(p, "/fd/", 4);
	p = put_number(p + 4, (unsigned long)peer.wake[1]);
	*p = 0;
	fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK); /* RDWR: a reader of our own, hence never SIGPIPE */
	if (fd < 0)
		return false;
	ok = write(fd, "", 1) == 1 || errno == EAGAIN;
	close(fd);
	return ok;
}

int agent_call(void (*fn)(void *arg), void *arg)
{
	const struct timespec second = {.tv_sec = 1};
	sigset_t all, saved;
	int cancel;
	pid_t tid;

	if (on_agent_thread()) {
		fn(arg);
		return 0;
	}
	/* A signal handler that called again would wait for itself; a cancelled thread would keep the lock. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
	pthread_mutex_lock(&call_lock);
	tid = atomic_load(&peer.tid);
	if (tid) {
		call.fn = fn;
		call.arg = arg;
		atomic_store(&call.done, 0);
		if (poke(tid))
			while (!atomic_load(&call.done) && atomic_load(&peer.tid) == tid)
				futex(&call.done, FUTEX_WAIT_PRIVATE, 0, &second);
		else
			tid = 0;
		if (tid && !atomic_load(&call.done)) /* the thread ended before it came to this */
			tid = 0;
	}
	pthread_mutex_unlock(&call_lock);
	pthread_setcancelstate(cancel, NULL);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	return tid ? 0 : -ENOTCONN;
}

static void take_call(void)
{
	char drain[64];

	while (read(peer.wake[0], drain, sizeof(drain)) > 0)
		;
	if (!call.fn)
		return;
	call.fn(call.arg);
	call.fn = NULL;
	atomic_store(&call.done, 1);
	futex(&call.done, FUTEX_WAKE_PRIVATE, 1, NULL);
}

/* ---- the wire --------------------------------------------------------------------------------------- */

static union {
	struct sp_hdr hdr;
	uint8_t bytes[SP_MSG_MAX];
} rx, tx __attribute__((aligned(8)));

uint64_t thread_cpu_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Receives one packet into rx; *fd is the descriptor it brought, or -1. Payload bytes, or -1: the peer went. */
static ssize_t receive(int *fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {rx.bytes, sizeof(rx.bytes)};
	/* CMSG_LEN, not CMSG_SPACE, whose padding has room for a second descriptor. */
	struct msghdr m = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
	ssize_t got;

	*fd = -1;
	do {
		got = recvmsg(peer.sock, &m, MSG_CMSG_CLOEXEC);
	} while (got < 0 && errno == EINTR);
	if (got > 0)
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
			if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
				memcpy(fd, CMSG_DATA(c), sizeof(*fd));
	if (got < (ssize_t)sizeof(struct sp_hdr) || (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) ||
	    rx.hdr.len != (size_t)got - sizeof(struct sp_hdr)) {
		if (*fd >= 0)
			close(*fd);
		*fd = -1;
		return -1;
	}
	return got - (ssize_t)sizeof(struct sp_hdr);
}

static bool transmit(uint32_t op, uint32_t seq, int error, size_t len, int fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {tx.bytes, sizeof(struct sp_hdr) + len};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t put;

	tx.hdr = (struct sp_hdr){op, seq, error, (uint32_t)len};
	if (fd >= 0) {
		struct cmsghdr *c = &control.align;

		memset(&control, 0, sizeof(control));
		m.msg_control = &control;
		m.msg_controllen = sizeof(control);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	}
	do {
		put = sendmsg(peer.sock, &m, MSG_NOSIGNAL);
	} while (put < 0 && errno == EINTR);
	return put == (ssize_t)iov.iov_len;
}

static ssize_t read_file(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, buf, size);

	if (fd >= 0)
		close(fd);
	return got;
}

/* ---- requests ---------------------------------------------------------------------------------------- */

static void *const payload = rx.bytes + sizeof(struct sp_hdr);
static void *const answer = tx.bytes + sizeof(struct sp_hdr);
#define ANSWER_MAX (SP_MSG_MAX - sizeof(struct sp_hdr))

/* The mergeable ranges, neighbours joined: what the service calls areas. */
static size_t do_areas(uint64_t from_vpn)
{
	struct sp_areas *head = answer;
	struct sp_area *list = (struct sp_area *)(head + 1);
	size_t n = 0, max = (ANSWER_MAX - sizeof(*head)) / sizeof(*list);
	const struct area *a;
	uintptr_t at = from_vpn << PAGE_SHIFT;

	agent_mmap_lock();
	*head = (struct sp_areas){.seq = areas_seq, .merge_any = merge_any};
	for (a = area_next(at); a; a = area_next(at)) {
		uint64_t vpn = (a->start > at ? a->start : at) >> PAGE_SHIFT, end = a->end >> PAGE_SHIFT;

		at = a->end;
		if (!area_mergeable(a))
			continue;
		if (n && list[n - 1].vpn + list[n - 1].npages == vpn) {
			list[n - 1].npages = end - list[n - 1].vpn;
		} else if (n == max) {
			head->next_vpn = vpn;
			break;
		} else {
			list[n++] = (struct sp_area){vpn, end - vpn};
		}
	}
	agent_mmap_unlock();
	return sizeof(*head) + n * sizeof(*list);
}

static size_t do_scan(const struct sp_scan *req)
{
	struct sp_scanned *head = answer;
	struct sp_run *runs = (struct sp_run *)(head + 1);
	uint64_t *sums = (uint64_t *)(runs + MAX_RUNS);
	uint64_t cpu = thread_cpu_ns();

	scan_step(req, head, runs, MAX_RUNS, sums, MAX_SUMS);
	memmove(runs + head->nruns, sums, head->nhashed * 8);
	head->forked_ms = ms_since_fork();
	head->pad = 0;
	head->cpu_ns = thread_cpu_ns() - cpu;
	return sizeof(*head) + head->nruns * sizeof(*runs) + head->nhashed * 8;
}

/* How many mappings merging may bring the process to: an eighth of vm.max_map_count is left to itself. */
static unsigned long map_limit(void)
{
	char buf[32] = "";
	unsigned long max = 65530;

	if (read_file("/proc/sys/vm/max_map_count", buf, sizeof(buf) - 1) > 0)
		max = strtoul(buf, NULL, 10);
	return max - max / 8;
}

/* Whether n ranges of pages lie in user memory and have answers that fit into a packet. */
static bool sane(uint64_t vpn, uint64_t npages, uint64_t *total)
{
	const uint64_t limit = 1ULL << (48 - PAGE_SHIFT);

	*total += npages;
	return npages && vpn < limit && npages <= limit - vpn && npages <= ANSWER_MAX &&
	       *total <= ANSWER_MAX - sizeof(struct sp_done);
}

static int do_donate(const struct sp_area *runs, size_t n, size_t *len, int *fd)
{
	struct sp_done *head = answer;
	uint64_t total = 0, cpu = thread_cpu_ns();

	for (size_t i = 0; i < n; i++)
		if (!sane(runs[i].vpn, runs[i].npages, &total))
			return EPROTO;
	*fd = donate(runs, n, (uint8_t *)(head + 1));
	*head = (struct sp_done){thread_cpu_ns() - cpu, total};
	*len = sizeof(*head) + total;
	return 0;
}

static int do_merge(int fd, const struct sp_extent *extents, size_t n, size_t *len)
{
	struct sp_done *head = answer;
	uint64_t total = 0, cpu = thread_cpu_ns();
	int err;

	for (size_t i = 0; i < n; i++)
		if (!sane(extents[i].vpn, extents[i].npages, &total))
			return EPROTO;
	err = merge(fd, extents, n, (uint8_t *)(head + 1));
	if (err)
		return err;
	*head = (struct sp_done){thread_cpu_ns() - cpu, total};
	*len = sizeof(*head) + total;
	return 0;
}

static void do_break(const struct sp_area *range)
{
	struct sp_broken *out = answer;

	break_ksm(range->vpn << PAGE_SHIFT, (range->vpn + range->npages) << PAGE_SHIFT, UINT64_MAX, out);
	if (!out->error) { /* the service now knows as much as we do; otherwise the next scan tells it */
		agent_mmap_lock();
		page_set(PAGE_KNOWN, range->vpn, range->vpn + range->npages, false);
		agent_mmap_unlock();
	}
}

/* Answers one request. False: the connection is of no more use. */
static bool serve(void)
{
	size_t len = 0;
	int fd, out = -1, err = 0;
	ssize_t got = receive(&fd);
	uint32_t op = rx.hdr.op, seq = rx.hdr.seq;
	uint64_t total = 0;
	bool ok;

	if (got < 0)
		return false;
	if (op == SP_AREAS && got == sizeof(uint64_t)) {
		len = do_areas(*(uint64_t *)payload);
	} else if (op == SP_SCAN && got == sizeof(struct sp_scan)) {
		len = do_scan(payload);
	} else if (op == SP_DONATE && got && got % (ssize_t)sizeof(struct sp_area) == 0) {
		err = do_donate(payload, (size_t)got / sizeof(struct sp_area), &len, &out);
	} else if (op == SP_MERGE && got && got % (ssize_t)sizeof(struct sp_extent) == 0) {
		err = do_merge(fd, payload, (size_t)got / sizeof(struct sp_extent), &len);
	} else if (op == SP_BREAK && got == sizeof(struct sp_area) &&
		   sane(((struct sp_area *)payload)->vpn, 1, &total) &&
		   ((struct sp_area *)payload)->npages < 1ULL << 36) {
		do_break(payload);
		len = sizeof(struct sp_broken);
	} else if (op == SP_MAP_COUNT && !got) {
		*(struct sp_map_count *)answer = (struct sp_map_count){vma_count(), map_limit()};
		len = sizeof(struct sp_map_count);
	} else if (op == SP_HEADROOM && !got) {
		agent_mmap_lock();
		*(struct sp_headroom *)answer = (struct sp_headroom){headroom(settings.use_swap)};
		agent_mmap_unlock();
		len = sizeof(struct sp_headroom);
	} else {
		err = EPROTO;
	}
	if (fd >= 0)
		close(fd);
	ok = transmit(op, seq, err, err ? 0 : len, out);
	if (out >= 0)
		close(out);
	return ok && err != EPROTO;
}

/* ---- joining ----------------------------------------------------------------------------------------- */

/* Whoever serves us is told checksums of our memory: only root and our own user may. */
static bool is_trusted(int sock)
{
	struct ucred peer_is;
	socklen_t len = sizeof(peer_is);

	return !getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer_is, &len) && (!peer_is.uid || peer_is.uid == geteuid());
}

static bool connect_service(void)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};

	if (peer.attached >= 0) {
		peer.sock = peer.attached;
		peer.attached = -1;
		return true;
	}
	if (!peer.path[0])
		return false;
	peer.sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	memcpy(to.sun_path, peer.path, sizeof(to.sun_path));
	return peer.sock >= 0 && !connect(peer.sock, (struct sockaddr *)&to, sizeof(to)) && is_trusted(peer.sock);
}

static bool handshake(void)
{
	struct sp_hello *hello = answer;
	struct sp_ready *ready = answer;
	const int room = 2 * SP_MSG_MAX;
	ssize_t got;
	int dev;

	setsockopt(peer.sock, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	*hello = (struct sp_hello){SP_MAGIC, SP_VERSION, (uint32_t)getpid(), PAGE_SIZE, ""};
	got = read_file("/proc/self/comm", hello->comm, sizeof(hello->comm) - 1);
	if (got > 0 && hello->comm[got - 1] == '\n')
		hello->comm[got - 1] = 0;
	if (!transmit(SP_HELLO, 0, 0, sizeof(*hello), -1))
		return false;
	got = receive(&dev);
	if (got != sizeof(settings) || rx.hdr.op != SP_WELCOME) {
		if (dev >= 0)
			close(dev);
		return false;
	}
	memcpy(&settings, payload, sizeof(settings));
	if (settings.section < 1 || settings.section > SECTION_MAX)
		settings.section = 64;
	kernel_close(); /* closing forgets what was tracked: a new service has to be told everything */
	agent_mmap_lock();
	page_forget_known();
	agent_mmap_unlock();
	if (kernel_open(dev))
		kernel_close();
	if (dev >= 0)
		close(dev);
	*ready = (struct sp_ready){kernel.swap, kernel.tracking, page_checksum(zero_page)};
	return transmit(SP_READY, 0, 0, sizeof(*ready), -1);
}

/* The service went, so nobody sleeps on a page for our sake. Should a kernel have lost a wake (see uffd_unregister for
 * one that does), it ends here at the latest. */
static void wake_everybody(void)
{
	const uintptr_t first = 1UL << 16, end = (1UL << 47) - PAGE_SIZE; /* vm.mmap_min_addr, TASK_SIZE */

	if (kernel.move >= 0)
		uffd_wake(kernel.move, first, end - first);
	if (kernel.wp >= 0)
		uffd_wake(kernel.wp, first, end - first);
}

static void disconnect(void)
{
	wake_everybody();
	atomic_store(&peer.joined, false);
	if (peer.sock >= 0)
		close(peer.sock);
	peer.sock = -1;
}

/* ---- the thread -------------------------------------------------------------------------------------- */

/* A file table and fs_struct of this thread's own: empty but for an attached socket. */
static bool isolate(void)
{
	const unsigned unshare_table = 1U << 1; /* CLOSE_RANGE_UNSHARE, 5.9 */
	unsigned keep = (unsigned)peer.attached;

	if (peer.attached < 0) {
		if (real.syscall(SYS_close_range, 0U, ~0U, unshare_table))
			return false;
	} else if ((keep && real.syscall(SYS_close_range, 0U, keep - 1, unshare_table)) ||
		   real.syscall(SYS_close_range, keep + 1, ~0U, keep ? 0U : unshare_table)) {
		return false;
	}
	/* A shared fs_struct would keep the application from setns(2) and hold its working directory. */
	return !real.unshare(CLONE_FS) && !chdir("/") && !pipe2(peer.wake, O_CLOEXEC | O_NONBLOCK);
}

/* A main thread that ends by the bare system call, and not by what thread_exits() learns of, leaves the process to
 * its other threads, and the last of them ends it. That must not wait for this one. */
static void end_if_alone(void)
{
	char buf[2048];
	const char *state, *threads;
	void *robust = NULL;
	size_t len;
	ssize_t got;

	/* glibc gives every thread one, and the kernel forgets it when the thread ends: a tenth of the time that the file takes,
	 * and mostly enough. */
	if (!real.syscall(SYS_get_robust_list, getpid(), &robust, &len) && robust)
		return;
	got = read_file("/proc/self/status", buf, sizeof(buf) - 1);
	if (got <= 0)
		return;
	buf[got] = 0;
	state = strstr(buf, "\nState:\tZ");
	threads = strstr(buf, "\nThreads:\t");
	if (state && threads && strtoul(threads + 10, NULL, 10) == 2)
		atomic_store(&peer.stop, true);
}

static void wait_for_work(void)
{
	struct pollfd p[2] = {{.fd = peer.wake[0], .events = POLLIN}, {.fd = peer.sock, .events = POLLIN}};
	static time_t looked;
	struct timespec now;

	poll(p, 2, peer.sock >= 0 ? LEADER_CHECK_MS : REJOIN_MS);
	if (p[0].revents)
		take_call();
	if (p[1].revents && !serve())
		disconnect();
	check_windows();
	/* By the clock: a service in a hurry leaves no pause to do it in. */
	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (now.tv_sec != looked) {
		looked = now.tv_sec;
		end_if_alone();
	}
}

static void *agent_main(void *arg)
{
	bool delay = peer.delay;

	(void)arg;
	real.prctl(PR_SET_NAME, "samepage", 0, 0, 0);
	if (!isolate())
		goto out;
	atomic_store(&peer.tid, (pid_t)real.syscall(SYS_gettid));
	if (delay)
		poll(NULL, 0, FORK_DELAY_MS);
	while (!atomic_load(&peer.stop)) {
		if (peer.sock < 0) {
			if (connect_service() && handshake())
				atomic_store(&peer.joined, true);
			else
				disconnect();
		}
		wait_for_work();
	}
	disconnect();
	kernel_close();
out:
	atomic_store(&peer.tid, 0);
	for (int i = 0; i < 2; i++) {
		if (peer.wake[i] >= 0)
			close(peer.wake[i]);
		peer.wake[i] = -1;
	}
	futex(&call.done, FUTEX_WAKE_PRIVATE, 1, NULL);
	return NULL;
}

/* Needs `life`. 0 or -errno. */
static int start_thread(void)
{
	int expected = IDLE, err;
	pthread_attr_t attr;
	sigset_t all, saved;

	if (!atomic_compare_exchange_strong(&peer.state, &expected, RUNNING))
		return expected == RETIRED ? -EPERM : 0;
	atomic_store(&peer.stop, false);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_SIZE);
	sigfillset(&all); /* the thread inherits the mask: no handler of the application's ever runs on it */
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	err = pthread_create(&peer.thread, &attr, agent_main, NULL);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	pthread_attr_destroy(&attr);
	if (err)
		atomic_store(&peer.state, IDLE);
	return -err;
}

void agent_start(void)
{
	int saved_errno = errno;

	if (atomic_load(&peer.state) != IDLE || !nr_areas || !peer.path[0] || pthread_mutex_trylock(&life))
		return;
	start_thread();
	pthread_mutex_unlock(&life);
	errno = saved_errno;
}

static void stop_thread(int state)
{
	pthread_mutex_lock(&life);
	if (atomic_load(&peer.state) == RUNNING) {
		atomic_store(&peer.stop, true);
		while (pthread_tryjoin_np(peer.thread, NULL) == EBUSY) {
			pid_t tid = atomic_load(&peer.tid);

			if (tid)
				poke(tid);
			real.syscall(SYS_sched_yield);
		}
	}
	atomic_store(&peer.state, state);
	pthread_mutex_unlock(&life);
}

void agent_stop(void)
{
	if (atomic_load(&peer.state) == RUNNING)
		stop_thread(IDLE);
}

void agent_retire(void)
{
	stop_thread(RETIRED);
}

void agent_fork_child(bool may_start_thread)
{
	/* The thread, its descriptors and what hung on them stayed in the parent. */
	pthread_mutex_init(&life, NULL);
	pthread_mutex_init(&call_lock, NULL);
	call.fn = NULL;
	atomic_store(&peer.tid, 0);
	atomic_store(&peer.joined, false);
	if (atomic_load(&peer.state) == RUNNING)
		atomic_store(&peer.state, IDLE);
	peer.sock = peer.attached = peer.wake[0] = peer.wake[1] = -1;
	windows_forked();
	kernel = KERNEL_CLOSED;
	page_forget_known();
	peer.delay = true;
	if (may_start_thread && any_mergeable())
		agent_start();
}

/* ---- for the program itself: the C API that samepage/agent/__init__.py binds ----------------------------- */

SP_EXPORT int samepage_join(const char *path)
{
	int err;

	if (strlen(path) >= sizeof(peer.path))
		return -ENAMETOOLONG;
	real_init();
	pthread_mutex_lock(&life);
	if (atomic_load(&peer.state) == RUNNING && strcmp(path, peer.path)) {
		err = -EBUSY;
	} else {
		strcpy(peer.path, path);
		err = start_thread();
	}
	pthread_mutex_unlock(&life);
	return err;
}

SP_EXPORT int samepage_attach(int fd)
{
	int err = -EBUSY;

	real_init();
	pthread_mutex_lock(&life);
	if (atomic_load(&peer.state) == IDLE) {
		peer.attached = fd;
		err = start_thread();
		/* Until it has a file table of its own, this descriptor is the one it will use. */
		while (!err && !atomic_load(&peer.tid) && pthread_tryjoin_np(peer.thread, NULL) == EBUSY)
			real.syscall(SYS_sched_yield);
		if (!err && !atomic_load(&peer.tid)) {
			atomic_store(&peer.state, IDLE);
			err = -ENOSYS; /* close_range(2) with CLOSE_RANGE_UNSHARE: Linux 5.9 */
		}
		if (err)
			peer.attached = -1;
		else
			close(fd);
	}
	pthread_mutex_unlock(&life);
	return err;
}

/* 0 when [start, end) is private anonymous memory that may be written; else -errno. */
static int check_mergeable(uintptr_t start, uintptr_t end)
{
	int maps = maps_open(), err = maps < 0 ? -errno : 0;
	struct vma v;

	while (!err && start < end) {
		if (!vma_find(maps, start, &v) || v.start > start)
			err = -ENOMEM;
		else if (v.shared || (v.ino && !page_test(PAGE_SEGMENT, start >> PAGE_SHIFT)))
			err = -EINVAL;
		else if (!v.read || !v.write)
			err = -EACCES;
		start = v.end;
	}
	if (maps >= 0)
		maps_close(maps);
	return err;
}

SP_EXPORT int samepage_register(void *addr, size_t len)
{
	uintptr_t start = (uintptr_t)addr, end = start + len;
	sigset_t saved;
	int err;

	if (!len || (start | len) & (PAGE_SIZE - 1))
		return -EINVAL;
	mmap_lock(&saved);
	err = check_mergeable(start, end);
	if (!err)
		err = area_cover(start, end, AREA_ADVISED, AREA_UNMERGED, 3 /* PROT_READ | PROT_WRITE */);
	mmap_unlock(&saved);
	if (!err)
		agent_start();
	return err;
}

SP_EXPORT int samepage_unmerge(void *addr, size_t len, size_t max_pages, struct sp_broken *out)
{
	uintptr_t start = PAGE_ALIGN_DOWN(addr), end = PAGE_ALIGN_UP((uintptr_t)addr + len);
	sigset_t saved;

	memset(out, 0, sizeof(*out));
	mmap_lock(&saved);
	area_change(start, end, max_pages ? AREA_UNMERGING : 0, AREA_UNMERGING, -1);
	mmap_unlock(&saved);
	if (!max_pages)
		return 0;
	unmerge_range(start, end, max_pages, out);
	if (out->error == EAGAIN)
		return -EAGAIN;
	mmap_lock(&saved);
	if (out->error) {
		area_change(start, end, 0, AREA_UNMERGING, -1);
	} else {
		area_change(start, end, AREA_UNMERGED, AREA_UNMERGING | AREA_ADVISED, -1);
		area_forget_plain(start, end);
	}
	mmap_unlock(&saved);
	return -out->error;
}

SP_EXPORT void samepage_quiet(void *addr, size_t len, int on)
{
	sigset_t saved;

	mmap_lock(&saved);
	area_change((uintptr_t)addr, (uintptr_t)addr + len, on ? AREA_QUIET : 0, AREA_QUIET, -1);
	mmap_unlock(&saved);
}

SP_EXPORT int samepage_mode(void)
{
	return atomic_load(&peer.joined) ? (int)kernel.swap : -ENOTCONN;
}

SP_EXPORT const char *samepage_strmode(int mode)
{
	static const char *const names[] = {"none", "move", "write-protect", "quiet areas only"};

	return mode >= 0 && mode < 4 ? names[mode] : "not joined";
}

/* Called by the constructor: the service that the environment names, joined once there is an area. */
void agent_configure(const char *path)
{
	if (path && strlen(path) < sizeof(peer.path))
		strcpy(peer.path, path);
}

bool agent_configured(void)
{
	return peer.path[0] || atomic_load(&peer.state) == RUNNING;
}
