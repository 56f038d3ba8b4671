/* SPDX-License-Identifier: Apache-2.0 */
/* Calls that map, unmap, protect, lock and advise pages of the arena, and what the kernel makes of them (6.18). */
#include "model.h"

#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct range with_neighbours(const struct fuzz *f, struct range r)
{
	r.first -= r.first > 0;
	r.end += r.end < f->npages;
	return r;
}

/* An address and a length that mean the range; not always aligned. */
static char *start_of(const struct fuzz *f, struct range r)
{
	return page_at(f, r.first);
}

static size_t length_of(struct fuzz *f, struct range r)
{
	return (r.end - r.first) * PAGE - (chance(f, 20) ? draw(f) % PAGE : 0);
}

static int draw_prot(struct fuzz *f)
{
	static const int prots[] = {PROT_READ | PROT_WRITE,	    PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE,
				    PROT_READ | PROT_WRITE,	    PROT_READ,		    PROT_NONE,
				    PROT_READ | PROT_EXEC, PROT_WRITE};

	return prots[draw(f) % 8];
}

/* ---- mmap and munmap ------------------------------------------------------------------------------------ */

void op_map(struct fuzz *f)
{
	struct range r = pick(f);
	size_t len = length_of(f, r), file_page = draw(f) % (PATTERNS + 1);
	int prot = draw_prot(f), flags = MAP_PRIVATE, fd = -1;
	bool of_file = chance(f, 8) && file_page + r.end - r.first <= PATTERNS + 1, locked = chance(f, 3);
	unsigned way = draw(f) % 10;
	off_t offset = of_file ? (off_t)(file_page * PAGE) : 0;
	uint32_t got;
	void *p;

	flags |= way < 6 ? MAP_FIXED : way < 8 ? MAP_FIXED_NOREPLACE : 0;
	flags |= locked ? MAP_LOCKED : chance(f, 5) ? MAP_POPULATE : chance(f, 5) ? MAP_NORESERVE : 0;
	if (of_file)
		fd = pattern_file;
	else
		flags |= MAP_ANONYMOUS | (chance(f, 3) ? MAP_STACK : 0);
	if (f->stealthy && chance(f, 30))
		p = (void *)syscall(SYS_mmap, start_of(f, r), len, prot, flags, fd, offset);
	else
		p = mmap(start_of(f, r), len, prot, flags, fd, offset);
	got = p == MAP_FAILED ? (uint32_t)errno : p == start_of(f, r) ? 0 : 1U << 16;
	if (p != MAP_FAILED && p != start_of(f, r))
		munmap(p, len);
	expect(f, got, false);
	if (got)
		return;
	if (way >= 6)
		for (size_t i = r.first; i < r.end; i++)
			if (f->page[i].flags & MAPPED)
				finding(f, page_at(f, i), "mmap took a place that was taken");
	fresh(f, r, prot, (of_file ? OF_FILE : 0) | (locked ? LOCKED : 0), file_page);
	verify(f, with_neighbours(f, r));
}

void op_unmap(struct fuzz *f)
{
	struct range r = pick(f);
	bool odd = chance(f, 2);
	char *at = start_of(f, r) + odd;
	size_t len = length_of(f, r);
	int ret = f->stealthy && chance(f, 30) ? (int)syscall(SYS_munmap, at, len) : munmap(at, len);

	expect(f, ret ? (uint32_t)errno : 0, false);
	if (!ret)
		memset(&f->page[r.first], 0, (r.end - r.first) * sizeof(*f->page));
	verify(f, with_neighbours(f, r));
}

/* ---- mprotect and mlock --------------------------------------------------------------------------------- */

void op_protect(struct fuzz *f)
{
	struct range r = pick(f);
	int prot = draw_prot(f), ret;
	size_t len = length_of(f, r), hole = first_hole(f, r);

	if (f->stealthy && chance(f, 30))
		ret = (int)syscall(SYS_mprotect, start_of(f, r), len, prot);
	else if (chance(f, 10))
		ret = pkey_mprotect(start_of(f, r), len, prot, -1);
	else
		ret = mprotect(start_of(f, r), len, prot);
	expect(f, ret ? (uint32_t)errno : 0, false);
	if (!ret && hole < r.end)
		finding(f, page_at(f, hole), "mprotect of nothing");
	if (ret && errno != ENOMEM)
		return;
	for (size_t i = r.first; i < hole; i++)
		f->page[i].prot = (uint8_t)prot;
	verify(f, with_neighbours(f, r));
}

void op_lock(struct fuzz *f)
{
	struct range r = pick(f);
	size_t len = length_of(f, r), hole = first_hole(f, r);
	unsigned way = draw(f) % 8;
	bool locks = way < 3 || (way < 4 && f->stealthy);
	int ret;

	if (way < 2)
		ret = mlock(start_of(f, r), len);
	else if (way < 3)
		ret = mlock2(start_of(f, r), len, MLOCK_ONFAULT);
	else if (way < 4 && f->stealthy)
		ret = (int)syscall(SYS_mlock, start_of(f, r), len);
	else
		ret = munlock(start_of(f, r), len);
	expect(f, ret ? (uint32_t)errno : 0, false);
	if (!ret && hole < r.end)
		finding(f, page_at(f, hole), "mlock of nothing");
	if (ret && errno != ENOMEM)
		return;
	for (size_t i = r.first; i < hole; i++) {
		/* Of several mappings it may fail half-way without a reason (6.18): again, so that it is known how far. */
		if (ret && locks)
			mlock(page_at(f, i), PAGE);
		else if (ret)
			munlock(page_at(f, i), PAGE);
		f->page[i].flags = (uint8_t)(locks ? f->page[i].flags | LOCKED : f->page[i].flags & ~LOCKED);
	}
	verify(f, with_neighbours(f, r));
}

/* ---- madvise -------------------------------------------------------------------------------------------- */

struct advice {
	int advice;
	unsigned stops; /* EINVAL at the first page with one of these flags; what is before it took the advice */
	unsigned set, clear;
	bool discards, vague; /* vague: what it returns says nothing */
};

static const struct advice advices[] = {
	{.advice = MADV_NORMAL},
	{.advice = MADV_RANDOM},
	{.advice = MADV_SEQUENTIAL},
	{.advice = MADV_WILLNEED},
	{.advice = MADV_REMOVE},
	{.advice = MADV_DONTFORK, .set = DONTFORK},
	{.advice = MADV_DOFORK, .clear = DONTFORK},
	{.advice = MADV_DOFORK, .clear = DONTFORK},
	{.advice = MADV_MERGEABLE, .set = ADVISED},
	{.advice = MADV_MERGEABLE, .set = ADVISED},
	{.advice = MADV_MERGEABLE, .set = ADVISED},
	{.advice = MADV_MERGEABLE, .set = ADVISED},
	{.advice = MADV_MERGEABLE, .set = ADVISED},
	{.advice = MADV_MERGEABLE, .set = ADVISED},
	{.advice = MADV_UNMERGEABLE, .clear = ADVISED},
	{.advice = MADV_UNMERGEABLE, .clear = ADVISED},
	{.advice = MADV_HUGEPAGE},
	{.advice = MADV_NOHUGEPAGE},
	{.advice = MADV_DONTDUMP},
	{.advice = MADV_DODUMP},
	{.advice = MADV_WIPEONFORK, .stops = OF_FILE, .set = WIPE},
	{.advice = MADV_KEEPONFORK, .clear = WIPE},
	{.advice = MADV_KEEPONFORK, .clear = WIPE},
	{.advice = MADV_COLD},
	{.advice = MADV_PAGEOUT},
	{.advice = MADV_POPULATE_READ},
	{.advice = MADV_POPULATE_WRITE},
	{.advice = MADV_COLLAPSE, .vague = true},
	{.advice = 77},
	/* Those that discard, from here on. */
	{.advice = MADV_DONTNEED, .stops = LOCKED, .discards = true},
	{.advice = MADV_DONTNEED, .stops = LOCKED, .discards = true},
	{.advice = MADV_DONTNEED, .stops = LOCKED, .discards = true},
	{.advice = MADV_FREE, .stops = LOCKED | OF_FILE, .set = LAZY},
	{.advice = MADV_FREE, .stops = LOCKED | OF_FILE, .set = LAZY},
	{.advice = MADV_DONTNEED_LOCKED, .discards = true},
	{.advice = MADV_GUARD_INSTALL, .stops = LOCKED, .set = GUARD, .discards = true},
	{.advice = MADV_GUARD_REMOVE, .clear = GUARD},
	{.advice = MADV_GUARD_REMOVE, .clear = GUARD},
};
#define FIRST_DISCARDING 29

static bool any_flag(const struct fuzz *f, struct range r, unsigned flags)
{
	for (size_t i = r.first; i < r.end; i++)
		if (f->page[i].flags & flags)
			return true;
	return false;
}

static void take_advice(struct fuzz *f, struct range r, const struct advice *a)
{
	for (size_t i = r.first; i < r.end; i++) {
		struct page *s = &f->page[i];

		if (!(s->flags & MAPPED))
			continue;
		if (a->discards)
			discard_page(s);
		if (a->set != LAZY || (!(s->flags & GUARD) && (s->pattern || s->poke != WORDS)))
			s->flags |= (uint8_t)a->set;
		s->flags &= (uint8_t)~a->clear;
	}
}

void op_advise(struct fuzz *f, bool discarding)
{
	const size_t n = sizeof(advices) / sizeof(advices[0]);
	const struct advice *a = discarding ? &advices[FIRST_DISCARDING + draw(f) % (n - FIRST_DISCARDING)]
					    : &advices[draw(f) % FIRST_DISCARDING];
	struct range r = pick(f);
	size_t len = length_of(f, r), stop = r.first;
	char *at = start_of(f, r) + chance(f, 1);
	int ret, err;

	if (a->advice == MADV_GUARD_INSTALL && any_flag(f, r, OF_FILE)) /* 6.15 learned it for files */
		return;
	if (f->stealthy && chance(f, 20))
		ret = (int)syscall(SYS_madvise, at, len, a->advice);
	else
		ret = madvise(at, len, a->advice);
	err = ret ? errno : 0;
	if (!a->vague)
		expect(f, (uint32_t)err | (uint32_t)a->advice << 16, false);
	while (stop < r.end && !(f->page[stop].flags & a->stops))
		stop++;
	if (!err && (first_hole(f, r) < r.end || stop < r.end) && !a->vague)
		finding(f, at, "madvise %d of what it should refuse", a->advice);
	if (!err || err == ENOMEM)
		take_advice(f, r, a);
	else if (err == EINVAL && at == start_of(f, r) && stop < r.end)
		take_advice(f, (struct range){r.first, stop}, a);
	verify(f, with_neighbours(f, r));
}

/* ---- for all of the process ----------------------------------------------------------------------------- */

static void mark_all(struct fuzz *f, bool locked)
{
	for (size_t i = 0; i < f->npages; i++)
		if (f->page[i].flags & MAPPED)
			f->page[i].flags = (uint8_t)(locked ? f->page[i].flags | LOCKED : f->page[i].flags & ~LOCKED);
}

void op_process(struct fuzz *f)
{
	static const int flags[] = {MCL_CURRENT, MCL_CURRENT | MCL_FUTURE, MCL_FUTURE, MCL_CURRENT | MCL_ONFAULT};
	unsigned way = draw(f) % 8;
	int ret;

	if (f->shared)
		return;
	if (way < 3) {
		ret = prctl(PR_SET_MEMORY_MERGE, way < 2, 0, 0, 0);
	} else if (way < 4) {
		int how = flags[draw(f) % 4];

		ret = mlockall(how);
		if (!ret)
			f->lock_future = how & MCL_FUTURE;
		if (!ret && how & MCL_CURRENT)
			mark_all(f, true);
	} else {
		ret = munlockall();
		f->lock_future = false;
		mark_all(f, false);
	}
	expect(f, ret ? (uint32_t)errno : 0, false);
}

/* ---- contents ------------------------------------------------------------------------------------------- */

void op_fill(struct fuzz *f)
{
	struct range r = pick(f);
	size_t first = draw(f) % PATTERNS, step = draw(f) % 3;
	bool by_kernel = chance(f, 25);

	for (size_t i = r.first; i < r.end; i++) {
		unsigned pattern = 1 + (unsigned)((first + (i - r.first) * step / 2) % PATTERNS);
		struct page *s = &f->page[i];

		if (!writable(s))
			continue;
		if (by_kernel &&
		    pread(pattern_file, page_at(f, i), PAGE, (off_t)(pattern * PAGE)) != (ssize_t)PAGE)
			finding(f, page_at(f, i), "read into a page: errno %d", errno);
		fill(f, i, pattern);
	}
	verify(f, with_neighbours(f, r));
}

void op_poke(struct fuzz *f)
{
	size_t i = draw(f) % f->npages, k = draw(f) % WORDS;
	struct page *s = &f->page[i];

	if (!writable(s))
		return;
	if (s->flags & LAZY) /* which of the two it is would have to be known */
		fill(f, i, 1 + draw(f) % PATTERNS);
	if (s->poke != WORDS)
		k = s->poke;
	s->poke = (uint16_t)k;
	s->value = chance(f, 30) ? ((uint64_t *)patterns[s->pattern])[k] : draw(f);
	((uint64_t *)page_at(f, i))[k] = s->value;
	verify(f, (struct range){i, i + 1});
}

void op_probe(struct fuzz *f)
{
	size_t i = draw(f) % f->npages, k = draw(f) % PAGE;
	const struct page *s = &f->page[i];
	bool write = chance(f, 40), by_kernel = chance(f, 50), want = write ? writable(s) : readable(s);

	if (can_access(page_at(f, i) + k, write, by_kernel) != want)
		finding(f, page_at(f, i), "%s %s", write ? "writing" : "reading", want ? "fails" : "succeeds");
}
