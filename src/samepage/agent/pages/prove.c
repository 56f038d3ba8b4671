/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Proving: before a process gets a segment, it proves that it has a page of it. A process that claims a page names its
 * checksum, which others may know, too. So the service asks for a hash of the page under a key that it has just made
 * up. That hash is keyed BLAKE2b (RFC 7693), which Python has as well; XXH3 is no cryptographic hash.
 */
#include "base/area.h"
#include "base/lock.h"
#include "kernel/headroom.h"
#include "kernel/kernel.h"
#include "pages/pages.h"

#include <string.h>
#include <unistd.h>

#define BLOCK 128 /* bytes */
#define ROUNDS 12

static const uint64_t iv[8] = {
	0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
	0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

static const uint8_t sigma[10][16] = {
	{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
	{11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
	{9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
	{12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
	{6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

static uint64_t rotate(uint64_t x, int by)
{
	return x >> by | x << (64 - by);
}

static inline void mix(uint64_t *a, uint64_t *b, uint64_t *c, uint64_t *d, uint64_t x, uint64_t y)
{
	*a += *b + x;
	*d = rotate(*d ^ *a, 32);
	*c += *d;
	*b = rotate(*b ^ *c, 24);
	*a += *b + y;
	*d = rotate(*d ^ *a, 16);
	*c += *d;
	*b = rotate(*b ^ *c, 63);
}

static void compress(uint64_t h[8], const void *block, uint64_t hashed, bool last)
{
	uint64_t v[16], m[16];

	memcpy(m, block, sizeof(m));
	memcpy(v, h, 8 * sizeof(*h));
	memcpy(v + 8, iv, sizeof(iv));
	v[12] ^= hashed;
	v[14] ^= last ? ~0ULL : 0;
	for (int i = 0; i < ROUNDS; i++) {
		const uint8_t *s = sigma[i % 10];

		for (int k = 0; k < 4; k++)
			mix(&v[k], &v[4 + k], &v[8 + k], &v[12 + k], m[s[2 * k]], m[s[2 * k + 1]]);
		for (int k = 0; k < 4; k++)
			mix(&v[k], &v[4 + (k + 1) % 4], &v[8 + (k + 2) % 4], &v[12 + (k + 3) % 4], m[s[8 + 2 * k]],
			    m[s[9 + 2 * k]]);
	}
	for (int i = 0; i < 8; i++)
		h[i] ^= v[i] ^ v[i + 8];
}

static void keyed_hash(const uint8_t key[SP_KEY_SIZE], const uint8_t *page, uint8_t out[SP_PROOF_SIZE])
{
	uint8_t first[BLOCK] = {0};
	uint64_t h[8];

	memcpy(h, iv, sizeof(h));
	h[0] ^= 0x01010000 ^ SP_KEY_SIZE << 8 ^ SP_PROOF_SIZE;
	memcpy(first, key, SP_KEY_SIZE);
	compress(h, first, BLOCK, false);
	for (size_t at = 0; at < PAGE_SIZE; at += BLOCK)
		compress(h, page + at, 2 * BLOCK + at, at + BLOCK == PAGE_SIZE);
	memcpy(out, h, SP_PROOF_SIZE);
}

/* Copies a page. Whatever became of its mapping, this causes no SIGSEGV or SIGBUS. */
static enum page_status read_page(uintptr_t addr, uint8_t *page)
{
	const struct area *a = area_next(addr);
	bool holds;

	if (!a || a->start > addr || !area_mergeable(a) || page_holds(addr, 1, &holds) || !holds)
		return GONE;
	if (!room_to_merge(PAGE_SIZE)) /* it may be swapped out */
		return NOMEM;
	return pread(kernel.mem, page, PAGE_SIZE, (off_t)addr) == (ssize_t)PAGE_SIZE ? DONE : GONE;
}

void prove(const struct sp_prove *req, const uint64_t *vpns, size_t n, uint8_t *status, uint8_t *proof)
{
	static uint8_t page[PAGE_SIZE_MAX]; /* static, since the agent thread's stack is small */

	for (size_t i = 0; i < n; i++, proof += SP_PROOF_SIZE) {
		agent_mmap_lock();
		status[i] = read_page(vpns[i] << PAGE_SHIFT, page);
		agent_mmap_unlock();
		if (status[i] == DONE)
			keyed_hash(req->key, page, proof);
		else
			memset(proof, 0, SP_PROOF_SIZE);
	}
	memset(page, 0, sizeof(page));
}
