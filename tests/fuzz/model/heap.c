/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The malloc family. A block holds a pattern in each of its pages, counted from its start, so that blocks have pages in
 * common; and its own number in its first and last eight bytes, so that two that overlap are noticed.
 */
#include "model.h"

#include <dlfcn.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#define SIZE_LEAST (64UL << 10) /* of what samepage may take for large */

static const uint8_t *pattern_of(const struct block *b, size_t page)
{
	return patterns[1 + (b->pattern + page / 2) % PATTERNS];
}

/* Calls fn for each part of the first `limit` bytes that is written: offset, length. */
typedef void part_fn(const struct fuzz *f, const struct block *b, char *p, size_t at, size_t len);

static void each_part(const struct fuzz *f, const struct block *b, char *p, size_t limit, part_fn *fn)
{
	size_t n = (limit + PAGE - 1) / PAGE;

	for (size_t i = 0; i < n; i++) {
		size_t at = i * PAGE, len = limit - at < PAGE ? limit - at : PAGE;

		if (!b->sparse || i == 0 || i == (b->size - 1) / PAGE || i == b->size / PAGE / 2)
			fn(f, b, p, at, len);
	}
}

static void write_part(const struct fuzz *f, const struct block *b, char *p, size_t at, size_t len)
{
	(void)f;
	memcpy(p + at, pattern_of(b, at / PAGE), len);
}

static void write_block(struct fuzz *f, struct block *b)
{
	b->id = f->next_id++ | (f->seed << 40) | 1UL << 63;
	each_part(f, b, b->p, b->size, write_part);
	if (b->size >= 16) {
		memcpy(b->p, &b->id, 8);
		memcpy(b->p + b->size - 8, &b->id, 8);
	}
}

static void verify_part(const struct fuzz *f, const struct block *b, char *p, size_t at, size_t len)
{
	const uint8_t *want = pattern_of(b, at / PAGE);
	size_t first = at || b->size < 16 ? 0 : 8, end = len;

	/* The block's number at its end may begin in the page before the last. */
	if (b->size >= 16 && at + len > b->size - 8)
		end = b->size - 8 > at ? b->size - 8 - at : 0;
	if (end <= first || !memcmp(p + at + first, want + first, end - first))
		return;
	for (size_t k = first; k < end; k++)
		if ((uint8_t)p[at + k] != want[k])
			finding(f, p + at + k, "byte %#zx of the block at %p of %#zx bytes is %#x, not %#x", at + k,
				(void *)p, b->size, (uint8_t)p[at + k], want[k]);
}

/* What the first `limit` bytes of a block hold that may be at `p` now. */
static void verify_block_at(const struct fuzz *f, const struct block *b, char *p, size_t limit)
{
	if (limit > b->size)
		limit = b->size;
	each_part(f, b, p, limit, verify_part);
	if (limit < 16)
		return;
	if (memcmp(p, &b->id, 8))
		finding(f, p, "the block of %#zx bytes does not begin with its number", b->size);
	if (limit == b->size && memcmp(p + b->size - 8, &b->id, 8))
		finding(f, p + b->size - 8, "the block of %#zx bytes does not end with its number", b->size);
}

void verify_heap(const struct fuzz *f)
{
	for (size_t i = 0; i < f->nblocks; i++)
		if (f->block[i].p)
			verify_block_at(f, &f->block[i], f->block[i].p, f->block[i].size);
}

static void verify_zero_part(const struct fuzz *f, const struct block *b, char *p, size_t at, size_t len)
{
	if (memcmp(p + at, patterns[0], len))
		finding(f, p + at, "calloc of %#zx bytes has more than zeros in page %zu", b->size, at / PAGE);
}

static size_t draw_size(struct fuzz *f)
{
	const struct mode *m = f->mode;
	size_t size;

	switch (draw(f) % 8) {
	case 0 ... 1:
		size = draw(f) % 2048;
		break;
	case 2 ... 3: /* just about what is large */
		size = SIZE_LEAST - 2 * PAGE + draw(f) % (4 * PAGE);
		break;
	case 4:
		size = draw(f) % (m->max_block / PAGE) * PAGE;
		break;
	case 5: /* sizes that come again */
		size = SIZE_LEAST << draw(f) % 4;
		break;
	default:
		size = draw(f) % m->max_block;
		break;
	}
	if (m->crowded && size > 3 * SIZE_LEAST / 2)
		size = SIZE_LEAST + draw(f) % (8 * PAGE);
	return size < m->max_block ? size : m->max_block;
}

/* A block that there is, or NULL. */
static struct block *draw_block(struct fuzz *f)
{
	size_t at = draw(f) % f->nblocks;

	for (size_t i = 0; i < 64 && i < f->nblocks; i++, at = (at + 1) % f->nblocks)
		if (f->block[at].p)
			return &f->block[at];
	return NULL;
}

static void forget(struct fuzz *f, struct block *b)
{
	f->bytes -= b->size;
	f->live--;
	*b = (struct block){0};
}

static void take_in(struct fuzz *f, struct block *b, char *p, size_t size)
{
	*b = (struct block){.p = p, .size = size};
	b->pattern = (uint16_t)(draw(f) % 3);
	b->sparse = f->mode->crowded || size > (8UL << 20);
	f->bytes += size;
	f->live++;
}

static void check_usable(struct fuzz *f, struct block *b)
{
	size_t usable = malloc_usable_size(b->p);

	if (usable < b->size)
		finding(f, b->p, "%#zx bytes of the block can be used, but it is of %#zx", usable, b->size);
	if (usable > b->size)
		*(volatile char *)(b->p + usable - 1) = 1;
}

static void *allocate(struct fuzz *f, size_t size, size_t *align, bool *zeroed)
{
	void *p = NULL;
	int err;

	*align = 16;
	switch (draw(f) % 12) {
	case 0 ... 4:
		return malloc(size);
	case 5 ... 6:
		*zeroed = true;
		return chance(f, 50) ? calloc(1, size) : calloc((size + 15) / 16, 16);
	case 7:
		*align = 8UL << draw(f) % 15; /* up to 128 KiB */
		return aligned_alloc(*align, size);
	case 8:
		*align = 8UL << draw(f) % 19; /* up to 2 MiB */
		err = posix_memalign(&p, *align, size);
		errno = err;
		return err ? NULL : p;
	case 9:
		*align = 8UL << draw(f) % 12;
		return memalign(*align, size);
	case 10:
		*align = PAGE;
		return chance(f, 50) ? valloc(size) : pvalloc(size);
	default:
		return realloc(NULL, size);
	}
}

/* What must be refused: more than there is, or a size that overflows. */
static void ask_too_much(struct fuzz *f)
{
	struct block *b = draw_block(f);
	volatile size_t huge = PTRDIFF_MAX - draw(f) % (8 * PAGE);
	void *p;

	errno = 0;
	switch (draw(f) % 5) {
	case 0:
		p = malloc(huge);
		break;
	case 1:
		p = calloc(huge, 16);
		break;
	case 2:
		p = aligned_alloc(1UL << 21, huge);
		break;
	case 3:
		p = b ? realloc(b->p, huge) : NULL;
		break;
	default:
		p = b ? reallocarray(b->p, huge, huge) : NULL;
		break;
	}
	if (p)
		finding(f, p, "%#zx bytes were to be had", huge);
	expect(f, (uint32_t)errno, false);
	if (b)
		verify_block_at(f, b, b->p, b->size);
}

void op_allocate(struct fuzz *f)
{
	size_t size = draw_size(f), align, at = draw(f) % f->nblocks;
	bool zeroed = false;
	struct block *b = &f->block[at];
	void *p;

	if (chance(f, 2)) {
		ask_too_much(f);
		return;
	}
	if (b->p || f->bytes + size > f->mode->max_bytes) {
		op_free(f);
		return;
	}
	errno = 0;
	p = allocate(f, size, &align, &zeroed);
	expect(f, p ? 0 : (uint32_t)errno, false);
	if (!p)
		return;
	if ((uintptr_t)p % align)
		finding(f, p, "not at a multiple of %#zx", align);
	take_in(f, b, p, size);
	if (zeroed)
		each_part(f, b, b->p, b->size, verify_zero_part);
	check_usable(f, b);
	write_block(f, b);
}

/* Whole pages inside the block, behind the one it begins in. False: there are none. */
static bool inside(const struct block *b, char **start, size_t *len)
{
	uintptr_t first = ((uintptr_t)b->p + PAGE) & ~(PAGE - 1), end = ((uintptr_t)b->p + b->size) & ~(PAGE - 1);

	*start = (char *)first;
	*len = end > first ? end - first : 0;
	return b->size >= 4 * SIZE_LEAST && end > first;
}

/* What its next owner must not meet. */
static void soil(struct fuzz *f, const struct block *b)
{
	char *start;
	size_t len;

	if (!inside(b, &start, &len))
		return;
	switch (draw(f) % 6) {
	case 0:
		mlock(start, len);
		break;
	case 1:
		mprotect(start, len, PROT_READ);
		break;
	case 2:
		madvise(start, len, MADV_DONTFORK);
		break;
	case 3:
		madvise(start, len, MADV_WIPEONFORK);
		break;
	case 4:
		madvise(start, len, MADV_HUGEPAGE);
		break;
	default:
		mprotect(start, len, PROT_NONE);
		break;
	}
}

void op_free(struct fuzz *f)
{
	struct block *b = draw_block(f);

	if (!b)
		return;
	verify_block_at(f, b, b->p, b->size);
	if (chance(f, 5))
		soil(f, b);
	errno = 77;
	free(b->p);
	if (errno != 77)
		finding(f, b->p, "free changed errno to %d", errno);
	forget(f, b);
}

void op_resize(struct fuzz *f)
{
	size_t size = draw_size(f);
	struct block *b = draw_block(f), old;
	char *p;

	if (!b || !size || f->bytes - b->size + size > f->mode->max_bytes)
		return;
	if (chance(f, 30)) /* as a vector grows */
		size = b->size + b->size / 2 < f->mode->max_block ? b->size + b->size / 2 + 1 : size;
	errno = 0;
	p = chance(f, 20) ? reallocarray(b->p, size, 1) : realloc(b->p, size);
	expect(f, p ? 0 : (uint32_t)errno, false);
	if (!p) {
		verify_block_at(f, b, b->p, b->size);
		return;
	}
	verify_block_at(f, b, p, size);
	old = *b;
	forget(f, b);
	take_in(f, b, p, size);
	b->pattern = old.pattern;
	check_usable(f, b);
	write_block(f, b);
}

void op_rewrite(struct fuzz *f)
{
	struct block *b = draw_block(f);

	if (!b)
		return;
	verify_block_at(f, b, b->p, b->size);
	b->pattern = (uint16_t)(draw(f) % 3);
	write_block(f, b);
	verify_block_at(f, b, b->p, b->size);
}

static int register_memory(void *at, size_t len)
{
	static int (*fn)(void *, size_t);
	static bool looked;

	if (!looked)
		*(void **)&fn = dlsym(RTLD_DEFAULT, "samepage_register");
	looked = true;
	errno = fn ? -fn(at, len) : 0;
	return errno ? -1 : 0;
}

void op_heap_advise(struct fuzz *f)
{
	struct block *b = draw_block(f);
	char *start;
	size_t len;
	int ret = 0;

	if (!b || !inside(b, &start, &len))
		return;
	switch (draw(f) % 8) {
	case 0:
		ret = madvise(start, len, MADV_MERGEABLE);
		break;
	case 1:
		ret = madvise(start, len, MADV_UNMERGEABLE);
		break;
	case 2:
		ret = register_memory(start, len);
		break;
	case 3: /* it reads as zeros; unless it was there when all was locked, which is the allocator's affair */
		if (!madvise(start, len, MADV_DONTNEED))
			for (size_t i = 0; i < len; i += PAGE)
				if (memcmp(start + i, patterns[0], PAGE))
					finding(f, start + i, "a page of a block is not discarded");
		write_block(f, b);
		break;
	case 4:
		madvise(start, len, MADV_FREE);
		write_block(f, b);
		break;
	case 5:
		ret = mprotect(start, len, PROT_READ);
		verify_block_at(f, b, b->p, b->size);
		ret |= mprotect(start, len, PROT_READ | PROT_WRITE);
		break;
	case 6:
		ret = mlock(start, len);
		verify_block_at(f, b, b->p, b->size);
		ret |= munlock(start, len);
		break;
	default:
		ret = madvise(start, len, chance(f, 50) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
		break;
	}
	expect(f, ret ? (uint32_t)errno : 0, false);
	verify_block_at(f, b, b->p, b->size);
}

void op_trim(struct fuzz *f)
{
	struct block *b = draw_block(f);

	malloc_trim(draw(f) % 3 * PAGE);
	if (b)
		verify_block_at(f, b, b->p, b->size);
}
