/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files about the agent's thread share. thread.c starts and ends the thread, forked.c sets it up in a forked
 * child, call.c brings it work from the application's threads, peer.c joins the service and runs the loop, who.c
 * watches who the process is, wire.c sends and receives, and serve.c answers requests.
 *
 * Whoever starts or ends the thread holds `life`. The connection, the packets and the calls belong to the thread:
 * nobody else touches them, except for the atomic fields.
 */
#ifndef SAMEPAGE_THREAD_PEER_H
#define SAMEPAGE_THREAD_PEER_H

#include "base/descriptors.h"
#include "base/system.h"
#include "thread/thread.h"

/* ---- thread.c ---- */

enum { IDLE, RUNNING, RETIRED };

extern struct thread {
	_Atomic int state;
	_Atomic uint32_t tid; /* of the living thread; the kernel sets it to 0 when the thread has ended */
	pid_t owner;	   /* the process that this memory belongs to; another in a child by vfork, or by a fork that we
			    * did not see */
	_Atomic bool stop; /* the thread must end */
	_Atomic bool wanted; /* there was something to merge at some time */
	_Atomic int away;    /* not 0: no thread may start (agent_leave()) */
	bool delay;	     /* the thread waits before it joins */
} thread;

/* Held while the thread is started or stopped, with signals blocked. */
extern struct mutex life;

bool thread_is_here(void); /* there is a thread, and it is this process's */
int thread_start(void);	   /* needs `life`; returns 0 or -errno */
void thread_retires(void); /* on the thread: it ends for good */
/* Notes which process this is, and where it may run and take memory from. Call it before the application changes
 * that. */
void thread_note_defaults(void);
void thread_settle(void); /* on the thread: makes it run as the process was started, not as its creator happens to
			   * run */

/* ---- forked.c ---- */

void forked_unseen(void);     /* in a child of a fork that passed no wrapper */
uint32_t ms_since_fork(void); /* UINT32_MAX: there was no fork, or long ago */

/* ---- call.c ---- */

bool calls_open(void); /* on the thread: it takes calls from now on */
bool calls_taken(void);
void calls_close(void);
void calls_forget(void); /* in a forked child */
void thread_wake(void);
/* Waits for `events` of a descriptor (-1: none), for a call, or for the timeout, and takes the call. Returns the events
 * that came. */
short wait_for(int fd, short events, int timeout_ms);

/* ---- peer.c ---- */

extern struct peer {
	char path[108];	 /* as long as in struct sockaddr_un; "": none */
	char domain[32]; /* the merge domain to ask for; "": none */
	int attached;	 /* a socket to serve instead, or -1 */
	int sock;
	_Atomic bool joined;
} peer;

void peer_main(void);	/* what the thread does */
void peer_forget(void); /* the descriptors are not the thread's own: forgets them, closes nothing */

/* ---- who.c ---- */

bool is_same(void); /* on the thread: whether its users and groups still are those of the process's main thread */

/* ---- wire.c ---- */

extern void *const payload, *const answer; /* the payload of the packet received, and of the answer to send */
#define ANSWER_MAX (SP_MSG_MAX - sizeof(struct sp_hdr))

/* Receives one packet; *fd is the descriptor that came with it, or -1. Returns the bytes of payload; -EAGAIN: there is
 * no packet; -EPIPE: the peer is gone or talks nonsense. */
ssize_t receive(struct sp_hdr *head, int *fd);
/* False: the connection is useless, or the thread must end. */
bool transmit(uint32_t op, uint32_t seq, int error, size_t len, int fd);

/* ---- serve.c ---- */

bool serve(void); /* answers one request; false: the connection is useless */

#endif
