/* SPDX-License-Identifier: Apache-2.0 */
/* The service's requests, and the answers. */
#include "base/area.h"
#include "base/lock.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/settings.h"
#include "base/stalls.h"
#include "kernel/headroom.h"
#include "pages/pages.h"
#include "pages/unstopped.h"
#include "thread/peer.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_RUNS 1024U
#define MAX_SUMS                                                                                                       \
	((SP_MSG_MAX - sizeof(struct sp_hdr) - sizeof(struct sp_scanned) - MAX_RUNS * sizeof(struct sp_run)) / 8)
#define FEW_RUNS 64U
#define FEW_SUMS ((uint32_t)SECTION_MAX)
#define FEW_AREAS 256U
#define BREAK_STEP (64 * SECTION_MAX) /* pages; the application's calls are taken after each step */
#define RESTORE_STEP (2 * SECTION_MAX)

#define VPN_LIMIT (ADDRESS_END >> PAGE_SHIFT) /* above user memory; addresses below it don't wrap */

static bool in_user_memory(uint64_t vpn, uint64_t npages)
{
	return vpn < VPN_LIMIT && npages <= VPN_LIMIT - vpn;
}

/* What we send is charged to this process's memory cgroup until the service has read it. If there is hardly room for
 * that, answers that can be continued in the next one are kept short: a few KiB. */
static bool must_be_short(void)
{
	bool room;

	agent_mmap_lock();
	room = room_to_merge(2 * SP_MSG_MAX); /* we may send two before one is read */
	agent_mmap_unlock();
	return !room;
}

/* Lists the mergeable ranges with neighbours joined, which the service calls areas. */
static size_t do_areas(uint64_t from_vpn)
{
	struct sp_areas *head = answer;
	struct sp_area *list = (struct sp_area *)(head + 1);
	size_t n = 0, max = must_be_short() ? FEW_AREAS : (ANSWER_MAX - sizeof(*head)) / sizeof(*list);
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
	bool few = must_be_short();

	if (in_user_memory(req->vpn, 0))
		scan_step(req, head, runs, few ? FEW_RUNS : MAX_RUNS, sums, few ? FEW_SUMS : MAX_SUMS);
	else
		*head = (struct sp_scanned){.areas_seq = SP_AREAS_CHANGED};
	memmove(runs + head->nruns, sums, head->nhashed * 8);
	head->forked_ms = ms_since_fork();
	head->pad = 0;
	agent_mmap_lock();
	stalls_take(&head->stalls);
	agent_mmap_unlock();
	head->cpu_ns = thread_cpu_ns() - cpu;
	return sizeof(*head) + head->nruns * sizeof(*runs) + head->nhashed * 8;
}

#define COUNT_RARELY_NS 50000000 /* a count that takes longer is good for COUNT_GOOD times as long */
#define COUNT_GOOD 30

/* Returns how many mappings the process has, and in *segments how many of these are of segments. The kernel has to write a line for
 * each. So where there are very many they are counted now and then; meanwhile a page that was merged counts as merged alone. */
static unsigned long mappings(unsigned long *segments)
{
	static unsigned long used, of_segments, given;
	static uint64_t until;
	uint64_t began = now_ns(), cpu = thread_cpu_ns();

	if (began >= until) {
		given = views_given;
		used = vma_count(&of_segments);
		cpu = thread_cpu_ns() - cpu;
		until = cpu > COUNT_RARELY_NS ? began + COUNT_GOOD * cpu : 0;
	}
	*segments = of_segments + (views_given - given);
	return used + 2 * (views_given - given);
}

/*
 * How many mappings the process has, and how many merging may bring it to. A third of vm.max_map_count is left to the
 * program, and never less than as many again as it has itself: breaking leaves mappings cut, and rejoin() runs only
 * when they are scarce. A page that is merged alone adds two mappings.
 */
static struct sp_map_count count_mappings(void)
{
	unsigned long max = vma_limit(), segments, used = mappings(&segments), own, leave;

	own = used > 2 * segments ? used - 2 * segments : 0;
	leave = own > max / 3 ? own : max / 3;
	return (struct sp_map_count){used, leave < max ? max - leave : 0};
}

/* Whether a range of pages lies in user memory, and the answer for all of `total` fits into a packet. */
static bool sane(uint64_t vpn, uint64_t npages, uint64_t *total)
{
	*total += npages;
	return npages && in_user_memory(vpn, npages) && npages <= ANSWER_MAX &&
	       *total <= ANSWER_MAX - sizeof(struct sp_done);
}

static int do_donate(const struct sp_area *runs, size_t n, size_t *len, int *fd)
{
	struct sp_done *head = answer;
	uint64_t total = 0, cpu = thread_cpu_ns();

	for (size_t i = 0; i < n; i++)
		if (!sane(runs[i].vpn, runs[i].npages, &total))
			return -EPROTO;
	*fd = donate(runs, n, (uint8_t *)(head + 1));
	*head = (struct sp_done){thread_cpu_ns() - cpu, total};
	*len = sizeof(*head) + total;
	return 0;
}

_Atomic bool has_guest;

#define GUEST_MS 30 /* how long a guest runs after a slice */

/*
 * Each swap makes KVM take pages out of its own page tables several times. Meanwhile the guest stands still, and
 * afterwards it faults on every page. So the guest gets most of the time; the application's calls are taken meanwhile.
 */
static void let_guest_run(void)
{
	wait_for(-1, 0, GUEST_MS);
}

static int do_merge(int fd, const struct sp_extent *extents, size_t n, size_t *len)
{
	struct sp_done *head = answer;
	uint64_t total = 0, cpu = thread_cpu_ns();
	int err;

	for (size_t i = 0; i < n; i++)
		if (!sane(extents[i].vpn, extents[i].npages, &total))
			return -EPROTO;
	err = merge(fd, extents, n, (uint8_t *)(head + 1),
		    atomic_load_explicit(&has_guest, memory_order_relaxed) ? let_guest_run : NULL);
	if (err)
		return err;
	*head = (struct sp_done){thread_cpu_ns() + unstopped_cpu_ns() - cpu, total};
	*len = sizeof(*head) + total;
	return 0;
}

static int do_prove(const struct sp_prove *req, size_t n, size_t *len)
{
	struct sp_done *head = answer;
	uint8_t *status = (uint8_t *)(head + 1);
	const uint64_t *vpns = (const uint64_t *)(req + 1);
	uint64_t cpu = thread_cpu_ns();

	if (n > (ANSWER_MAX - sizeof(*head)) / (1 + SP_PROOF_SIZE))
		return -EPROTO;
	for (size_t i = 0; i < n; i++)
		if (!in_user_memory(vpns[i], 1))
			return -EPROTO;
	prove(req, vpns, n, status, status + n);
	*head = (struct sp_done){thread_cpu_ns() - cpu, n};
	*len = sizeof(*head) + n * (1 + SP_PROOF_SIZE);
	return 0;
}

/* Breaks a long range in steps, so that the application's calls need not wait for all of it. */
static void do_break(const struct sp_area *range)
{
	uintptr_t start = range->vpn << PAGE_SHIFT, end = (range->vpn + range->npages) << PAGE_SHIFT;
	struct sp_broken *out = answer, sum = {0};

	do {
		break_ksm(start, end, BREAK_STEP, out);
		sum.pages_unmerged += out->pages_unmerged;
		sum.cpu_ns += out->cpu_ns;
		wait_for(-1, 0, 0);
	} while (out->error == EAGAIN && !atomic_load(&thread.stop));
	out->pages_unmerged = sum.pages_unmerged;
	out->cpu_ns = sum.cpu_ns;
	if (!out->error) { /* the service now knows that nothing is merged here; after an error the next scan tells
			    * it */
		agent_mmap_lock();
		page_set(PAGE_KNOWN, range->vpn, range->vpn + range->npages, false);
		agent_mmap_unlock();
	}
}

static int do_restore(const struct sp_area *ranges, size_t n)
{
	struct sp_restored done = {0};
	uint64_t cpu = thread_cpu_ns();

	for (size_t i = 0; i < n; i++)
		if (!in_user_memory(ranges[i].vpn, ranges[i].npages))
			return -EPROTO;
	for (size_t i = 0; i < n && !atomic_load(&thread.stop); i++) {
		uintptr_t at = ranges[i].vpn << PAGE_SHIFT, end = at + (ranges[i].npages << PAGE_SHIFT);

		while (at < end && !atomic_load(&thread.stop)) {
			at = restore_islands(at, end, RESTORE_STEP, &done);
			wait_for(-1, 0, 0);
		}
	}
	done.cpu_ns = thread_cpu_ns() + unstopped_cpu_ns() - cpu;
	*(struct sp_restored *)answer = done;
	return 0;
}

static uint64_t look_at_headroom(void)
{
	uint64_t bytes;

	agent_mmap_lock();
	bytes = headroom(settings.use_swap);
	agent_mmap_unlock();
	return bytes;
}

bool serve(void)
{
	size_t len = 0;
	int fd, out = -1, err = 0;
	struct sp_hdr head;
	ssize_t got = receive(&head, &fd);
	uint32_t op = head.op;
	bool ok;

	if (got < 0)
		return got == -EAGAIN;
	if ((op == SP_DONATE || op == SP_PROVE || op == SP_MERGE) && !is_same()) {
		thread_retires();
		err = -EPROTO;
	} else if (op == SP_AREAS && got == sizeof(uint64_t) && in_user_memory(*(uint64_t *)payload, 0)) {
		len = do_areas(*(uint64_t *)payload);
	} else if (op == SP_SCAN && got == sizeof(struct sp_scan)) {
		len = do_scan(payload);
	} else if (op == SP_DONATE && got && got % (ssize_t)sizeof(struct sp_area) == 0) {
		err = do_donate(payload, (size_t)got / sizeof(struct sp_area), &len, &out);
	} else if (op == SP_PROVE && got >= (ssize_t)sizeof(struct sp_prove) &&
		   (got - sizeof(struct sp_prove)) % sizeof(uint64_t) == 0) {
		err = do_prove(payload, ((size_t)got - sizeof(struct sp_prove)) / sizeof(uint64_t), &len);
	} else if (op == SP_MERGE && got && got % (ssize_t)sizeof(struct sp_extent) == 0) {
		err = do_merge(fd, payload, (size_t)got / sizeof(struct sp_extent), &len);
	} else if (op == SP_BREAK && got == sizeof(struct sp_area) &&
		   in_user_memory(((struct sp_area *)payload)->vpn, ((struct sp_area *)payload)->npages)) {
		do_break(payload);
		len = sizeof(struct sp_broken);
	} else if (op == SP_RESTORE && got && got % (ssize_t)sizeof(struct sp_area) == 0) {
		err = do_restore(payload, (size_t)got / sizeof(struct sp_area));
		len = sizeof(struct sp_restored);
	} else if (op == SP_MAP_COUNT && !got) {
		*(struct sp_map_count *)answer = count_mappings();
		len = sizeof(struct sp_map_count);
	} else if (op == SP_HEADROOM && !got) {
		*(struct sp_headroom *)answer = (struct sp_headroom){look_at_headroom()};
		len = sizeof(struct sp_headroom);
	} else {
		err = -EPROTO;
	}
	if (unstopped_killed())
		thread_retires();
	if (fd >= 0)
		close(fd);
	ok = transmit(op, head.seq, -err, err ? 0 : len, out);
	if (out >= 0)
		close(out);
	return ok && err != -EPROTO;
}
