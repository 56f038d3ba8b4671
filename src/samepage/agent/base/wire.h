/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's side of the wire. samepage/memory/wire.py is the other side; tests/memory/test_wire.py, which compiles
 * this file, keeps them equal.
 *
 * The socket is AF_UNIX, SOCK_SEQPACKET: one message is one packet, at most SP_MSG_MAX bytes, little-endian (the host's
 * order), and a descriptor rides on the packet it belongs to (SCM_RIGHTS). The agent speaks first (HELLO), the service
 * answers (WELCOME), the agent says what it can do (READY). From then on the service sends requests, several ahead if
 * it likes. The agent answers them in order, each answer with the op and seq of its request. A connection whose first
 * packet starts with '{' is a control connection instead (see service/control.py).
 *
 * Pages are named by virtual page number (vpn): address / page size.
 */
#ifndef SAMEPAGE_BASE_WIRE_H
#define SAMEPAGE_BASE_WIRE_H

#include <stdint.h>

#define SP_MAGIC 0x45504d53u /* "SMPE" */
#define SP_VERSION 9u
#define SP_MSG_MAX (128u << 10)

enum sp_op {
	SP_HELLO = 1,	  /* agent: sp_hello */
	SP_WELCOME = 2,	  /* service: sp_welcome [+ fd of /dev/userfaultfd] */
	SP_READY = 3,	  /* agent: sp_ready */
	SP_AREAS = 4,	  /* -> u64 from_vpn         <- sp_areas, sp_area[n] */
	SP_SCAN = 5,	  /* -> sp_scan              <- sp_scanned, sp_run[nruns], u64 checksum[nhashed] */
	SP_DONATE = 6,	  /* -> sp_area[]            <- sp_done, u8 status[npages] [+ fd of the sealed memfd] */
	SP_MERGE = 7,	  /* -> sp_extent[] [+ fd]   <- sp_done, u8 status[npages] */
	SP_BREAK = 8,	  /* -> sp_area (one)        <- sp_broken */
	SP_MAP_COUNT = 9, /* ->                      <- sp_map_count */
	SP_HEADROOM = 10, /* ->                      <- sp_headroom */
	SP_RESTORE = 11,  /* -> sp_area[]            <- sp_restored */
	SP_PROVE = 12,	  /* -> sp_prove, u64 vpn[]  <- sp_done, u8 status[npages], u8 proof[npages][SP_PROOF_SIZE] */
};

struct sp_hdr {
	uint32_t op;
	uint32_t seq;
	int32_t error; /* answers: 0 or a positive errno (EPROTO: the request made no sense) */
	uint32_t len;  /* bytes after this header */
};

struct sp_hello {
	uint32_t magic;
	uint32_t version;
	uint32_t pid; /* in the agent's own pid namespace; the service believes SO_PEERCRED */
	uint32_t page_size;
	char comm[16];
	char domain[32]; /* the merge domain it asks for ($SAMEPAGE_DOMAIN), ""; the service decides */
};

/* For tests and measurements: do what an older kernel would do. Some flags are for other things. */
enum sp_welcome_flags {
	SP_WELCOME_TRUNCATE_HASH = 1, /* keep 8 bits of every checksum, so that they collide */
	SP_WELCOME_NO_MOVE = 2,	      /* no UFFDIO_MOVE */
	SP_WELCOME_NO_TRACKING = 4,   /* hash everything at every scan */
	SP_WELCOME_TWO_NODES = 8,     /* for tests: pages of odd numbers are on a second NUMA node */
	SP_WELCOME_NO_MAP_QUERY = 16, /* read /proc/self/maps for each mapping */
	SP_WELCOME_LIKE_6_1 = 32,     /* also: no PAGEMAP_SCAN, UFFDIO_WRITEPROTECT takes one mapping */
	SP_WELCOME_LIKE_5_10 = 64,    /* also: no MADV_POPULATE_WRITE; less for mappings of files */
	SP_WELCOME_SWAP_WP = 128,     /* the user chose to swap by write-protection */
	SP_WELCOME_UNPINNED = 256,    /* for tests: as if there were a network file system (reads_unpinned()) */
};

struct sp_welcome {
	uint32_t version;
	uint32_t flags;
	uint64_t reserve;  /* bytes of headroom that a break or a donation leaves untouched; merging leaves half of
			    * them */
	uint32_t section;  /* pages in one critical section */
	uint32_t use_swap; /* count free swap as headroom */
};

/* How pages are swapped under the application's threads. */
enum sp_swap {
	SP_SWAP_NONE = 0,     /* no userfaultfd: nothing can be merged */
	SP_SWAP_MOVE = 1,     /* UFFDIO_MOVE */
	SP_SWAP_WP = 2,	      /* UFFDIO_WRITEPROTECT; only if the user chose it */
	SP_SWAP_QUIET = 3,    /* user-mode-only userfaultfd: only areas that their owner declares quiet */
	SP_SWAP_QUIET_WP = 4, /* no UFFDIO_MOVE: only those areas too, by UFFDIO_WRITEPROTECT */
};

struct sp_ready {
	uint32_t swap;	   /* enum sp_swap */
	uint32_t tracking; /* 1: PAGEMAP_SCAN tells which pages were written; 0: every scan hashes everything */
	uint64_t zero_checksum;
	uint32_t unnamed; /* 1: memory that the program maps itself is mergeable (merge_mapped) */
	uint32_t pad;
};

struct sp_area {
	uint64_t vpn;
	uint64_t npages;
};

struct sp_areas {
	uint64_t seq;
	uint64_t next_vpn;  /* 0, or where the rest of a long list starts */
	uint32_t merge_any; /* PR_SET_MEMORY_MERGE */
	uint32_t pad;
};

#define SP_VPN_END (1ULL << 52) /* after the last possible page; VPN_END in samepage/memory */

enum sp_scan_flags {			/* ScanFlag in samepage/memory */
		     SP_SCAN_ALL = 1,	/* look also at pages that were not written since the last look */
		     SP_SCAN_NODES = 2, /* a page's NUMA node is part of its checksum */
		     SP_SCAN_STILL = 4, /* don't look for broken pages, nor for pages that others wrote */
		     SP_SCAN_NAMED = 8, /* look at memory that was named alone (area_named()) */
};

struct sp_scan {
	uint64_t vpn;
	uint64_t budget; /* the most pages to hash */
	uint64_t end;	 /* stop before this page */
	uint32_t flags;
	uint32_t pad;
};

struct sp_run {
	uint64_t vpn;
	uint32_t npages;
	uint32_t kind; /* RunKind in samepage/memory */
	uint64_t ino;
	uint64_t offset;
};

/* Threads of the application that were held up, counted by how long at most, in microseconds. The last count is of
 * longer waits. STALLS in samepage/memory. */
#define SP_STALLS 8
#define SP_STALLS_US {30, 100, 300, 1000, 3000, 10000, 100000}

struct sp_stalls {
	uint64_t ns; /* the total */
	uint32_t count[SP_STALLS];
};

#define SP_AREAS_CHANGED 0ULL /* the set of areas changed during the scan; no set of areas has this seq */

struct sp_scanned {
	uint64_t next_vpn;
	uint64_t areas_seq; /* or SP_AREAS_CHANGED */
	uint64_t cpu_ns;
	uint32_t nruns;
	uint32_t nhashed;
	uint32_t forked_ms; /* since the last fork, whose child may be about to join; UINT32_MAX: no fork, or long
			     * ago */
	uint32_t pad;
	struct sp_stalls stalls; /* since the last SP_SCAN answer */
};

struct sp_extent {
	uint64_t vpn;
	uint64_t npages;
	uint64_t offset; /* in pages; SP_ZERO_PAGE: the kernel's zero page */
};
#define SP_ZERO_PAGE UINT64_MAX

struct sp_done {
	uint64_t cpu_ns;
	uint64_t npages;
};

#define SP_KEY_SIZE 32
#define SP_PROOF_SIZE 16 /* BLAKE2b of the page under the key; zeros for a page that is not DONE */

struct sp_prove {
	uint8_t key[SP_KEY_SIZE];
};

struct sp_broken {
	uint64_t pages_unmerged;
	uint64_t pages_remaining;
	uint64_t bytes_needed;	  /* for copies of the pages that remain */
	uint64_t bytes_available; /* for copies, without the reserve */
	uint64_t cpu_ns;
	int32_t error;	 /* 0, ENOMEM, EINTR, EFAULT */
	uint32_t unseen; /* 1: bytes_available is 0 because a limit of the process could not be read */
};

/* The pages of the request that were merged and then written. */
struct sp_restored {
	uint64_t pages_restored; /* ordinary anonymous memory again */
	uint64_t pages_left;	 /* somebody holds them, or there is too little memory */
	uint64_t cpu_ns;
};

struct sp_map_count {
	uint64_t used;
	uint64_t limit;
};

struct sp_headroom {
	uint64_t available; /* bytes */
};

#endif
