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
#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

const uint8_t zero_page[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

/* A stretch of one area that lies in one mapping: what is swapped under one hold of the lock. */
struct chunk {
	uintptr_t addr;
	size_t n;		/* pages, at most SECTION_MAX, and of one huge page's range */
	const uint8_t *segment; /* the segment's pages for these, in the view; or NULL: zeros */
	int fd;
	uint64_t offset; /* of `segment` in fd, in pages */
	uint8_t *status; /* one a page */
	const struct area *area;
	uintptr_t scratch; /* the window that pages are moved to */
};

static uintptr_t page_at(const struct chunk *c, size_t i)
{
	return c->addr + i * PAGE_SIZE;
}

static uintptr_t scratch_at(const struct chunk *c, size_t k)
{
	return c->scratch + k * PAGE_SIZE;
}

static bool page_equal(const struct chunk *c, size_t i, const void *page)
{
	return !memcmp(page, c->segment ? c->segment + i * PAGE_SIZE : zero_page, PAGE_SIZE);
}

/* Puts the segment's pages over pages [i, j) of the chunk. The caller has made sure that they are equal. */
static int map_segment(const struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = page_at(c, i), end = page_at(c, j);
	size_t len = end - start;
	void *put;

	/* What was compared moves there, page tables and all, so the application need not fault. */
	if (kernel.moves_views)
		put = real.mremap((void *)(c->segment + i * PAGE_SIZE), len, len,
				  MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, (void *)start);
	else
		put = real.mmap((void *)start, len, c->area->prot, MAP_PRIVATE | MAP_FIXED, c->fd,
				(off_t)((c->offset + i) * PAGE_SIZE));
	if (put == MAP_FAILED)
		return -errno;
	area_readvise(c->area, start, end);
	page_set(PAGE_SEGMENT, start >> PAGE_SHIFT, end >> PAGE_SHIFT, true);
	page_set(PAGE_KNOWN, start >> PAGE_SHIFT, end >> PAGE_SHIFT, true);
	page_set(PAGE_ISLAND, start >> PAGE_SHIFT, end >> PAGE_SHIFT, false);
	return 0;
}

/* The end of the run of pages from i on, before n, whose flag equals flag[i]. */
static size_t run_end(const bool *flag, size_t i, size_t n)
{
	size_t j = i + 1;

	while (j < n && flag[j] == flag[i])
		j++;
	return j;
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

/* Moves pages [i, j) of the chunk to scratch [0, j - i), as many as will go. here[k]: page i + k came. */
static void pull(struct chunk *c, size_t i, size_t j, bool *here)
{
	size_t n = j - i, at = 0;
	bool written = false;
	int tries = 0;

	while (at < n) {
		int err = uffd_move(scratch_at(c, at), page_at(c, i + at), (n - at) * PAGE_SIZE);

		scratch_holds(c, n, here);
		while (at < n && here[at])
			at++;
		if (at == n)
			return;
		if (err == -EBUSY && !written) {
			/* A page that a fork shared once is not ours alone again (PageAnonExclusive) until
			 * it is written; who maps it was asked before: nobody else. This writes without
			 * changing a byte. A pinned page is exclusive already and stays where it is. */
			written = true;
			if (!real.madvise((void *)page_at(c, i + at), (n - at) * PAGE_SIZE, MADV_POPULATE_WRITE))
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
			size_t len;
			int err;

			end = run_end(here, k, n);
			if (!here[k])
				continue;
			left = true;
			len = (end - k) * PAGE_SIZE;
			err = uffd_move(page_at(c, i + k), scratch_at(c, k), len);
			if (!err || tries < 16)
				continue;
			/* It will not move (a migration keeps it, say): a copy is as good, nobody else can write
			 * the page here. One page at a time, since a copy may stop half-way too. */
			err = uffd_copy(page_at(c, i + k), scratch_at(c, k), PAGE_SIZE);
			/* EEXIST: something stands at home. With the range registered for missing pages only
			 * we can have put it there: the page itself, of which this is the copied original. */
			if (!err || (err == -EEXIST && !page_kinds(page_at(c, i + k), 1, &kind) && kind != PAGE_ABSENT))
				real.madvise((void *)scratch_at(c, k), PAGE_SIZE, MADV_DONTNEED);
			/* The mapping at home is gone (a kernel before 6.12 can fail a MAP_FIXED half-way): put the
			 * scratch pages there. */
			else if (err == -ENOENT && real.mremap((void *)scratch_at(c, k), len, len,
							       MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
							       (void *)page_at(c, i + k)) != MAP_FAILED)
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
	size_t n = j - i;

	for (size_t m = 0; m < n; m++) {
		equal[m] = here[k + m] && page_equal(c, i + m, (void *)scratch_at(c, k + m));
		if (here[k + m] && !equal[m])
			c->status[i + m] = DIFFERENT;
	}
	for (size_t m = 0, end; m < n; m = end) {
		int err = 0;

		end = run_end(equal, m, n);
		if (!equal[m])
			continue;
		if (c->segment)
			err = map_segment(c, i + m, i + end);
		memset(c->status + i + m, !err ? DONE : err == -ENOMEM ? NOMAP : REFUSED, end - m);
	}
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
	bool done[SECTION_MAX];

	for (size_t k = 0; k < n; k++)
		done[k] = c->status[i + k] == DONE;
	for (size_t k = 0, end; k < n; k = end) {
		end = run_end(done, k, n);
		if (done[k])
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

/* One critical section: pages [i, j) of the chunk, all present and exclusive a moment ago. */
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
	uffd_wake(kernel.move, page_at(c, i), (j - i) * PAGE_SIZE);
}

static bool is_huge_page(const struct chunk *c)
{
	const struct pm_walk w = {.must = PAGE_IS_PRESENT | PAGE_IS_HUGE}; /* anonymous: its pages are ours alone */
	struct page_region r;
	uintptr_t walked;

	return kernel.huge && kernel.scan && c->n == SECTION_MAX && c->addr % WINDOW == 0 &&
	       pagemap_walk(c->addr, c->addr + WINDOW, &w, &r, 1, &walked) == 1 && r.end - r.start == WINDOW;
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
	uffd_move(scratch_at(c, 0), c->addr, WINDOW);
	scratch_holds(c, SECTION_MAX, here);
	for (size_t k = 0; k < SECTION_MAX; k++)
		all &= here[k];
	if (all) {
		for (size_t at = 0, end; at < SECTION_MAX; at = end) {
			end = min_addr(at + settings.section, SECTION_MAX);
			settle(c, at, end, at, here);
			uffd_wake(kernel.move, page_at(c, at), (end - at) * PAGE_SIZE);
		}
		clear_scratch(c, 0, SECTION_MAX);
		if (!all_done(c, 0, SECTION_MAX)) /* a part of it went home: there are page tables now */
			huge_reset();
	} else {
		push_back(c, 0, SECTION_MAX);
		huge_reset();
	}
	uffd_wake(kernel.move, c->addr, WINDOW);
	return all;
}

/* Swaps pages [i, j) of the chunk. */
static void swap_by_move(struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = page_at(c, i), end = page_at(c, j);

	if (uffd_register(kernel.move, start, end - start, MODE_MISSING_WP)) {
		memset(c->status + i, REFUSED, j - i);
		return;
	}
	if (!is_huge_page(c) || !swap_huge_page(c))
		for (size_t at = i; at < j; at += settings.section)
			section_by_move(c, at, min_addr(at + settings.section, j));
	/* What stayed anonymous is no longer watched for missing pages; unregistering wakes who waits there. */
	for (uint64_t vpn = start >> PAGE_SHIFT, last = end >> PAGE_SHIFT, stop; vpn < last; vpn = stop) {
		vpn = page_next(PAGE_SEGMENT, vpn, last, false);
		stop = page_next(PAGE_SEGMENT, vpn, last, true);
		if (vpn < stop) {
			untrack(vpn << PAGE_SHIFT, stop << PAGE_SHIFT);
			track(vpn << PAGE_SHIFT, stop << PAGE_SHIFT);
		}
	}
}

/* ---- by write-protection --------------------------------------------------------------------------- */

/* Drops pages [i, j), which are zeros, so that they read as the kernel's zero page. */
static int drop_zeros(const struct chunk *c, size_t i, size_t j)
{
	int err = discard_segments(page_at(c, i), page_at(c, j));

	return err ? err : real.madvise((void *)page_at(c, i), (j - i) * PAGE_SIZE, MADV_DONTNEED) ? -errno : 0;
}

static void swap_by_protect(struct chunk *c, size_t i, size_t j)
{
	uintptr_t start = page_at(c, i), len = page_at(c, j) - start;
	bool equal[SECTION_MAX];
	uint8_t kind[SECTION_MAX];
	size_t n = j - i;

	if (kernel.tracking)
		untrack(start, start + len);
	if (uffd_register(kernel.wp, start, len, UFFDIO_REGISTER_MODE_WP) || uffd_protect(start, len, true) ||
	    page_kinds(start, n, kind)) {
		memset(c->status + i, REFUSED, n);
	} else {
		for (size_t k = 0; k < n; k++) {
			/* The one look that counts: from here on nobody writes. */
			equal[k] = kind[k] == PAGE_OWN && page_equal(c, i + k, (void *)page_at(c, i + k));
			if (!equal[k])
				c->status[i + k] = kind[k] == PAGE_OWN	    ? DIFFERENT
						   : kind[k] == PAGE_FORKED ? BUSY
									    : GONE;
		}
		for (size_t k = 0, end; k < n; k = end) {
			int err;

			end = run_end(equal, k, n);
			if (!equal[k])
				continue;
			err = c->segment ? map_segment(c, i + k, i + end) : drop_zeros(c, i + k, i + end);
			memset(c->status + i + k, !err ? DONE : err == -ENOMEM ? NOMAP : REFUSED, end - k);
		}
	}
	uffd_unregister(kernel.wp, start, len);
	for (uint64_t vpn = start >> PAGE_SHIFT, last = (start + len) >> PAGE_SHIFT, stop; vpn < last; vpn = stop) {
		vpn = page_next(PAGE_SEGMENT, vpn, last, false);
		stop = page_next(PAGE_SEGMENT, vpn, last, true);
		if (vpn < stop)
			track(vpn << PAGE_SHIFT, stop << PAGE_SHIFT);
	}
}

/* ---- merging --------------------------------------------------------------------------------------- */

static bool may_swap(const struct area *a)
{
	if (!area_mergeable(a) || (a->flags & (AREA_LOCKED | AREA_UNMERGING)) || a->prot != (PROT_READ | PROT_WRITE))
		return false;
	return kernel.swap == SP_SWAP_MOVE || kernel.swap == SP_SWAP_WP ||
	       (kernel.swap == SP_SWAP_QUIET && (a->flags & AREA_QUIET));
}

/* Sorts out what cannot be swapped, and swaps the rest run by run. */
static void merge_chunk(struct chunk *c)
{
	bool go[SECTION_MAX];
	uint8_t kind[SECTION_MAX];

	if (page_kinds(c->addr, c->n, kind)) {
		memset(c->status, GONE, c->n);
		return;
	}
	for (size_t k = 0; k < c->n; k++) {
		uint64_t vpn = (c->addr >> PAGE_SHIFT) + k;
		bool anonymous = !page_test(PAGE_SEGMENT, vpn) || (kernel.swap == SP_SWAP_WP && kind[k] != PAGE_FILE);

		go[k] = kind[k] == PAGE_OWN && anonymous;
		if (!go[k])
			c->status[k] = !anonymous		? REFUSED
				       : kind[k] == PAGE_FORKED ? BUSY
				       : kind[k] == PAGE_FILE	? REFUSED
								: GONE;
	}
	for (size_t i = 0, j; i < c->n; i = j) {
		j = run_end(go, i, c->n);
		if (!go[i])
			continue;
		if (kernel.swap == SP_SWAP_WP)
			swap_by_protect(c, i, j);
		else
			swap_by_move(c, i, j);
	}
}

/* Fills the page tables of what was just mapped, where it was not moved with them: the application need not fault, and
 * what /proc says of the process (PSS, PAGE_IS_FILE) is true at once. */
static void populate(const struct chunk *c)
{
	if (kernel.moves_views || !c->segment)
		return;
	for (size_t i = 0, j; i < c->n; i = j) {
		for (j = i; j < c->n && c->status[j] == DONE; j++)
			;
		if (j > i)
			real.madvise((void *)page_at(c, i), (j - i) * PAGE_SIZE, MADV_POPULATE_READ);
		else
			j = i + 1;
	}
}

#define FAULT_AROUND 16 /* pages: fault_around_bytes of the kernel, unless somebody changed it */

#define VIEW_PAGES (VIEW_WINDOW >> PAGE_SHIFT)

/* A segment, and what of it is in the view window, in pages. */
struct segment {
	int fd;
	uint64_t npages, start, end;
};

/* A private view of at most n pages of a segment: how many, 0 when no mapping is to be had. Not kept from a fork, since
 * what is moved from it must not be; a forked child unmaps it (agent_fork_child). */
static size_t view_of(struct segment *s, uint64_t offset, size_t n, const uint8_t **view)
{
	if (offset < s->start || offset >= s->end) {
		uint64_t start = offset / VIEW_PAGES * VIEW_PAGES, end = min_addr(start + VIEW_PAGES, s->npages);

		s->end = 0;
		if (real.mmap((void *)kernel.view, (end - start) * PAGE_SIZE, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_FIXED, s->fd, (off_t)(start * PAGE_SIZE)) == MAP_FAILED)
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

/* Merges pages at `addr`, up to the end of a huge page's range, under one hold of the lock. How many it answered for. */
static size_t merge_some(uintptr_t addr, size_t n, struct segment *segment, uint64_t offset, uint8_t *status)
{
	struct chunk c = {.addr = addr,
			  .n = min_addr(n, SECTION_MAX - (addr >> PAGE_SHIFT) % SECTION_MAX),
			  .fd = segment->fd,
			  .status = status};
	struct vma vma;

	if (offset != SP_ZERO_PAGE) {
		size_t seen = view_of(segment, offset, c.n, &c.segment);

		if (!seen) {
			memset(status, NOMAP, c.n);
			return c.n;
		}
		c.n = seen;
		c.offset = offset;
	}
	agent_mmap_lock();
	c.area = area_next(addr);
	if (!c.area || c.area->start > addr) {
		c.n = 1;
		*status = GONE;
	} else if (!may_swap(c.area) || !vma_find(kernel.maps, addr, &vma) || vma.start > addr || vma.shared) {
		c.n = min_addr(c.n, (c.area->end - addr) >> PAGE_SHIFT);
		memset(status, REFUSED, c.n);
	} else {
		/* A move must stay within one mapping. */
		c.n = min_addr(c.n, (min_addr(c.area->end, vma.end) - addr) >> PAGE_SHIFT);
		merge_chunk(&c);
		populate(&c);
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
	uint64_t since = SECTION_MAX;
	bool room = false;

	if (pages < 0)
		return (int)-pages;
	for (size_t i = 0; i < n; i++)
		if (extents[i].offset != SP_ZERO_PAGE &&
		    (extents[i].offset > (uint64_t)pages || extents[i].npages > (uint64_t)pages - extents[i].offset))
			return EINVAL;
	for (size_t i = 0; i < n; i++) {
		const struct sp_extent *e = &extents[i];

		for (uint64_t at = 0; at < e->npages;) {
			size_t did;

			if (since >= SECTION_MAX) {
				since = 0;
				room = room_to_merge();
			}
			if (!room) {
				memset(status, NOMEM, e->npages - at);
				status += e->npages - at;
				break;
			}
			did = merge_some((e->vpn + at) << PAGE_SHIFT, e->npages - at, &segment,
					 e->offset == SP_ZERO_PAGE ? SP_ZERO_PAGE : e->offset + at, status);

			at += did;
			since += did;
			status += did;
		}
	}
	scratch_drop();
	if (pages && kernel.view) /* the segment is not ours to keep alive */
		window_reset(kernel.view, VIEW_WINDOW, PROT_NONE, -1, 0);
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
					memset(status + i,
					       kind[i] == PAGE_FORKED ? BUSY
					       : kind[i] == PAGE_FILE ? REFUSED
								      : GONE,
					       j - i);
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
