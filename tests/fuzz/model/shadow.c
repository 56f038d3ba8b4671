/* SPDX-License-Identifier: Apache-2.0 */
/* What every page of the arena must hold. */
#include "model.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

uint8_t patterns[PATTERNS + 1][PAGE]; /* 0: zeros */
int pattern_file;		      /* the same, page by page */

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

void make_patterns(void)
{
	for (uint64_t p = 1; p <= PATTERNS; p++)
		for (uint64_t k = 0; k < WORDS; k++)
			((uint64_t *)patterns[p])[k] = mix(p * 1000003u + k);
	pattern_file = memfd_create("patterns", MFD_CLOEXEC);
	if (write(pattern_file, patterns, sizeof(patterns)) != (ssize_t)sizeof(patterns))
		_exit(2);
}

bool readable(const struct page *s)
{
	return s->flags & MAPPED && !(s->flags & GUARD) && s->prot & (PROT_READ | PROT_WRITE);
}

bool writable(const struct page *s)
{
	return readable(s) && s->prot & PROT_WRITE;
}

void discard_page(struct page *s)
{
	s->pattern = s->base;
	s->poke = WORDS;
	s->flags &= ~LAZY;
}

/* New memory in the range. file_page: which of the file's its first is, where `flags` say that it is of a file. */
void fresh(struct fuzz *f, struct range r, int prot, unsigned flags, size_t file_page)
{
	for (size_t i = r.first; i < r.end; i++) {
		struct page *s = &f->page[i];

		*s = (struct page){.prot = (uint8_t)prot, .flags = (uint8_t)(MAPPED | flags)};
		if (flags & OF_FILE)
			s->base = (uint16_t)(file_page + i - r.first);
		if (f->lock_future)
			s->flags |= LOCKED;
		discard_page(s);
	}
}

void fill(struct fuzz *f, size_t i, unsigned pattern)
{
	struct page *s = &f->page[i];

	memcpy(page_at(f, i), patterns[pattern], PAGE);
	s->pattern = (uint16_t)pattern;
	s->poke = WORDS;
	s->flags &= ~LAZY;
}

void verify_page_as(const struct fuzz *f, const struct page *s, const void *at)
{
	const uint64_t *got = at, *want = (const uint64_t *)patterns[s->pattern];

	if (s->poke == WORDS && !memcmp(at, want, PAGE))
		return;
	if (s->flags & LAZY && !memcmp(at, patterns[0], PAGE))
		return;
	for (size_t k = 0; k < WORDS; k++)
		if (got[k] != (k == s->poke ? s->value : want[k]))
			finding(f, at, "word %zu of page %zu holds %#lx, not %#lx (pattern %u, flags %#x)", k,
				(size_t)(s - f->page), got[k], k == s->poke ? s->value : want[k], s->pattern, s->flags);
}

/* What the shadow says is mapped must be. */
static void verify_mapped(const struct fuzz *f, struct range r)
{
	for (size_t i = r.first, end; i < r.end; i = end) {
		bool mapped = f->page[i].flags & MAPPED;

		for (end = i + 1; end < r.end && !(f->page[end].flags & MAPPED) == !mapped; end++)
			;
		if (mapped && msync(page_at(f, i), (end - i) * PAGE, MS_ASYNC))
			finding(f, page_at(f, i), "not all of %zu pages is mapped", end - i);
	}
}

void verify(const struct fuzz *f, struct range r)
{
	verify_mapped(f, r);
	for (size_t i = r.first; i < r.end; i++)
		if (readable(&f->page[i]))
			verify_page_as(f, &f->page[i], page_at(f, i));
}

size_t first_hole(const struct fuzz *f, struct range r)
{
	while (r.first < r.end && f->page[r.first].flags & MAPPED)
		r.first++;
	return r.first;
}

/* ---- from the shadow ------------------------------------------------------------------------------------ */

static bool same_kind(const struct page *a, const struct page *b)
{
	return a->prot == b->prot && !((a->flags ^ b->flags) & ~LAZY) &&
	       (!(a->flags & OF_FILE) || b->base == a->base + 1);
}

static void must(const struct fuzz *f, bool good, const void *at, const char *what)
{
	if (!good)
		finding(f, at, "%s: errno %d", what, errno);
}

/* Pages [i, end), all of one kind. */
static void rebuild_run(struct fuzz *f, size_t i, size_t end)
{
	const struct page *s = &f->page[i];
	size_t len = (end - i) * PAGE;
	char *at = page_at(f, i);
	int map = s->flags & OF_FILE ? MAP_PRIVATE | MAP_FIXED : MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS;

	must(f,
	     mmap(at, len, PROT_READ | PROT_WRITE, map, s->flags & OF_FILE ? pattern_file : -1,
		  s->flags & OF_FILE ? (off_t)(s->base * PAGE) : 0) == at,
	     at, "mmap to build anew");
	if (f->lock_future)
		must(f, !munlock(at, len), at, "munlock to build anew");
	for (size_t k = i; k < end; k++) {
		struct page *p = &f->page[k];

		if (p->flags & GUARD || (p->pattern == p->base && p->poke == WORDS))
			continue;
		memcpy(page_at(f, k), patterns[p->pattern], PAGE);
		if (p->poke != WORDS)
			((uint64_t *)page_at(f, k))[p->poke] = p->value;
	}
	if (s->flags & GUARD)
		must(f, !madvise(at, len, MADV_GUARD_INSTALL), at, "MADV_GUARD_INSTALL to build anew");
	if (s->prot != (PROT_READ | PROT_WRITE))
		must(f, !mprotect(at, len, s->prot), at, "mprotect to build anew");
	if (s->flags & DONTFORK)
		must(f, !madvise(at, len, MADV_DONTFORK), at, "MADV_DONTFORK to build anew");
	if (s->flags & WIPE)
		must(f, !madvise(at, len, MADV_WIPEONFORK), at, "MADV_WIPEONFORK to build anew");
	if (s->flags & ADVISED)
		madvise(at, len, MADV_MERGEABLE);
	if (s->flags & LOCKED)
		must(f, !mlock(at, len) || errno == ENOMEM, at, "mlock to build anew");
}

/* Makes memory in the range what the shadow says, whatever is there. */
void rebuild(struct fuzz *f, struct range r)
{
	if (r.first == r.end)
		return;
	must(f, !munmap(page_at(f, r.first), (r.end - r.first) * PAGE), page_at(f, r.first), "munmap to build anew");
	for (size_t i = r.first, end; i < r.end; i = end) {
		for (end = i + 1; end < r.end && same_kind(&f->page[end - 1], &f->page[end]); end++)
			;
		if (f->page[i].flags & MAPPED)
			rebuild_run(f, i, end);
	}
	verify(f, r);
}

/* ---- where ---------------------------------------------------------------------------------------------- */

static struct range clip(const struct fuzz *f, size_t first, size_t len)
{
	size_t end = first + len < f->npages ? first + len : f->npages;

	return (struct range){first, end};
}

/* What looks like one mapping around page i, if it is not too long. */
static struct range around(const struct fuzz *f, size_t i)
{
	const struct page *s = &f->page[i];
	size_t first = i, end = i + 1, most = f->mode->max_len;

	while (first > 0 && i - first < most && f->page[first - 1].prot == s->prot &&
	       !((f->page[first - 1].flags ^ s->flags) & ~LAZY))
		first--;
	while (end < f->npages && end - i < most && f->page[end].prot == s->prot &&
	       !((f->page[end].flags ^ s->flags) & ~LAZY))
		end++;
	return (struct range){first, end};
}

static struct range draw_range(struct fuzz *f)
{
	size_t i = draw(f) % f->npages, len;
	struct range r;

	switch (draw(f) % 8) {
	case 0 ... 2:
		len = 1 + draw(f) % 4;
		return clip(f, i, len);
	case 3 ... 4:
		len = 1 + draw(f) % f->mode->max_len;
		return clip(f, i, len);
	case 5 ... 6:
		return around(f, i);
	default:
		r = around(f, i);
		i = draw(f) % 3;
		r.first -= r.first < i ? r.first : i;
		len = r.end - r.first + draw(f) % 3;
		return clip(f, r.first, len);
	}
}

struct range pick(struct fuzz *f)
{
	f->picked = draw_range(f);
	return f->picked;
}
