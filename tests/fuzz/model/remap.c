/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mremap. Its results may differ: whether a range is one mapping depends on more than an application can know, and
 * merging makes more mappings. So where it fails, or does what it did not do elsewhere, the outcome of elsewhere is built
 * from the shadow, and the sequence goes on from there. What it says is done must be done, to the last byte.
 */
#include "model.h"

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#define OTHER_PLACE (1U << 16) /* in what is noted: success, and not where it was */

struct move {
	struct range from, to; /* `to`: where it is to be at the end, if it is to move */
	size_t new_len;	       /* pages */
	int flags;
	struct page *result; /* of new_len pages */
};

static bool overlap(struct range a, struct range b)
{
	return a.first < b.end && b.first < a.end;
}

/* What the pages are if it succeeds. */
static void work_out(struct fuzz *f, struct move *m)
{
	size_t old_len = m->from.end - m->from.first;
	const struct page *last = &f->page[m->from.end - 1];

	for (size_t i = 0; i < m->new_len; i++) {
		if (i < old_len) {
			m->result[i] = f->page[m->from.first + i];
			continue;
		}
		m->result[i] = (struct page){.prot = last->prot, .flags = last->flags & ~(LAZY | GUARD)};
		discard_page(&m->result[i]);
	}
}

static void check(const struct fuzz *f, const struct move *m, const char *at)
{
	for (size_t i = 0; i < m->new_len; i++)
		if (readable(&m->result[i]))
			verify_page_as(f, &m->result[i], at + i * PAGE);
}

/* Notes in the shadow that it succeeded. */
static void apply(struct fuzz *f, const struct move *m, bool moved)
{
	size_t old_len = m->from.end - m->from.first, keep = old_len < m->new_len ? old_len : m->new_len;
	size_t to = moved ? m->to.first : m->from.first;

	for (size_t i = moved ? 0 : keep; i < old_len; i++) {
		struct page *s = &f->page[m->from.first + i];

		if (!(m->flags & MREMAP_DONTUNMAP) || !(s->flags & MAPPED)) {
			*s = (struct page){0};
			continue;
		}
		discard_page(s);
		s->flags &= ~(LOCKED | GUARD);
	}
	for (size_t i = 0; i < m->new_len; i++) /* a gap between mappings that move leaves alone what is there */
		if (m->result[i].flags & MAPPED)
			f->page[to + i] = m->result[i];
}

/* MREMAP_DONTUNMAP unlocks all of the mapping that the range is a part of (6.18), and the shadow knows no mappings. */
static void unlock_around(struct fuzz *f, struct range r)
{
	while (r.first > 0 && f->page[r.first - 1].flags & MAPPED)
		r.first--;
	while (r.end < f->npages && f->page[r.end].flags & MAPPED)
		r.end++;
	for (size_t i = r.first; i < r.end; i++)
		f->page[i].flags &= ~LOCKED;
	/* Of several mappings it may fail half-way without a reason (6.18). */
	if (munlock(page_at(f, r.first), (r.end - r.first) * PAGE))
		for (size_t i = r.first; i < r.end; i++)
			munlock(page_at(f, i), PAGE);
}

/* A range somewhere else in the arena. */
static struct range place(struct fuzz *f, size_t len)
{
	size_t first = draw(f) % (f->npages - len + 1);

	return (struct range){first, first + len};
}

static bool draw_move(struct fuzz *f, struct move *m)
{
	static const int flags[] = {0, MREMAP_MAYMOVE, MREMAP_MAYMOVE, MREMAP_MAYMOVE | MREMAP_FIXED,
				    MREMAP_MAYMOVE | MREMAP_FIXED, MREMAP_MAYMOVE | MREMAP_FIXED,
				    MREMAP_MAYMOVE | MREMAP_DONTUNMAP, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP};
	size_t len;
	bool of_file = false;

	m->from = pick(f);
	len = m->from.end - m->from.first;
	m->flags = chance(f, 2) ? (int)(draw(f) % 16) : flags[draw(f) % 8];
	m->new_len = len;
	for (size_t i = m->from.first; i < m->from.end; i++)
		of_file |= f->page[i].flags & OF_FILE;
	if (!(m->flags & MREMAP_DONTUNMAP) || chance(f, 5)) {
		unsigned way = draw(f) % 10;

		if (way < 3 && !of_file)
			m->new_len += 1 + draw(f) % f->mode->max_len;
		else if (way < 6)
			m->new_len = 1 + draw(f) % len;
	}
	if (m->new_len > f->npages / 4 || (m->new_len > len && m->from.first + m->new_len > f->npages))
		return false;
	m->to = place(f, m->new_len);
	return !overlap(m->to, m->from) || (m->flags & MREMAP_FIXED && chance(f, 10));
}

static void *call(struct fuzz *f, const struct move *m)
{
	char *from = page_at(f, m->from.first), *to = page_at(f, m->to.first);
	size_t old = (m->from.end - m->from.first) * PAGE, new = m->new_len * PAGE;

	if (f->stealthy && chance(f, 30))
		return (void *)syscall(SYS_mremap, from, old, new, m->flags, to);
	return mremap(from, old, new, m->flags, to);
}

/* The kernel chose a place outside of the arena. Brings it to where it is to be. */
static void bring_home(struct fuzz *f, const struct move *m, void *at)
{
	char *to = page_at(f, m->to.first);
	size_t len = m->new_len * PAGE;

	if (mremap(at, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to)
		return;
	munmap(at, len);
	rebuild(f, m->to);
}

static void set_right(struct fuzz *f, const struct move *m)
{
	size_t end = m->from.first + m->new_len > m->from.end ? m->from.first + m->new_len : m->from.end;

	rebuild(f, (struct range){m->from.first, end});
	rebuild(f, m->to);
}

void op_remap(struct fuzz *f)
{
	static struct page results[ARENA_PAGES];
	struct move m = {.result = results + (f->page - all_pages)};
	uint32_t got, want;
	bool ok, inside;
	char *p;

	if (!draw_move(f, &m))
		return;
	work_out(f, &m);
	p = call(f, &m);
	ok = p != MAP_FAILED;
	inside = ok && p >= f->arena && p < page_at(f, f->npages);
	got = !ok ? (uint32_t)errno : p == page_at(f, m.from.first) ? 0 : OTHER_PLACE;
	if (ok && m.new_len > m.from.end - m.from.first && first_hole(f, m.from) < m.from.end)
		finding(f, p, "mremap made more of nothing");
	if (ok)
		check(f, &m, p);
	want = expect(f, got, true);
	if (want != got)
		__atomic_fetch_add(ok ? &laxer : &stricter, 1, __ATOMIC_RELAXED);
	if (want == 0 || want == OTHER_PLACE)
		apply(f, &m, want == OTHER_PLACE);
	if (ok && !inside && got == want) {
		bring_home(f, &m, p);
	} else if (want != got || (!ok && got != EINVAL)) {
		if (ok && !inside)
			munmap(p, m.new_len * PAGE);
		set_right(f, &m);
	}
	if (m.flags & MREMAP_DONTUNMAP) /* whatever became of it, here or there */
		unlock_around(f, m.from);
	verify(f, m.from);
	verify(f, m.to);
}
