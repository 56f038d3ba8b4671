/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model fuzzer for the malloc family and the calls that map memory: random calls, and a shadow that says what every
 * page and every block must hold afterwards. It knows nothing of samepage; it is run without it (and writes down what
 * each call returned), then with it, where each call must return the same.
 *
 *   main.c     modes, the choice of calls, forks, the command line
 *   shadow.c   what pages must hold: fill, verify, and build anew from the shadow
 *   pages.c    mmap, munmap, mprotect, mlock, madvise, prctl
 *   remap.c    mremap
 *   heap.c     the malloc family
 *
 * Pages are those of an arena at a fixed address, so that a sequence of calls means the same in every process. What a
 * step does depends on the seed, the number of the step and the state it finds, and on nothing else.
 */
#ifndef FUZZ_MODEL_H
#define FUZZ_MODEL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define PATTERNS 24
#define ARENA 0x7e9000000000UL /* far from where the kernel puts things, and where sanitizers expect memory */
#define ARENA_PAGES (1UL << 16)
#define BLOCKS (1UL << 14)

enum page_flags {
	MAPPED = 1 << 0,
	OF_FILE = 1 << 1, /* a private mapping of the file of patterns */
	LOCKED = 1 << 2,
	DONTFORK = 1 << 3,
	WIPE = 1 << 4,
	GUARD = 1 << 5,
	LAZY = 1 << 6, /* freed by MADV_FREE: what it held, or zeros */
	ADVISED = 1 << 7,
};

struct page {
	uint64_t value;	  /* of the one word that differs from the pattern */
	uint16_t pattern; /* 0: zeros */
	uint16_t poke;	  /* that word, or WORDS: none */
	uint16_t base;	  /* the pattern that a discard brings back: the file's, or 0 */
	uint8_t prot, flags;
};

struct block {
	char *p;
	size_t size;
	uint64_t id;
	uint16_t pattern;
	bool sparse; /* written in a few of its pages only */
};

enum op {
	FILL, POKE, VERIFY, PROBE, MAP, UNMAP, PROTECT, ADVISE, DISCARD, LOCK, REMAP, FORK, NAP, PROCESS, /* pages */
	ALLOCATE, FREE, RESIZE, REWRITE, HEAP_ADVISE, TRIM,					       /* blocks */
	NR_OPS
};

struct mode {
	const char *name;
	size_t npages, max_len;			/* pages */
	size_t nblocks, max_block, max_bytes;	/* of the heap: blocks, and bytes of one and of all */
	unsigned threads, verify_every;
	bool crowded;			/* begins with a mapping and a block in every place there is */
	uint8_t weight[NR_OPS];
};

struct range {
	size_t first, end; /* pages of the arena */
};

/* One sequence of calls: all there is, or one thread's share. */
struct fuzz {
	const struct mode *mode;
	uint64_t seed, step, draws;
	enum op op;
	const char *doing;
	struct range picked; /* last */
	char *arena;
	size_t npages;
	struct page *page;
	struct block *block;
	size_t nblocks, bytes, live;
	uint64_t next_id;
	bool lock_future;
	bool shared;   /* other threads are at it, too: nothing that is for all of the process */
	bool child;
	bool comparing; /* with what the same calls returned elsewhere */
	bool recording;
	bool lenient;	/* mremap may return something else than there */
	bool stealthy;	/* some calls by way of syscall(2) */
	size_t nlog, loglen;
	uint32_t *log;
	unsigned children, forks;
	char *log_path;
};

extern const char *const op_names[NR_OPS];
extern struct page all_pages[ARENA_PAGES]; /* of all threads */
extern int pattern_file;
extern uint8_t patterns[PATTERNS + 1][PAGE];
extern _Atomic unsigned long counts[NR_OPS], stricter, laxer;
extern bool naps;

uint64_t draw(struct fuzz *f);
static inline bool chance(struct fuzz *f, unsigned percent)
{
	return draw(f) % 100 < percent;
}
void finding(const struct fuzz *f, const void *at, const char *what, ...) __attribute__((noreturn, format(printf, 3, 4)));
/* Notes what a call returned (0 or errno, and what else counts), or compares it. What it returned elsewhere. */
uint32_t expect(struct fuzz *f, uint32_t got, bool lenient);
/* Whether a byte can be read, written there, as the kernel's copy or this thread finds it. */
bool can_access(void *at, bool write, bool by_kernel);

/* shadow.c */
void make_patterns(void);
static inline char *page_at(const struct fuzz *f, size_t i)
{
	return f->arena + i * PAGE;
}
bool readable(const struct page *s);
bool writable(const struct page *s);
void fresh(struct fuzz *f, struct range r, int prot, unsigned flags, size_t file_page);
void discard_page(struct page *s);
void fill(struct fuzz *f, size_t i, unsigned pattern);
void verify_page_as(const struct fuzz *f, const struct page *s, const void *at);
void verify(const struct fuzz *f, struct range r);
void rebuild(struct fuzz *f, struct range r);
struct range pick(struct fuzz *f);
/* The first page of the range that is not mapped, or its end. */
size_t first_hole(const struct fuzz *f, struct range r);

/* pages.c, remap.c */
void op_map(struct fuzz *f);
void op_unmap(struct fuzz *f);
void op_protect(struct fuzz *f);
void op_advise(struct fuzz *f, bool discarding);
void op_lock(struct fuzz *f);
void op_process(struct fuzz *f);
void op_fill(struct fuzz *f);
void op_poke(struct fuzz *f);
void op_probe(struct fuzz *f);
void op_remap(struct fuzz *f);

/* heap.c */
void op_allocate(struct fuzz *f);
void op_free(struct fuzz *f);
void op_resize(struct fuzz *f);
void op_rewrite(struct fuzz *f);
void op_heap_advise(struct fuzz *f);
void op_trim(struct fuzz *f);
void verify_heap(const struct fuzz *f);

#endif
