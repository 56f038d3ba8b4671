/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Donating pages to a segment, and swapping pages for a segment's.
 *
 * The swap must be atomic for the application's other threads. By *move*: the range is registered for
 * missing faults, its pages are moved to the scratch range, where nobody else can reach them, compared
 * there, and either the segment is mapped over the hole or the pages go home. A thread that touches the hole
 * sleeps in the kernel until it is woken. By *write-protection*: the range is write-protected, compared where
 * it is, and mapped over; a thread that writes sleeps.
 *
 * While a hole is open its pages are nowhere else. Hence the one rule of this file: what a call returned is
 * a hint; where pages stand is read from the pagemap, and no section ends before every page is at home or equal to
 * the segment page that is mapped there, and only the latter's originals, which nobody needs, are left in the scratch.
 */
#include "agent.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MODE_MISSING_WP (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)
#define VPN_MAX (UINTPTR_MAX >> PAGE_SHIFT)
#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

const uint8_t zero_page[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

/* Pages of one area: what is swapped under one hold of the lock. Those that stand in a row in memory are a *row*, which lies
 * in one mapping; where they do so in the segment, too, a *piece*, which takes one. */
struct chunk {
	size_t n;		     /* pages, at most SECTION_MAX; if there is a gap between them, at most a section */
	uintptr_t addr[SECTION_MAX]; /* ascending */
	const uint8_t *target[SECTION_MAX]; /* what each is to be: a page in the view of the segment, or zero_page */
	const struct segment *segment;	    /* NULL: zeros */
	uint8_t *status;		    /* one a page */
	const struct area *area;
	uintptr_t scratch; /* the window that pages are moved to */
};

/* A segment, and what of it is in the view window, in pages. */
struct segment {
	int fd;
	uint64_t npages, start, end;
};

static uintptr_t scratch_at(const struct chunk *c, size_t k)
{
	return c->scratch + k * PAGE_SIZE;
}

static bool page_equal(const struct chunk *c, size_t i, const void *page)
{
	return !memcmp(page, c->target[i], PAGE_SIZE);
}

/* Of a page that cannot be swapped because of what stands there. */
static uint8_t status_of(uint8_t kind)
{
	return kind == PAGE_FORKED ? BUSY : kind == PAGE_FILE ? REFUSED : GONE;
}

static bool same_row(const struct chunk *c, size_t i)
{
	return c->addr[i] == c->addr[i - 1] + PAGE_SIZE;
}

/* Whether page i continues the piece that the page before it is of. */
static bool same_piece(const struct chunk *c, size_t i)
{
	return same_row(c, i) && (!c->segment || c->target[i] == c->target[i - 1] + PAGE_SIZE);
}

/* The end of the row that page i is of, before j. */
static size_t row_end(const struct chunk *c, size_t i, size_t j)
{
	size_t end = i + 1;

	while (end < j && same_row(c, end))
		end++;
	return end;
}

/* Puts the segment's pages over pages [i, j) of the chunk, which are of one piece. The caller has made sure that they are
 * equal. */
static int map_segment(const struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = c->addr[i], end = start + (j - i) * PAGE_SIZE;
	size_t len = end - start;
	void *put;

	/* What was compared moves there, page tables and all, so the application need not fault. */
	if (kernel.moves_views)
		put = real.mremap((void *)c->target[i], len, len, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
				  (void *)start);
	else
		put = real.mmap((void *)start, len, c->area->prot, MAP_PRIVATE | MAP_FIXED, c->segment->fd,
				(off_t)(c->segment->start * PAGE_SIZE + ((uintptr_t)c->target[i] - kernel.view)));
	if (put == MAP_FAILED)
		return -errno;
	area_readvise(c->area, start, end);
	page_set(PAGE_SEGMENT, start >> PAGE_SHIFT, end >> PAGE_SHIFT, true);
	page_set(PAGE_KNOWN, start >> PAGE_SHIFT, end >> PAGE_SHIFT, true);
	page_set(PAGE_ISLAND, start >> PAGE_SHIFT, end >> PAGE_SHIFT, false);
	return 0;
}

/* Makes pages [i, j) of the chunk, which are a row of zeros, read as the kernel's zero page. The hole that moved ones leave
 * does already. */
static int drop_zeros(const struct chunk *c, size_t i, size_t j)
{
	size_t len = (j - i) * PAGE_SIZE;
	int err;

	if (kernel.swap != SP_SWAP_WP)
		return 0;
	err = discard_segments(c->addr[i], c->addr[i] + len);
	return err ? err : real.madvise((void *)c->addr[i], len, MADV_DONTNEED) ? -errno : 0;
}

/* Puts the segment's pages, or the zero page, over those of pages [i, j) of the chunk that are equal, piece by piece. */
static void map_equal(const struct chunk *c, size_t i, size_t j, const bool *equal)
{
	for (size_t end; i < j; i = end) {
		int err;

		for (end = i + 1; end < j && equal[end] == equal[i] && same_piece(c, end); end++)
			;
		if (!equal[i])
			continue;
		err = c->segment ? map_segment(c, i, end) : drop_zeros(c, i, end);
		memset(c->status + i, !err ? DONE : err == -ENOMEM ? NOMAP : REFUSED, end - i);
	}
}

/* ---- by move --------------------------------------------------------------------------------------- */

/* Which pages of scratch [0, n) hold something: the truth about every move. */
static void scratch_holds(const struct chunk *c, size_t n, bool *here)
{
	const struct pm_walk w = {.any = PAGE_IS_PRESENT | PAGE_IS_SWAPPED};
	uintptr_t at = c->scratch, end = scratch_at(c, n);
	struct page_region v[16];

	memset(here, 0, n);
	while (at < end) {
		int regions = pagemap_walk(at, end, &w, v, 16, &at);

		if (regions < 0) {
			if (regions != -EINTR && regions != -ENOMEM)
				return; /* EFAULT, EINVAL: cannot be, the arguments are ours */
			real.syscall(SYS_sched_yield);
		}
		for (int r = 0; r < regions; r++)
			memset(here + ((v[r].start - c->scratch) >> PAGE_SHIFT), 1,
			       (v[r].end - v[r].start) >> PAGE_SHIFT);
	}
}

/* Moves pages [i, j) of the chunk to scratch [k, k + j - i), row by row, until one will not go. */
static int pull_rows(const struct chunk *c, size_t i, size_t j, size_t k)
{
	int err = 0;

	for (size_t end; i < j && !err; k += end - i, i = end) {
		end = row_end(c, i, j);
		err = uffd_move(scratch_at(c, k), c->addr[i], (end - i) * PAGE_SIZE);
	}
	return err;
}

/* Moves pages [i, j) of the chunk to scratch [0, j - i), as many as will go. here[k]: page i + k came. */
static void pull(struct chunk *c, size_t i, size_t j, bool *here)
{
	size_t n = j - i, at = 0, written = 0;
	uint8_t kind[SECTION_MAX];
	int tries = 0;

	while (at < n) {
		int err = pull_rows(c, i + at, j, at);

		scratch_holds(c, n, here);
		while (at < n && here[at])
			at++;
		if (at == n)
			return;
		if (err == -EBUSY && at >= written) {
			size_t end = row_end(c, i + at, j) - i, own = at;

			if (page_kinds(c->addr[i + at], end - at, kind + at))
				memset(kind + at, PAGE_ABSENT, end - at);
			while (own < end && kind[own] == PAGE_OWN)
				own++;
			if (own == at) {
				for (; at < end && kind[at] != PAGE_OWN; at++)
					c->status[i + at] = status_of(kind[at]);
				continue;
			}
			/* A page that a fork shared once is not ours alone again (PageAnonExclusive) until it is written.
			 * This writes without changing a byte. A pinned page is exclusive already and stays where it
			 * is. */
			written = own;
			if (!real.madvise((void *)c->addr[i + at], (own - at) * PAGE_SIZE, MADV_POPULATE_WRITE))
				continue;
		}
		if (err == -EAGAIN && tries++ < 8)
			continue;
		c->status[i + at++] = err == -ENOENT ? GONE : BUSY;
	}
}

/* Moves what scratch [0, n) still holds home to page i of the chunk on. Does not return before it is there. */
static void push_back(struct chunk *c, size_t i, size_t n)
{
	bool here[SECTION_MAX];
	uint8_t kind;

	for (unsigned long tries = 0;; tries++) {
		bool left = false;

		scratch_holds(c, n, here);
		for (size_t k = 0, end; k < n; k = end) {
			uintptr_t home = c->addr[i + k];
			size_t len;
			int err;

			for (end = k + 1; end < n && here[end] == here[k] && same_row(c, i + end); end++)
				;
			if (!here[k])
				continue;
			left = true;
			len = (end - k) * PAGE_SIZE;
			err = uffd_move(home, scratch_at(c, k), len);
			if (!err || tries < 16)
				continue;
			/* It will not move (a migration keeps it, say): a copy is as good, nobody else can write
			 * the page here. One page at a time, since a copy may stop half-way too. */
			err = uffd_copy(home, scratch_at(c, k), PAGE_SIZE);
			/* EEXIST: something stands at home. With the range registered for missing pages only
			 * we can have put it there: the page itself, of which this is the copied original. */
			if (!err || (err == -EEXIST && !page_kinds(home, 1, &kind) && kind != PAGE_ABSENT))
				real.madvise((void *)scratch_at(c, k), PAGE_SIZE, MADV_DONTNEED);
			/* The mapping at home is gone (a kernel before 6.12 can fail a MAP_FIXED half-way): put the
			 * scratch pages there. */
			else if (err == -ENOENT && real.mremap((void *)scratch_at(c, k), len, len,
							       MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
							       (void *)home) != MAP_FAILED)
				uffd_register(kernel.move, scratch_at(c, k), len, UFFDIO_REGISTER_MODE_WP);
		}
		if (!left)
			return;
		real.syscall(SYS_sched_yield);
	}
}

/* Compares pages [i, j) of the chunk, which are in scratch from k on where `here` says so, and puts the segment's over
 * those that are equal. */
static void settle(struct chunk *c, size_t i, size_t j, size_t k, const bool *here)
{
	bool equal[SECTION_MAX];

	for (size_t m = i; m < j; m++, k++) {
		equal[m] = here[k] && page_equal(c, m, (void *)scratch_at(c, k));
		if (here[k] && !equal[m])
			c->status[m] = DIFFERENT;
	}
	map_equal(c, i, j, equal);
}

static bool all_done(const struct chunk *c, size_t i, size_t j)
{
	while (i < j && c->status[i] == DONE)
		i++;
	return i == j;
}

/* Empties scratch [0, n), which holds what is left of page i of the chunk on: what is done goes, the rest goes home. */
static void clear_scratch(struct chunk *c, size_t i, size_t n)
{
	for (size_t k = 0, end; k < n; k = end) {
		bool done = c->status[i + k] == DONE;

		for (end = k + 1; end < n && (c->status[i + end] == DONE) == done; end++)
			;
		if (done)
			real.madvise((void *)scratch_at(c, k), (end - k) * PAGE_SIZE, MADV_DONTNEED);
	}
	if (!all_done(c, i, i + n))
		push_back(c, i, n);
}

static size_t spent; /* pages at the start of the scratch that are done with */

/* Gives them back, many at a time, for it takes a system call. */
static void scratch_drop(void)
{
	if (spent)
		real.madvise((void *)kernel.scratch, spent * PAGE_SIZE, MADV_DONTNEED);
	spent = 0;
}

/* Whoever waits for one of pages [i, j), or a page in between, goes on. */
static void wake(const struct chunk *c, size_t i, size_t j)
{
	uffd_wake(kernel.move, c->addr[i], c->addr[j - 1] + PAGE_SIZE - c->addr[i]);
}

/* One critical section: pages [i, j) of the chunk. */
static void section_by_move(struct chunk *c, size_t i, size_t j)
{
	bool here[SECTION_MAX];

	if (spent + (j - i) > SECTION_MAX)
		scratch_drop();
	c->scratch = kernel.scratch + spent * PAGE_SIZE;
	pull(c, i, j, here);
	settle(c, i, j, 0, here);
	if (all_done(c, i, j))
		spent += j - i;
	else
		clear_scratch(c, i, j - i);
	wake(c, i, j);
}

/* Mappings made in one critical section: a hundred microseconds' worth. */
#define PIECES_MAX 16

/* Where a critical section ends that begins at page i, before j. */
static size_t section_end(const struct chunk *c, size_t i, size_t j)
{
	size_t end, pieces = 1;

	for (end = i + 1; end < j && end - i < settings.section; end++)
		if (!same_piece(c, end) && ++pieces > PIECES_MAX)
			break;
	return end;
}

static bool is_huge_page(const struct chunk *c)
{
	const struct pm_walk w = {.must = PAGE_IS_PRESENT | PAGE_IS_HUGE}; /* anonymous: its pages are ours alone */
	struct page_region r;
	uintptr_t walked;

	return kernel.huge && kernel.scan && c->n == SECTION_MAX && c->addr[0] % WINDOW == 0 &&
	       pagemap_walk(c->addr[0], c->addr[0] + WINDOW, &w, &r, 1, &walked) == 1 && r.end - r.start == WINDOW;
}

/*
 * A huge page moves whole: splitting it, which moving a part of it makes the kernel do, costs as much as all the rest. Its
 * sections are compared and mapped one after the other, and who waits for one of them goes on then, so nobody waits
 * for more than the whole. False: it would not move, and every page is at home.
 */
static bool swap_huge_page(struct chunk *c)
{
	bool here[SECTION_MAX], all = true;

	c->scratch = kernel.huge;
	uffd_move(scratch_at(c, 0), c->addr[0], WINDOW);
	scratch_holds(c, SECTION_MAX, here);
	for (size_t k = 0; k < SECTION_MAX; k++)
		all &= here[k];
	if (all) {
		for (size_t at = 0, end; at < SECTION_MAX; at = end) {
			end = section_end(c, at, SECTION_MAX);
			settle(c, at, end, at, here);
			wake(c, at, end);
		}
		clear_scratch(c, 0, SECTION_MAX);
		if (!all_done(c, 0, SECTION_MAX)) /* a part of it went home: there are page tables now */
			huge_reset();
	} else {
		push_back(c, 0, SECTION_MAX);
		huge_reset();
	}
	wake(c, 0, SECTION_MAX);
	return all;
}

/* Has what stayed anonymous of pages [start, end) followed again as all such memory is. Unregistering it before, where it
 * was watched for missing pages, wakes who waits there. */
static void track_again(uintptr_t start, uintptr_t end, bool watched)
{
	for (uint64_t vpn = start >> PAGE_SHIFT, last = end >> PAGE_SHIFT, stop; vpn < last; vpn = stop) {
		vpn = page_next(PAGE_SEGMENT, vpn, last, false);
		stop = page_next(PAGE_SEGMENT, vpn, last, true);
		if (vpn == stop)
			continue;
		if (watched)
			untrack(vpn << PAGE_SHIFT, stop << PAGE_SHIFT);
		track(vpn << PAGE_SHIFT, stop << PAGE_SHIFT);
	}
}

/* Swaps pages [i, j) of the chunk. */
static void swap_by_move(struct chunk *c, size_t i, size_t j)
{
	int err = 0;

	for (size_t at = i, end; at < j && !err; at = end) {
		end = row_end(c, at, j);
		err = uffd_register(kernel.move, c->addr[at], (end - at) * PAGE_SIZE, MODE_MISSING_WP);
	}
	if (err)
		memset(c->status + i, REFUSED, j - i);
	else if (!is_huge_page(c) || !swap_huge_page(c))
		for (size_t at = i, end; at < j; at = end) {
			end = section_end(c, at, j);
			section_by_move(c, at, end);
		}
	for (size_t at = i, end; at < j; at = end) {
		end = row_end(c, at, j);
		track_again(c->addr[at], c->addr[end - 1] + PAGE_SIZE, true);
	}
}

/* ---- by write-protection --------------------------------------------------------------------------- */

/* Swaps pages [i, j) of the chunk, which are a row. */
static void swap_by_protect(struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = c->addr[i], len = (j - i) * PAGE_SIZE;
	bool equal[SECTION_MAX];
	uint8_t kind[SECTION_MAX];

	if (kernel.tracking)
		untrack(start, start + len);
	if (uffd_register(kernel.wp, start, len, UFFDIO_REGISTER_MODE_WP) || uffd_protect(start, len, true) ||
	    page_kinds(start, j - i, kind + i)) {
		memset(c->status + i, REFUSED, j - i);
	} else {
		for (size_t k = i; k < j; k++) {
			/* The one look that counts: from here on nobody writes. */
			equal[k] = kind[k] == PAGE_OWN && page_equal(c, k, (void *)c->addr[k]);
			if (!equal[k])
				c->status[k] = kind[k] == PAGE_OWN ? DIFFERENT : status_of(kind[k]);
		}
		map_equal(c, i, j, equal);
	}
	uffd_unregister(kernel.wp, start, len);
	track_again(start, start + len, false);
}

/* ---- merging --------------------------------------------------------------------------------------- */

static bool may_swap(const struct area *a)
{
	if (!area_mergeable(a) || (a->flags & (AREA_LOCKED | AREA_UNMERGING)) || a->prot != (PROT_READ | PROT_WRITE))
		return false;
	return kernel.swap == SP_SWAP_MOVE || kernel.swap == SP_SWAP_WP ||
	       (kernel.swap == SP_SWAP_QUIET && (a->flags & AREA_QUIET));
}

/* Swaps what may be swapped. It is not asked before what stands there: nearly all can be swapped, and the attempt tells. By
 * write-protection a page of a segment can be, too, if it was written. */
static void merge_chunk(struct chunk *c)
{
	bool go[SECTION_MAX];

	for (size_t k = 0; k < c->n; k++)
		go[k] = kernel.swap == SP_SWAP_WP || !page_test(PAGE_SEGMENT, c->addr[k] >> PAGE_SHIFT);
	for (size_t i = 0, j; i < c->n; i = j) {
		for (j = i + 1; j < c->n && go[j] == go[i]; j++)
			;
		if (!go[i])
			memset(c->status + i, REFUSED, j - i);
		else if (kernel.swap != SP_SWAP_WP)
			swap_by_move(c, i, j);
		else
			for (size_t at = i, end; at < j; at = end) {
				end = row_end(c, at, j);
				swap_by_protect(c, at, end);
			}
	}
}

/* Fills the page tables of what was just mapped, where it was not moved with them: the application need not fault, and
 * what /proc says of the process (PSS, PAGE_IS_FILE) is true at once. */
static void populate(const struct chunk *c)
{
	if (kernel.moves_views || !c->segment)
		return;
	for (size_t i = 0, j; i < c->n; i = j) {
		for (j = i + 1; j < c->n && same_row(c, j) && c->status[j] == c->status[i]; j++)
			;
		if (c->status[i] == DONE)
			real.madvise((void *)c->addr[i], (j - i) * PAGE_SIZE, MADV_POPULATE_READ);
	}
}

#define FAULT_AROUND 16 /* pages: fault_around_bytes of the kernel, unless somebody changed it */

#define VIEW_PAGES (VIEW_WINDOW >> PAGE_SHIFT)

/*
 * A core dump leaves a private file mapping out unless it was written to, that is, has an anon_vma (vma_dump_size() in the
 * kernel's fs/coredump.c); and where merged memory would be, debuggers find zeros. So the view is written to once, before
 * pieces of it become the application's: these inherit its anon_vma, and hand it on to what they are cut into, moved to and
 * forked to. The written copy is dropped. A view that is moved away as a whole would have to leave its anon_vma
 * behind; hence the page at its end, which lies behind the file's.
 */
static bool map_view(int fd, uint64_t start, uint64_t end)
{
	volatile uint8_t *last = (volatile uint8_t *)kernel.view + (end - start - 1) * PAGE_SIZE;

	if (real.mmap((void *)kernel.view, (end - start + 1) * PAGE_SIZE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_FIXED, fd, (off_t)(start * PAGE_SIZE)) == MAP_FAILED)
		return false;
	*last = *last;
	return !real.madvise((void *)last, PAGE_SIZE, MADV_DONTNEED);
}

/* A private view of at most n pages of a segment: how many, 0 when no mapping is to be had. Not kept from a fork, since
 * what is moved from it must not be; a forked child unmaps it (agent_fork_child). */
static size_t view_of(struct segment *s, uint64_t offset, size_t n, const uint8_t **view)
{
	if (offset < s->start || offset >= s->end) {
		uint64_t start = offset / VIEW_PAGES * VIEW_PAGES, end = min_addr(start + VIEW_PAGES, s->npages);

		s->end = 0;
		if (!map_view(s->fd, start, end))
			return 0;
		s->start = start;
		s->end = end;
	}
	n = min_addr(n, s->end - offset);
	*view = (const uint8_t *)kernel.view + (offset - s->start) * PAGE_SIZE;
	/* Before the hole is open, so that the comparison does not fault in it. A fault maps what is around it, too, which is
	 * cheaper than MADV_POPULATE_READ's walk over every page. */
	for (size_t k = 0; k < n; k += FAULT_AROUND)
		*(const volatile uint8_t *)(*view + k * PAGE_SIZE);
	*(const volatile uint8_t *)(*view + (n - 1) * PAGE_SIZE);
	return n;
}

/* What a request has come to: page `at` of an extent, before `last`. */
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

/* Whether the extent after e can be swapped with what was gathered: small ones are, some at a time. */
static bool goes_with(const struct chunk *c, const struct segment *s, const struct sp_extent *e)
{
	const struct sp_extent *next = e + 1;

	return next->vpn >= e->vpn + e->npages && next->npages && next->npages <= settings.section - c->n &&
	       (c->segment ? next->offset >= s->start && next->offset < s->end && next->npages <= s->end - next->offset
			   : next->offset == SP_ZERO_PAGE);
}

/* Makes a chunk of what comes next: of one extent up to the end of a huge page's range, or of small ones no more than one
 * critical section. False: no mapping is to be had for a view. */
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

/* Leaves out what lies at `end` or behind. */
static void clip(struct chunk *c, uintptr_t end)
{
	while (c->n && c->addr[c->n - 1] >= end)
		c->n--;
}

/* Leaves out what begins with a page that is in no private mapping, or one that its row shares with another mapping: a
 * move must stay within one. */
static void clip_to_mappings(struct chunk *c)
{
	struct vma vma = {0};

	for (size_t i = 0; i < c->n; i++) {
		uintptr_t at = c->addr[i];

		if (at < vma.end)
			continue;
		if ((i && same_row(c, i)) || !vma_find(kernel.maps, at, &vma) || vma.start > at || vma.shared)
			c->n = i;
	}
}

/* Merges what comes next, under one hold of the lock. How many pages it answered for. */
static size_t merge_some(struct segment *segment, const struct cursor *at, uint8_t *status)
{
	struct chunk c = {.status = status};
	size_t n;

	if (!gather(&c, segment, at)) {
		memset(status, NOMAP, at->extent->npages - at->at);
		return at->extent->npages - at->at;
	}
	agent_mmap_lock();
	c.area = area_next(c.addr[0]);
	if (!c.area || c.area->start > c.addr[0]) {
		c.n = 1;
		*status = GONE;
	} else {
		clip(&c, c.area->end);
		n = c.n;
		if (may_swap(c.area))
			clip_to_mappings(&c);
		else
			c.n = 0;
		if (c.n) {
			merge_chunk(&c);
			populate(&c);
		} else {
			c.n = n;
			memset(status, REFUSED, n);
		}
	}
	agent_mmap_unlock();
	return c.n;
}

/* The number of pages of a segment, or -errno when it is none: sealed content is what makes a comparison
 * worth anything, and a sealed size is what makes a mapping safe from SIGBUS. */
static int64_t segment_pages(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat st;

	if (seals < 0 || (seals & SEALS & ~F_SEAL_SEAL) != (SEALS & ~F_SEAL_SEAL))
		return -EPERM;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode))
		return -EBADF;
	return st.st_size >> PAGE_SHIFT;
}

/* Merging gives memory back, but takes some for mappings and page tables first: 256 KiB do for SECTION_MAX pages. In a
 * cgroup that is full to the last page these would wake the OOM killer as well. */
static bool room_to_merge(void)
{
	bool room;

	agent_mmap_lock();
	room = room_for(256UL << 10, 0);
	agent_mmap_unlock();
	return room;
}

int merge(int fd, const struct sp_extent *extents, size_t n, uint8_t *status)
{
	int64_t pages = fd >= 0 ? segment_pages(fd) : 0;
	struct segment segment = {.fd = fd, .npages = (uint64_t)pages};
	struct cursor at = {.extent = extents, .last = extents + n};
	uint64_t since = SECTION_MAX;
	bool room = false;

	if (pages < 0)
		return (int)-pages;
	for (size_t i = 0; i < n; i++) {
		const struct sp_extent *e = &extents[i];

		if (e->npages > VPN_MAX || e->vpn > VPN_MAX - e->npages)
			return EINVAL;
		if (e->offset != SP_ZERO_PAGE &&
		    (e->offset > (uint64_t)pages || e->npages > (uint64_t)pages - e->offset))
			return EINVAL;
	}
	for (cursor_advance(&at, 0); at.extent < at.last;) {
		size_t did;

		if (since >= SECTION_MAX) {
			since = 0;
			room = room_to_merge();
		}
		if (room) {
			did = merge_some(&segment, &at, status);
		} else {
			did = at.extent->npages - at.at;
			memset(status, NOMEM, did);
		}
		since += did;
		status += did;
		cursor_advance(&at, did);
	}
	scratch_drop();
	if (pages && kernel.view) /* the segment is not ours to keep alive */
		window_reset(kernel.view, VIEW_SPACE, PROT_NONE, -1, 0);
	return 0;
}

/* ---- donating --------------------------------------------------------------------------------------- */

static int new_segment(void)
{
	int fd = (int)real.syscall(SYS_memfd_create, "samepage", 1 | 2 | 8); /* CLOEXEC, ALLOW_SEALING, NOEXEC_SEAL */

	if (fd < 0 && errno == EINVAL) /* MFD_NOEXEC_SEAL: 6.3 */
		fd = (int)real.syscall(SYS_memfd_create, "samepage", 1 | 2);
	return fd;
}

/* Appends pages [i, j) at `addr` to the segment, and says so. */
static void append(int fd, uintptr_t addr, size_t i, size_t j, uint8_t *status)
{
	while (i < j) {
		ssize_t put = write(fd, (void *)(addr + i * PAGE_SIZE), (j - i) * PAGE_SIZE);
		off_t end;

		if (put < 0 && errno == EINTR)
			continue;
		if (put < (ssize_t)PAGE_SIZE) {
			memset(status + i, put < 0 && errno == EFAULT ? GONE : NOMEM, j - i);
			return;
		}
		/* A short write may have ended inside a page: that page is not there. */
		memset(status + i, DONE, (size_t)put / PAGE_SIZE);
		i += (size_t)put / PAGE_SIZE;
		if (put % (ssize_t)PAGE_SIZE) {
			end = lseek(fd, -(put % (ssize_t)PAGE_SIZE), SEEK_CUR);
			if (end < 0 || ftruncate(fd, end)) {
				memset(status + i, NOMEM, j - i);
				return;
			}
		}
	}
}

/* The same, with each copy on the NUMA node of its page, as a page that the kernel's KSM shares stays where it is. */
static void append_near(int fd, uintptr_t addr, size_t i, size_t j, uint8_t *status)
{
	int node[SECTION_MAX];

	if (!kernel.numa || page_nodes(addr + i * PAGE_SIZE, j - i, node)) {
		append(fd, addr, i, j, status);
		return;
	}
	for (size_t from = i, to; from < j; from = to) {
		for (to = from; to < j && node[to - i] == node[from - i]; to++)
			;
		prefer_node(node[from - i]);
		append(fd, addr, from, to, status);
	}
	prefer_node(-1);
}

/* Pages written to a segment after one look at the headroom: 512 KiB, which takes a tenth of a millisecond. A write to
 * a memfd that finds its cgroup full wakes the OOM killer like any fault. */
#define DONATE_STEP 128UL

static size_t donate_some(int fd, uintptr_t addr, size_t n, uint8_t *status)
{
	uint8_t kind[SECTION_MAX];
	const struct area *a;

	n = n < DONATE_STEP ? n : DONATE_STEP;
	agent_mmap_lock();
	a = area_next(addr);
	if (!a || a->start > addr) {
		n = 1;
		*status = GONE;
	} else {
		n = min_addr(n, (a->end - addr) >> PAGE_SHIFT);
		if (!room_for(n * PAGE_SIZE, settings.reserve))
			memset(status, NOMEM, n);
		else if (!may_swap(a))
			memset(status, REFUSED, n);
		else if (page_kinds(addr, n, kind))
			memset(status, GONE, n);
		else
			for (size_t i = 0, j; i < n; i = j) {
				for (j = i; j < n && kind[j] == kind[i]; j++)
					;
				if (kind[i] == PAGE_OWN)
					append_near(fd, addr, i, j, status);
				else
					memset(status + i, status_of(kind[i]), j - i);
			}
	}
	agent_mmap_unlock();
	return n;
}

static int seal(int fd)
{
	int err, tries = 0;

	do { /* EBUSY: something holds a page for a moment (compaction, another CPU's LRU batch); it was waited for */
		err = fcntl(fd, F_ADD_SEALS, SEALS) ? errno : 0;
	} while (err == EBUSY && tries++ < 4);
	return err;
}

int donate(const struct sp_area *runs, size_t n, uint8_t *status)
{
	uint64_t pages = 0, done = 0;
	uint8_t *first = status;
	int fd;

	for (size_t i = 0; i < n; i++)
		pages += runs[i].npages;
	agent_mmap_lock();
	fd = room_for(0, pages * PAGE_SIZE + settings.reserve) ? new_segment() : -1;
	agent_mmap_unlock();
	if (fd < 0) {
		memset(status, NOMEM, pages);
		return -1;
	}
	for (size_t i = 0; i < n; i++)
		for (uint64_t at = 0; at < runs[i].npages;) {
			size_t did = donate_some(fd, (runs[i].vpn + at) << PAGE_SHIFT, runs[i].npages - at, status);

			at += did;
			status += did;
		}
	while (first < status)
		done += *first++ == DONE;
	if (done && !seal(fd))
		return fd;
	close(fd);
	memset(status - pages, BUSY, done ? pages : 0);
	return -1;
}
