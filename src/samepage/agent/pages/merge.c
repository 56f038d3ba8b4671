/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Merging: cuts the extents of a request into chunks, each of which is swapped under one hold of the lock (swap.c).
 */
#include "base/lock.h"
#include "base/maps.h"
#include "base/planes.h"
#include "base/real.h"
#include "base/settings.h"
#include "base/system.h"
#include "kernel/headroom.h"
#include "kernel/holders.h"
#include "kernel/window.h"
#include "pages/swap.h"
#include "pages/unstopped.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define VPN_MAX (UINTPTR_MAX >> PAGE_SHIFT)

/* The view counts against the limits. The application must not be refused memory because of it. */
#define ROOM_TO_LIMIT (64UL << 20)

#define FAULT_AROUND 16 /* pages: the kernel's default for fault_around_bytes */

#define VIEW_PAGES (VIEW_WINDOW >> PAGE_SHIFT)

/* Roughly how long the lock is held at a time, unless somebody waits for it; and where a guest is to run in between. */
#define SLICE_NS 8000000
#define GUEST_SLICE_NS 2000000

/* How much of the kernel's memory one slice takes before it gives pages back: 530 bytes a page if each is merged alone
 * (two mappings), for less than twice SECTION_MAX pages; page tables; and what the kernel charges ahead on a CPU. */
#define SLICE_TAKES (1UL << 20)

/*
 * A core dump leaves out a private file mapping unless it was written to, that is, has an anon_vma (vma_dump_size() in
 * the kernel's fs/coredump.c); debuggers would find zeros where merged memory is. So we write to the view once, before
 * pieces of it become the application's: these inherit its anon_vma, and hand it on when they are cut, moved or forked.
 * The written copy is dropped. If the view were moved away as a whole, the mapping that stays would lose its anon_vma;
 * hence the extra page at its end, which is never moved.
 */
static bool map_view(struct segment *s, uint64_t start, uint64_t end)
{
	volatile uint8_t *last = (volatile uint8_t *)kernel.view + (end - start - 1) * PAGE_SIZE;

	if (!kernel.view || (s->limited && !limits_leave(ROOM_TO_LIMIT)))
		return false;
	s->charged = mappings_charged();
	if (real.mmap((void *)kernel.view, (end - start + 1) * PAGE_SIZE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_FIXED, s->fd, (off_t)(start * PAGE_SIZE)) == MAP_FAILED)
		return false;
	*last = *last;
	return !real.madvise((void *)last, PAGE_SIZE, MADV_DONTNEED);
}

/*
 * Whether n pages of the view can be read without taking memory that is not there. A page that is not in memory may
 * have been swapped out; or it is a hole, which would be filled at our expense (segment_pages() lets few through: a
 * huge page that reaches beyond the end of the file counts as a whole). Where there is memory for all of them, nobody
 * need ask the kernel, which would look each of them up.
 */
static bool may_read(const uint8_t *view, size_t n)
{
	uint8_t present[SECTION_MAX];
	uint64_t absent = 0;

	if (room_to_merge(n * PAGE_SIZE + SLICE_TAKES))
		return true;
	if (real.syscall(SYS_mincore, view, n * PAGE_SIZE, present))
		return false;
	for (size_t k = 0; k < n; k++)
		absent += !(present[k] & 1);
	return !absent || room_to_merge(absent * PAGE_SIZE + SLICE_TAKES);
}

/* Makes a private view of at most n pages of a segment. Returns how many; 0: there is none, see s->refusal. Forked
 * children inherit the view, since they must inherit what is moved from it; they unmap it (windows_forked()). */
static size_t view_of(struct segment *s, uint64_t offset, size_t n, const uint8_t **view)
{
	if (s->lost || offset < s->start || offset >= s->end) {
		uint64_t start = offset / VIEW_PAGES * VIEW_PAGES, end = min_addr(start + VIEW_PAGES, s->npages);

		s->end = 0;
		s->refusal = NOMAP;
		if (!map_view(s, start, end))
			return 0;
		s->lost = false;
		s->start = start;
		s->end = end;
	}
	n = min_addr(n, s->end - offset);
	*view = (const uint8_t *)kernel.view + (offset - s->start) * PAGE_SIZE;
	s->refusal = NOMEM;
	if (!may_read(*view, n))
		return 0;
	/* Fault the pages in before the hole is open, so that the comparison takes no faults. A fault also maps the
	 * pages around it, which is cheaper than MADV_POPULATE_READ's walk over every page. */
	for (size_t k = 0; k < n; k += FAULT_AROUND)
		*(const volatile uint8_t *)(*view + k * PAGE_SIZE);
	*(const volatile uint8_t *)(*view + (n - 1) * PAGE_SIZE);
	return n;
}

unsigned long views_given;

int view_give(struct segment *s, const uint8_t *view, size_t len, uintptr_t to)
{
	uintptr_t from = (uintptr_t)view;
	off_t offset = (off_t)(s->start * PAGE_SIZE + (from - kernel.view));
	int err;

	if (s->lost)
		return -ENOMEM;
	views_given++;
	if (kernel.views_stay && !s->limited && !s->charged) {
		if (real.mremap((void *)from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, (void *)to) !=
		    MAP_FAILED)
			return 0;
		err = -errno;
		if (range_mapped(to, len)) /* if not, a limit was set just now */
			return err;
	}
	err = window_give(from, len, to);
	if (!err && !window_fill(from, len, PROT_READ | PROT_WRITE, s->fd, offset)) {
		s->lost = true;
		if (!window_fill(from, len, PROT_NONE, -1, 0))
			window_lost();
	}
	return err;
}

/* How far a request has come: page `at` of an extent, before `last`. */
struct cursor {
	const struct sp_extent *extent, *last;
	uint64_t at;
};

static void cursor_advance(struct cursor *at, uint64_t pages)
{
	at->at += pages;
	while (at->extent < at->last && at->at >= at->extent->npages)
		at->at -= at->extent++->npages;
}

/* Whether the extent after e can be swapped together with the pages gathered; several small extents can. */
static bool goes_with(const struct chunk *c, const struct segment *s, const struct sp_extent *e)
{
	const struct sp_extent *next = e + 1;

	return next->vpn >= e->vpn + e->npages && next->npages && next->npages <= settings.section - c->n &&
	       (c->segment ? next->offset >= s->start && next->offset < s->end && next->npages <= s->end - next->offset
			   : next->offset == SP_ZERO_PAGE);
}

/* Makes a chunk of what comes next: pages of one extent up to the end of a huge page's range, or several small extents,
 * no more than one critical section. False: there is no view, see s->refusal. */
static bool gather(struct chunk *c, struct segment *s, const struct cursor *from)
{
	const struct sp_extent *e = from->extent;
	uint64_t vpn = e->vpn + from->at, left = min_addr(e->npages - from->at, SECTION_MAX - vpn % SECTION_MAX);

	c->segment = e->offset == SP_ZERO_PAGE ? NULL : s;
	c->n = 0;
	for (int extents = 1;; extents++) {
		const uint8_t *view = zero_page;
		uint64_t n = c->segment ? view_of(s, e->offset + (vpn - e->vpn), left, &view) : left;

		for (uint64_t k = 0; k < n; k++, c->n++) {
			c->addr[c->n] = (vpn + k) << PAGE_SHIFT;
			c->target[c->n] = c->segment ? view + k * PAGE_SIZE : zero_page;
		}
		if (vpn + n < e->vpn + e->npages || c->n >= settings.section || extents == PIECES_MAX ||
		    ++e == from->last || !goes_with(c, s, e - 1))
			return c->n;
		vpn = e->vpn;
		left = e->npages;
	}
}

/*
 * Cuts the chunk short before a page that no area has, or whose area may not be swapped, or that lies in another area than the
 * page before it in its row. Returns DONE; or, if that is the very first page, what its status is, and that of all that are left
 * in the chunk.
 */
static enum page_status clip_to_areas(struct chunk *c)
{
	const struct area *a = area_next(c->addr[0]);
	enum page_status first = !a || a->start > c->addr[0] ? GONE : may_swap(a) ? DONE : REFUSED;
	size_t i = 1;

	for (; i < c->n && first != GONE; i++) {
		if (c->addr[i] < a->end)
			continue;
		if (first == REFUSED || same_row(c, i))
			break;
		a = area_next(c->addr[i]);
		if (!a || a->start > c->addr[i] || !may_swap(a))
			break;
	}
	c->n = i;
	return first;
}

/* Whether a mapping of a readable and writable page is what the books say: anonymous, or a segment's. */
static bool is_as_known(const struct vma *v, uintptr_t addr)
{
	if (v->shared || !v->read || !v->write)
		return false;
	return page_test(PAGE_SEGMENT, addr >> PAGE_SHIFT) ? vma_is_segment(v) : !v->ino;
}

/* Cuts the chunk short before a page whose mapping is not what the books say, or that lies in another mapping than the
 * page before it in its row: a move must stay within one mapping. If the mapping of the very first page is not what the
 * books say, it is left alone for good: the program changed it by a system call that passed no wrapper (an inline one),
 * and may do so again without our noticing. */
static void clip_to_mappings(struct chunk *c)
{
	struct vma vma = {0};

	for (size_t i = 0; i < c->n; i++) {
		uintptr_t at = c->addr[i];

		if (at < vma.end)
			continue;
		if (i && same_row(c, i))
			c->n = i;
		else if (!vma_find(kernel.maps, at, &vma) || vma.start > at || !is_as_known(&vma, at))
			c->n = i;
		if (!c->n)
			area_change(at,
				    vma.start > at ? vma.start
				    : vma.end > at ? vma.end
						   : at + PAGE_SIZE,
				    AREA_EXCLUDED, 0, -1);
	}
}

/* Merges what comes next. Returns for how many pages it set a status. */
static size_t merge_some(struct segment *segment, const struct cursor *at, uint8_t *status, bool unpinned)
{
	static struct chunk c; /* static, because swap_recover() must find it */
	enum page_status why_not;
	size_t n;

	c = (struct chunk){.status = status, .unpinned = unpinned};
	segment->limited = mappings_limited();
	if (!gather(&c, segment, at)) {
		memset(status, segment->refusal, at->extent->npages - at->at);
		return at->extent->npages - at->at;
	}
	why_not = clip_to_areas(&c);
	n = c.n;
	if (why_not == DONE) {
		n = row_end(&c, 0, c.n);
		clip_to_mappings(&c);
		if (c.n) {
			swap_chunk(&c);
			return c.n;
		}
		why_not = REFUSED;
	}
	memset(status, why_not, n);
	return n;
}

/* The part of a request that is left. */
struct rest {
	struct segment *segment;
	struct cursor at;
	uint8_t *status;
	bool unpinned; /* reads_unpinned() */
	bool shortly;  /* a guest is to run between slices */
};

static void answered(struct rest *rest, size_t pages)
{
	rest->status += pages;
	cursor_advance(&rest->at, pages);
}

/* Whether a slice goes on. `pages` are those since the headroom was looked at. */
static bool slice_goes_on(const struct rest *rest, uint64_t began, size_t *pages)
{
	if (*pages < SECTION_MAX)
		return step_goes_on(began, rest->shortly ? GUEST_SLICE_NS : SLICE_NS);
	*pages = 0;
	return !rest->shortly && step_goes_on(began, SLICE_NS) && room_to_merge(SLICE_TAKES);
}

/* Merges chunks for one hold of the lock: beginning one costs as much as swapping ten pages. */
static void merge_slice(void *arg)
{
	struct rest *rest = arg;
	uint64_t began = thread_cpu_ns();
	size_t pages = 0;

	do {
		size_t did = merge_some(rest->segment, &rest->at, rest->status, rest->unpinned);

		answered(rest, did);
		pages += did;
	} while (rest->at.extent < rest->at.last && !mmap_lock_contended() && !thread_woke() &&
		 slice_goes_on(rest, began, &pages));
}

/* False: the child that did it was killed. */
static bool merge_unstopped(struct rest *rest)
{
	bool ended;

	rest->unpinned = reads_unpinned();
	agent_mmap_lock();
	ended = run_unstopped(merge_slice, rest);
	if (!ended)
		swap_recover();
	agent_mmap_unlock();
	return ended;
}

/* The number of pages of a segment, or -errno if it is none. Only sealed content makes a comparison worth anything, a
 * sealed size makes a mapping safe from SIGBUS, and holes are refused because their reader pays for them. (Pages that
 * are swapped out count as blocks.) */
static int64_t segment_pages(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat st;

	if (seals < 0 || (seals & SEALS & ~F_SEAL_SEAL) != (SEALS & ~F_SEAL_SEAL))
		return -EPERM;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode))
		return -EBADF;
	if (st.st_blocks < st.st_size / 512)
		return -EPERM;
	segment_dev =
		(st.st_dev >> 8 & 0xfff) << 32 | (st.st_dev & 0xff) | (st.st_dev >> 12 & 0xfff00); /* makedev(3) */
	return st.st_size >> PAGE_SHIFT;
}

/* Why nothing may be merged now; DONE if it may. */
static enum page_status refusal(void)
{
	bool room;

	if (traced())
		return BUSY;
	agent_mmap_lock();
	room = room_to_merge(SLICE_TAKES);
	agent_mmap_unlock();
	return room ? DONE : NOMEM;
}

static bool sane(const struct sp_extent *e, uint64_t pages)
{
	return e->npages <= VPN_MAX && e->vpn <= VPN_MAX - e->npages &&
	       (e->offset == SP_ZERO_PAGE || (e->offset <= pages && e->npages <= pages - e->offset));
}

int merge(int fd, const struct sp_extent *extents, size_t n, uint8_t *status, void (*pause)(void))
{
	int64_t pages = fd >= 0 ? segment_pages(fd) : 0;
	struct segment segment = {.fd = fd, .npages = (uint64_t)pages};
	struct rest rest = {.segment = &segment,
			    .at = {.extent = extents, .last = extents + n},
			    .status = status,
			    .shortly = pause};

	if (pages < 0)
		return (int)pages;
	for (size_t i = 0; i < n; i++)
		if (!sane(&extents[i], (uint64_t)pages))
			return -EINVAL;
	for (answered(&rest, 0); rest.at.extent < rest.at.last;) {
		enum page_status why_not = refusal();

		if (why_not == DONE && !merge_unstopped(&rest))
			why_not = BUSY;
		if (why_not != DONE) {
			size_t left = rest.at.extent->npages - rest.at.at;

			memset(rest.status, why_not, left);
			answered(&rest, left);
		} else if (rest.at.extent < rest.at.last && pause) {
			pause();
			segment.end = 0; /* a call may have used the view window */
		}
	}
	scratch_drop();
	if (pages && kernel.view) /* don't keep the segment alive */
		window_reset(kernel.view, VIEW_SPACE, PROT_NONE, -1, 0);
	return 0;
}
