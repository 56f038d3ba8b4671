/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the agent's thread does: it joins the service, answers its requests one at a time, and joins again if the
 * service goes and comes back. Its descriptors are in a file table of its own (thread.c).
 */
#include "thread/peer.h"
#include "base/area.h"
#include "base/lock.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/settings.h"
#include "kernel/holders.h"
#include "kernel/kernel.h"
#include "kernel/window.h"
#include "pages/pages.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define REJOIN_MS 200 /* between two attempts to join; doubled each time that we are refused, or sent away within */
#define REJOIN_MAX_MS 3200 /* this, up to this */
#define SERVED_MS 1000	   /* how long to wait for a request before looking around */
#define FORK_DELAY_MS 50   /* most forked children exec at once, and are not worth a connection */

struct peer peer = {.attached = -1, .sock = -1};

void agent_configure(const char *path, const char *domain)
{
	if (!path || strlen(path) >= sizeof(peer.path))
		return;
	strcpy(peer.path, path);
	/* A name that is too long is invalid: send "?", so that the service refuses the process. It must not end up in
	 * another domain. */
	if (domain)
		strcpy(peer.domain, strlen(domain) < sizeof(peer.domain) ? domain : "?");
	thread_note_defaults();
	note_page_size();
}

void agent_unconfigure(void)
{
	peer.path[0] = '\0';
}

bool agent_configured(void)
{
	return peer.path[0] || atomic_load(&thread.state) == RUNNING;
}

bool agent_may_run(void)
{
	return agent_configured() && atomic_load(&thread.state) != RETIRED;
}

void peer_forget(void)
{
	peer.sock = -1;
}

/* ---- joining ----------------------------------------------------------------------------------------- */

/* Whether `uid` is the one that stands for all users without an id in this user namespace. */
static bool is_anybody(uid_t uid)
{
	char map[256] = "", overflow[16] = "";
	char *at = map;
	ssize_t got = read_file("/proc/thread-self/uid_map", map, sizeof(map) - 1);

	if (read_file("/proc/sys/kernel/overflowuid", overflow, sizeof(overflow) - 1) <= 0)
		strcpy(overflow, "65534");
	if (uid != strtoul(overflow, NULL, 10))
		return false;
	/* If one line maps every id to itself, no user is without an id. */
	return got <= 0 || strtoul(at, &at, 10) || strtoul(at, &at, 10) || strtoul(at, &at, 10) != UINT32_MAX;
}

/* The service gets checksums of our memory: it must be root's or our own user's. */
static bool is_trusted(int sock)
{
	struct ucred peer_is;
	socklen_t len = sizeof(peer_is);

	return !getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer_is, &len) &&
	       (!peer_is.uid || peer_is.uid == geteuid()) && !is_anybody(peer_is.uid);
}

static bool say_hello(void)
{
	struct sp_hello *hello = answer;
	const int room = 2 * SP_MSG_MAX;
	ssize_t got;

	setsockopt(peer.sock, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	*hello = (struct sp_hello){SP_MAGIC, SP_VERSION, (uint32_t)getpid(), PAGE_SIZE, "", ""};
	memcpy(hello->domain, peer.domain, sizeof(hello->domain));
	got = read_file("/proc/self/comm", hello->comm, sizeof(hello->comm) - 1);
	if (got > 0 && hello->comm[got - 1] == '\n')
		hello->comm[got - 1] = 0;
	return transmit(SP_HELLO, 0, 0, sizeof(*hello), -1);
}

/* Connects and says hello. It does not wait for the answer, which may never come. */
static bool connect_service(void)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};

	if (peer.attached >= 0) {
		peer.sock = peer.attached;
		peer.attached = -1;
		return say_hello();
	}
	if (!peer.path[0])
		return false;
	if (!is_same()) { /* started by a thread that acts for another user */
		thread_retires();
		return false;
	}
	peer.sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	memcpy(to.sun_path, peer.path, sizeof(to.sun_path));
	return peer.sock >= 0 && !connect(peer.sock, (struct sockaddr *)&to, sizeof(to)) && is_trusted(peer.sock) &&
	       say_hello();
}

/* Reads the answer to hello. False: there is no service that we know. */
static bool finish_handshake(void)
{
	struct sp_ready *ready = answer;
	struct sp_hdr head;
	int dev;
	ssize_t got = receive(&head, &dev);

	if (got == -EAGAIN)
		return true;
	if (got != sizeof(settings) || head.op != SP_WELCOME) {
		if (dev >= 0)
			close(dev);
		return false;
	}
	memcpy(&settings, payload, sizeof(settings));
	if (settings.flags & SP_WELCOME_LIKE_5_10)
		settings.flags |= SP_WELCOME_LIKE_6_1;
	if (settings.flags & SP_WELCOME_LIKE_6_1)
		settings.flags |= SP_WELCOME_NO_MOVE | SP_WELCOME_NO_TRACKING | SP_WELCOME_NO_MAP_QUERY;
	if (settings.section < 1 || settings.section > SECTION_MAX)
		settings.section = 64;
	kernel_close(); /* closing forgets which pages were written: a new service has to be told everything */
	agent_mmap_lock();
	page_forget_known();
	agent_mmap_unlock();
	if (kernel_open(dev))
		kernel_close();
	if (dev >= 0)
		close(dev);
	*ready = (struct sp_ready){kernel.swap, kernel.tracking, page_checksum(zero_page), merge_mapped, 0};
	if (!transmit(SP_READY, 0, 0, sizeof(*ready), -1))
		return false;
	atomic_store(&peer.joined, true);
	return true;
}

/* The service is gone, so no page is away and nobody need sleep for one. If a kernel has lost a wake (uffd_unregister()
 * knows one that does), the thread wakes here at the latest. */
static void wake_everybody(void)
{
	const uintptr_t first = 1UL << 16, end = ARCH_TASK_SIZE; /* vm.mmap_min_addr */

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

/* When to try next to join, and how long after that to try once more; and when it was tried last. In ms. */
static struct {
	int64_t at;
	int after;
	int64_t last;
} next_try;

/* Connects if it is time to. Returns how many ms may pass until there is something to do here. */
static int stay_connected(void)
{
	int64_t now = now_ms();

	if (peer.sock < 0 && now >= next_try.at) {
		next_try.last = now;
		if (!connect_service()) {
			disconnect();
			next_try.after = REJOIN_MS; /* nobody is there: keep trying often, to notice soon when somebody
						     * is */
		}
		next_try.at = now + next_try.after;
		next_try.after = next_try.after < REJOIN_MAX_MS ? 2 * next_try.after : REJOIN_MAX_MS;
	}
	return peer.sock >= 0 ? SERVED_MS : (int)(next_try.at - now);
}

/* ---- the thread -------------------------------------------------------------------------------------- */

/* Gives this thread a file table of its own, empty except for an attached socket. */
static bool isolate(void)
{
	const unsigned unshare_table = CLOSE_RANGE_UNSHARE; /* 5.9 */
	unsigned keep = (unsigned)peer.attached;

	if (peer.attached < 0) {
		if (real.syscall(SYS_close_range, 0U, ~0U, unshare_table))
			return false;
	} else if ((keep && real.syscall(SYS_close_range, 0U, keep - 1, unshare_table)) ||
		   real.syscall(SYS_close_range, keep + 1, ~0U, keep ? 0U : unshare_table)) {
		return false;
	}
	return !chdir("/") && calls_open();
}

/* Receives what is there. False: the connection is useless. */
static bool attend(void)
{
	if (!atomic_load(&peer.joined))
		return finish_handshake();
	if (!serve())
		return false;
	if (now_ms() - next_try.last > REJOIN_MAX_MS)
		next_try.after = REJOIN_MS; /* we were not refused */
	return true;
}

void peer_main(void)
{
	thread_settle();
	if (!isolate()) {
		calls_close();
		windows_give_up();
		thread_retires();
		return;
	}
	if (thread.delay)
		wait_for(-1, 0, FORK_DELAY_MS);
	next_try.at = 0;
	next_try.after = REJOIN_MS;
	while (!atomic_load(&thread.stop)) {
		int wait_ms = stay_connected();

		if (wait_for(peer.sock, POLLIN, wait_ms) && !attend())
			disconnect();
		check_windows();
	}
	disconnect();
	kernel_close();
	windows_give_up();
	calls_close();
}
